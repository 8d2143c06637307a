"""Timing: medians, spreads, roofline bounds, rotation; on a GPU, graph replay agrees with a plain measurement."""

from __future__ import annotations

import time

import pytest
import torch

from abiding.testing import Roofline, Timing, call_us, copy_gbps, eager_us, graph_us, matmul_tflops, rotations


def test_a_timing_is_the_median_and_the_distance_between_deciles() -> None:
    timing = Timing.of([float(n) for n in range(101)])
    assert (timing.us, timing.spread_us) == (50.0, 80.0)
    assert Timing.of([3.0]) == Timing(3.0, 0.0)


def test_eager_calls_take_turns_and_are_timed_one_by_one() -> None:
    seen: list[int] = []

    def call(which: int, seconds: float) -> None:
        seen.append(which)
        time.sleep(seconds)

    timing = eager_us([lambda: call(0, 0.002), lambda: call(1, 0.002), lambda: call(2, 0.002)], budget_s=0.0)
    assert seen == [0, *(n % 3 for n in range(15))]
    assert 2000 <= timing.us < 20000


def test_eager_repeats_quick_calls_until_the_budget_is_spent() -> None:
    calls: list[None] = []
    eager_us([lambda: calls.append(None)], repetitions=4, budget_s=10.0)
    assert len(calls) == 1 + 40


def test_the_roofline_bound_is_the_larger_of_both() -> None:
    assert Roofline(3000.0).bound_us(3_000_000) == pytest.approx(1.0)
    assert Roofline(3000.0, 800.0).bound_us(3_000_000, 8e9) == pytest.approx(10.0)
    assert Roofline(3000.0, 800.0).bound_us(3_000_000, 8e8) == pytest.approx(1.0)


def test_rotation_exceeds_the_cache_threefold() -> None:
    cpu = torch.device("cpu")
    assert rotations(1 << 20, cpu) == 48
    assert rotations(1 << 40, cpu) == 2
    assert rotations(0, cpu) > 1


def test_the_roofline_of_a_cpu_is_plausible() -> None:
    assert 0.1 < copy_gbps("cpu") < 10_000
    assert 0 < matmul_tflops("cpu") < 1000


@pytest.mark.gpu
def test_a_graph_runs_every_call_in_turn(cuda: torch.device) -> None:
    counts = torch.zeros(7, dtype=torch.int64, device=cuda)
    timing = graph_us([lambda i=i: counts[i].add_(1) for i in range(7)])  # type: ignore[misc]
    found = counts.tolist()
    assert timing.us > 0
    assert timing.spread_us >= 0
    assert max(found[3:]) == min(found[3:]) == found[0] - 1  # the first three also warmed up, once


@pytest.mark.gpu
def test_graph_time_agrees_with_the_bandwidth_of_a_copy(cuda: torch.device) -> None:
    source = torch.zeros(1 << 28, dtype=torch.uint8, device=cuda)
    target = torch.empty_like(source)
    us = call_us([lambda: target.copy_(source)], cuda).us
    assert us == pytest.approx(Roofline(copy_gbps(cuda)).bound_us(2 << 28), rel=0.15)


@pytest.mark.gpu
def test_calls_that_allocate_can_be_timed(cuda: torch.device) -> None:
    x = torch.ones(1000, device=cuda)
    kept: list[torch.Tensor] = []

    def call() -> None:
        kept.clear()
        kept.append(x + 1)

    assert graph_us([call]).us < 1000
