"""Build whole packages from migrated sources, once, and run their own tests under several torch releases.

    python tools/corpus_packages.py TORCHES [--package NAME]

TORCHES holds one torch per subfolder, as the repository's tools/torch_matrix.py makes them. Nothing is edited by hand:
the copy that corpus_migrate.py makes is compiled against the newest stable headers for torch 2.10, the library is put
where the package's Python code or the module that migrate wrote looks for it, and the tests that came in the sdist run
with the package's Python code as it is. Where an sdist has no test of an operator, one of `tools/package_tests/` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import ROOT, read_lock
from corpus_migrate import migrated
from torch_abi_audit import inspect_extension

from abiding_abi.compilers import find_cxx, target_macro
from abiding_abi.headers import Headers, fetch
from abiding_abi.versions import OLDEST

EXTRA_TESTS = Path(__file__).resolve().parent / "package_tests"


@dataclass(frozen=True)
class Library:
    """One library: where it goes, from what, and more flags."""

    path: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    """One package: its libraries that run on the CPU, and its tests."""

    name: str
    libraries: tuple[Library, ...]
    tests: tuple[str, ...]
    extra: tuple[str, ...] = ()


_FAST = "fast_transformers"
PACKAGES = (
    Whole(
        "torch-discounted-cumsum",
        (Library("_torch_discounted_cumsum_cpu.so", ("torch_discounted_cumsum/discounted_cumsum_cpu.cpp",)),),
        (),  # its own test compares and times for many minutes
        ("discounted_cumsum.py",),
    ),
    Whole(
        "torchsort",
        (Library("torchsort/_isotonic_cpu.so", ("torchsort/isotonic_cpu.cpp",), ("-fopenmp", "-ffast-math")),),
        (),
        ("torchsort_ops.py",),
    ),
    Whole(
        "torchlpc",
        (Library("torchlpc/_C.so", ("torchlpc/csrc/scan_cpu.cpp",), ("-fopenmp",)),),
        (),
        ("torchlpc_ops.py",),
    ),
    Whole(
        "pytorch-fast-transformers",
        tuple(
            Library(f"{_FAST}/{folder}/_{name}.so", (f"{_FAST}/{folder}/{name}.cpp",), ("-fopenmp", "-ffast-math"))
            for folder, name in (
                ("hashing", "hash_cpu"),
                ("aggregate", "aggregate_cpu"),
                ("causal_product", "causal_product_cpu"),
                ("local_product", "local_product_cpu"),
            )
        ),
        ("tests/hashing/test_hash_cpu.py", "tests/aggregate/test_aggregate_cpu.py"),
        ("fast_transformers_ops.py",),
    ),
)


def build(folder: Path, library: Library, headers: Headers, torch_lib: Path) -> str:
    """Compile and link; empty, or the first error."""
    command = [find_cxx() or "g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-w", "-DTORCH_STABLE_ONLY"]
    command += [f"-DTORCH_TARGET_VERSION={target_macro(OLDEST)}", "-isystem", str(headers.include)]
    command += ["-isystem", sysconfig.get_path("include"), *library.flags]
    command += [str(folder / source) for source in library.sources]
    command += ["-o", str(folder / library.path), f"-L{torch_lib}", "-Wl,--no-as-needed", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
    return "" if done.returncode == 0 else (errors or ["failed"])[0].replace(str(folder) + "/", "")[:200]


def tested(folder: Path, package: Whole, torch: Path, log: Path) -> dict[str, int]:
    """Run the tests under one torch; how many passed, failed and were skipped."""
    tests = [*package.tests, *(str(EXTRA_TESTS / name) for name in package.extra)]
    environment = {**os.environ, "PYTHONPATH": f"{torch}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), *tests]
    command += ["-c", os.devnull, "--import-mode=importlib"]
    command = ["timeout", "400", *command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    log.write_text(done.stdout + done.stderr)
    last = next((line for line in reversed(done.stdout.splitlines()) if re.search(r" in \d", line)), "")
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return counts or {"error": 1}


def run(package: Whole, torches: list[Path], headers: Headers) -> dict[str, object]:
    locked = next(p for p in read_lock() if p.name == package.name)
    copy, counts = migrated(locked, "built")
    row: dict[str, object] = {"version": locked.version, "left": counts["left"]}
    libraries: dict[str, object] = {}
    for library in package.libraries:
        error = build(copy.folder, library, headers, torches[0] / "torch/lib")
        if error:
            libraries[library.path] = {"error": error}
        else:
            audit = inspect_extension(copy.folder / library.path).torch
            unstable = len(audit.unstable_symbols)
            libraries[library.path] = {"unstable_symbols": unstable, "min_torch": audit.min_torch_version}
    row["libraries"] = libraries
    logs = ROOT / ".corpus/logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = {t.name: tested(copy.folder, package, t, logs / f"{package.name}-{t.name}.log") for t in torches}
    clean = all(isinstance(value, dict) and value.get("unstable_symbols") == 0 for value in libraries.values())
    passed = all(r.get("passed") and not r.get("failed") and not r.get("error") for r in results.values())
    return row | {"tests": results, "passes": clean and passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torches", type=Path)
    parser.add_argument("--package", action="append", default=[])
    parser.add_argument("--headers", default="2.15.0")
    arguments = parser.parse_args()
    torches = sorted(p for p in arguments.torches.resolve().iterdir() if (p / "torch/lib").is_dir())
    if not torches:
        raise SystemExit(f"{arguments.torches}: no torch releases in it; see tools/torch_matrix.py of the repository")
    headers = fetch(arguments.headers, print)
    rows: dict[str, dict[str, object]] = {}
    for package in PACKAGES:
        if not arguments.package or package.name in arguments.package:
            rows[package.name] = run(package, torches, headers)
            print(json.dumps({package.name: rows[package.name]}, indent=1), flush=True)
    good = sum(bool(row["passes"]) for row in rows.values())
    print(f"{good} of {len(rows)} packages pass on {', '.join(t.name for t in torches)} from one build")
    if not arguments.package:
        data = {"command": "python tools/corpus_packages.py TORCHES", "torch": [t.name for t in torches]}
        path = ROOT / "results/packages.json"
        path.write_text(json.dumps(data | {"passing": good, "packages": rows}, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
