"""The ratchet: what fails, what holds, what tighten writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from abiding_abi import ratchet
from abiding_abi.cli import app
from abiding_abi.errors import UserError
from abiding_abi.ratchet import Ledger, compare

LINE = "at::Tensor a;\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cpp").write_text(LINE * 2)
    (tmp_path / "csrc" / "b.cpp").write_text(LINE)
    monkeypatch.chdir(tmp_path)
    assert run("init", "csrc") == (0, "abi-ratchet.json: 3 findings in 2 files")
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["ratchet", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output.strip()


def test_holds_and_file_is_sorted(project: Path) -> None:
    assert run("check") == (0, "holds: 3 findings in 2 files")
    data = json.loads((project / "abi-ratchet.json").read_text())
    assert data["sources"] == {"csrc/a.cpp": {"TYP001": 2}, "csrc/b.cpp": {"TYP001": 1}}
    assert data["paths"] == ["csrc"]


def test_rise_fails_and_is_not_tightened(project: Path) -> None:
    (project / "csrc" / "b.cpp").write_text(LINE * 2)
    assert run("check") == (1, "csrc/b.cpp: TYP001 rose from 1 to 2\nfails: 4 findings in 2 files")
    before = (project / "abi-ratchet.json").read_bytes()
    assert run("tighten")[0] == 1
    assert (project / "abi-ratchet.json").read_bytes() == before


def test_move_fails_though_the_sum_stays(project: Path) -> None:
    (project / "csrc" / "a.cpp").write_text(LINE)
    (project / "csrc" / "b.cpp").write_text(LINE * 2)
    code, text = run("check")
    assert code == 1
    assert "csrc/b.cpp: TYP001 rose from 1 to 2 (it fell in csrc/a.cpp: moving is not falling)" in text


def test_stale_entry_fails_until_tightened(project: Path) -> None:
    (project / "csrc" / "a.cpp").unlink()
    assert run("check") == (
        1,
        "csrc/a.cpp: TYP001 fell from 2 to 0: run 'abiding-abi ratchet tighten'\nfails: 1 findings in 1 files",
    )
    assert run("tighten") == (0, "1 entries lowered: 1 findings in 1 files")
    assert run("check") == (0, "holds: 1 findings in 1 files")


def test_binaries_count_by_symbol() -> None:
    allowed = Ledger(binaries={"a.so": {"x": 1, "y": 1}})
    rises, stale = compare(allowed, Ledger(binaries={"a.so": {"x": 1, "z": 1}}))
    assert rises == ["a.so: z rose from 0 to 1"]
    assert stale == ["a.so: y fell from 1 to 0"]


def test_init_does_not_overwrite(project: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        run("init", "csrc")
    assert run("init", "csrc", "--force")[0] == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 2}', '{"version": 1, "sources": {"a": {"TYP001": 0}}}', "\xff"]
)
def test_broken_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "abi-ratchet.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as error:
        ratchet.read(path)
    assert "\n" not in str(error.value)


def test_unreadable_binary_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    path.write_text("no library")
    with pytest.raises(UserError, match=r"a\.so"):
        ratchet.unstable_symbols(path)
