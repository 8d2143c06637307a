"""compare_sass: machine code is compared without symbol names, and what differs is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "compare_sass.py"
WHEELS = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
SOURCE = """
struct Rows { float* data; };
template <class T> __global__ void scale(T x, float a) { x.data[threadIdx.x] *= a; }
template __global__ void scale(Rows, float);
__global__ void fill(Rows x, float a) { x.data[threadIdx.x] = a; }
"""
Compile = Callable[[str], Path]


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles CUDA source. Skips where there is no compiler or no disassembler."""
    path = os.pathsep.join((str(WHEELS), os.environ["PATH"]))
    programs = ("nvcc", "cuobjdump", "nvdisasm", "c++filt")
    missing = [program for program in programs if not shutil.which(program, path=path)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    nvcc = str(shutil.which("nvcc", path=path))

    @cache
    def compiled(source: str) -> Path:
        file = tmp_path_factory.mktemp("cubin") / "kernels.cu"
        file.write_text(source)
        result = file.with_suffix(".cubin")
        subprocess.run([nvcc, "-cubin", "-arch=sm_90a", "-o", str(result), str(file)], check=True)
        return result

    return compiled


def compare(*binaries: Path) -> tuple[int, list[str], list[str]]:
    """Exit status, lines of stdout, lines of stderr."""
    done = subprocess.run([sys.executable, TOOL, *binaries], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def test_names_do_not_count(cubin: Compile) -> None:
    old = cubin(SOURCE)
    new = cubin(SOURCE.replace("scale", "multiply_rows").replace("Rows", "Matrix"))
    assert old.read_bytes() != new.read_bytes()
    assert compare(old, new) == (0, ["2 kernels, all with the same machine code"], [])


def test_kernels_that_changed_or_came_are_named(cubin: Compile) -> None:
    new = cubin(SOURCE.replace("*= a", "+= a") + "__global__ void clear(Rows x) { x.data[blockIdx.x] = 0; }")
    status, lines, errors = compare(cubin(SOURCE), new)
    assert (status, errors) == (1, [])
    assert [line.split(" (")[0] for line in lines] == [
        "only in NEW: sm_90a clear(Rows)",
        "only in NEW: sm_90a void scale<Rows>(Rows, float)",
        "only in OLD: sm_90a void scale<Rows>(Rows, float)",
    ]
    assert all(" instructions, REG:" in line for line in lines)


def test_two_kernels_of_the_same_code_need_two_matches(cubin: Compile) -> None:
    new = cubin(SOURCE.replace("x.data[threadIdx.x] *= a", "x.data[threadIdx.x] = a"))
    status, lines, _ = compare(cubin(SOURCE), new)
    assert (status, len(lines)) == (1, 2)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "old.so"
    error = f"{missing}: no such file; expected a cubin, an object or a shared library"
    assert compare(missing, tmp_path / "new.so") == (2, [], [error])


def test_a_file_without_kernels_is_one_line(cubin: Compile, tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("no device code\n")
    for name in (text, cubin("__device__ int data;")):
        for binaries in ((cubin(SOURCE), name), (name, cubin(SOURCE))):
            status, lines, errors = compare(*binaries)
            assert (status, lines, len(errors)) == (2, [], 1), errors
            assert str(name) in errors[0]
