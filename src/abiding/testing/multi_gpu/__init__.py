"""What several GPUs of one host are asked, in order of value: values, many calls, a rank's death, times beside peers.

A process a GPU for every phase, which the parent kills when the phase's time is over, so that nothing waits for ever;
:func:`main` is the command line. Everything can be rehearsed between CPU processes, or on one GPU that all ranks share.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from abiding import _library
from abiding.testing.benchmarks import DEFAULT_OUTPUT
from abiding.testing.benchmarks.base import Benchmark, Settings, say
from abiding.testing.benchmarks.report import table
from abiding.testing.cases.reduce_rms import RmsCase
from abiding.testing.multi_gpu import checks, times
from abiding.testing.multi_gpu.checks import Setting
from abiding.testing.multi_gpu.times import Times
from abiding.testing.ranks import RanksFailedError, prepare_for_virtual_ranks, run_processes
from abiding.testing.results import CaseResult, Param, Results
from abiding.testing.timing import Roofline, Timing

TOTAL_S = 470.0
"""No phase starts, and none goes on, after this."""


def _measure(_: Settings) -> Iterator[CaseResult]:
    raise ValueError("several GPUs take a process each: run benchmarks/multi_gpu.py")


def row(case: CaseResult) -> str:
    """The number of ranks, and what has failed if anything has."""
    return f"{case.params['ranks']} ranks{'' if case.params.get('passed', True) else ', FAILED'}"


def target_us(case: CaseResult) -> float | None:
    """The faster of NCCL and vLLM, of messages up to 1 MiB; between 2 ranks and from a graph also 4 us up to 32 KiB."""
    theirs = [us for name, us in case.peers.items() if name.startswith("nccl") or name == "vllm"]
    if case.op not in BENCHMARK.ops or not theirs:
        return None
    if "tokens" in case.params:
        return min(theirs)
    if int(case.params["bytes"]) > 1 << 20:
        return None
    small = case.op == "graph" and case.params["ranks"] == 2 and int(case.params["bytes"]) <= 32 << 10
    return min([*theirs, 4.0] if small else theirs)


_MODES = ("graph", "eager")
_NORMS = tuple(f"qk_norm {mode}" for mode in _MODES)
BENCHMARK = Benchmark(
    "multi_gpu",
    (*_MODES, *_NORMS),
    "bytes",
    _measure,
    row,
    target_us,
    overlaid=True,
    other_axes=dict.fromkeys(_NORMS, "tokens"),
)
"""For tables and plots; not among the groups, since it is not run as they are."""


@dataclass(frozen=True)
class Phase:
    """A function that every rank calls, and how long that may take, start of the processes included."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    limit_s: float = 60.0
    may_die: Collection[int] = ()


class _Run:
    """Phases one after another, until the time is over; what failed, by phase."""

    def __init__(self, ranks: int, setting: Setting) -> None:
        self.ranks, self.setting = ranks, setting
        self.errors: dict[str, str] = {}
        self._begin = time.monotonic()

    def __call__(self, phase: Phase) -> tuple[list[Any] | None, float]:
        """What each rank returned, or None where one failed; and the seconds it took."""
        limit_s = min(phase.limit_s, TOTAL_S - (time.monotonic() - self._begin))
        begin = time.monotonic()
        say(f"{phase.name} (at most {max(limit_s, 0):.0f} s)")
        found: list[Any] | None = None
        if limit_s < 5:
            self.errors[phase.name] = "no time was left for it"
        else:
            try:
                args = (self.setting, *phase.args)
                found = run_processes(
                    phase.function, self.ranks, *args, timeout_s=limit_s, may_die=phase.may_die, threads=self._threads
                )
            except RanksFailedError as error:
                say(str(error))
                self.errors[phase.name] = _in_short(error, phase.may_die)
        took = time.monotonic() - begin
        say(f"{phase.name}: {self.errors.get(phase.name, 'done')}, {took:.1f} s")
        return found, took

    @property
    def _threads(self) -> int:
        return max(1, min(8, (os.cpu_count() or 1) // self.ranks))


def run(
    ranks: int, setting: Setting, *, output: Path | None = None, commit: str | None = None
) -> tuple[Results, dict[str, str]]:
    """All phases: the results, and what failed; prints a table. Writes after every phase where `output` is given."""
    go = _Run(ranks, setting)
    per_phase, _ = go(Phase("roofline", times.roofline))
    roofline: Roofline = per_phase[0] if per_phase else Roofline(0.0, 0.0)
    device = torch.device(setting.device)
    results = Results.begin("multi_gpu", device, roofline, commit)
    results = replace(results, gpu=f"{results.gpu} x{ranks}{' sharing one' if setting.shared_gpu else ''}")

    def add(cases: Iterable[CaseResult], *, after: int | None = None) -> None:
        """Also in place of those after so many."""
        results.cases[after if after is not None else len(results.cases) :] = cases
        if output is not None:
            results.write(output)

    # What has to be right.
    found, took = go(Phase("correctness", checks.correctness, limit_s=90))
    add([_check("correctness", ranks, go, took * 1e6, {"calls": found[0] if found else 0})])
    found, took = go(Phase("stress", checks.stress, limit_s=90))
    us = max(us for _, us in found) if found else took * 1e6
    add([_check("stress", ranks, go, us, {"calls": found[0][0] if found else 0})])
    victim, timeout_s = ranks - 1, min(setting.timeout_s, 5.0)
    found, took = go(Phase("killed", checks.killed, (victim, timeout_s), limit_s=50, may_die={victim}))
    told_s = max((seconds for seconds in found or [] if seconds is not None), default=took)
    add([_check("killed", ranks, go, told_s * 1e6, {"timeout_s": timeout_s})])

    # How long it takes, beside the peers.
    def compare(mine: Times, phases: Iterable[tuple[str, Phase]], case: _Case) -> None:
        begin, peers = len(results.cases), dict[str, Times]()
        add(_cases(mine, peers, case))
        for name, phase in phases:
            peers[name] = _slowest(go(phase)[0])
            add(_cases(mine, peers, case), after=begin)

    mine = _slowest(go(Phase("times", times.ours, limit_s=60))[0])
    compare(mine, _peers(setting), partial(_summed, ranks, roofline))
    mine = _slowest(go(Phase("times of qk_norm", times.qk_norm, limit_s=40))[0])
    compare(mine, _norm_peers(setting), partial(_normed, ranks, roofline))
    add(_algorithms(ranks, go, roofline))
    print(_summary(results, go.errors))
    return results, go.errors


def _peers(setting: Setting) -> list[tuple[str, Phase]]:
    found = [(setting.backend, Phase(f"times of {setting.backend}", times.torch_distributed, limit_s=60))]
    if setting.backend == "nccl":
        found.append(("nccl symmetric", Phase("times of nccl symmetric", times.nccl_symmetric, limit_s=40)))
        for name, op in (("symm_mem one-shot", "one_shot_all_reduce"), ("symm_mem two-shot", "two_shot_all_reduce_")):
            if hasattr(torch.ops.symm_mem, op):
                found.append((name, Phase(f"times of {name}", times.symmetric_memory, (op,), limit_s=40)))
    if setting.device == "cuda" and setting.peer is not None:
        found.append(("vllm", Phase("times of vllm", times.vllm, limit_s=40)))
    if setting.backend == "nccl" and setting.sglang is not None:
        found.append(("sglang", Phase("times of sglang", times.sglang, limit_s=120)))  # it may have to compile
    return found


def _norm_peers(setting: Setting) -> list[tuple[str, Phase]]:
    found = [(setting.backend, Phase(f"times of qk_norm around {setting.backend}", times.plain_qk_norm, limit_s=40))]
    if setting.device == "cuda" and setting.peer is not None:
        found.append(("vllm", Phase("times of vllm's qk_norm", times.vllm_qk_norm, limit_s=40)))
    if setting.backend == "nccl" and setting.sglang is not None:
        found.append(("sglang", Phase("times of sglang's qk_norm", times.sglang_qk_norm, limit_s=120)))
    return found


def _check(op: str, ranks: int, go: _Run, us: float, more: Mapping[str, Param]) -> CaseResult:
    error = go.errors.get(op)
    params: dict[str, Param] = {"ranks": ranks, "passed": error is None, **more}
    if error is not None:
        params["error"] = error
    return CaseResult(op, params, max(round(us, 3), 0.001), 0.0, True, 0.0)


def _slowest(of_ranks: list[Times] | None) -> Times:
    """Each time as the slowest rank had it."""
    if not of_ranks:
        return {}
    return {key: max((found[key] for found in of_ranks), key=lambda timing: timing.us) for key in of_ranks[0]}


_Case = Callable[[str, int, Timing, Mapping[str, Timing]], CaseResult]
"""Of a mode, bytes or tokens, our time and the peers'."""


def _cases(mine: Times, peers: Mapping[str, Times], case: _Case) -> Iterator[CaseResult]:
    for mode in _MODES:
        for (its_mode, point), timing in mine.items():
            if its_mode == mode:
                theirs = {name: found[mode, point] for name, found in peers.items() if (mode, point) in found}
                yield case(mode, point, timing, theirs)


def _summed(
    ranks: int, roofline: Roofline, op: str, size: int, timing: Timing, peers: Mapping[str, Timing]
) -> CaseResult:
    params: dict[str, Param] = {"bytes": size, "ranks": ranks, "dtype": "bfloat16"}
    return _timed(op, params, timing, peers, roofline, 2 * size)


def _normed(
    ranks: int, roofline: Roofline, mode: str, tokens: int, timing: Timing, peers: Mapping[str, Timing]
) -> CaseResult:
    case = RmsCase.minimax_m2(tokens, ranks)
    params: dict[str, Param] = {"tokens": tokens, "ranks": ranks, "q": case.q, "kv": case.kv or 0, "dtype": "bfloat16"}
    return _timed(f"qk_norm {mode}", params, timing, peers, roofline, case.bytes)


def _timed(
    op: str, params: Mapping[str, Param], timing: Timing, peers: Mapping[str, Timing], roofline: Roofline, moved: int
) -> CaseResult:
    bound_us = roofline.bound_us(moved) if roofline.copy_gbps else 0.0
    return CaseResult.of(op, params, timing, peers, l2_warm=True, bound_us=bound_us)


def _algorithms(ranks: int, go: _Run, roofline: Roofline) -> Iterator[CaseResult]:
    """Both of ours at every size, where they can be told apart: on GPUs."""
    if go.setting.device != "cuda":
        return
    for name in ("one-shot", "two-shot"):
        for (mode, size), timing in _slowest(go(Phase(name, times.algorithm, (name,), limit_s=40))[0]).items():
            if mode == "graph":
                yield _summed(ranks, roofline, name, size, timing, {})


def _in_short(error: RanksFailedError, may_die: Collection[int]) -> str:
    """The last line of a rank's error: of one that found something wrong, else of one that did not merely wait."""
    failed = [outcome for outcome in error.outcomes if outcome.error is not None and outcome.rank not in may_die]
    lines = [(outcome.rank, (outcome.error or "").strip().splitlines()[-1]) for outcome in failed]
    rank, line = min(lines, key=lambda one: (not one[1].startswith("AssertionError"), "did not end in time" in one[1]))
    return f"rank {rank}: {line}"[:300]


# --- what is said -----------------------------------------------------------------------------------------------------


def _summary(results: Results, errors: Mapping[str, str]) -> str:
    parts = [
        f"{results.gpu}, driver {results.driver}, torch {results.torch}, commit {results.commit[:12]}, {results.date}"
    ]
    by_op: dict[str, list[CaseResult]] = {}
    for case in results.cases:
        by_op.setdefault(case.op, []).append(case)
    for op in ("correctness", "stress", "killed"):
        for case in by_op.get(op, []):
            verdict = "passed" if case.params["passed"] else f"FAILED: {case.params['error']}"
            what = {
                "correctness": f"{case.params.get('calls')} calls checked",
                "stress": f"{case.params.get('calls')} calls, {case.us:.1f} us each with their check",
                "killed": f"told after {case.us / 1e6:.2f} s, timeout {case.params.get('timeout_s')} s",
            }[op]
            parts.append(f"{op}: {verdict} ({what})" if case.params["passed"] else f"{op}: {verdict}")
    parts += [_table(op, by_op[op]) for op in BENCHMARK.ops if op in by_op]
    one, two = ([(int(c.params["bytes"]), c.us) for c in by_op.get(name, [])] for name in ("one-shot", "two-shot"))
    if one and two:
        ranks = by_op["one-shot"][0].params["ranks"]
        parts.append(
            f"One-shot should hand over to two-shot above {times.hand_over(one, two)} bytes: "
            f"kOneShotLimits in csrc/all_reduce/params.h, the row for {ranks} ranks"
        )
    parts += [f"no result: {name}: {error}" for name, error in errors.items() if name not in by_op]
    return "\n\n".join(parts)


def _table(op: str, cases: Sequence[CaseResult]) -> str:
    """A line a size: ours, for a message also as the bandwidth that a ring would need on each link, then the peers."""
    peers = sorted({name for case in cases for name in case.peers})
    axis = BENCHMARK.axis_of(op)
    lines = []
    for case in cases:
        point, ranks = int(case.params[axis]), int(case.params["ranks"])
        gbps = [f"{2 * (ranks - 1) / ranks * point / case.us / 1e3:.2f}"] if axis == "bytes" else []
        theirs = [f"{case.peers[name]:.2f}" if name in case.peers else "-" for name in peers]
        best = min(case.peers.values(), default=None)
        lines.append([str(point), f"{case.us:.2f}", *gbps, *theirs, "-" if best is None else f"{case.us / best:.2f}"])
    return table([f"{op}: {axis}", "abiding us", *(["GB/s"] if axis == "bytes" else []), *peers, "/ best"], lines)


# --- the command line -------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """`benchmarks/multi_gpu.py`; exits with 1 if a check or our own times failed."""
    parser = argparse.ArgumentParser(
        description="Check and time the collectives between GPUs, a process each, in less than 8 minutes."
    )
    parser.add_argument("--ranks", type=int, help="how many processes (default: all GPUs; 2 on a CPU)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on GPU 0: a rehearsal, and slow")
    parser.add_argument("--calls", type=int, help="of the stress (default: 100000; 2000 on a CPU or a shared GPU)")
    parser.add_argument("--quick", action="store_true", help="small messages, few of them: a rehearsal")
    parser.add_argument("--timeout", type=float, default=20.0, help="of the communicators, in seconds (default: 20)")
    parser.add_argument("--peer", type=Path, help="shared library with vLLM's kernels, timed as well")
    parser.add_argument(
        "--sglang", type=Path, help="folder with SGLang's package, tvm_ffi and msgspec: compiled by nvcc, timed as well"
    )
    parser.add_argument("--output", type=Path, help=f"where to write the JSON (default, for GPUs: {DEFAULT_OUTPUT})")
    parser.add_argument("--commit", help="recorded in the results (default: ask git)")
    chosen = parser.parse_args(arguments)

    alone = chosen.device == "cpu" or chosen.share_gpu
    gpus = torch.cuda.device_count() if chosen.device == "cuda" else 0
    ranks = chosen.ranks or (2 if alone else gpus)
    if not 2 <= ranks <= 16:
        parser.error(f"--ranks {ranks}; expected 2 to 16 (this machine has {gpus} GPUs; --device cpu needs none)")
    if chosen.device == "cuda" and gpus < (1 if chosen.share_gpu else ranks):
        parser.error(f"--ranks {ranks}, but torch sees {gpus} GPUs; --share-gpu takes one, --device cpu none")
    if chosen.device == "cuda" and not _library.has_cuda_kernels():
        parser.error(_library.cuda_unavailable_reason() or "the CUDA binary is not loaded")
    setting = Setting(
        device=chosen.device,
        shared_gpu=chosen.share_gpu,
        calls=chosen.calls or (2000 if alone else 100_000),
        quick=chosen.quick,
        timeout_s=chosen.timeout,
        peer=None if chosen.peer is None else str(chosen.peer.resolve()),
        sglang=None if chosen.sglang is None else str(chosen.sglang.resolve()),
    )
    whole = not alone and not chosen.quick
    # The peers' multicast through the NVLink switch stays off: it is another kind of hardware than is compared here.
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    prepare_for_virtual_ranks()
    if not chosen.share_gpu:
        os.environ["CUDA_MODULE_LOADING"] = "LAZY"  # all kernels at once take long in every process
    # Should the parent itself be stuck, in a driver say, it ends here all the same.
    faulthandler.dump_traceback_later(TOTAL_S + 9, exit=True)
    output = chosen.output or (DEFAULT_OUTPUT if whole else None)
    results, errors = run(ranks, setting, output=output, commit=chosen.commit)
    if output is not None:
        say(f"Wrote {output / results.file_name}")
    faulthandler.cancel_dump_traceback_later()
    sys.exit(1 if errors.keys() & {"correctness", "stress", "killed", "times", "times of qk_norm"} else 0)
