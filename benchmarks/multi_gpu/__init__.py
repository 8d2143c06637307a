"""Checks and benchmarks of the collectives between the GPUs of one host: correctness, stress, a killed rank, times.

Every phase runs one process per GPU, which the parent kills when the phase's time limit has passed, so nothing hangs.
All phases can be rehearsed between CPU processes, or on one GPU that all ranks share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from abiding.testing.cases.reduce_rms import RmsCase
from abiding.testing.ranks import RanksFailedError, run_processes
from abiding.testing.timing import Roofline, Timing
from benchmarks.base import Benchmark, Settings, say
from benchmarks.multi_gpu import checks, times
from benchmarks.multi_gpu.checks import RunConfig
from benchmarks.multi_gpu.times import Times
from benchmarks.result_file import CaseResult, Param, Results
from benchmarks.tables import peers_of, table

TOTAL_S = 470.0
"""No phase starts or continues after this time."""


def _measure(_: Settings) -> Iterator[CaseResult]:
    raise ValueError("several GPUs need one process each: run python -m benchmarks.multi_gpu")


def row(case: CaseResult) -> str:
    """The label of a case's row: the number of ranks, and FAILED if a check failed."""
    return f"{case.params['ranks']} ranks{'' if case.params.get('passed', True) else ', FAILED'}"


def target_us(case: CaseResult) -> float | None:
    """The faster of NCCL and vLLM, for messages up to 1 MiB; from a graph between 2 ranks at most 4 µs up to 32 KiB."""
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
    group="multi_gpu",
    ops=(*_MODES, *_NORMS),
    axis="bytes",
    measure=_measure,
    row=row,
    target_us=target_us,
    overlaid=True,
    other_axes=dict.fromkeys(_NORMS, "tokens"),
)
"""For tables and plots. Not one of the groups, since it needs a process per GPU."""


@dataclass(frozen=True)
class Phase:
    """A function that every rank runs, and its time limit, which includes starting the processes."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...] = ()
    limit_s: float = 60.0
    may_die: Collection[int] = ()


class _Run:
    """Runs phases one after another until the total time is over; `errors` has the failed ones."""

    def __init__(self, ranks: int, config: RunConfig) -> None:
        self.ranks, self.config = ranks, config
        self.errors: dict[str, str] = {}
        self._begin = time.monotonic()

    def __call__(self, phase: Phase) -> tuple[list[Any] | None, float]:
        """The result of each rank, or None if one failed; and the seconds it took."""
        limit_s = min(phase.limit_s, TOTAL_S - (time.monotonic() - self._begin))
        begin = time.monotonic()
        say(f"{phase.name} (at most {max(limit_s, 0):.0f} s)")
        found: list[Any] | None = None
        if limit_s < 5:
            self.errors[phase.name] = "no time was left for it"
        else:
            try:
                args = (self.config, *phase.args)
                found = run_processes(
                    phase.function, self.ranks, *args, timeout_s=limit_s, may_die=phase.may_die, threads=self._threads
                )
            except RanksFailedError as error:
                say(str(error))
                self.errors[phase.name] = _summarize(error, phase.may_die)
        took = time.monotonic() - begin
        say(f"{phase.name}: {self.errors.get(phase.name, 'done')}, {took:.1f} s")
        return found, took

    @property
    def _threads(self) -> int:
        return max(1, min(8, (os.cpu_count() or 1) // self.ranks))


def run(
    ranks: int, config: RunConfig, *, output: Path | None = None, commit: str | None = None
) -> tuple[Results, dict[str, str]]:
    """Run all phases and print a table; returns the results and the errors. Writes to `output` after every phase."""
    go = _Run(ranks, config)
    per_phase, _ = go(Phase("roofline", times.roofline))
    roofline: Roofline = per_phase[0] if per_phase else Roofline(0.0, 0.0)
    device = torch.device(config.device)
    results = Results.begin("multi_gpu", device, roofline, commit)
    results = replace(results, gpu=f"{results.gpu} x{ranks}{' sharing one' if config.shared_gpu else ''}")

    def add(cases: Iterable[CaseResult], *, after: int | None = None) -> None:
        """Append cases, or replace those from index `after` on."""
        results.cases[after if after is not None else len(results.cases) :] = cases
        if output is not None:
            results.write(output)

    # Checks.
    found, took = go(Phase("correctness", checks.correctness, limit_s=90))
    add([_check("correctness", ranks, go, took * 1e6, {"calls": found[0] if found else 0})])
    found, took = go(Phase("stress", checks.stress, limit_s=90))
    us = max(us for _, us in found) if found else took * 1e6
    add([_check("stress", ranks, go, us, {"calls": found[0][0] if found else 0})])
    victim, timeout_s = ranks - 1, min(config.timeout_s, 5.0)
    found, took = go(Phase("killed", checks.killed, (victim, timeout_s), limit_s=50, may_die={victim}))
    detected_s = max((seconds for seconds in found or [] if seconds is not None), default=took)
    add([_check("killed", ranks, go, detected_s * 1e6, {"timeout_s": timeout_s})])

    # Times, and those of the peers.
    def compare(mine: Times, phases: Iterable[tuple[str, Phase]], case: _Case) -> None:
        begin, peers = len(results.cases), dict[str, Times]()
        add(_cases(mine, peers, case))
        for name, phase in phases:
            peers[name] = _slowest(go(phase)[0])
            add(_cases(mine, peers, case), after=begin)

    mine = _slowest(go(Phase("times", times.ours, limit_s=60))[0])
    compare(mine, _peers(config), partial(_summed, ranks, roofline))
    mine = _slowest(go(Phase("times of qk_norm", times.qk_norm, limit_s=40))[0])
    compare(mine, _norm_peers(config), partial(_normed, ranks, roofline))
    add(_algorithms(ranks, go, roofline))
    print(_summary(results, go.errors))
    return results, go.errors


def _peers(config: RunConfig) -> list[tuple[str, Phase]]:
    found = [(config.backend, Phase(f"times of {config.backend}", times.torch_distributed, limit_s=60))]
    if config.backend == "nccl":
        found.append(("nccl symmetric", Phase("times of nccl symmetric", times.nccl_symmetric, limit_s=40)))
        for name, op in (("symm_mem one-shot", "one_shot_all_reduce"), ("symm_mem two-shot", "two_shot_all_reduce_")):
            if hasattr(torch.ops.symm_mem, op):
                found.append((name, Phase(f"times of {name}", times.symmetric_memory, (op,), limit_s=40)))
    if config.device == "cuda" and config.peer is not None:
        found.append(("vllm", Phase("times of vllm", times.vllm, limit_s=40)))
    if config.backend == "nccl" and config.sglang is not None:
        found.append(("sglang", Phase("times of sglang", times.sglang, limit_s=120)))  # it may JIT-compile
    return found


def _norm_peers(config: RunConfig) -> list[tuple[str, Phase]]:
    unfused = Phase(f"times of qk_norm around {config.backend}", times.torch_qk_norm, limit_s=40)
    found = [(config.backend, unfused)]
    if config.device == "cuda" and config.peer is not None:
        found.append(("vllm", Phase("times of vllm's qk_norm", times.vllm_qk_norm, limit_s=40)))
    if config.backend == "nccl" and config.sglang is not None:
        found.append(("sglang", Phase("times of sglang's qk_norm", times.sglang_qk_norm, limit_s=120)))
    return found


def _check(op: str, ranks: int, go: _Run, us: float, more: Mapping[str, Param]) -> CaseResult:
    error = go.errors.get(op)
    params: dict[str, Param] = {"ranks": ranks, "passed": error is None, **more}
    if error is not None:
        params["error"] = error
    return CaseResult(op, params, us=max(round(us, 3), 0.001), spread_us=0.0, l2_warm=True, bound_us=0.0)


def _slowest(of_ranks: list[Times] | None) -> Times:
    """For each point the timing of its slowest rank."""
    if not of_ranks:
        return {}
    return {key: max((found[key] for found in of_ranks), key=lambda timing: timing.us) for key in of_ranks[0]}


_Case = Callable[[str, int, Timing, Mapping[str, Timing]], CaseResult]
"""Creates the result of a mode, a number of bytes or tokens, our timing and the peers'."""


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
    """Times of one-shot and of two-shot at every size; on GPUs only, as the CPU has one algorithm."""
    if go.config.device != "cuda":
        return
    for name in ("one-shot", "two-shot"):
        for (mode, size), timing in _slowest(go(Phase(name, times.algorithm, (name,), limit_s=40))[0]).items():
            if mode == "graph":
                yield _summed(ranks, roofline, name, size, timing, {})


def _summarize(error: RanksFailedError, may_die: Collection[int]) -> str:
    """The last line of the most telling error: a failed assertion first, a timeout last."""
    failed = [outcome for outcome in error.outcomes if outcome.error is not None and outcome.rank not in may_die]
    lines = [(outcome.rank, (outcome.error or "").strip().splitlines()[-1]) for outcome in failed]
    rank, line = min(lines, key=lambda one: (not one[1].startswith("AssertionError"), "did not end in time" in one[1]))
    return f"rank {rank}: {line}"[:300]


# --- the summary ------------------------------------------------------------------------------------------------------


def _summary(results: Results, errors: Mapping[str, str]) -> str:
    parts = [
        f"{results.gpu}, driver {results.driver}, torch {results.torch}, commit {results.commit[:12]}, {results.date}"
    ]
    by_op: dict[str, list[CaseResult]] = {}
    for case in results.cases:
        by_op.setdefault(case.op, []).append(case)
    parts += checked(results)
    parts += [_table(op, by_op[op]) for op in BENCHMARK.ops if op in by_op]
    one, two = ([(int(c.params["bytes"]), c.us) for c in by_op.get(name, [])] for name in ("one-shot", "two-shot"))
    if one and two:
        ranks = by_op["one-shot"][0].params["ranks"]
        parts.append(
            f"One-shot should be used up to {times.one_shot_limit(one, two)} bytes and two-shot above: "
            f"kOneShotLimits in csrc/all_reduce/params.h, the row for {ranks} ranks"
        )
    parts += [f"no result: {name}: {error}" for name, error in errors.items() if name not in by_op]
    return "\n\n".join(parts)


def checked(results: Results) -> Iterator[str]:
    """A line per check: whether it passed, and of what."""
    what: dict[str, Callable[[CaseResult], str]] = {
        "correctness": lambda case: f"{case.params.get('calls')} calls checked",
        "stress": lambda case: f"{case.params.get('calls')} calls, {case.us:.1f} µs per call with its check",
        "killed": lambda case: f"detected after {case.us / 1e6:.2f} s, timeout {case.params.get('timeout_s')} s",
    }
    for case in results.cases:
        if case.op in what:
            passed = case.params["passed"]
            yield (
                f"{case.op}: passed ({what[case.op](case)})" if passed else f"{case.op}: FAILED: {case.params['error']}"
            )


def _table(op: str, cases: Sequence[CaseResult]) -> str:
    """A line per size: our time, for messages the bus bandwidth as nccl-tests define it, then the peers' times."""
    peers = peers_of(cases)
    axis = BENCHMARK.axis_of(op)
    lines = []
    for case in cases:
        point, ranks = int(case.params[axis]), int(case.params["ranks"])
        gbps = [f"{2 * (ranks - 1) / ranks * point / case.us / 1e3:.2f}"] if axis == "bytes" else []
        theirs = [f"{case.peers[name]:.2f}" if name in case.peers else "-" for name in peers]
        lines.append([str(point), f"{case.us:.2f}", *gbps, *theirs, "-" if case.ratio is None else f"{case.ratio:.2f}"])
    return table([f"{op}: {axis}", "abiding us", *(["GB/s"] if axis == "bytes" else []), *peers, "/ best"], lines)
