"""Times of the reduce-RMS of MiniMax M2 (6144 columns of Q, 1024 of K over all ranks): virtual ranks on one GPU beside
vLLM's kernel, and CPU processes beside plain PyTorch with gloo. Inputs stay in the L2 cache from call to call."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import reduce_rms as face
from abiding.communicator import Communicator
from abiding.testing.benchmarks.base import Benchmark, Settings
from abiding.testing.cases.reduce_rms import PERFORMANCE, RmsCase, RmsInputs
from abiding.testing.comparison import max_ulps
from abiding.testing.ranks import RanksFailedError, processes_us, run_processes, virtual_ranks, virtual_ranks_us
from abiding.testing.results import CaseResult, Param
from abiding.testing.timing import Timing

Q_COLUMNS = 6144
PEER_TOKENS = 2048
"""Of all ranks together. Beyond that the peer's blocks are not all resident on one GPU: it would spin for ever."""
_PEER_LIMIT_S = 120.0
"""Most of it is spent on loading every kernel, which virtual ranks need."""


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time every number of tokens for every number of ranks."""
    cases = [case for case in PERFORMANCE if not settings.quick or case.tokens in (1, 128)]
    if "qk_norm" in settings.ops and settings.device.type == "cuda":
        for case in cases:
            yield _on_gpu(case, settings)
    if "qk_norm_cpu" in settings.ops:
        for ranks in sorted({_ranks(case) for case in cases}):
            some = [case for case in cases if _ranks(case) == ranks and case.tokens <= 128]
            everyone = run_processes(_in_process, ranks, [case.tokens for case in some], timeout_s=300)
            for case, (ours, theirs) in zip(some, everyone[0], strict=True):
                yield _result("qk_norm_cpu", case, Timing.of(ours), {"gloo": Timing.of(theirs)}, 0.0)


def target_us(case: CaseResult) -> float | None:
    """A share of vLLM's time in the same run."""
    if "vllm" not in case.peers:
        return None
    return (0.65 if int(case.params["tokens"]) <= 128 else 0.45) * case.peers["vllm"]


def row(case: CaseResult) -> str:
    """The number of ranks."""
    return f"{case.params['ranks']} {'CPU processes' if case.op == 'qk_norm_cpu' else 'virtual ranks'}"


BENCHMARK = Benchmark("reduce_rms", ("qk_norm", "qk_norm_cpu"), "tokens", measure, row, target_us, overlaid=True)


def _ranks(case: RmsCase) -> int:
    return Q_COLUMNS // case.q


def _on_gpu(case: RmsCase, settings: Settings) -> CaseResult:
    ranks = _ranks(case)
    inputs = case.make(ranks, settings.device)
    with virtual_ranks(ranks, settings.device) as comms, torch.cuda.device(settings.device):
        ours = virtual_ranks_us(ranks, lambda rank: inputs[rank].run(face, comms[rank]))
        for comm in comms:
            comm.check()
    peers = {}
    if settings.peer is not None and ranks * case.tokens <= PEER_TOKENS:
        try:
            # In a process of its own, since this peer waits without an end where its blocks do not all run at once.
            peers["vllm"] = run_processes(
                _peer_us, 1, str(settings.peer), case, ranks, str(settings.device), timeout_s=_PEER_LIMIT_S
            )[0]
        except RanksFailedError as error:
            print(f"{ranks} ranks, {case}: no time of the peer: {error}", file=sys.stderr, flush=True)
    return _result("qk_norm", case, ours, peers, settings.floors.us(ranks * case.bytes))


def _result(op: str, case: RmsCase, ours: Timing, peers: dict[str, Timing], floor_us: float) -> CaseResult:
    params: dict[str, Param] = {
        "tokens": case.tokens,
        "ranks": _ranks(case),
        "q": case.q,
        "kv": case.kv or 0,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    return CaseResult.of(op, params, ours, peers, warm=True, floor_us=floor_us)


def _in_process(rank: int, tokens: Sequence[int]) -> list[tuple[list[float], list[float]]]:
    """Samples of ours and of plain PyTorch around gloo, for every number of tokens."""
    found = []
    with Communicator(device="cpu", timeout_s=60.0) as comm:
        for count in tokens:
            inputs = RmsCase(count, Q_COLUMNS // comm.ranks, 1024 // comm.ranks).make(1)[0]
            ours = processes_us(partial(inputs.run, face, comm))
            found.append((ours, processes_us(partial(_plain, inputs, comm.ranks))))
    return found


def _plain(inputs: RmsInputs, ranks: int) -> list[Tensor]:
    """What an engine does without the operator."""
    case = inputs.case
    widths = [case.q, case.kv or 0]
    parts = [part.float() for part in inputs.rows.split([*widths, case.kv or 0], 1)[:2]]
    sums = torch.stack([part.square().sum(1) for part in parts])
    dist.all_reduce(sums)
    scales = torch.rsqrt(sums / (ranks * torch.tensor(widths)[:, None]) + case.eps)[..., None]
    weights = [weight.float() for weight in (inputs.wq, inputs.wk) if weight is not None]
    scaled = [part * scale * weight for part, scale, weight in zip(parts, scales, weights, strict=True)]
    return [part.to(case.dtype) for part in scaled]


# The peer: vLLM's kernel, over the table of pointers that its callers allocate.


def _peer_us(_: int, library: str, case: RmsCase, ranks: int, device_name: str) -> Timing:
    torch.ops.load_library(library)
    op: Any = torch.ops._C.minimax_allreduce_rms_qk
    slot_bytes, device = 2 << 20, torch.device(device_name)
    inputs = case.make(ranks, device)
    slots = [torch.full((3 * slot_bytes // 4,), -0.0, device=device) for _ in inputs]
    counters = [torch.zeros(3, dtype=torch.int32, device=device) for _ in inputs]
    sizes = [torch.tensor([0, slot_bytes], device=device) for _ in inputs]
    pointers = [0] * 2 * ranks + [slot.data_ptr() for slot in slots]
    tables = [
        torch.tensor([*pointers, counter.data_ptr(), size.data_ptr()], device=device)
        for counter, size in zip(counters, sizes, strict=True)
    ]
    outs: list[tuple[Tensor, Tensor] | None] = [None] * ranks

    def call(rank: int) -> None:
        one = inputs[rank]
        outs[rank] = op(one.rows, one.wq, one.wk, tables[rank], case.q, case.kv, rank, ranks, case.eps)

    with torch.cuda.device(device):
        timing = virtual_ranks_us(ranks, call)
    ulps = [max_ulps(out, expected) for expected, out in zip(inputs[0].expected(), outs[0] or (), strict=True)]
    print(f"{ranks} ranks, {case}: the peer differs by {max(ulps)} ulps", file=sys.stderr, flush=True)
    return timing
