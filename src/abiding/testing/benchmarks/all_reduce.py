"""Times of the all-reduce: virtual ranks on one GPU beside vLLM's kernel, and CPU processes beside gloo.

On a GPU all ranks' messages stay in its L2 cache from call to call, as they do for the peer. What lies between several
GPUs is not in these times.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abiding.communicator import Communicator
from abiding.testing.benchmarks.base import Benchmark, Settings, say
from abiding.testing.cases.all_reduce import PERFORMANCE, AllReduceCase
from abiding.testing.comparison import max_ulps
from abiding.testing.ranks import (
    prepare_for_virtual_ranks,
    processes_us,
    run_processes,
    virtual_ranks,
    virtual_ranks_us,
)
from abiding.testing.results import CaseResult, Param
from abiding.testing.timing import Timing

GPU_RANKS = (2, 4, 8)
CPU_RANKS = (2, 4)
PEER_RANKS = 4
"""Of more, not all blocks of the peer's kernel are resident on one GPU: it would spin for ever."""


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time every size for every number of ranks."""
    cases = [case for case in PERFORMANCE if not settings.quick or case.bytes in (16, 4096, 65536, 1 << 20)]
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
    """A share of the peer's time in the same run: on a GPU of vLLM's, by size; on a CPU of gloo's, to 64 KiB."""
    size = int(case.params["bytes"])
    if case.op == "all_reduce_cpu":
        return case.peers["gloo"] / 3 if size <= 64 << 10 else None
    share = next((share for limit, share in _SHARES.items() if size <= limit), None)
    return None if share is None or "vllm" not in case.peers else share * case.peers["vllm"]


_SHARES = {64 << 10: 0.40, 256 << 10: 0.45, 1 << 20: 0.75, 4 << 20: 0.95}


def row(case: CaseResult) -> str:
    """The number of ranks."""
    where = "CPU processes" if case.op == "all_reduce_cpu" else "virtual ranks"
    return f"{case.params['ranks']} {where}"


BENCHMARK = Benchmark(
    "all_reduce",
    ("all_reduce", "all_reduce_cpu"),
    "bytes",
    measure,
    row,
    target_us,
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
    """Samples of ours and of gloo, for every size."""
    found = []
    with Communicator(device="cpu", timeout_s=60.0) as comm:
        for size in sizes:
            x = torch.randn(size).bfloat16()
            ours = processes_us(partial(comm.all_reduce, x, torch.empty_like(x)))
            found.append((ours, processes_us(partial(dist.all_reduce, x.clone()))))
    return found


class _Peer:
    """vLLM's kernel in this process, with every message in the memory that it calls a registered buffer."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library.resolve()))
        self._ops: Any = torch.ops._C_custom_ar

    def time(self, messages: Sequence[Tensor], expected: Tensor) -> Timing:
        ops, ranks, most = self._ops, len(messages), 8 << 20
        with ExitStack() as stack:

            def shared(size: int) -> int:
                address: int = ops.allocate_shared_buffer_and_handle(size)[0]
                stack.callback(ops.free_shared_buffer, address)
                return address

            signals, buffers = ([shared(size) for _ in messages] for size in (ops.meta_size() + most, most))
            arenas = [torch.empty(most, dtype=torch.uint8, device=message.device) for message in messages]
            handles = [ops.init_custom_ar(signals, arena, rank, True) for rank, arena in enumerate(arenas)]
            for handle in handles:
                stack.callback(ops.dispose, handle)
                ops.register_buffer(handle, buffers)
            registered = [at_address(address, message) for address, message in zip(buffers, messages, strict=True)]
            outs = [torch.empty_like(message) for message in messages]
            calls = [partial(ops.all_reduce, *each, 0, 0) for each in zip(handles, registered, outs, strict=True)]
            timing = virtual_ranks_us(ranks, lambda rank: calls[rank]())
            said = f"{ranks} ranks, {expected.nbytes} bytes: the peer differs by {max_ulps(outs[0], expected)} ulps"
            say(said)
            torch.cuda.synchronize()
            return timing


def at_address(address: int, like: Tensor) -> Tensor:
    """A copy of a tensor at an address of the GPU's memory."""

    memory = SimpleNamespace(
        __cuda_array_interface__={"shape": (like.nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
    )
    made: Tensor = torch.as_tensor(memory, device=like.device).view(like.dtype).view(like.shape)
    return made.copy_(like)
