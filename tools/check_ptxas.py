"""Fail if ptxas spilled registers, serialized WGMMA or compiled a kernel file for other architectures than its suffix.

    python tools/check_ptxas.py BUILD_FOLDER

A file `*_sm90.cu` has code for sm_90a and nothing else, `*_sm100.cu` for sm_100a: what an architecture alone has, its
successors do not run. All other files are portable and have code for sm_90a among others, since it is measured there.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MEASURED = "sm_90a"
SUFFIX = re.compile(r"_sm(\d+)\.cu$")  # as cmake/cuda.cmake has it
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
PERFORMANCE_WARNING = re.compile(r".*\bC75\d\d\b.*")


def check_architectures(name: str, archs: set[str]) -> list[str]:
    """The complaint if a kernel file was compiled for other architectures than its name says."""
    suffix = SUFFIX.search(name)
    if suffix and archs != {expected := f"sm_{suffix[1]}a"}:
        return [f"{name}: code for {', '.join(sorted(archs)) or 'nothing'}; expected {expected} alone"]
    if not suffix and MEASURED not in archs:
        return [f"{name}: code for {', '.join(sorted(archs)) or 'nothing'}; expected {MEASURED} among them"]
    return []


def check(build: Path) -> list[str]:
    """Print a line for each kernel file that the folder has compiled; all complaints."""
    logs = sorted(build.rglob("*.cu.o.log"))
    complaints = [] if logs else [f"{build} holds no compiled kernel"]
    for log in logs:
        text = log.read_text()
        name = "/".join(log.parts[-2:]).removesuffix(".o.log")
        entries = list(ENTRY.finditer(text))
        archs = {entry["arch"] for entry in entries}
        registers = max((int(entry["registers"]) for entry in entries), default=0)
        print(f"{name}: {len(entries)} kernels for {', '.join(sorted(archs))}; at most {registers} registers")
        complaints += check_architectures(name, archs)
        for entry in entries:
            if entry["spilled"] != "0":
                complaints.append(f"{name}: spills {entry['spilled']} bytes on {entry['arch']} in {entry['kernel']}")
        complaints += [f"{name}: {warning}" for warning in PERFORMANCE_WARNING.findall(text)]
    return complaints


if __name__ == "__main__":
    sys.exit("\n".join(check(Path(sys.argv[1]))) or None)
