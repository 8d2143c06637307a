"""Building a stable extension as the documentation says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from abiding_abi.compilers import target_macro
from abiding_abi.versions import OLDEST


def build(source: Path, library: Path, include: Path) -> None:
    """The command of the documentation."""
    where = "import pathlib, torch; print(pathlib.Path(torch.__file__).parent / 'lib')"
    found = subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-DNDEBUG", "-DTORCH_STABLE_ONLY"]
    command += [f"-DTORCH_TARGET_VERSION={target_macro(OLDEST)}", "-isystem", str(include), str(source)]
    command += ["-o", str(library), f"-L{found}", "-Wl,--no-as-needed", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
