"""Times of the reduce-RMS of MiniMax M2 (6144 columns of Q, 1024 of K over all ranks): virtual ranks on one GPU beside
vLLM's kernel, and CPU processes beside plain PyTorch with gloo. Inputs stay in the L2 cache from call to call.

On a GPU every call follows an ordinary kernel, as it does in a model, and that kernel's time is taken off: calls of
vLLM's kernel that follow each other directly may wait for ever, since it reads its counters before the kernel in front
has ended.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import reduce_rms as face
from abiding.communicator import Communicator
from abiding.testing.benchmarks.base import Benchmark, Settings, say
from abiding.testing.cases.reduce_rms import PERFORMANCE, Q_COLUMNS, RmsCase, RmsInputs
from abiding.testing.comparison import max_ulps
from abiding.testing.ranks import (
    RanksFailedError,
    prepare_for_virtual_ranks,
    processes_us,
    run_processes,
    virtual_ranks,
    virtual_ranks_us,
)
from abiding.testing.results import CaseResult, Param
from abiding.testing.timing import Timing

PEER_TOKENS = 2048
"""Of all ranks together. Beyond that the peer's blocks are not all resident on one GPU: it would spin for ever."""
_PEER_LIMIT_S = 40.0


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time every number of tokens for every number of ranks."""
    cases = [case for case in PERFORMANCE if not settings.quick or case.tokens in (1, 128)]
    by_ranks = [(ranks, list(some)) for ranks, some in groupby(cases, _ranks)]
    if "qk_norm" in settings.ops and settings.device.type == "cuda":
        for ranks, some in by_ranks:
            peer = _peer_times([case for case in some if ranks * case.tokens <= PEER_TOKENS], ranks, settings)
            for case in some:
                yield _on_gpu(case, settings, peer.get(case.tokens))
    if "qk_norm_cpu" in settings.ops:
        for ranks, some in by_ranks:
            few = [case for case in some if case.tokens <= 128]
            everyone = run_processes(_in_process, ranks, [case.tokens for case in few], timeout_s=300)
            for case, (ours, theirs) in zip(few, everyone[0], strict=True):
                yield _result("qk_norm_cpu", case, Timing.of(ours), {"gloo": Timing.of(theirs)}, 0.0)


def target_us(case: CaseResult) -> float | None:
    """A share of vLLM's time in the same run."""
    if "vllm" not in case.peers:
        return None
    return (0.65 if int(case.params["tokens"]) <= 128 else 0.45) * case.peers["vllm"]


def row(case: CaseResult) -> str:
    """The number of ranks."""
    return f"{case.params['ranks']} {'CPU processes' if case.op == 'qk_norm_cpu' else 'virtual ranks'}"


BENCHMARK = Benchmark(
    "reduce_rms",
    ("qk_norm", "qk_norm_cpu"),
    "tokens",
    measure,
    row,
    target_us,
    overlaid=True,
    prepare=prepare_for_virtual_ranks,
)


def _ranks(case: RmsCase) -> int:
    return Q_COLUMNS // case.q


def _on_gpu(case: RmsCase, settings: Settings, peer: Timing | None) -> CaseResult:
    ranks = _ranks(case)
    inputs = case.make(ranks, settings.device)
    with virtual_ranks(ranks, settings.device) as comms, torch.cuda.device(settings.device):
        ours = _spaced_us(ranks, lambda rank: inputs[rank].run(face, comms[rank]))
        for comm in comms:
            comm.check()
    peers = {} if peer is None else {"vllm": peer}
    return _result("qk_norm", case, ours, peers, settings.roofline.bound_us(ranks * case.bytes))


def _spaced_us(ranks: int, call: Callable[[int], object]) -> Timing:
    spacers = [Spacer(torch.device("cuda")) for _ in range(ranks)]

    def both(rank: int) -> None:
        spacers[rank]()
        call(rank)

    return virtual_ranks_us(ranks, both) - virtual_ranks_us(ranks, lambda rank: spacers[rank]())


class Spacer:
    """An ordinary kernel, one that does not let the next one start before its end."""

    def __init__(self, device: torch.device) -> None:
        self._word = torch.zeros(1, device=device)

    def __call__(self) -> None:
        self._word.add_(1)


def _result(op: str, case: RmsCase, ours: Timing, peers: dict[str, Timing], bound_us: float) -> CaseResult:
    params: dict[str, Param] = {
        "tokens": case.tokens,
        "ranks": _ranks(case),
        "q": case.q,
        "kv": case.kv or 0,
        "dtype": str(case.dtype).removeprefix("torch."),
    }
    return CaseResult.of(op, params, ours, peers, l2_warm=True, bound_us=bound_us)


def _in_process(rank: int, tokens: Sequence[int]) -> list[tuple[list[float], list[float]]]:
    """Samples of ours and of plain PyTorch around gloo, for every number of tokens."""
    found = []
    with Communicator(device="cpu", timeout_s=60.0) as comm:
        for count in tokens:
            inputs = RmsCase.minimax_m2(count, comm.ranks).make(1)[0]
            ours = processes_us(partial(inputs.run, face, comm))
            found.append((ours, processes_us(partial(plain, inputs, comm.ranks))))
    return found


def plain(inputs: RmsInputs, ranks: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """What an engine does without the operator."""
    case = inputs.case
    parts = [part.float() for part in inputs.rows.split([case.q, case.kv or 0, case.kv or 0], 1)[:2]]
    sums = torch.stack([part.square().sum(1) for part in parts])
    dist.all_reduce(sums, group=group)
    weights = [weight for weight in (inputs.wq, inputs.wk) if weight is not None]
    outs = []
    for part, total, weight in zip(parts, sums, weights, strict=True):
        scale = torch.rsqrt(total / (ranks * part.shape[1]) + case.eps)
        outs.append((part * scale[:, None] * weight.float()).to(case.dtype))
    return outs


# The peer: vLLM's kernel, over the table of pointers that its callers allocate.


def _peer_times(cases: Sequence[RmsCase], ranks: int, settings: Settings) -> dict[int, Timing]:
    """By tokens, as far as they got: in a process of its own, since where not all of the peer's blocks run at once, it
    waits without an end."""
    if settings.peer is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times"
        path.touch()
        try:
            arguments = (str(settings.peer), cases, ranks, str(settings.device), str(path))
            run_processes(_time_peer, 1, *arguments, timeout_s=_PEER_LIMIT_S)
        except RanksFailedError as error:
            say(f"{ranks} ranks: not all times of the peer: {error}")
        lines = [line.split() for line in path.read_text().splitlines()]
        return {int(tokens): Timing(float(us), float(spread_us)) for tokens, us, spread_us in lines}


def _time_peer(_: int, library: str, cases: Sequence[RmsCase], ranks: int, device_name: str, path: str) -> None:
    torch.ops.load_library(library)
    device = torch.device(device_name)
    with torch.cuda.device(device), Path(path).open("a") as found:
        for case in cases:
            timing = _peer_us(case.make(ranks, device), device)
            print(case.tokens, timing.us, timing.spread_us, file=found, flush=True)


def _peer_us(inputs: Sequence[RmsInputs], device: torch.device) -> Timing:
    ranks, case = len(inputs), inputs[0].case
    buffers = [VllmTable.buffer(device) for _ in inputs]
    tables = [VllmTable([buffer.data_ptr() for buffer in buffers], device) for _ in inputs]
    outs: list[tuple[Tensor, Tensor] | None] = [None] * ranks

    def call(rank: int) -> None:
        outs[rank] = tables[rank].qk_norm(inputs[rank], rank)

    timing = _spaced_us(ranks, call)
    ulps = [max_ulps(out, expected) for expected, out in zip(inputs[0].expected(), outs[0] or (), strict=True)]
    say(f"{ranks} ranks, {case}: the peer differs by {max(ulps)} ulps")
    return timing


class VllmTable:
    """A rank's workspace of vLLM's operator: a table of the ranks' buffers, in rank order, and its own counters."""

    SLOT_BYTES = 2 << 20

    @classmethod
    def buffer(cls, device: torch.device) -> Tensor:
        """A rank's: three slots, empty."""
        return torch.full((3 * cls.SLOT_BYTES // 4,), -0.0, device=device)

    def __init__(self, buffers: Sequence[int], device: torch.device) -> None:
        self.ranks = len(buffers)
        self._counters = torch.zeros(3, dtype=torch.int32, device=device)
        self._sizes = torch.tensor([0, self.SLOT_BYTES], device=device)
        pointers = [*[0] * 2 * self.ranks, *buffers, self._counters.data_ptr(), self._sizes.data_ptr()]
        self._table = torch.tensor(pointers, device=device)

    def qk_norm(self, one: RmsInputs, rank: int) -> tuple[Tensor, Tensor]:
        op: Any = torch.ops._C.minimax_allreduce_rms_qk
        case = one.case
        q, k = op(one.rows, one.wq, one.wk, self._table, case.q, case.kv, rank, self.ranks, case.eps)
        return q, k
