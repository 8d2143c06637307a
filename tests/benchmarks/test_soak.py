"""The soak for half a minute, and that it would notice: wrong outcomes, leaks, and what was not asked for."""

from __future__ import annotations

import pytest
import torch

from abiding.testing.ranks import RanksFailedError, run_processes
from benchmarks import soak
from benchmarks.soak import EVENTS, Round
from benchmarks.stress import Stress

REASON = "abiding::all_reduce: this communicator has stopped: rank 1 has closed (found by rank 0 in all_reduce, ...)"


def test_half_a_minute() -> None:
    counts = soak.soak(25.0, 4, seed=1, device="cpu")
    assert sum(counts.values()) >= 6, counts


def test_rounds_follow_from_the_seed_and_all_events_occur() -> None:
    rounds = [Round.of(seed, 4) for seed in range(100)]
    assert rounds == [Round.of(seed, 4) for seed in range(100)]
    assert {one.event for one in rounds} == set(EVENTS)
    assert {one.victim for one in rounds} == set(range(4))


@pytest.mark.parametrize(
    ("event", "rank", "outcome", "seconds"),
    [
        ("nothing", 0, REASON, 1.0),
        ("forks", 0, "an error", 1.0),
        ("closes", 0, REASON.replace("rank 1 has", "rank 2 has"), 1.0),
        ("closes", 1, "right", 1.0),
        ("killed", 0, "Connection reset by peer", 1.0),
        ("raises", 1, "right", 1.0),
        ("interrupted", 1, "right", 1.0),
        ("late", 0, REASON, 100.0),
    ],
)
def test_a_wrong_outcome_is_noticed(event: str, rank: int, outcome: str, seconds: float) -> None:
    one = Round(5, event, victim=1, at=3)
    soak._judge(one, 0, REASON if event not in ("nothing", "forks") else "right", 1.0)
    with pytest.raises(AssertionError, match=rf"seed 5: {event}, rank 1, before call 3: rank {rank} ended after"):
        soak._judge(one, rank, outcome, seconds)


def leaks(rank: int) -> None:
    record_golden = Stress.record_golden

    def leaking(stress: Stress, variant: int) -> None:
        record_golden(stress, variant)
        torch.ops.abiding_custom_ar.allocate_shared_memory_and_handle(64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stress, "record_golden", leaking)
        soak.play(rank, 2, Round(3, "nothing", 0, 0), "cpu")


def test_a_leak_is_noticed() -> None:
    with pytest.raises(RanksFailedError, match=r"rank 0: held .*'mappings': 0, 'descriptors': 0.*'mappings': 1"):
        run_processes(leaks, 2)
