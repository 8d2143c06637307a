"""Compile the worked example before and after its migration; write results/worked-example.json.

    python tools/measure_example.py

Needs g++, an installed torch with its headers, and cached stable headers (abiding-abi verify --fetch-headers).
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from abiding_abi import headers, migrate
from abiding_abi.compilers import target_macro
from abiding_abi.lint import Config
from abiding_abi.versions import OLDEST

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "rolling"


def compiled(source: Path, options: list[str]) -> dict[str, float]:
    """Seconds of CPU and bytes of a shared library."""
    library = source.with_suffix(".so")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    common = ["g++", "-std=c++20", "-O2", "-g1", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run([*common, *options], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_seconds": round(seconds, 1), "bytes": library.stat().st_size}


def main() -> None:
    """Measure both."""
    installed = headers.of_installed()
    newest = max(headers.cached(), key=lambda found: found.version)
    if installed is None:
        sys.exit("no torch is installed here")
    where = "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)"
    torch = Path(
        subprocess.run([sys.executable, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    )
    include = torch / "include"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rolling"
        shutil.copytree(EXAMPLE, folder)
        source = folder / "csrc" / "rolling.cpp"
        api = include / "torch" / "csrc" / "api" / "include"
        legacy = ["-DTORCH_EXTENSION_NAME=_C", f"-I{include}", f"-I{api}", f"-I{sysconfig.get_paths()['include']}"]
        before = compiled(source, legacy)
        migrate.write(migrate.run([folder], Config(root=folder)))
        stable = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={target_macro(OLDEST)}", f"-I{newest.include}"]
        after = compiled(source, stable)
    result = {
        "command": "python tools/measure_example.py",
        "legacy": {"headers": installed.release, **before},
        "stable": {"headers": newest.release, **after},
    }
    (ROOT / "results" / "worked-example.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
