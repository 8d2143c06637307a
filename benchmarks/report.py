"""Write docs/results and the plots, and fill the markers of README.md and docs/*.md, from the result files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import limits, multi_gpu
from benchmarks.base import Benchmark
from benchmarks.engines import report as engines
from benchmarks.groups import GROUPS
from benchmarks.headline import headline
from benchmarks.plots import plot, plot_ratios
from benchmarks.result_file import RESULTS, Results
from benchmarks.tables import about, fill, of_op, targets_met, wrap

LEGEND = """
Times are microseconds per call: the median, and as spread the distance from the 10th to the 90th percentile of the
repetitions. `/ best peer` is our time as a part of the fastest peer's: below 1 ours is faster. The bound is the
roofline's, max(bytes / bandwidth, FLOP / rate), at the rates measured in the same run. A target is met by a time within
it that is also not more than 1 % slower than any peer's. What the targets are, and what limits a kernel:
[{page}](../{page}#results). Written by `make docs` from [benchmarks/results](../../benchmarks/results).
"""


@dataclass(frozen=True)
class Part:
    """Operators of a benchmark on a page; the first is plotted."""

    benchmark: Benchmark
    ops: tuple[str, ...]


_SEVERAL_GPUS = {
    "all_reduce": Part(multi_gpu.BENCHMARK, ("graph", "eager", "one-shot", "two-shot")),
    "reduce_rms": Part(multi_gpu.BENCHMARK, ("qk_norm graph", "qk_norm eager")),
}
PAGES: Mapping[str, tuple[Part, ...]] = {
    name: (*([_SEVERAL_GPUS[name]] if name in _SEVERAL_GPUS else []), Part(benchmark, benchmark.ops))
    for name, benchmark in GROUPS.items()
}
"""What each page of docs/results holds, by group: no operator stands on two."""


def page(name: str, found: Sequence[Results]) -> str:
    """The page docs/results/NAME.md."""
    parts = [f"# Results: `{name}`", wrap(LEGEND.format(page=f"{name}.md").strip())]
    for part, results in _of_page(name, found):
        alone = ", virtual ranks and CPU processes" if name in _SEVERAL_GPUS and results.group == name else ""
        parts += [f"## {results.gpu}{alone}", about(results)]
        if "graph" in part.ops:
            parts.append("\n".join(f"- {line}" for line in multi_gpu.checked(results)))
        for op in part.ops:
            if tables := of_op(results, part.benchmark, op):
                plotted = [f"![{op} on {results.gpu}](../plots/{_plot(results, op).name})"] if op == part.ops[0] else []
                parts += [f"### `{op}`", *plotted, tables]
    profiled = [limits.to_markdown(one) for one in found if name == "mxfp8_moe" and one.group == limits.GROUP]
    return "\n\n".join([*parts, *(["## What limits a layer", *profiled] if profiled else [])]) + "\n"


def _of_page(name: str, found: Sequence[Results]) -> Iterator[tuple[Part, Results]]:
    return ((part, one) for part in PAGES[name] for one in found if one.group == part.benchmark.group)


def _plot(results: Results, op: str) -> Path:
    suffix = "" if results.group != "multi_gpu" else f"-{op.replace(' ', '_')}"
    return Path("docs/plots") / f"{Path(results.file_name).stem}{suffix}.svg"


def texts(root: Path) -> dict[Path, str]:
    """What `make docs` makes of every page that it writes or fills, by path.

    Raises:
        ValueError: there are no result files, or an invalid one.
    """
    found = _found(root)
    made = {root / f"docs/results/{name}.md": page(name, found) for name in PAGES}
    made |= {root / f"docs/results/{name}.md": text for name, text in engines.pages(root).items()}
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text = fill(path.read_text(), "results:headline", [headline(found)])
        for name in PAGES:
            met = [targets_met(one, part.benchmark, part.ops) for part, one in _of_page(name, found)]
            text = fill(text, f"results:{name}:targets", ["\n".join(f"- {line}" for line in met if line)])
        made[path] = text
    return made


def plots(root: Path) -> None:
    """Draw every plot."""
    found = _found(root)
    for name in PAGES:
        for part, results in _of_page(name, found):
            op = part.ops[0]
            if any(case.op == op for case in results.cases):
                plot(results, part.benchmark, op, root / _plot(results, op), f"{name}: {op}")
    plot_ratios(found, root / "docs/plots/ratios.svg")
    engines.plot(root)


def _found(root: Path) -> list[Results]:
    found = [Results.read(path) for path in sorted((root / RESULTS).glob("*.json"))]
    if not found:
        raise ValueError(f"{root / RESULTS} holds no result files; `make bench` on a machine with a GPU makes some")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout (default: the current folder)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not what it would be")
    chosen = parser.parse_args(arguments)
    stale = []
    for path, text in texts(chosen.root).items():
        if not path.exists() or path.read_text() != text:
            stale.append(str(path))
            if not chosen.check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                print(f"Wrote {path}")
    if not chosen.check:
        plots(chosen.root)
    elif stale:
        sys.exit(f"`make docs` would change {', '.join(stale)}")


if __name__ == "__main__":
    main()
