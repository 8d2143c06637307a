"""Plots of benchmark results: microseconds, and ours as a part of the best peer's and of the bound's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.base import Benchmark
from benchmarks.headline import ALL_REDUCE, MOE_SHAPES, PROLOGUE
from benchmarks.result_file import CaseResult, Results
from benchmarks.tables import peers_of, point_text, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Value = Callable[[CaseResult], "float | None"]
"""What is plotted of a case, if anything."""


class Style(NamedTuple):
    """How a line is drawn; lines differ in dashes and markers too, for those who cannot tell the colors apart."""

    color: str
    linestyle: str | tuple[int, tuple[int, ...]]
    marker: str


# Okabe and Ito's colors.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, BLACK, GRAY = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000", "#777777"),
)
LONG, SHORT, DASH_DOT, DENSE = (0, (7, 2)), (0, (4, 2)), (0, (6, 2, 1, 2)), (0, (2, 1))
OURS, BOUND, OTHER = Style(BLUE, "-", "o"), Style(GRAY, ":", ""), Style(SKY, LONG, "+")
PEERS = {
    "vllm": Style(VERMILION, SHORT, "s"),
    "marlin": Style(VERMILION, SHORT, "s"),
    "sglang": Style(GREEN, DASH_DOT, "^"),
    "humming": Style(GREEN, DASH_DOT, "^"),
    "nccl": Style(BLACK, LONG, "D"),
    "gloo": Style(BLACK, LONG, "D"),
    "humming_indexed": Style(PURPLE, DENSE, "x"),
    "humming_fp8_token": Style(ORANGE, SHORT, "v"),
    "humming_fp8_block": Style(SKY, DENSE, "x"),
    "deep_gemm": Style(GREEN, DASH_DOT, "^"),
    "bf16": Style(BLACK, LONG, "D"),
    "nccl symmetric": Style(GRAY, LONG, "d"),
    "symm_mem one-shot": Style(ORANGE, DENSE, "v"),
    "symm_mem two-shot": Style(PURPLE, DENSE, "x"),
}
ROWS = (
    *(OURS, Style(VERMILION, SHORT, "s"), Style(GREEN, DASH_DOT, "^"), Style(ORANGE, LONG, "D")),
    *(Style(PURPLE, DENSE, "v"), Style(SKY, LONG, "x"), Style(BLACK, SHORT, "d"), Style(GRAY, DASH_DOT, "+")),
)
"""Of the rows of a benchmark, where a panel has a line for each."""
UNITS = {"bytes": "message per rank", "tokens": "tokens per call"}


def plot(results: Results, benchmark: Benchmark, op: str, path: Path, title: str) -> None:
    """Plot an operator's times over the axis, L2-cold ones if there are any.

    A panel per row of the benchmark has our microseconds, the peers' and the roofline bound; two more have, with a line
    per row, our time as a part of the best peer's and of the bound. Rows of a few points are left to the tables. The
    title ends with the card. The suffix of `path` chooses SVG or PNG.
    """
    cases = [case for case in results.cases if case.op == op]
    cases = [case for case in cases if not case.l2_warm] or cases
    rows, axis = rows_of(cases, benchmark), benchmark.axis_of(op)
    longest = max(len(members) for _, members in rows)
    rows = [(label, members) for label, members in rows if 2 * len(members) > longest]
    ratios: list[tuple[str, Value]] = [
        ("our time / the best peer's", lambda case: case.ratio),
        ("our time / the bound", lambda case: case.us / case.bound_us if case.bound_us else None),
    ]
    ratios = [(name, ratio) for name, ratio in ratios if any(ratio(case) for _, members in rows for case in members)]
    with figure(len(rows) + len(ratios), path, f"{title}, {results.gpu}, {cases[0].cache_state}") as panels:
        for panel, (label, members) in zip(panels, rows, strict=False):
            for name in peers_of(members):
                _line(panel, members, axis, partial(_of_peer, name), PEERS.get(name, OTHER), name)
            _line(panel, members, axis, lambda case: case.us, OURS, "abiding")
            _line(panel, members, axis, lambda case: case.bound_us or None, BOUND, "bound")
            panel.set(title=label, ylabel="µs per call", yscale="log")
            _finish(panel, axis)
        for panel, (name, ratio) in zip(panels[len(rows) :], ratios, strict=True):
            for (label, members), style in zip(rows, cycle(ROWS), strict=False):
                _line(panel, members, axis, ratio, style, label)
            _finish_ratios(panel, axis, name)


def plot_ratios(found: Iterable[Results], path: Path) -> None:
    """The README's plot: our time by the best peer's over size, a panel per job and a line per card or model."""
    every = list(found)
    jobs = (PROLOGUE, "tokens", ""), (ALL_REDUCE, "bytes", ""), (MOE_SHAPES, "tokens", "shape")
    with figure(len(jobs), path) as panels:
        for panel, (job, axis, name) in zip(panels, jobs, strict=True):
            lines: dict[tuple[str, str], list[CaseResult]] = {}
            for results, case in job.cases(every):
                lines.setdefault((str(case.params.get(name, "")), results.gpu), []).append(case)
            cards = sorted({card for _, card in lines})
            for ((part, card), cases), style in zip(lines.items(), cycle(ROWS), strict=False):
                label = part if len(cards) == 1 else f"{part} {card}".strip()
                _line(panel, cases, axis, lambda case: case.ratio, style, label)
            _finish_ratios(panel, axis, "our time / the best peer's")
            panel.set(title="\n".join([job.job, ", ".join(cards)]), ylabel="our time / the best peer's", ylim=(0, 1.3))


@contextmanager
def figure(panels: int, path: Path, title: str = "") -> Iterator[Sequence[Axes]]:
    """The panels of a figure, up to four side by side, which is saved at the end."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # Text stays text, which is smaller than outlines. A fixed salt: the same results give the same file.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": path.stem,
        "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    }
    with matplotlib.rc_context(settings):
        columns = panels if panels <= 4 else min(3, 4, key=lambda columns: -panels % columns)
        lines = -(-panels // columns)
        drawn = pyplot.figure(figsize=(4.3 * columns, 3.5 * lines), layout="constrained")
        axes = list(drawn.subplots(lines, columns, squeeze=False).flat)
        for panel in axes[panels:]:
            panel.set_visible(False)
        if title:
            drawn.suptitle(title)
        yield axes[:panels]
        _save(drawn, path)
        pyplot.close(drawn)


def _save(drawn: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _line(panel: Axes, cases: Sequence[CaseResult], axis: str, value: Value, style: Style, label: str) -> None:
    points = [(float(case.params[axis]), one) for case in cases if (one := value(case)) is not None]
    if points:
        panel.plot(*zip(*points, strict=True), **style._asdict(), label=label, markersize=4, linewidth=1.5)


def _of_peer(name: str, case: CaseResult) -> float | None:
    return case.peers.get(name)


def _finish_ratios(panel: Axes, axis: str, name: str) -> None:
    """A linear axis that shows 0 and 1, or a logarithmic one if some ratio is far from 1."""
    highest = max(_drawn(panel, 1), default=1.0)
    panel.set(title=name, ylabel="ratio", yscale="log" if highest > 10 else "linear")
    if highest <= 10:
        panel.set_ylim(0, 1.1 * max(1.0, highest))
    _finish(panel, axis)
    panel.axhline(1, color=GRAY, linewidth=0.8)


def _finish(panel: Axes, axis: str) -> None:
    """The x axis with its unit and ticks where labels have room; major lines alone; a legend if it tells more."""
    from matplotlib.ticker import LogLocator

    points = sorted(set(_drawn(panel, 0)))
    shown = points[:1]
    for point in points:
        if point / shown[-1] >= (points[-1] / points[0]) ** 0.15:  # room for a label
            shown.append(point)
    panel.set(xscale="log", xlabel=UNITS[axis])
    panel.set_xticks(shown, [point_text(axis, int(point)) for point in shown], fontsize="small")
    if panel.get_yscale() == "log":
        low, high = panel.get_ylim()
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
        panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if len(panel.lines) > 1:
        panel.legend(fontsize="x-small")


def _drawn(panel: Axes, axis: int) -> list[float]:
    """All x (0) or y (1) of a panel's lines."""
    lines: list[Any] = list(panel.lines)
    return [float(value) for line in lines for value in line.get_xydata()[:, axis]]
