"""Benchmark of the QK norm of MiniMax M2 (6144 columns of Q and 1024 of K over all ranks), L2-warm.

Virtual ranks on one GPU run against vLLM's kernel, and CPU processes against plain PyTorch around gloo.

On a GPU every call follows a spacer kernel without PDL, as it follows a GEMM in a model, and the spacer's time is
subtracted. Back-to-back calls of vLLM's kernel may hang, since it reads its counters before griddepcontrol.wait.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from abiding import reduce_rms
from abiding.communicator import Communicator
from abiding.testing.cases.reduce_rms import PERFORMANCE, Q_COLUMNS, RmsCase, RmsInputs, unfused_qk_norm
from abiding.testing.comparison import max_ulps
from abiding.testing.ranks import (
    RanksFailedError,
    prepare_for_virtual_ranks,
    processes_us,
    run_processes,
    virtual_ranks,
    virtual_ranks_us,
)
from abiding.testing.timing import Timing
from benchmarks.base import Benchmark, Settings, kind_of_ranks, say
from benchmarks.peers.vllm import VllmTable
from benchmarks.result_file import CaseResult, Param

PEER_TOKENS = 2048
"""Of all ranks together. With more, the peer's CTAs are not all co-resident on one GPU, and the peer hangs."""
_PEER_LIMIT_S = 40.0


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time every number of tokens for every number of ranks."""
    cases = [case for case in PERFORMANCE if not settings.quick or case.tokens in (1, 128)]
    cases = [case for case in cases if settings.takes(case.tokens)]
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
    """A fraction of vLLM's time in the same run."""
    if "vllm" not in case.peers:
        return None
    return (0.65 if int(case.params["tokens"]) <= 128 else 0.45) * case.peers["vllm"]


BENCHMARK = Benchmark(
    group="reduce_rms",
    ops=("qk_norm", "qk_norm_cpu"),
    axis="tokens",
    measure=measure,
    row=kind_of_ranks,
    target_us=target_us,
    overlaid=True,
    prepare=prepare_for_virtual_ranks,
)


def _ranks(case: RmsCase) -> int:
    return Q_COLUMNS // case.q


def _on_gpu(case: RmsCase, settings: Settings, peer: Timing | None) -> CaseResult:
    ranks = _ranks(case)
    inputs = case.make(ranks, settings.device)
    with virtual_ranks(ranks, settings.device) as comms, torch.cuda.device(settings.device):
        ours = _spaced_us(ranks, lambda rank: inputs[rank].run(reduce_rms, comms[rank]))
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
    """A short kernel that does not trigger dependents early (no PDL), so the next one starts when it has ended."""

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
    """For every number of tokens, the samples of Abiding and of plain PyTorch around gloo."""
    samples = []
    with Communicator(device="cpu", timeout_s=60.0) as comm:
        for count in tokens:
            inputs = RmsCase.minimax_m2(count, comm.ranks).make(1)[0]
            ours = processes_us(partial(inputs.run, reduce_rms, comm))
            samples.append((ours, processes_us(partial(unfused_qk_norm, inputs, comm.ranks))))
    return samples


# --- the peer: vLLM's kernel, over the workspace that its callers allocate --------------------------------------------


def _peer_times(cases: Sequence[RmsCase], ranks: int, settings: Settings) -> dict[int, Timing]:
    """The peer's times by tokens, as far as it got. It runs in a process of its own, which is killed if the peer hangs:
    it has no timeout, and hangs if its CTAs are not all co-resident."""
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
