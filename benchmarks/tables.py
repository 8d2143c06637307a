"""Markdown tables of benchmark results."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import groupby

from benchmarks.base import Benchmark
from benchmarks.result_file import CaseResult, Results

Row = tuple[str, list[CaseResult]]
"""The label of a table's row or a plot's panel, and its cases."""


def full_table(results: Results, benchmark: Benchmark) -> str:
    """Every case as a Markdown table: its roofline bound, its target, and whether the target is met."""
    peers = peers_of(results.cases)
    times_head = ["us", "spread", "bound", "target", *peers, *(f"/ {name}" for name in peers)]
    axes = dict.fromkeys([benchmark.axis, *benchmark.other_axes.values()])
    head = ["op", "case", " / ".join(axes), "cache", *times_head, "verdict"]
    rows = []
    for case in results.cases:
        target = benchmark.target_us(case)
        times = [case.peers.get(name) for name in peers]
        rows.append(
            [
                case.op,
                benchmark.row(case),
                str(case.params.get(benchmark.axis_of(case.op), "-")),
                case.cache_state,
                *map(us_text, (case.us, case.spread_us, case.bound_us, target, *times)),
                *("-" if us is None else f"{case.us / us:.2f}" for us in times),
                benchmark.verdict(case),
            ]
        )
    ops = dict.fromkeys(case.op for case in results.cases)
    return "\n\n".join(filter(None, [table(head, rows), *(_timed_later(results, benchmark, op) for op in ops)]))


def _timed_later(results: Results, benchmark: Benchmark, op: str) -> str:
    """A sentence per commit, other than the file's, at which cases of an operator were timed; empty if none."""
    cases = [case for case in results.cases if case.op == op]
    every = Counter(map(benchmark.row, cases))
    sentences = []
    for commit in sorted({case.commit for case in cases} - {""}):
        count = Counter(benchmark.row(case) for case in cases if case.commit == commit)
        rows = [row if count[row] == every[row] else f"{row} ({count[row]} of {every[row]})" for row in count]
        sentences.append(f"Of commit {commit[:12]}: {op}" + (f", {', '.join(rows)}." if count != every else "."))
    return wrap(" ".join(sentences))


def summary(results: Results, benchmark: Benchmark) -> str:
    """The table of :func:`of_op` for the first operator that was measured on one GPU, and how many targets are met."""
    measured = {case.op for case in results.cases}
    parts = [of_op(results, benchmark, next((op for op in benchmark.ops if op in measured), benchmark.ops[0]))]
    judged: dict[str, list[str]] = {}
    for case in results.cases:
        if (verdict := benchmark.verdict(case)) != "-":
            judged.setdefault(case.op, []).append(verdict)
    if judged:
        counts = [f"`{op}` {verdicts.count('met')} of {len(verdicts)}" for op, verdicts in judged.items()]
        parts.append(f"Targets met: {', '.join(counts)}.")
    return "\n\n".join(parts)


def of_op(results: Results, benchmark: Benchmark, op: str) -> str:
    """One operator on one GPU: a line that says what was measured, and a table per cache state with the axis across;
    empty if the operator was not measured there."""
    tables = []
    for l2_warm in (False, True):
        cases = [case for case in results.cases if case.op == op and case.l2_warm is l2_warm]
        if cases:
            tables.append(_across(cases, benchmark))
    head = (
        f"**{results.gpu}** (driver {results.driver}, CUDA {results.cuda}, torch {results.torch}; commit "
        f"{results.commit[:12]}, {results.date}): measured copy {results.copy_gbps:.0f} GB/s, bf16 GEMM "
        f"{results.matmul_tflops:.0f} TFLOP/s. `{op}`, µs per call."
    )
    return "\n\n".join(filter(None, [wrap(head), *tables, _timed_later(results, benchmark, op)])) if tables else ""


def rewrite(text: str, group: str, results: Iterable[Results], benchmark: Benchmark) -> str:
    """`text` with the tables between the group's markers replaced.

    `<!-- results:GROUP -->` ... `<!-- /results:GROUP -->` takes a summary per GPU, `results:GROUP:full` every case as
    well, `results:GROUP:OP` the table of one operator.
    """
    every = list(results)
    written: dict[str, Callable[[Results], str]] = {
        f"results:{group}": lambda one: summary(one, benchmark),
        f"results:{group}:full": lambda one: summary(one, benchmark) + "\n\n" + full_table(one, benchmark),
        **{f"results:{group}:{op}": partial(of_op, benchmark=benchmark, op=op) for op in benchmark.ops},
    }
    for marker, write in written.items():
        text = fill(text, marker, map(write, every))
    return text


def fill(text: str, marker: str, parts: Iterable[str]) -> str:
    """`text` with the non-empty parts between `<!-- MARKER -->` and `<!-- /MARKER -->`."""
    body = "\n\n".join(filter(None, parts))
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /?{marker} -->)"
    return re.sub(pattern, partial(_between, body), text, flags=re.DOTALL)


def wrap(text: str) -> str:
    """A paragraph, wrapped as the documents are."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _between(body: str, markers: re.Match[str]) -> str:
    return f"{markers[1]}\n{body}\n\n{markers[2]}"


def peers_of(cases: Iterable[CaseResult]) -> list[str]:
    return sorted({name for case in cases for name in case.peers})


def _across(cases: Sequence[CaseResult], benchmark: Benchmark) -> str:
    """A table of cases of one cache state, with the axis across."""
    axis = benchmark.axis_of(cases[0].op)
    points = sorted({case.params[axis] for case in cases}, key=float)
    rows = []
    for label, members in rows_of(cases, benchmark):
        at = {case.params[axis]: case for case in members}
        rows.append([label, "**abiding**", *(f"**{us_text(at[p].us)}**" if p in at else "-" for p in points)])
        for name in peers_of(members):
            rows.append(["", name, *(us_text(at[p].peers.get(name)) if p in at else "-" for p in points)])
        rows.append(["", "bound", *(us_text(at[p].bound_us) if p in at else "-" for p in points)])
    return table([cases[0].cache_state, axis, *map(str, points)], rows)


def rows_of(cases: Sequence[CaseResult], benchmark: Benchmark) -> list[Row]:
    return [(label, list(members)) for label, members in groupby(cases, benchmark.row)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def us_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
