"""Compiles the C++ programs of this folder, which need nothing but the headers of the protocol."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
HEADERS = [CSRC / "common" / "dtypes.h", CSRC / "common" / "numerics.h", *sorted((CSRC / "peer").glob("*.h"))]

Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a program with flags, and with other texts for some headers, by name. Programs are cached."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler: g++, or what CXX names")
    if not HEADERS[0].exists():
        pytest.skip("needs the sources under csrc/, which this installation comes without")
    # The processes of pytest-xdist share the parent folder.
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def compile_(source: str, *flags: str, headers: dict[str, str] | None = None) -> Path:
        texts = {path.relative_to(CSRC): path.read_text() for path in HEADERS}
        for name, text in (headers or {}).items():
            texts[Path("peer") / name] = text
        program = Path(__file__).parent / source
        key = hashlib.sha256(repr((texts, program.read_text(), flags)).encode()).hexdigest()[:16]
        folder = shared / f"{program.stem}-{key}"
        if (folder / "program").exists():
            return folder / "program"
        include = tmp_path_factory.mktemp(program.stem)
        for path, text in texts.items():
            (include / path).parent.mkdir(exist_ok=True)
            (include / path).write_text(text)
        command = [compiler, "-std=c++17", "-ffp-contract=off", "-pthread", f"-I{include}", *flags]
        result = subprocess.run(
            [*command, str(program), "-o", str(include / "program")], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        with contextlib.suppress(OSError):  # another test process has renamed its own first
            include.rename(folder)
        return folder / "program"

    return compile_


@pytest.fixture
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program to its end; a program that hangs is a failure."""

    def run(program: Path, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    return run
