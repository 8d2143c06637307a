"""The tiling of the sm_90 grouped GEMM: its header, which host and device share, compiled and tried on every size."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


def test_every_number_of_tokens_is_tiled_well(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler: g++, or what CXX names")
    if not (CSRC / "mxfp8_moe").exists():
        pytest.skip("needs the sources under csrc/, which this installation comes without")
    program = tmp_path / "plan"
    source = Path(__file__).parent / "plan.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout[:2000]
