"""The gates of tools/ find what they are for, and say where it is."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
long_lines = runpy.run_path(str(TOOLS / "check_lines.py"))["long_lines"]
KERNEL = (
    "ptxas info    : Compiling entry function '{kernel}' for '{arch}'\n"
    "    0 bytes stack frame, {spilled} bytes spill stores, 0 bytes spill loads\n"
    "ptxas info    : Used 168 registers\n"
)


def run(tool: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOLS / tool, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["a.cu", "a.py", "Makefile", "a.cmake", "a.yaml", "a.toml", "a.md", ".ci/run"])
def test_a_line_of_121_columns_is_too_long(name: str) -> None:
    text = "short\n" + "µ" * 120 + "\n" + "x" * 121 + "\n"  # columns, not bytes
    assert long_lines(name, text) == [f"{name}:3: 121 columns; expected at most 120"]


def test_only_tables_urls_and_generated_results_may_be_longer() -> None:
    long = "x" * 121
    text = f"| {long} |\nhttps://{long}\n<!-- results:group -->\n{long}\n<!-- /results:group -->\n    {long}\n{long}"
    assert [complaint.split(":")[1] for complaint in long_lines("a.md", text)] == ["6", "7"]
    assert [complaint.split(":")[1] for complaint in long_lines("a.cu", text)] == ["1", "4", "6", "7"]


def test_the_line_gate_fails_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.sh"
    file.write_text("x" * 120)
    assert run("check_lines.py", file).returncode == 0
    file.write_text("\n" + "x" * 121)
    failed = run("check_lines.py", file)
    assert failed.returncode == 1
    assert failed.stderr == f"{file}:2: 121 columns; expected at most 120\n"


@pytest.mark.parametrize(
    ("file", "archs", "complaint"),
    [
        ("mm_sm90.cu", ["sm_90a"], ""),
        ("mm_sm90.cu", ["sm_80", "sm_90a"], "g/mm_sm90.cu: code for sm_80, sm_90a; expected sm_90a alone\n"),
        ("mm_sm100.cu", ["sm_100a"], ""),
        ("mm_sm100.cu", ["sm_90a"], "g/mm_sm100.cu: code for sm_90a; expected sm_100a alone\n"),
        ("mm_sm100.cu", [], "g/mm_sm100.cu: code for nothing; expected sm_100a alone\n"),
        ("mm_sm100a.cu", ["sm_100a"], "g/mm_sm100a.cu: code for sm_100a; expected sm_90a among them\n"),  # no suffix
        ("mm.cu", ["sm_80", "sm_90a"], ""),
        ("mm.cu", ["sm_80"], "g/mm.cu: code for sm_80; expected sm_90a among them\n"),
    ],
)
def test_a_kernel_file_is_compiled_for_what_its_name_says(
    tmp_path: Path, file: str, archs: list[str], complaint: str
) -> None:
    log = tmp_path / "g" / f"{file}.o.log"
    log.parent.mkdir()
    log.write_text("".join(KERNEL.format(kernel="k", arch=arch, spilled=0) for arch in archs))
    checked = run("check_ptxas.py", tmp_path)
    assert (checked.returncode, checked.stderr) == (int(bool(complaint)), complaint)


def test_spills_and_serialized_wgmma_are_named(tmp_path: Path) -> None:
    warning = "ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    (tmp_path / "mm.cu.o.log").write_text(KERNEL.format(kernel="k", arch="sm_90a", spilled=8) + warning + "\n")
    checked = run("check_ptxas.py", tmp_path)
    assert checked.returncode == 1
    assert "mm.cu: spills 8 bytes on sm_90a in k\n" in checked.stderr
    assert warning in checked.stderr
