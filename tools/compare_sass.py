"""Compare the machine code of two CUDA binaries with symbol names taken out, so that a rename proves itself harmless.

    python tools/compare_sass.py OLD NEW

OLD and NEW are cubins, objects or shared libraries. Kernels are matched by their instruction encodings and their use of
registers, stack and shared memory, never by name: a kernel that was renamed, or that takes a renamed struct, still
matches. Kernels without a match are named with their instruction counts, and the exit status is 1. Runs cuobjdump and
nvdisasm: those of the development environment, else of PATH.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """A kernel's machine code."""

    architecture: str
    encodings: tuple[str, ...]  # of its instructions, in order
    resources: str  # registers, stack, shared and local memory, as cuobjdump prints them


def read_kernels(binary: Path) -> dict[Kernel, list[str]]:
    """The names (mangled) of a binary's kernels by their machine code."""
    resources = _read_resources(binary)
    kernels: dict[Kernel, list[str]] = defaultdict(list)
    architecture = name = ""
    encodings: list[str] = []

    def finish() -> None:
        if name:
            code = Kernel(architecture, tuple(encodings), resources.get((architecture, name)) or resources["", name])
            kernels[code].append(name)

    for line in _run("cuobjdump", "-sass", str(binary)).splitlines():
        if match := re.search(r"^\s*(?:code for|arch =) (sm_\w+)", line):
            finish()
            architecture, name, encodings = match[1], "", []
        elif match := re.search(r"^\s*Function : (\S+)", line):
            finish()
            name, encodings = match[1], []
        elif match := re.search(r"/\* (0x[0-9a-f]{16}) \*/", line):
            encodings.append(match[1])
    finish()
    return dict(kernels)


def _read_resources(binary: Path) -> dict[tuple[str, str], str]:
    found = {}
    architecture = name = ""
    for line in _run("cuobjdump", "-res-usage", str(binary)).splitlines():
        if match := re.search(r"^\s*(?:code for|arch =) (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"^\s*Function (\S+):", line):
            name = match[1]
        elif name and "REG:" in line:
            found[architecture, name] = " ".join(line.split())
            name = ""
    return found


def compare(before: dict[Kernel, list[str]], after: dict[Kernel, list[str]]) -> list[str]:
    """What differs, a line per kernel and direction; empty where every kernel has its match."""
    lines = []
    for label, have, other in (("only in OLD", before, after), ("only in NEW", after, before)):
        for kernel, names in have.items():
            if missing := names[len(other.get(kernel, [])) :]:
                code = f"{len(kernel.encodings) // 2} instructions, {kernel.resources or 'resources unknown'}"
                lines += [f"{label}: {kernel.architecture} {_demangled(name)} ({code})" for name in missing]
    return sorted(lines)


def _demangled(name: str) -> str:
    return _run("c++filt", name).strip()


def _run(*command: str) -> str:
    wheels = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
    environment = os.environ | {"PATH": f"{wheels}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def main() -> int:
    """Print what differs and return the exit status."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    old, new = Path(sys.argv[1]), Path(sys.argv[2])
    for binary in (old, new):
        if not binary.is_file():
            print(f"{binary}: no such file; expected a cubin, an object or a shared library", file=sys.stderr)
            return 2
    try:
        before, after = read_kernels(old), read_kernels(new)
        differences = compare(before, after)
    except FileNotFoundError as error:
        print(f"{error.filename} is not found; expected it after `make setup`, or on PATH", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(error.cmd)} failed: {error.stderr.strip()}", file=sys.stderr)
        return 2
    for binary, kernels in ((old, before), (new, after)):
        if not kernels:
            print(f"{binary}: no kernels found; expected device code", file=sys.stderr)
            return 2
    count = sum(map(len, after.values()))
    print("\n".join(differences) or f"{count} kernels, all with the same machine code")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
