"""The checks between the ranks: correct values, many back-to-back calls, and the death of a rank.

The functions that take a rank run in every process; the parent passes them a `RunConfig`.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import reduce_rms
from abiding.communicator import DTYPES, Communicator
from abiding.testing.cases import all_reduce as all_reduce_cases
from abiding.testing.cases import reduce_rms as reduce_rms_cases
from abiding.testing.cases.all_reduce import AllReduceCase, AllReduceInputs
from abiding.testing.cases.reduce_rms import RmsCase
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from benchmarks.stress import Stress

GRACE_S = 10.0
"""How much longer than the timeout a rank may take to report that another is gone."""
ALIVE_S = 0.5  # how long the victim of `killed` takes part in the calls

_BYTES = (
    *(0, 4, 16, 100, 4096, 4100, 64 << 10, 128 << 10, (128 << 10) + 4, 256 << 10, (256 << 10) + 4),
    *(1 << 20, (1 << 20) + 12, 2 << 20, (2 << 20) + 4, 8 << 20, (8 << 20) + 4, 64 << 20),
)


@dataclass(frozen=True)
class RunConfig:
    """How the processes of the ranks run."""

    device: str
    """"cpu" or "cuda"."""
    shared_gpu: bool = False
    """All ranks on GPU 0, which time-slices between their processes."""
    calls: int = 100_000
    """Calls of the stress test."""
    quick: bool = False
    """Few and small messages: a rehearsal."""
    timeout_s: float = 20.0
    """Timeout of the communicators."""
    peer: str | None = None
    """Path of a library with vLLM's kernels."""
    sglang: str | None = None
    """Path of a folder with SGLang's package and its imports."""

    @property
    def backend(self) -> str:
        """Backend of the group beside the communicator: NCCL refuses two ranks on one GPU."""
        return "nccl" if self.device == "cuda" and not self.shared_gpu else "gloo"

    @property
    def max_bytes(self) -> int:
        return (64 << 10) if self.quick else (8 << 20)


@contextmanager
def rank_context(
    rank: int, config: RunConfig, *, nccl: bool = True
) -> Iterator[tuple[torch.device, dist.ProcessGroup | None]]:
    """Make this rank's device current; yields it and the group to which its messages may fall back."""
    if config.device == "cpu":
        yield torch.device("cpu"), None
        return
    device = torch.device("cuda", 0 if config.shared_gpu else rank)
    torch.cuda.set_device(device)
    yield device, dist.new_group(backend="nccl") if nccl and config.backend == "nccl" else None
    torch.cuda.synchronize(device)


def require_peer_memory(comm: Communicator) -> None:
    if comm.unavailable_reason is not None:
        raise AssertionError(f"no peer memory, so abiding's kernels cannot run: {comm.unavailable_reason}")


# --- values -----------------------------------------------------------------------------------------------------------


def correctness(rank: int, config: RunConfig) -> int:
    """Check both collectives against the reference and rank 0's bits; returns how many calls were checked."""
    checked = 0
    with (
        rank_context(rank, config) as (device, group),
        Communicator(group, device=device, max_bytes=config.max_bytes, timeout_s=config.timeout_s) as comm,
    ):
        require_peer_memory(comm)
        for seed, case in enumerate(_messages(config)):
            inputs = case.make(comm.ranks, device, seed)
            _sum_and_check(comm, inputs)
            checked += 1
        for seed, rows in enumerate(_rows(comm.ranks, config)):
            one = rows.make(comm.ranks, device, seed)[rank]
            for out, expected in zip(one.run(reduce_rms, comm), one.expected(), strict=True):
                assert_close(out, expected, ulps=reduce_rms_cases.ULPS[rows.dtype], name=f"rank {rank}: {rows}")
            checked += 1
        if device.type == "cuda":
            for count in (500, 50_001, 500_000) if config.quick else (500, 50_001, 500_000, 4 << 20):
                checked += _replayed(comm, AllReduceCase((count,)))
        comm.check()
    return checked


def _messages(config: RunConfig) -> Iterator[AllReduceCase]:
    for number, (nbytes, dtype) in enumerate(itertools.product(_BYTES, DTYPES)):
        if not config.quick or nbytes <= 2 * config.max_bytes:
            count = nbytes // dtype.itemsize
            yield AllReduceCase((count,), dtype, in_place=number % 4 == 3, offset=number % 3, out_offset=number % 2)
    yield from (case for case in all_reduce_cases.ODD if not config.quick or case.bytes <= config.max_bytes)


def _rows(ranks: int, config: RunConfig) -> Iterator[RmsCase]:
    for tokens, dtype in itertools.product((1, 16) if config.quick else (1, 16, 130, 1024), DTYPES):
        yield RmsCase.minimax_m2(tokens, ranks, dtype)
    yield from (case for case in reduce_rms_cases.ODD if not config.quick or case.tokens <= 16)


def _sum_and_check(comm: Communicator, inputs: AllReduceInputs) -> None:
    case, x, out = inputs.case, inputs.messages[comm.rank].tensor, inputs.outs[comm.rank].tensor
    name = f"rank {comm.rank}: {case}"
    route = comm.explain(x)
    if (route.backend == "abiding") != (case.bytes <= comm.max_bytes):
        raise AssertionError(f"{name}: served by {route.backend}, as {route.reason}")
    # torch.distributed does not specify the order of its sum, so its result is only within rounding errors.
    total = torch.zeros_like(x, dtype=torch.float64)
    for message in inputs.messages:
        total += message.tensor
    magnitude = sum(float(message.tensor.abs().max()) for message in inputs.messages) if case.bytes else 0.0
    comm.all_reduce(x, out)
    if route.backend == "abiding":
        assert_bitwise_equal(out, inputs.expected, name)
    else:
        assert_close(out, total, atol=comm.ranks * torch.finfo(case.dtype).eps * magnitude, name=name)
    inputs.messages[comm.rank].check()
    inputs.outs[comm.rank].check()
    _same_on_all(out, name)


def _same_on_all(out: Tensor, name: str) -> None:
    """Compare the result bit for bit with rank 0's, which is broadcast over gloo."""
    if out.numel() == 0:
        return
    mine = out.cpu().reshape(-1).view(torch.uint8)
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert_bitwise_equal(mine, theirs, f"{name}, against rank 0")


def _replayed(comm: Communicator, case: AllReduceCase) -> int:
    static = case.make(comm.ranks, comm.device)
    x, out = static.messages[comm.rank].tensor, static.outs[comm.rank].tensor
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        comm.all_reduce(x, out)
        twice = comm.all_reduce(out)
    for seed in range(1, 4):
        fresh = case.make(comm.ranks, comm.device, seed)
        x.copy_(fresh.messages[comm.rank].tensor)
        graph.replay()
        comm.check()
        assert_bitwise_equal(out, fresh.expected, f"rank {comm.rank}: {case}, replay {seed}")
        _same_on_all(twice, f"rank {comm.rank}: {case}, replay {seed}, second call")
    return 6


# --- many calls -------------------------------------------------------------------------------------------------------


def stress(rank: int, config: RunConfig) -> tuple[int, float]:
    """Back-to-back calls, on a GPU from a graph; returns their number, and microseconds per call with its check."""
    calls_per_run = 50 if config.quick else 128
    runs = -(-config.calls // calls_per_run)
    with (
        rank_context(rank, config, nccl=False) as (device, group),
        Communicator(group, device=device, timeout_s=config.timeout_s) as comm,
    ):
        require_peer_memory(comm)
        largest = 5120 if config.quick else 300_001
        one = Stress(rank, comm.ranks, device, calls=calls_per_run, seed=comm.ranks, largest=largest)
        for variant in range(one.variants):
            one.load(variant)
            one.collect(one.run(comm))
            comm.check()
            one.record_golden(variant)
        graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
        if graph is not None:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                returned = one.run(comm)
        begin = time.monotonic()
        for run in range(runs):
            one.load(run % one.variants)
            if graph is None:
                returned = one.run(comm)
            else:
                graph.replay()
            comm.check()
            one.collect(returned)
            one.check(run % one.variants, f"rank {rank}, run {run}")
            if rank == 0 and run % max(1, runs // 5) == 0:
                print(f"  {run * calls_per_run} of {runs * calls_per_run} calls", file=sys.stderr, flush=True)
        calls = runs * calls_per_run
        return calls, (time.monotonic() - begin) * 1e6 / calls


# --- a death ----------------------------------------------------------------------------------------------------------


def killed(rank: int, config: RunConfig, victim: int, timeout_s: float) -> float:
    """A rank is killed in the middle of its calls; returns after how many seconds this rank raised an error."""
    with rank_context(rank, config, nccl=False) as (device, group):
        comm = Communicator(group, device=device, timeout_s=timeout_s)
        require_peer_memory(comm)
        x = torch.ones(50_000, device=device)
        comm.all_reduce(x)
        comm.check()
        dist.barrier()
        end = time.monotonic() + ALIVE_S
        if rank == victim:
            threading.Timer(ALIVE_S, os.kill, (os.getpid(), signal.SIGKILL)).start()
        try:
            while time.monotonic() < end + timeout_s + GRACE_S:
                for _ in range(20):
                    comm.all_reduce(x)
                comm.check()
        except RuntimeError as error:
            detected_s, text = time.monotonic() - end, str(error)
        else:
            raise AssertionError(f"rank {rank}: no error {timeout_s + GRACE_S:g} s after a rank was killed")
        _require(f"rank {victim} " in text, f"rank {rank}: the error does not name rank {victim}: {text}")
        _require(detected_s < timeout_s + GRACE_S, f"rank {rank}: the error took {detected_s:.1f} s")
        try:
            comm.reset()
        except RuntimeError as error:
            _require(f"rank {victim} is" in str(error), f"rank {rank}: reset() does not name rank {victim}: {error}")
        else:
            raise AssertionError(f"rank {rank}: reset() without rank {victim} raised nothing")
        comm.close()
        return detected_s


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
