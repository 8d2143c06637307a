"""The command line `python -m benchmarks`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.groups import GROUPS
from benchmarks.result_file import Results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "argument group: invalid choice: 'nothing'"),
        (["--op", "moe"], "--op moe without a group"),
        (["--at", "8"], "--at 8 without a group"),
        (["mxfp8_moe", "--op", "nothing"], r"ops ['nothing']; expected some of ['"),
    ],
)
def test_what_cannot_be_timed_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_group_is_timed_into_the_named_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.json"
    assert main(["mla_prologue", "--quick", "--op", "gather_kv", "--commit", "abc", "--output", str(path)]) == 0
    found = Results.read(path)
    assert (found.group, found.commit) == ("mla_prologue", "abc")
    assert {case.op for case in found.cases} == {"gather_kv"}
    assert "`gather_kv`, µs per call:" in capsys.readouterr().out


def test_only_some_points_are_timed_again(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    arguments = ["mxfp8_moe", "--op", "quantize", "--output", str(path)]
    assert main([*arguments, "--commit", "old"]) == 0
    assert main([*arguments, "--commit", "new", "--at", "8"]) == 0
    found = Results.read(path)
    assert [(case.params["tokens"], case.commit) for case in found.cases] == [(1, ""), (8, "new")]
    assert found.commit == "old"


def test_points_without_cases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["mxfp8_moe", "--op", "quantize", "--output", str(tmp_path / "some.json"), "--at", "7"])
    assert "at [7] there are no cases of quantize" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_only_moves_bytes_has_a_target_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "some.json"
    assert main(["mxfp8_moe", "--op", "rebase", "--op", "quantize_rowwise", "--output", str(path)]) == 0
    cases = Results.read(path).cases
    assert [(case.op, case.params["k"]) for case in cases] == [
        *(("quantize_rowwise", 256), ("quantize_rowwise", 256), ("rebase", 256), ("rebase", 128))
    ]
    benchmark = GROUPS["mxfp8_moe"]
    assert [benchmark.target_us(case) for case in cases] == [case.bound_us / 0.9 + 2.5 for case in cases]
    assert [benchmark.row(case) for case in cases] == ["256 columns", "256 columns", "small", "small"]
    assert benchmark.axis_of("rebase") == "k"
    assert "`rebase`, µs per call:" in capsys.readouterr().out
