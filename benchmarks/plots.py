"""Plots of benchmark results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.base import Benchmark
from benchmarks.headline import ALL_REDUCE, MOE, PROLOGUE, Headline
from benchmarks.result_file import Results
from benchmarks.tables import Row, peers_of, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    rows = rows_of(cases, benchmark)
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
        for color, name in zip(("tab:orange", "tab:green", "tab:red", "tab:purple"), peers_of(members), strict=False):
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
        for marker, name in zip("s^vDx+", peers_of(members), strict=False):
            times = [case.peers.get(name, float("nan")) for case in members]
            panel.plot(xs, times, marker=marker, color=color, linestyle="--", alpha=0.7, label=f"{label}, {name}")
    _finish(panel, axis)


def _finish(panel: Axes, axis: str, **more: str) -> None:
    panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="µs per call", **more)
    panel.grid(alpha=0.3)
    panel.legend()
