"""Tables and plots of benchmark results."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from abiding.testing.benchmarks.base import Benchmark
from abiding.testing.results import CaseResult, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = tuple[str, list[CaseResult]]
"""The label of a table's row or a plot's panel, and its cases."""


def full_table(results: Results, benchmark: Benchmark) -> str:
    """Every case as a Markdown table: its roofline bound, its target, and whether the target is met."""
    peers = _peers(results.cases)
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
                *map(_us, (case.us, case.spread_us, case.bound_us, target, *times)),
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


@dataclass(frozen=True)
class Headline:
    """A row of the README's table: one case of a job, chosen by its parameters."""

    job: str
    group: str
    op: str
    params: Mapping[str, object]

    def at(self, size: str, **params: object) -> Headline:
        return replace(self, job=f"{self.job}, {size}", params={**self.params, **params})

    def cases(self, found: Iterable[Results]) -> Iterator[tuple[Results, CaseResult]]:
        """The matching cases of all GPUs, L2-cold ones where there are both."""
        for results in found:
            if results.group == self.group:
                cases = [case for case in results.cases if case.op == self.op and case.peers]
                cases = [case for case in cases if self.params.items() <= case.params.items()]
                cold = [case for case in cases if not case.l2_warm]
                yield from ((results, case) for case in cold or cases)


PROLOGUE = Headline("DeepSeek V4 MLA prologue, 64 heads", "mla_prologue", "qnorm_rope_kv_insert", {"heads": 64})
ALL_REDUCE = Headline("all-reduce, CUDA graph", "multi_gpu", "graph", {})
QK_NORM = Headline("MiniMax M2 QK norm, CUDA graph", "multi_gpu", "qk_norm graph", {})
MOE = {"routing": "uniform"}
MOE_M2 = Headline("MXFP8 MoE layer, MiniMax M2", "mxfp8_moe", "moe_w8a16", MOE | {"shape": "minimax-m2"})
HEADLINES = (
    PROLOGUE.at("256 tokens", tokens=256),
    ALL_REDUCE.at("64 KiB", bytes=65536),
    QK_NORM.at("64 tokens", tokens=64),
    *(MOE_M2.at("1 token" if tokens == 1 else f"{tokens} tokens", tokens=tokens) for tokens in (1, 8, 100, 512, 8192)),
)


def headline(found: Iterable[Results]) -> str:
    """The README's table: a row per job and card, with the best peer's time and the ratio to it."""
    every, rows = list(found), []
    for one in HEADLINES:
        for results, case in one.cases(every):
            best = min(case.peers, key=lambda name: case.peers[name])
            ratio = f"**{case.us / case.peers[best]:.2f}**"
            rows.append([one.job, _us(case.us), _us(case.peers[best]), best, ratio, results.gpu])
    return table(["job", "Abiding, µs", "best peer, µs", "which", "ratio", "card"], rows)


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


def plot(results: Results, benchmark: Benchmark, path: Path) -> None:
    """Plot the times of the group's first operator over the axis, L2-cold ones if there are any: ours, the peers' and
    the roofline bound. The suffix of `path` chooses SVG or PNG."""
    import matplotlib

    matplotlib.use("agg")
    # A fixed salt, so that the same results give the same file.
    matplotlib.rcParams["svg.hashsalt"] = benchmark.group
    from matplotlib import pyplot

    cases = [case for case in results.cases if case.op == benchmark.ops[0]]
    cases = [case for case in cases if not case.l2_warm] or cases
    rows = _rows(cases, benchmark)
    figure = pyplot.figure(layout="constrained")
    (_plot_overlaid if benchmark.overlaid else _plot_panels)(figure, rows, benchmark.axis)
    figure.suptitle(f"{benchmark.ops[0]}, {results.gpu}, {cases[0].cache_state}")
    _save(figure, path)
    pyplot.close(figure)


def plot_ratios(found: Iterable[Results], path: Path) -> None:
    """The README's plot: our time by the best peer's over size, a panel per job and a line per card or model."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "ratios"
    from matplotlib import pyplot

    every = list(found)
    moe = Headline("MXFP8 MoE layer, w8a16", "mxfp8_moe", "moe_w8a16", MOE)
    figure, panels = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained", sharey=True)
    for panel, job, axis, name in zip(
        panels, (PROLOGUE, ALL_REDUCE, moe), ("tokens", "bytes", "tokens"), ("", "", "shape"), strict=True
    ):
        lines: dict[str, list[tuple[float, float]]] = {}
        for results, case in job.cases(every):
            line = lines.setdefault(" ".join(filter(None, (str(case.params.get(name, "")), results.gpu))), [])
            line.append((float(case.params[axis]), case.us / min(case.peers.values())))
        for (label, points), style in zip(lines.items(), ("o-", "s--", "^-.", "v:", "D-"), strict=False):
            panel.plot(*zip(*points, strict=True), style, label=label, markersize=4)
        panel.axhline(1, color="gray")
        panel.set(title=job.job, xscale="log", xlabel=axis, ylim=(0, 1.3))
        panel.grid(alpha=0.3)
        if lines:
            panel.legend(fontsize="small")
    panels[0].set_ylabel("our time / the best peer's")
    _save(figure, path)
    pyplot.close(figure)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _plot_panels(figure: Figure, rows: Sequence[Row], axis: str) -> None:
    """One panel per row: the peers' times, ours, the roofline bound."""
    columns = min(len(rows), 2)
    lines = -(-len(rows) // columns)
    figure.set_size_inches(5 * columns, 3.4 * lines)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True)
    for panel in panels.flat[len(rows) :]:
        panel.set_visible(False)
    for panel, (label, members) in zip(panels.flat, rows, strict=False):
        xs = [float(case.params[axis]) for case in members]
        for color, name in zip(("tab:orange", "tab:green", "tab:red", "tab:purple"), _peers(members), strict=False):
            times = [case.peers.get(name, float("nan")) for case in members]
            panel.plot(xs, times, marker="s", color=color, label=name)
        panel.plot(xs, [case.us for case in members], marker="o", color="tab:blue", label="abiding")
        panel.plot(xs, [case.bound_us for case in members], color="gray", linestyle="--", label="bound")
        _finish(panel, axis, title=label)


def _plot_overlaid(figure: Figure, rows: Sequence[Row], axis: str) -> None:
    """One panel: a color per row, our times as a solid line, the peers' as dashed lines with their own markers."""
    figure.set_size_inches(8, 4.8)
    panel = figure.subplots()
    for index, (label, members) in enumerate(rows):
        xs, color = [float(case.params[axis]) for case in members], f"C{index}"
        panel.plot(xs, [case.us for case in members], marker="o", color=color, label=label)
        for marker, name in zip("s^vDx+", _peers(members), strict=False):
            times = [case.peers.get(name, float("nan")) for case in members]
            panel.plot(xs, times, marker=marker, color=color, linestyle="--", alpha=0.7, label=f"{label}, {name}")
    _finish(panel, axis)


def _finish(panel: Axes, axis: str, **more: str) -> None:
    panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="µs per call", **more)
    panel.grid(alpha=0.3)
    panel.legend()


def _peers(cases: Iterable[CaseResult]) -> list[str]:
    return sorted({name for case in cases for name in case.peers})


def _across(cases: Sequence[CaseResult], benchmark: Benchmark) -> str:
    """A table of cases of one cache state, with the axis across."""
    axis = benchmark.axis_of(cases[0].op)
    points = sorted({case.params[axis] for case in cases}, key=float)
    rows = []
    for label, members in _rows(cases, benchmark):
        at = {case.params[axis]: case for case in members}
        rows.append([label, "**abiding**", *(f"**{_us(at[p].us)}**" if p in at else "-" for p in points)])
        for name in _peers(members):
            rows.append(["", name, *(_us(at[p].peers.get(name)) if p in at else "-" for p in points)])
        rows.append(["", "bound", *(_us(at[p].bound_us) if p in at else "-" for p in points)])
    return table([cases[0].cache_state, axis, *map(str, points)], rows)


def _rows(cases: Sequence[CaseResult], benchmark: Benchmark) -> list[Row]:
    return [(label, list(members)) for label, members in groupby(cases, benchmark.row)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
