"""Result files survive the round trip, bad ones are refused by name, and tables and plots say what the files say."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from abiding.testing.timing import Roofline
from benchmarks.groups import GROUPS
from benchmarks.headline import headline
from benchmarks.result_file import RESULTS, CaseResult, Param, Results, validate
from benchmarks.tables import about, fill, of_op, point_text, targets_met

BENCHMARK = GROUPS["mla_prologue"]


def case(
    tokens: int, us: float, *, l2_warm: bool = False, op: str = BENCHMARK.ops[0], heads: int = 64, **peers: float
) -> CaseResult:
    params: dict[str, Param] = {
        "tokens": tokens,
        "block_size": 64,
        "dtype": "bfloat16",
        "heads": heads,
        "padded_heads": heads,
    }
    return CaseResult(op, params, us, 0.1, l2_warm, tokens * 0.1, peers)


@pytest.fixture
def results() -> Results:
    cases = [case(1, 1.5, vllm=2.5), case(1, 1.4, l2_warm=True), case(64, 9.0, vllm=8.8), case(256, 50.0)]
    return Results(
        "mla_prologue", "NVIDIA H100 80GB HBM3", "580.1", "2.11.0", "13.0", "c" * 40, "2026-01-02", 3005.0, 790.0, cases
    )


def test_a_file_is_named_after_group_and_gpu_and_reads_back_equal(results: Results, tmp_path: Path) -> None:
    path = results.write(tmp_path / "deep" / "er")
    assert path.name == "mla_prologue-h100-80gb-hbm3.json"
    assert Results.read(path) == results
    assert list(json.loads(path.read_text())) == [
        *("group", "gpu", "driver", "torch", "cuda", "commit", "date", "copy_gbps", "matmul_tflops", "cases")
    ]
    assert list(json.loads(path.read_text())["cases"][0]) == [
        "op",
        "params",
        "us",
        "spread_us",
        "l2_warm",
        "bound_us",
        "peers",
    ]


def test_a_file_may_be_named(results: Results, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    assert results.write(path) == path
    assert Results.read(path) == results
    assert results.write(tmp_path / "folder") == tmp_path / "folder" / results.file_name


def test_cases_that_were_timed_again_have_their_commit(results: Results, tmp_path: Path) -> None:
    newer = replace(results, commit="d" * 40, date="2026-02-03", cases=[case(1, 1.2, op="other")])
    once = results.replaced(newer)
    assert once.cases == [*results.cases, replace(newer.cases[0], commit="d" * 40)]
    twice = once.replaced(replace(newer, commit="e" * 40))
    assert [one.commit for one in twice.cases] == [""] * len(results.cases) + ["e" * 40]
    assert (twice.commit, twice.date) == (results.commit, results.date)
    assert Results.read(twice.write(tmp_path)) == twice
    assert of_op(twice, BENCHMARK, "other").endswith(f"Of commit {'e' * 12}: other.")
    part = replace(once, cases=[*once.cases, case(2, 1.3, op="other")])
    assert of_op(part, BENCHMARK, "other").endswith(f"Of commit {'d' * 12}: other, 64 heads (1 of 2).")
    assert "Of commit" not in of_op(once, BENCHMARK, BENCHMARK.ops[0])
    assert of_op(once, BENCHMARK, "other").endswith(f"Of commit {'d' * 12}: other.")


def test_cases_at_some_points_take_their_places(results: Results) -> None:
    """A case is told by its place in the tables, whatever else was measured with it; a new one comes last."""
    first, second = results.cases[0], results.cases[1]
    again = replace(first, us=9.0, params=dict(first.params) | {"exact_us": 3.0})
    newer = replace(results, commit="d" * 40, cases=[again, case(1, 1.2, op="other")])
    found = results.replaced(newer, lambda one: (one.op, one.params["tokens"], one.params["heads"], one.l2_warm))
    assert found.cases[0] == replace(again, commit="d" * 40)
    assert found.cases[1] == second
    assert found.cases[len(results.cases) :] == [replace(newer.cases[1], commit="d" * 40)]


@pytest.mark.parametrize("name", list(GROUPS))
def test_committed_cases_have_places_of_their_own(name: str) -> None:
    for path in RESULTS.glob(f"{name}-*.json"):
        places = [GROUPS[name].place(one) for one in Results.read(path).cases]
        assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpu": None}, r"results.gpu is None; expected a str"),
        ({"copy_gbps": "fast"}, r"results.copy_gbps is 'fast'; expected a number"),
        ({"copy_gbps": True}, r"results.copy_gbps is True; expected a number"),
        ({"cases": {}}, r"results.cases is \{\}; expected a list"),
        ({"extra": 1}, r"has unknown \['extra'\]"),
        ({"cases": [{"op": "x"}]}, r"cases\[0\] lacks \['params', 'us', "),
    ],
)
def test_a_bad_file_is_refused_by_name(change: dict[str, Any], message: str, results: Results, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(asdict(results) | change))
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
        Results.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"us": -1.0}, r"cases\[0\] has us -1.0"),
        ({"l2_warm": 1}, r"cases\[0\].l2_warm is 1; expected a bool"),
        ({"peers": {"vllm": "2"}}, r"cases\[0\].peers.vllm is '2'; expected a number"),
        ({"params": {"tokens": [1]}}, r"cases\[0\].params.tokens is \[1\]"),
    ],
)
def test_a_bad_case_is_refused_by_name(change: dict[str, Any], message: str, results: Results) -> None:
    data = asdict(results)
    data["cases"][0] |= change
    with pytest.raises(ValueError, match=message):
        validate(data)
    with pytest.raises(ValueError, match="results is 3; expected an object"):
        validate(3)


def test_begin_describes_this_machine() -> None:
    here = Results.begin("mla_prologue", torch.device("cpu"), Roofline(12.345, 0.678))
    assert (here.copy_gbps, here.matmul_tflops, here.torch) == (12.3, 0.7, torch.__version__)
    assert here.gpu
    assert here.commit
    assert Results.begin("g", torch.device("cpu"), Roofline(1, 1), commit="abc").commit == "abc"


def test_a_target_is_met_only_within_it_and_beside_every_peer() -> None:
    met = case(64, 8.0, vllm=8.0)
    assert BENCHMARK.target_us(met) == pytest.approx(6.4 / 0.95 + 2.0)
    assert BENCHMARK.verdict(met) == "met"
    assert BENCHMARK.verdict(replace(met, us=8.8)) == "missed"
    assert BENCHMARK.verdict(replace(met, peers={"vllm": 7.9})) == "missed"
    assert BENCHMARK.verdict(replace(met, peers={"vllm": 7.95})) == "met"
    assert BENCHMARK.target_us(case(1, 1.0)) == 1.6
    assert BENCHMARK.verdict(case(64, 1.0, op="gather_kv")) == "-"


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_a_table_has_times_peers_ratios_and_verdicts_of_each_row(results: Results) -> None:
    cold, _, warm = of_op(results, BENCHMARK, BENCHMARK.ops[0]).partition("\n\n")
    head, _, *lines = cells(cold)
    assert head == ["L2-cold", "tokens", "1", "64", "256"]
    assert lines == [
        ["64 heads", "**abiding**", "**1.50**", "**9.00**", "**50.0**"],
        ["", "spread", "0.10", "0.10", "0.10"],
        ["", "vllm", "2.50", "8.80", "-"],
        ["", "/ best peer", "0.60", "1.02", "-"],
        ["", "bound", "0.10", "6.40", "25.6"],
        ["", "target", "1.60", "8.74", "28.9"],
        ["", "verdict", "met", "missed", "missed"],
    ]
    assert [line[:3] for line in cells(warm)][2:4] == [["64 heads", "**abiding**", "**1.40**"], ["", "spread", "0.10"]]
    assert "vllm" not in warm, "no line that says nothing"
    assert of_op(results, BENCHMARK, "gather_kv") == ""
    words = " ".join(about(results).split())
    assert "**NVIDIA H100 80GB HBM3** (driver 580.1, CUDA 13.0, torch 2.11.0; commit cccccccccccc, 2026-01-02)" in words
    met = targets_met(results, BENCHMARK, BENCHMARK.ops)
    assert met == f"Targets met on NVIDIA H100 80GB HBM3: `{BENCHMARK.ops[0]}` 2 of 4."
    assert targets_met(results, BENCHMARK, ["gather_kv"]) == ""


def test_an_operator_may_have_another_axis(results: Results) -> None:
    benchmark = replace(BENCHMARK, other_axes={"insert": "heads"})
    some = replace(results, cases=[case(16, 3.25, op="insert", heads=8), case(16, 4.5, op="insert", heads=128)])
    assert cells(of_op(some, benchmark, "insert"))[0] == ["L2-cold", "heads", "8", "128"]


@pytest.mark.parametrize(("size", "text"), [(16, "16 B"), (1024, "1 KiB"), (98304, "96 KiB"), (1 << 21, "2 MiB")])
def test_sizes_have_units(size: int, text: str) -> None:
    assert point_text("bytes", size) == text
    assert point_text("tokens", size) == str(size)


def test_only_what_stands_between_the_markers_is_filled() -> None:
    text = "a\n<!-- results:x -->\nstale\n<!-- /results:x -->\nb <!-- results:other -->\n"
    once = fill(text, "results:x", ["new", "", "more"])
    assert once == "a\n<!-- results:x -->\n\nnew\n\nmore\n\n<!-- /results:x -->\nb <!-- results:other -->\n"
    assert fill(once, "results:x", ["new", "", "more"]) == once


def test_the_headline_names_the_best_peer_of_each_card(results: Results) -> None:
    chosen = replace(results, cases=[*results.cases, case(256, 10.0, vllm=20.0, other=16.0)])
    job = "DeepSeek V4 MLA prologue, 64 heads, 256 tokens"
    assert cells(headline([chosen]))[-1] == [job, "10.0", "16.0", "other", "**0.62**", "NVIDIA H100 80GB HBM3"]
    assert len(headline([results]).splitlines()) == 2, "no row without a peer's time"
