"""Finding and loading the binaries; if that cannot work, one clear sentence and never a crash."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import abiding
from abiding import _library

Python = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = Path("load_library.py")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the installed package in another folder."""
    target = tmp_path / "another place" / "abiding"
    for folder in abiding.__path__:
        if Path(folder).is_dir():
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    assert (target / "libabiding.so").is_file()
    return target


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


# --- torch ------------------------------------------------------------------------------------------------------------


def test_importing_with_an_old_torch_says_so(python: Python) -> None:
    result = python(PROGRAM, "torch=2.9.1+cu128", "report")
    (line,) = result.stdout.strip().splitlines()
    assert line.startswith("ImportError: abiding needs torch >= 2.10"), line
    assert "2.9.1+cu128" in line
    assert result.stderr == ""


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.1.0", "1.13.1"])
def test_an_old_torch_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=re.escape(version)):
        _library._check_torch()


@pytest.mark.parametrize("version", ["2.10.0", "2.10.0a0+git1234", "2.15.0+cu132", "3.0.0", "10.1"])
def test_a_new_torch_is_accepted(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    _library._check_torch()


# --- the binaries -----------------------------------------------------------------------------------------------------


def test_binaries_of_this_installation() -> None:
    names = [path.name for path in abiding.binaries()]
    assert names in (["libabiding.so"], ["libabiding.so", "libabiding_cuda.so"])
    assert all(path.is_file() for path in abiding.binaries())
    assert str(abiding.binaries()[0]) in Path("/proc/self/maps").read_text()


def test_cuda_kernels_or_a_reason() -> None:
    reason = abiding.cuda_unavailable_reason()
    assert abiding.has_cuda_kernels() == (reason is None)
    if reason is None:
        return
    assert len(reason.splitlines()) == 1
    assert "CUDA" in reason or "cuda" in reason
    with pytest.raises(RuntimeError) as caught:
        _library.require_cuda_kernels()
    assert str(caught.value) == reason


def test_loading_again_changes_nothing(python: Python) -> None:
    python(PROGRAM, "import", "again", "works")


def test_a_link_to_the_same_file_is_the_same_library(python: Python, tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "libabiding.so").symlink_to(abiding.binaries()[0].resolve())
    result = python(PROGRAM, f"load={tmp_path}/link/libabiding.so", "import", "works")
    assert result.stdout.strip() == "works"


def test_only_torch_is_needed(python: Python) -> None:
    result = python(PROGRAM, "packages")
    assert last_line(result.stdout) == "['abiding']"


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_a_missing_binary_is_named(python: Python, copy: Path) -> None:
    (copy / "libabiding.so").unlink()
    result = python(PROGRAM, f"copy={copy}")
    (line,) = result.stdout.strip().splitlines()
    assert line.startswith("ImportError: ")
    assert "libabiding.so" in line


@pytest.mark.parametrize(
    "content", [b"", b"not a library", b"\x7fELF" + bytes(4096)], ids=["empty", "text", "cut short"]
)
def test_a_binary_that_cannot_load_is_named(python: Python, copy: Path, content: bytes) -> None:
    (copy / "libabiding.so").write_bytes(content)
    result = python(PROGRAM, f"copy={copy}", check=False)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.strip().splitlines()
    assert line.startswith("ImportError: ")
    assert str(copy / "libabiding.so") in line


def test_a_second_package_is_refused(python: Python, copy: Path) -> None:
    result = python(PROGRAM, "library", f"copy={copy}", "works")
    first, line, works = result.stdout.strip().splitlines()
    assert line.startswith("ImportError: ")
    assert "another copy" in line
    assert str(copy / "libabiding.so") in line
    assert first in line
    assert works == "works"


@pytest.mark.parametrize("name", ["libabiding.so", "renamed.so"])
def test_a_second_library_is_refused(python: Python, copy: Path, name: str) -> None:
    """Loaded without the package's loader: the first library stays in use, and one line on stderr says so."""
    second = copy.parent / name
    shutil.copy(copy / "libabiding.so", second)
    result = python(PROGRAM, "import", f"load={second}", "works", check=False)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"
    output = (result.stderr + result.stdout.removesuffix("works\n")).strip()
    assert len(output.splitlines()) == 1, output
    assert str(second) in output
    assert str(abiding.binaries()[0].resolve()) in output or str(abiding.binaries()[0]) in output
    assert last_line(result.stdout) == "works"


def test_the_package_is_refused_after_another_library(python: Python, copy: Path) -> None:
    result = python(PROGRAM, f"load={copy / 'libabiding.so'}", "report", "works")
    line, works = result.stdout.strip().splitlines()
    assert line.startswith("ImportError: ")
    assert str(copy / "libabiding.so") in line
    assert works == "works"


def test_two_libraries_without_the_package(python: Python, copy: Path) -> None:
    first, second = copy / "libabiding.so", copy.parent / "libabiding.so"
    shutil.copy(first, second)
    result = python(PROGRAM, f"load={first}", f"load={second}", "works", check=False)
    assert result.returncode == 0, f"exit status {result.returncode}: {result.stderr}"
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(second) in result.stderr
    assert result.stdout == "works\n"


def test_importing_from_a_folder_with_odd_characters(python: Python, copy: Path) -> None:
    odd = copy.parent.parent / "ünï (copy) %s 'x'" / "abiding"
    odd.parent.mkdir()
    os.rename(copy, odd)
    result = python(PROGRAM, f"copy={odd}", "works")
    assert result.stdout.strip().splitlines() == [f"imported {odd / 'libabiding.so'}", "works"]
