"""Fail if ptxas spilled registers or serialised wgmma in a kernel, or a CUDA file was not compiled for Hopper.

python tools/check_ptxas.py BUILD_FOLDER
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'"
    r".*?(?P<spilled>\d+) bytes spill stores"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
PERFORMANCE_WARNING = re.compile(r".*\bC75\d\d\b.*")


def check(build: Path) -> list[str]:
    """Print a line for each CUDA file that the folder has compiled; all complaints."""
    logs = sorted(build.rglob("*.cu.o.log"))
    complaints = [] if logs else [f"{build} holds no compiled kernel"]
    for log in logs:
        text = log.read_text()
        name = "/".join(log.parts[-2:]).removesuffix(".o.log")
        entries = list(ENTRY.finditer(text))
        archs = sorted({entry["arch"] for entry in entries})
        registers = max((int(entry["registers"]) for entry in entries), default=0)
        print(f"{name}: {len(entries)} kernels for {', '.join(archs)}; at most {registers} registers")
        if "sm_90a" not in archs:
            complaints.append(f"{name}: no kernel for sm_90a")
        for entry in entries:
            if entry["spilled"] != "0":
                complaints.append(f"{name}: spills {entry['spilled']} bytes on {entry['arch']} in {entry['kernel']}")
        complaints += [f"{name}: {warning}" for warning in PERFORMANCE_WARNING.findall(text)]
    return complaints


if __name__ == "__main__":
    sys.exit("\n".join(check(Path(sys.argv[1]))) or None)
