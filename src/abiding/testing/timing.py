"""Timing of calls, and the roofline of the device.

A time is the median over repetitions, its spread the distance from their 10th to their 90th percentile, both in
microseconds per call. On CUDA the calls are replayed from a graph, which takes the host's speed out of the time. One
callable gives an L2-warm time; an L2-cold time takes callables over distinct inputs and outputs that together exceed
the L2 cache (`rotations` returns how many).
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
"""A graph lasts at least this long, so that its launch of a few microseconds is negligible."""


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: the median, and the distance from the 10th to the 90th percentile."""

    us: float
    spread_us: float

    def __sub__(self, other: Timing) -> Timing:
        """The time without a part that was timed alone."""
        return Timing(self.us - other.us, self.spread_us + other.spread_us)

    @staticmethod
    def of(samples_us: Sequence[float]) -> Timing:
        """The timing of these repetitions."""
        if len(samples_us) < 2:
            return Timing(samples_us[0], 0.0)
        deciles = statistics.quantiles(samples_us, n=10, method="inclusive")
        return Timing(statistics.median(samples_us), deciles[-1] - deciles[0])


@dataclass(frozen=True)
class Roofline:
    """A device's roofline, measured: the bandwidth of a large copy and the rate of a large bfloat16 GEMM."""

    copy_gbps: float
    matmul_tflops: float = math.inf

    @staticmethod
    def measure(device: torch.device) -> Roofline:
        return Roofline(copy_gbps(device), matmul_tflops(device))

    def bound_us(self, bytes_moved: float, flops: float = 0.0) -> float:
        """The roofline bound, max(bytes / bandwidth, FLOP / rate), in microseconds."""
        return max(bytes_moved / (self.copy_gbps * 1e3), flops / (self.matmul_tflops * 1e6))


def rotations(bytes_touched: int, device: torch.device) -> int:
    """How many sets of inputs and outputs of `bytes_touched` each make every call L2-cold: together three times the
    size of the L2 cache, and at least two sets. On a CPU 16 MiB stand in for the cache size."""
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

    The graph repeats the calls in turn until it lasts a millisecond and holds 20 calls, or `nodes` calls if given.
    Every replay is a sample. Calls must not synchronize; their allocations come from the graph's memory pool. Every
    capture runs within a context of `capture`.
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
    """Time synchronous calls, as on a CPU: each call, in turn, is a sample.

    After one warm-up call it takes at least `repetitions` samples, then more until the budget is spent or there are ten
    times as many.
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
    """Measured bandwidth of a large copy, bytes read plus bytes written: 1 GiB on a GPU, 256 MiB on a CPU."""
    device = torch.device(device)
    size = 1 << (30 if device.type == "cuda" else 28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / (_queued_us(lambda: target.copy_(source), device) * 1e3)


def matmul_tflops(device: torch.device | str) -> float:
    """Measured rate of a square bfloat16 GEMM on random numbers: size 8192 on a GPU, 1024 on a CPU."""
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    return 2 * size**3 / (_queued_us(lambda: torch.mm(a, b, out=c), device) * 1e6)


def _queued_us(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call that lasts far longer than its launch. Not from a graph, where copies run on the copy
    engines: those are slower than the SMs."""
    if device.type != "cuda":
        return eager_us([call], repetitions=5).us
    with torch.cuda.device(device):
        return statistics.median(_event_us(call, repetitions=15, warmup=5))


def _capture(calls: Calls, rounds: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads, such as NCCL's, may call CUDA during the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(rounds):
            for call in calls:
                call()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph, calls: int, replays: int) -> list[float]:
    """Microseconds per call, of each replay."""
    return [us / calls for us in _event_us(graph.replay, repetitions=replays, warmup=5)]


def _event_us(call: Callable[[], object], *, repetitions: int, warmup: int) -> list[float]:
    """Microseconds between events around each call. The untimed warm-up calls keep the device busy while the host
    queues the rest."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    for _ in range(warmup):
        call()
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]
