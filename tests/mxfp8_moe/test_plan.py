"""The tiling of the sm_90 grouped GEMM: its header, which host and device share, compiled and tried on every size."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from abiding.testing.cases.mxfp8_moe import TILES

CSRC = Path(__file__).parents[2] / "csrc"


def run(name: str, folder: Path, given: str = "") -> subprocess.CompletedProcess[str]:
    """Compile a program of this folder, and run it with `given` as its input."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler: g++, or what CXX names")
    if not (CSRC / "mxfp8_moe").exists():
        pytest.skip("needs the sources under csrc/, which this installation comes without")
    program = folder / name
    source = Path(__file__).parent / f"{name}.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    return subprocess.run([str(program)], input=given, capture_output=True, text=True, timeout=120, check=False)


def test_every_number_of_tokens_is_tiled_well(tmp_path: Path) -> None:
    result = run("plan", tmp_path)
    assert result.returncode == 0, result.stdout[:2000]


def test_cases_have_tiles_of_every_width(tmp_path: Path) -> None:
    """A GPU's tests would not notice that another threshold leaves a kernel without cases."""
    lines = "".join(f"{case.n} {case.k} {' '.join(map(str, case.sizes))}\n" for case in TILES)
    assert run("widths", tmp_path, lines).stdout == ""
    without = run("widths", tmp_path, lines.partition("\n")[2]).stdout
    assert without.splitlines() == [
        f"{rows} rows, shape 0, width {width}" for rows in ("bf16", "e4m3") for width in (8, 16)
    ]
