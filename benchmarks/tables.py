"""Markdown tables of benchmark results."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

from benchmarks.base import Benchmark
from benchmarks.result_file import CaseResult, Param, Results

Row = tuple[str, list[CaseResult]]
"""The label of a table's row or a plot's panel, and its cases."""


def about(results: Results) -> str:
    """A sentence: on which card, with what, when, and how fast the card copies and multiplies."""
    return wrap(
        f"**{results.gpu}** (driver {results.driver}, CUDA {results.cuda}, torch {results.torch}; commit "
        f"{results.commit[:12]}, {results.date}): measured copy {results.copy_gbps:.0f} GB/s, bf16 GEMM "
        f"{results.matmul_tflops:.0f} TFLOP/s."
    )


def of_op(results: Results, benchmark: Benchmark, op: str) -> str:
    """All times of one operator, with a table per cache state; empty if the operator was not timed."""
    tables = []
    for l2_warm in (False, True):
        cases = [case for case in results.cases if case.op == op and case.l2_warm is l2_warm]
        if cases:
            tables.append(_across(cases, benchmark))
    return "\n\n".join(filter(None, [*tables, _timed_later(results, benchmark, op)]))


def targets_met(results: Results, benchmark: Benchmark, ops: Iterable[str]) -> str:
    """A sentence: of each operator, how many targets are met on this card; empty if none has a target."""
    counts = []
    for op in ops:
        verdicts = [benchmark.verdict(case) for case in results.cases if case.op == op]
        if judged := len(verdicts) - verdicts.count("-"):
            counts.append(f"`{op}` {verdicts.count('met')} of {judged}")
    return wrap(f"Targets met on {results.gpu}: {', '.join(counts)}.") if counts else ""


def _across(cases: Sequence[CaseResult], benchmark: Benchmark) -> str:
    """A table of cases of one cache state, with the axis across and, per row of the benchmark, a line per quantity."""
    axis = benchmark.axis_of(cases[0].op)
    points = sorted({case.params[axis] for case in cases}, key=float)
    lines = []
    for label, members in rows_of(cases, benchmark):
        at = {case.params[axis]: case for case in members}
        first = True
        for name, text in _quantities(members, benchmark):
            cells = [text(at[point]) if point in at else "-" for point in points]
            if set(cells) != {"-"}:
                lines.append([label if first else "", name, *cells])
                first = False
    return table([cases[0].cache_state, axis, *(point_text(axis, point) for point in points)], lines)


def _quantities(cases: Sequence[CaseResult], benchmark: Benchmark) -> Iterator[tuple[str, Callable[[CaseResult], str]]]:
    """What a table says of each case: the name of the line, and how its cells are written."""
    yield "**abiding**", lambda case: f"**{us_text(case.us)}**"
    yield "spread", lambda case: us_text(case.spread_us)
    for name in peers_of(cases):
        yield name, partial(_peer_text, name)
    yield "/ best peer", lambda case: "-" if case.ratio is None else f"{case.ratio:.2f}"
    yield "bound", lambda case: us_text(case.bound_us or None)
    yield "target", lambda case: us_text(benchmark.target_us(case))
    yield "verdict", benchmark.verdict


def _peer_text(name: str, case: CaseResult) -> str:
    return us_text(case.peers.get(name))


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


def fill(text: str, marker: str, parts: Iterable[str]) -> str:
    """`text` with the non-empty parts between `<!-- MARKER -->` and `<!-- /MARKER -->`."""
    body = "\n\n".join(filter(None, parts))
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- /?{marker} -->)"
    return re.sub(pattern, partial(_between, body), text, flags=re.DOTALL)


def _between(body: str, markers: re.Match[str]) -> str:
    return f"{markers[1]}\n{body}\n\n{markers[2]}"


def wrap(text: str) -> str:
    """A paragraph, wrapped as the documents are."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def peers_of(cases: Iterable[CaseResult]) -> list[str]:
    return sorted({name for case in cases for name in case.peers})


def rows_of(cases: Sequence[CaseResult], benchmark: Benchmark) -> list[Row]:
    return [(label, list(members)) for label, members in groupby(cases, benchmark.row)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


_SIZES = {"MiB": 1 << 20, "KiB": 1 << 10, "B": 1}


def point_text(axis: str, point: Param) -> str:
    """A point of an axis, with its unit if that is bytes."""
    if axis == "bytes":
        unit, size = next((name, size) for name, size in _SIZES.items() if int(point) % size == 0)
        return f"{int(point) // size} {unit}"
    return str(point)


def us_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
