"""Benchmark of the all-reduce: virtual ranks on one GPU against vLLM's kernel, and CPU processes against gloo.

Messages are L2-warm, for the peer too. The times of virtual ranks do not include NVLink; for that see
:mod:`benchmarks.multi_gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abiding.communicator import Communicator
from abiding.testing.cases.all_reduce import PERFORMANCE, AllReduceCase
from abiding.testing.comparison import max_ulps
from abiding.testing.ranks import (
    prepare_for_virtual_ranks,
    processes_us,
    run_processes,
    virtual_ranks,
    virtual_ranks_us,
)
from abiding.testing.timing import Timing
from benchmarks.base import Benchmark, Settings, kind_of_ranks, say
from benchmarks.peers.vllm import copy_to_address
from benchmarks.result_file import CaseResult, Param

GPU_RANKS = (2, 4, 8)
CPU_RANKS = (2, 4)
PEER_RANKS = 4
"""With more virtual ranks the CTAs of the peer's kernels are not all co-resident on one GPU, and the peer hangs."""


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time every message size for every number of ranks."""
    cases = [case for case in PERFORMANCE if not settings.quick or case.bytes in (16, 4096, 65536, 1 << 20)]
    cases = [case for case in cases if settings.takes(case.bytes)]
    if "all_reduce" in settings.ops and settings.device.type == "cuda":
        peer = _Peer(settings.peer) if settings.peer else None
        for ranks in GPU_RANKS:
            for case in cases:
                yield _on_gpu(case, ranks, peer if ranks <= PEER_RANKS else None, settings)
    if "all_reduce_cpu" in settings.ops:
        for ranks in CPU_RANKS:
            everyone = run_processes(_in_process, ranks, [case.shape[0] for case in cases], timeout_s=300)
            for case, (ours, theirs) in zip(cases, everyone[0], strict=True):
                yield _result("all_reduce_cpu", case, ranks, Timing.of(ours), {"gloo": Timing.of(theirs)}, 0.0)


def target_us(case: CaseResult) -> float | None:
    """A fraction of the peer's time in the same run: on a GPU of vLLM's, by size; on a CPU of gloo's, up to 64 KiB."""
    size = int(case.params["bytes"])
    if case.op == "all_reduce_cpu":
        return case.peers["gloo"] / 3 if size <= 64 << 10 else None
    fraction = next((fraction for limit, fraction in _TARGET_FRACTIONS.items() if size <= limit), None)
    return None if fraction is None or "vllm" not in case.peers else fraction * case.peers["vllm"]


_TARGET_FRACTIONS = {64 << 10: 0.40, 256 << 10: 0.45, 1 << 20: 0.75, 4 << 20: 0.95}


BENCHMARK = Benchmark(
    group="all_reduce",
    ops=("all_reduce", "all_reduce_cpu"),
    axis="bytes",
    measure=measure,
    row=kind_of_ranks,
    target_us=target_us,
    overlaid=True,
    prepare=prepare_for_virtual_ranks,
)


def _on_gpu(case: AllReduceCase, ranks: int, peer: _Peer | None, settings: Settings) -> CaseResult:
    inputs = case.make(ranks, settings.device)
    messages, outs = ([guard.tensor for guard in guards] for guards in (inputs.messages, inputs.outs))
    with virtual_ranks(ranks, settings.device) as comms, torch.cuda.device(settings.device):
        ours = virtual_ranks_us(ranks, lambda rank: comms[rank].all_reduce(messages[rank], outs[rank]))
        for comm in comms:
            comm.check()
    peers = {} if peer is None else {"vllm": peer.time(messages, inputs.expected)}
    bound_us = settings.roofline.bound_us(2 * ranks * case.bytes)
    return _result("all_reduce", case, ranks, ours, peers, bound_us)


def _result(
    op: str, case: AllReduceCase, ranks: int, ours: Timing, peers: dict[str, Timing], bound_us: float
) -> CaseResult:
    params: dict[str, Param] = {"bytes": case.bytes, "ranks": ranks, "dtype": str(case.dtype).removeprefix("torch.")}
    return CaseResult.of(op, params, ours, peers, l2_warm=True, bound_us=bound_us)


def _in_process(rank: int, sizes: Sequence[int]) -> list[tuple[list[float], list[float]]]:
    """For every size, the samples of Abiding and of gloo."""
    samples = []
    with Communicator(device="cpu", timeout_s=60.0) as comm:
        for size in sizes:
            x = torch.randn(size).bfloat16()
            ours = processes_us(partial(comm.all_reduce, x, torch.empty_like(x)))
            samples.append((ours, processes_us(partial(dist.all_reduce, x.clone()))))
    return samples


class _Peer:
    """vLLM's kernel between virtual ranks, with every message in a registered buffer: its fastest case."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library.resolve()))
        self._ops: Any = torch.ops._C_custom_ar

    def time(self, messages: Sequence[Tensor], expected: Tensor) -> Timing:
        ops, ranks, max_bytes = self._ops, len(messages), 8 << 20
        with ExitStack() as stack:

            def shared(size: int) -> int:
                address: int = ops.allocate_shared_buffer_and_handle(size)[0]
                stack.callback(ops.free_shared_buffer, address)
                return address

            signals, buffers = ([shared(size) for _ in messages] for size in (ops.meta_size() + max_bytes, max_bytes))
            arenas = [torch.empty(max_bytes, dtype=torch.uint8, device=message.device) for message in messages]
            handles = [ops.init_custom_ar(signals, arena, rank, True) for rank, arena in enumerate(arenas)]
            for handle in handles:
                stack.callback(ops.dispose, handle)
                ops.register_buffer(handle, buffers)
            registered = [copy_to_address(address, message) for address, message in zip(buffers, messages, strict=True)]
            outs = [torch.empty_like(message) for message in messages]
            calls = [partial(ops.all_reduce, *each, 0, 0) for each in zip(handles, registered, outs, strict=True)]
            timing = virtual_ranks_us(ranks, lambda rank: calls[rank]())
            say(f"{ranks} ranks, {expected.nbytes} bytes: the peer differs by {max_ulps(outs[0], expected)} ulps")
            torch.cuda.synchronize()
            return timing
