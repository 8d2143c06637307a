"""Rewrite the tables of README.md and docs/*.md, and the plots, from the result files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import limits, multi_gpu
from benchmarks.groups import GROUPS
from benchmarks.headline import headline
from benchmarks.plots import plot, plot_ratios
from benchmarks.result_file import RESULTS, Results
from benchmarks.tables import fill, rewrite


def write(results: Path, documents: Sequence[Path], plots: Path) -> None:
    """Fill the documents' markers and write a plot per result file.

    Raises:
        ValueError: `results` has no result files, or an invalid one.
    """
    found = [Results.read(path) for path in sorted(results.glob("*.json"))]
    if not found:
        raise ValueError(f"{results} holds no result files; `make bench` on a machine with a GPU makes some")
    for group, benchmark in (GROUPS | {"multi_gpu": multi_gpu.BENCHMARK}).items():
        members = [one for one in found if one.group == group]
        for one in members:
            if not any(case.op == benchmark.ops[0] for case in one.cases):
                continue
            path = plots / f"{Path(one.file_name).stem}.svg"
            plot(one, benchmark, path)
            print(f"Wrote {path}")
        if members:
            _rewrite(documents, partial(rewrite, group=group, results=members, benchmark=benchmark))
    _rewrite(documents, lambda text: fill(text, "results:headline", [headline(found)]))
    ratios = plots / "ratios.svg"
    plot_ratios(found, ratios)
    print(f"Wrote {ratios}")
    profiled = [limits.to_markdown(one) for one in found if one.group == limits.GROUP]
    if profiled:
        _rewrite(documents, lambda text: fill(text, limits.MARKER, profiled))


def _rewrite(documents: Sequence[Path], rewritten: Callable[[str], str]) -> None:
    for document in documents:
        text = document.read_text()
        if (new := rewritten(text)) != text:
            document.write_text(new)
            print(f"Wrote {document}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--document", type=Path, action="append", help="file with markers to fill; repeatable")
    parser.add_argument("--plots", type=Path, default=Path("docs/plots"), help="folder for the plots")
    chosen = parser.parse_args()
    documents = chosen.document or [Path("README.md"), *sorted(Path("docs").glob("*.md"))]
    try:
        write(chosen.results, [path for path in documents if path.exists()], chosen.plots)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
