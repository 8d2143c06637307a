"""How long calls take, and the floors that the machine itself sets.

A time is the median over repetitions, its spread the distance from their 10th to their 90th percentile, both in
microseconds a call. On CUDA the calls are replayed from a graph, so that the host's speed does not count. Pass one
callable for a warm time; for a cold one, pass callables over distinct inputs and outputs that together exceed the L2
cache (`rotations` says how many it takes).
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

Calls = Sequence[Callable[[], object]]

_GRAPH_US = 1000.0
"""A graph lasts at least this long, so that its own launch, some microseconds, does not show."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median, and how far apart the 10th and the 90th percentile are."""

    us: float
    spread_us: float

    def __sub__(self, other: Timing) -> Timing:
        """What is left without a part that was timed alone."""
        return Timing(self.us - other.us, self.spread_us + other.spread_us)

    @staticmethod
    def of(samples_us: Sequence[float]) -> Timing:
        """The timing that these repetitions amount to."""
        if len(samples_us) < 2:
            return Timing(samples_us[0], 0.0)
        deciles = statistics.quantiles(samples_us, n=10, method="inclusive")
        return Timing(statistics.median(samples_us), deciles[-1] - deciles[0])


@dataclass(frozen=True)
class Floors:
    """What the device itself was measured to do."""

    copy_gbps: float
    matmul_tflops: float

    @staticmethod
    def measure(device: torch.device) -> Floors:
        return Floors(copy_gbps(device), matmul_tflops(device))

    def us(self, bytes_moved: float, flops: float = 0.0) -> float:
        """`floor_us` on this device."""
        return floor_us(bytes_moved, flops, copy_gbps=self.copy_gbps, matmul_tflops=self.matmul_tflops)


def floor_us(bytes_moved: float, flops: float = 0.0, *, copy_gbps: float, matmul_tflops: float = float("inf")) -> float:
    """The least time that moving these bytes and doing these operations can take: the larger of the two."""
    return max(bytes_moved / (copy_gbps * 1e3), flops / (matmul_tflops * 1e6))


def rotations(bytes_touched: int, device: torch.device) -> int:
    """How many sets of inputs and outputs, `bytes_touched` each, make every call find a cold L2 cache: three times
    its size, and two sets at the least. On a CPU, whose caches differ, 16 MiB stand for one."""
    cache = 16 << 20
    if device.type == "cuda":
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or cache
    return max(2, -(-3 * cache // max(bytes_touched, 1)))


def call_us(calls: Calls, device: torch.device) -> Timing:
    """`graph_us` on a CUDA device, `eager_us` elsewhere."""
    if device.type != "cuda":
        return eager_us(calls)
    with torch.cuda.device(device):
        return graph_us(calls)


def graph_us(
    calls: Calls,
    *,
    replays: int = 20,
    nodes: int | None = None,
    capture: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Timing:
    """Time calls replayed from one CUDA graph on the current device.

    The graph holds the calls in turn, as often as it takes to last a millisecond and to reach 20 calls, or `nodes`
    calls if given. Every replay is a sample. Calls must not synchronise; what they allocate comes from the graph's
    own memory. Every capture runs within a context of `capture`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    rounds = -(-(nodes or 20) // len(calls))
    with capture():
        graph = _capture(calls, rounds)
    if nodes is None:
        lasts_us = statistics.median(_replay_us(graph, 1, 3))
        if lasts_us < _GRAPH_US:
            rounds *= math.ceil(_GRAPH_US / lasts_us)
            with capture():
                graph = _capture(calls, rounds)
    return Timing.of(_replay_us(graph, rounds * len(calls), replays))


def eager_us(calls: Calls, *, repetitions: int = 15, budget_s: float = 0.3) -> Timing:
    """Time calls that have returned when they are done, as on a CPU: each call, in turn, is a sample.

    At least `repetitions` samples after one warm-up call, then more until the budget is spent or there are ten times
    as many.
    """
    calls[0]()
    samples: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(samples) < repetitions or (len(samples) < 10 * repetitions and time.perf_counter() < deadline):
        call = calls[len(samples) % len(calls)]
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) / 1e3)
    return Timing.of(samples)


def copy_gbps(device: torch.device | str) -> float:
    """Measured bandwidth of a large copy, bytes read plus bytes written: of 1 GiB on a GPU, 256 MiB on a CPU."""
    device = torch.device(device)
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / (_queued_us(lambda: target.copy_(source), device) * 1e3)


def matmul_tflops(device: torch.device | str) -> float:
    """Measured rate of a square bfloat16 matrix product of random numbers: size 8192 on a GPU, 1024 on a CPU."""
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    return 2 * size**3 / (_queued_us(lambda: torch.mm(a, b, out=c), device) * 1e6)


def _queued_us(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call that lasts far longer than its launch. Not from a graph: there, copy engines do the copies,
    and they are slower than the multiprocessors."""
    if device.type != "cuda":
        return eager_us([call], repetitions=5).us
    with torch.cuda.device(device):
        return statistics.median(_event_us(call, repetitions=15, warmup=5))


def _capture(calls: Calls, rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as NCCL's, may use CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, calls: int, replays: int) -> list[float]:
    """Microseconds a call of each replay."""
    return [us / calls for us in _event_us(graph.replay, repetitions=replays, warmup=5)]


def _event_us(call: Callable[[], object], *, repetitions: int, warmup: int) -> list[float]:
    """Microseconds between events around each call. Untimed calls in front keep the device busy while the host queues
    the rest."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    for _ in range(warmup):
        call()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]
