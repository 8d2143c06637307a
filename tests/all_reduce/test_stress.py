"""A hundred thousand calls of both collectives from CUDA graphs, with other inputs at every replay."""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor

from abiding import Communicator
from abiding.testing.ranks import captured_on_each, on_each, virtual_ranks
from benchmarks.stress import Stress, plan


def run_call(stresses: list[Stress], index: int, rank: int, comm: Communicator) -> dict[int, Tensor]:
    return stresses[rank].run(comm, [index])


def record_golden(stresses: list[Stress], comms: list[Communicator]) -> None:
    """Record the golden results of all variants.

    Call by call: an allocation may synchronize the device, which would deadlock if a later call of another rank waited.
    """
    for variant in range(stresses[0].variants):
        for stress in stresses:
            stress.load(variant)
        for index in range(len(stresses[0].calls)):
            returned = on_each(comms, partial(run_call, stresses, index))
            for stress, one in zip(stresses, returned, strict=True):
                stress.collect(one)
        for stress, comm in zip(stresses, comms, strict=True):
            comm.check()
            stress.record_golden(variant)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_calls_without_a_pause(ranks: int) -> None:
    cpu = torch.device("cpu")
    stresses = [Stress(rank, ranks, cpu, calls=80, seed=ranks, largest=5120) for rank in range(ranks)]
    with virtual_ranks(ranks) as comms:
        record_golden(stresses, comms)
        for number in range(6):
            variant = number % 3
            for stress in stresses:
                stress.load(variant)
            returned = on_each(comms, lambda rank, comm: stresses[rank].run(comm))
            for stress, comm, theirs in zip(stresses, comms, returned, strict=True):
                comm.check()
                stress.collect(theirs)
                stress.check(variant, f"run {number}")


def check_replays(ranks: int, calls: int, replays: int, cuda: torch.device) -> None:
    """A graph of `calls` calls per rank, each replayed on a stream of its own, with other inputs every time."""
    stresses = [Stress(rank, ranks, cuda, calls=calls, seed=ranks) for rank in range(ranks)]
    with virtual_ranks(ranks, cuda) as comms:
        record_golden(stresses, comms)
        replay_all, returned = captured_on_each(comms, lambda rank, comm: stresses[rank].run(comm))
        for replay in range(replays):
            variant = replay % 3
            for stress in stresses:
                stress.load(variant)
            replay_all()
            for stress, comm, theirs in zip(stresses, comms, returned, strict=True):
                comm.check()
                stress.collect(theirs)
                stress.check(variant, f"replay {replay}, rank {comm.rank}")


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4])
def test_calls_from_graphs(ranks: int, cuda: torch.device) -> None:
    """Graphs as short as compute-sanitizer takes, whose streams hold few unfinished launches."""
    check_replays(ranks, 8, 6, cuda)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_hundred_thousand_calls_from_graphs(ranks: int, cuda: torch.device) -> None:
    check_replays(ranks, 128, 800, cuda)


# --- the stress test itself -------------------------------------------------------------------------------------------


def test_the_plan_has_every_kind_of_call_and_is_the_same_on_all_ranks() -> None:
    calls = plan(128, seed=1)
    assert calls == plan(128, seed=1) != plan(128, seed=2)
    assert {call.kind for call in calls} == {"new", "out", "in_place", "qk_norm", "rms_norm"}
    assert {call.dtype for call in calls} == {torch.float32, torch.float16, torch.bfloat16}
    assert any(call.offset for call in calls)
    assert max(call.shape[0] for call in plan(128, seed=1, largest=1000)) == 1000


def test_one_wrong_bit_is_detected_and_its_call_named() -> None:
    stress = Stress(0, 1, torch.device("cpu"), calls=30, variants=1, largest=1000)
    with virtual_ranks(1) as comms:
        record_golden([stress], comms)
        stress.load(0)
        stress.collect(stress.run(comms[0]))
        stress.check(0)
        memory = stress._results.memory
        for byte in random.Random(0).sample(range(len(memory)), 50):
            memory[byte] ^= 4
            inside = not bool(stress._results._gaps[byte])
            with pytest.raises(AssertionError, match=r"call \d+, Call\(" if inside else "1 bytes between the results"):
                stress.check(0)
            memory[byte] ^= 4
        stress.load(0)
        with pytest.raises(AssertionError, match=r"call \d+, Call\("):
            stress.check(0)
