"""Plots have a panel per row and the ratios beside it, lines that can be told apart, and are the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.base import Benchmark
from benchmarks.groups import GROUPS
from benchmarks.plots import PEERS, ROWS, plot, plot_ratios
from benchmarks.result_file import CaseResult, Results

pyplot = pytest.importorskip("matplotlib.pyplot")
BENCHMARK: Benchmark = GROUPS["mla_prologue"]
OP = BENCHMARK.ops[0]


def case(tokens: int, us: float, heads: int = 64, **peers: float) -> CaseResult:
    return CaseResult(OP, {"tokens": tokens, "heads": heads}, us, 0.1, False, tokens * 0.1, peers)


CASES = [
    *(case(1, 1.5, vllm=2.5), case(64, 9.0, vllm=8.8), case(256, 50.0)),
    *(case(1, 2.0, heads=128, vllm=1.0, sglang=4.0), case(64, 9.5, heads=128, vllm=9.0)),
    case(64, 1.0, heads=16),
]
RESULTS = Results("mla_prologue", "NVIDIA H100", "580.1", "2.11.0", "13.0", "c" * 40, "2026-01-02", 3e3, 790.0, CASES)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_results_plot_to_the_same_file(suffix: str, tmp_path: Path) -> None:
    first, second = tmp_path / f"a{suffix}", tmp_path / "plots" / f"a{suffix}"
    for path in (first, second):
        plot(RESULTS, BENCHMARK, OP, path, "title")
    assert first.read_bytes() == second.read_bytes()
    for path in (first, second):
        plot_ratios([RESULTS], path)
    assert first.read_bytes() == second.read_bytes()


def test_a_panel_per_row_and_two_of_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot(RESULTS, BENCHMARK, OP, tmp_path / "plot.svg", "mla_prologue: insert")
    (figure,) = figures
    assert figure.get_suptitle() == "mla_prologue: insert, NVIDIA H100, L2-cold"
    panels = [panel for panel in figure.axes if panel.get_visible()]
    drawn = {panel.get_title(): {line.get_label(): line for line in panel.lines} for panel in panels}
    assert list(drawn) == ["64 heads", "128 heads", "our time / the best peer's", "our time / the bound"], (
        "a row of one point is left to the tables"
    )
    assert list(drawn["128 heads"]) == ["sglang", "vllm", "abiding", "bound"]
    assert list(drawn["128 heads"]["abiding"].get_ydata()) == [2.0, 9.5]
    best, bound = drawn["our time / the best peer's"], drawn["our time / the bound"]
    assert list(best["64 heads"].get_ydata()) == pytest.approx([1.5 / 2.5, 9.0 / 8.8]), "no peer at 256 tokens"
    assert list(best["128 heads"].get_ydata()) == pytest.approx([2.0, 9.5 / 9.0]), "the faster of two peers"
    assert list(bound["64 heads"].get_ydata()) == pytest.approx([15.0, 9.0 / 6.4, 50 / 25.6])
    assert {panel.get_xlabel() for panel in panels} == {"tokens per call"}
    assert [panel.get_ylabel() for panel in panels] == ["µs per call", "µs per call", "ratio", "ratio"]


def test_without_peers_there_is_no_ratio_to_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    alone = replace(RESULTS, cases=[replace(one, peers={}) for one in CASES])
    plot(alone, BENCHMARK, OP, tmp_path / "plot.svg", "title")
    titles = [panel.get_title() for panel in figures[0].axes if panel.get_visible()]
    assert titles == ["64 heads", "128 heads", "our time / the bound"]


def test_lines_of_a_panel_differ_in_dashes_and_markers_too() -> None:
    together = (
        {"nccl", "nccl symmetric", "sglang", "symm_mem one-shot", "symm_mem two-shot", "vllm"},
        {"marlin", "humming"},
        {"deep_gemm", "humming_fp8_token", "humming_fp8_block"},
    )
    for names in together:
        styles = [PEERS[name] for name in names] + [ROWS[0]]
        assert len({style.color for style in styles}) == len(styles)
        assert len({(style.linestyle, style.marker) for style in styles}) == len(styles)
    assert len(set(ROWS)) == len(ROWS)
