"""Two builds timed by turns: each in a process of its own, the same cases, ratios per round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import compare_builds
from benchmarks.compare_builds import INSTALLED, Build, Time


class Made:
    """A build whose times are made up."""

    def __init__(self, name: str, *rounds: list[Time]) -> None:
        self.name = name
        self.times: Iterator[Time | None] = iter([time for some in rounds for time in (*some, None)])

    def next(self) -> Time | None:
        return next(self.times)


def times(*all_us: float) -> list[Time]:
    return [Time("moe", "a shape", str(tokens), us) for tokens, us in enumerate(all_us)]


def test_medians_are_of_ratios_within_a_round() -> None:
    """The board was twice as slow in the second round."""
    old = Made("OLD", times(10.0, 5.0), times(20.0, 10.0), times(10.0, 5.0))
    new = Made("NEW", times(9.0, 10.0), times(18.0, 20.0), times(9.5, 10.0))
    text = compare_builds.to_markdown(compare_builds.compare([old, new], 3))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    first = ["moe", "a shape", "0", "10.00", "9.50", "0.900"]
    second = ["moe", "a shape", "1", "5.00", "10.00", "2.000"]
    assert cells[2:] == [first, second]
    assert text.endswith("NEW / OLD, geometric mean over cases: `moe` 1.342.")


def test_builds_with_different_cases_are_refused() -> None:
    for some, other in (((1.0, 2.0), (1.0,)), ((1.0,), (1.0, 2.0))):
        with pytest.raises(RuntimeError, match="the builds make different cases"):
            compare_builds.compare([Made("OLD", times(*some)), Made("NEW", times(*other))], 1)


def test_an_installed_build_beside_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_builds.main([INSTALLED, INSTALLED, "mxfp8_moe", "--op", "rebase", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.count("| rebase") == 2


def test_no_cases_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_builds.main([INSTALLED, INSTALLED, "mxfp8_moe", "--op", "quantize", "--at", "7"]) == 1
    assert "compare_builds: the builds make no such cases: see --op and --at" in capsys.readouterr().err


def test_a_folder_comes_before_what_is_installed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "abiding"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('of the folder')")
    build = Build("OLD", str(tmp_path), "mxfp8_moe")
    try:
        with pytest.raises(RuntimeError, match="the process of OLD ended with status 1"):
            build.next()
    finally:
        build.close()
    assert "of the folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere", INSTALLED, "mxfp8_moe"],
            "OLD is 'nowhere'; expected a wheel, a folder that holds",
        ),
        ([INSTALLED, INSTALLED, "moe"], "GROUP is 'moe'; expected one of ['mla_prologue', "),
        ([INSTALLED, INSTALLED, "mxfp8_moe", "--op", "qk_norm"], "--op is 'qk_norm'; expected one of ['moe', "),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare_builds.main(arguments)
    assert message in capsys.readouterr().err
