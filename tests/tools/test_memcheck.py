"""memcheck: sessions of tests under a tool that stands in for compute-sanitizer, and the record of what is clean."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "memcheck.py"
TESTS = """
import os, time, pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("name", ["a", "b c", "d"])
def test_passes(name): pass

def test_fails(): assert "broken" in os.environ.get("STATE", "") or not os.environ.get("STATE")

def test_takes_long():
    if os.environ.get("STATE") == "slow": time.sleep(60)

def test_at_the_end(): pass

def test_of_two_gpus(): pytest.skip("needs 2 GPUs")

def test_kernels_are_loaded(): assert os.environ["CUDA_MODULE_LOADING"] == "EAGER"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tests; PATH begins with a tool that runs its command and logs as many errors as ERRORS says."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\n[ "$1 $2 $3" = "--tool memcheck --log-file" ] || exit 9\nlog=$4; shift 4\n"$@"; status=$?\n'
        'echo "========= ERROR SUMMARY: ${ERRORS:-0} errors" > "$log"\nexit $status\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def memcheck(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), "--jobs", "2", "--size", "2", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def outcome(folder: Path, test: str) -> tuple[str, int | None]:
    found = json.loads((folder / "memcheck.json").read_text())[f"test_some.py::{test}"]
    return found["result"], found["errors"]


def test_what_is_clean_is_not_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "something")
    first = memcheck("test_some.py", "-k", "not two_gpus and not kernels")
    assert first.returncode == 1, first.stdout + first.stderr
    assert "6 of 6 tests, 3 sessions" in first.stdout
    assert "5 of 6 tests are clean" in first.stdout
    assert outcome(folder, "test_passes[b c]") == ("passed", 0)
    assert outcome(folder, "test_fails") == ("failed", 0)
    monkeypatch.setenv("STATE", "broken")
    again = memcheck("test_some.py", "-k", "not two_gpus and not kernels")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 of 6 tests, 1 sessions" in again.stdout


def test_reports_of_the_tool_are_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRORS", "3")
    result = memcheck("test_some.py", "-k", "passes")
    assert result.returncode == 1
    assert outcome(folder, "test_passes[d]") == ("passed", 3)
    assert "0 of 3 tests are clean" in result.stdout


def test_a_session_that_takes_too_long_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE", "slow")
    begin = time.monotonic()
    result = memcheck("test_some.py", "-k", "takes_long or end", "--seconds", "8")
    assert time.monotonic() - begin < 45
    assert result.returncode == 1
    assert outcome(folder, "test_takes_long")[0] == "cut off"


def test_a_skipped_test_is_not_clean(folder: Path) -> None:
    result = memcheck("test_some.py", "-k", "two_gpus")
    assert result.returncode == 1
    assert outcome(folder, "test_of_two_gpus") == ("skipped", 0)


def test_kernels_are_loaded_beforehand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    result = memcheck("test_some.py", "-k", "kernels")
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_the_tool_nothing_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder / "empty"))
    result = memcheck("test_some.py")
    assert result.returncode == 2
    assert "compute-sanitizer is not on the PATH" in result.stderr


def test_arguments_that_find_no_tests(folder: Path) -> None:
    result = memcheck("test_some.py", "-k", "nothing")
    assert result.returncode == 1
    assert "finds no tests" in result.stderr
