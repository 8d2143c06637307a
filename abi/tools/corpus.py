"""The corpus that rules are made on and judged by: public sdists with C++ and CUDA extensions of torch.

    python tools/corpus.py lock NAME[==VERSION] ...   # add packages to corpus.lock.json with what they hold
    python tools/corpus.py split                      # write which half each package belongs to, by a fixed rule
    python tools/corpus.py fetch [--half H]           # download and unpack what the lock names, hashes checked
    python tools/corpus.py show                       # the table

None of the packages' code is committed: archives and sources lie in `.corpus/`, which git ignores. Rules are made on
the development half. The held-out half is only compiled and counted by programs until the final score; nobody reads it.
`corpus_score.py` scores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "corpus.lock.json"
STORE = ROOT / ".corpus"
STUB = Path(__file__).resolve().parent / "_sdist_stub"

DEVELOPMENT, HELD_OUT, CONTROL = "development", "held-out", "control"
SOURCES = (".cpp", ".cc", ".cxx", ".cu")
HEADERS = (".h", ".hpp", ".hh", ".cuh", ".inl")
# Code that a package carries and does not own, and back ends that neither g++ nor nvcc compiles.
FOREIGN = re.compile(
    r"(^|/)(third_?party|3rd_?party|external|extern|deps|submodules?|cutlass|cub|eigen[^/]*|glm|pybind11|googletest|fmt"
    r"|json|nanobind|dlpack|composable_kernel|hip(_[^/]*)?|rocm|amd|npu|ascend|mlu"
    r"|musa|mps|metal|xpu|sycl|hpu|test|tests|node_modules)(/|$)",
    re.IGNORECASE,
)
TORCH = re.compile(r'#\s*include\s*[<"](torch/|ATen/|c10/|THC/|TH/)')
PYBIND = re.compile(r"\bPYBIND11_MODULE\s*\(")
LIBRARY = re.compile(r"\bTORCH_LIBRARY(_FRAGMENT|_IMPL|_EXPAND)?\s*\(|\bRegisterOperators\b")


@dataclass(frozen=True, order=True)
class Package:
    """One locked sdist, what a program counted in it, and its half."""

    name: str
    version: str
    file: str
    sha256: str
    units: int = 0
    lines: int = 0
    cuda_units: int = 0
    pybind: int = 0
    library: int = 0
    seen: bool = False
    half: str = ""
    why: str = field(default="", compare=False)

    @property
    def folder(self) -> Path:
        return STORE / (self.half or "unsplit") / f"{self.name}-{self.version}"


def read_lock() -> list[Package]:
    if not LOCK.exists():
        return []
    return [Package(**entry) for entry in json.loads(LOCK.read_text())["packages"]]


def write_lock(packages: Iterable[Package]) -> None:
    entries = [asdict(package) for package in sorted(packages)]
    LOCK.write_text(json.dumps({"packages": entries}, indent=1) + "\n")


def download(requirement: str, folder: Path) -> Path:
    """Fetch one sdist with pip, without running any code of the package: see _sdist_stub."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:", "--use-pep517"]
        command += ["--no-build-isolation", "--disable-pip-version-check", "--dest", scratch, requirement]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(STUB)}, capture_output=True, text=True)
        found = [path for path in Path(scratch).iterdir() if path.suffix in (".gz", ".zip", ".bz2", ".tgz")]
        if done.returncode or not found:
            problem = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise SystemExit(f"{requirement}: no sdist: {problem[-1] if problem else done.stderr.strip()[-300:]}")
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(str(found[0]), str(folder / found[0].name)))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack atomically: a folder that was unpacked by half never bears the final name."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, data in _members(archive):
        parts = Path(name).parts[1:]  # the first is name-version
        if not parts or ".." in parts or Path(name).is_absolute():
            continue
        target = partial.joinpath(*parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    partial.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)


def _members(archive: Path) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as opened:
            for name in opened.namelist():
                if not name.endswith("/"):
                    yield name, opened.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)):
                yield member.name, file.read()


def own_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files of the package itself, in a fixed order, foreign code left out."""
    found = (p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file())
    return sorted(p for p in found if not FOREIGN.search(p.relative_to(folder).parent.as_posix()))


def units(folder: Path) -> list[Path]:
    """Translation units that see torch, directly or through headers of the package."""
    files = own_files(folder, SOURCES + HEADERS)
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in files}
    reaches = {path for path, text in texts.items() if TORCH.search(text)}
    names = {path: {Path(n).name for n in re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', texts[path])} for path in files}
    while True:
        headers = {path.name for path in reaches if path.suffix in HEADERS}
        grown = reaches | {path for path in files if names[path] & headers}
        if grown == reaches:
            return [path for path in files if path in reaches and path.suffix in SOURCES]
        reaches = grown


def count(package: Package, folder: Path) -> Package:
    found = units(folder)
    headers = own_files(folder, HEADERS)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in [*found, *headers]]
    fields = asdict(package) | {
        "units": len(found),
        "cuda_units": sum(path.suffix == ".cu" for path in found),
        "lines": sum(text.count("\n") for text in texts),
        "pybind": sum(bool(PYBIND.search(text)) for text in texts),
        "library": sum(bool(LIBRARY.search(text)) for text in texts),
    }
    return Package(**fields)


def lock(requirements: Sequence[str], seen: bool, half: str) -> None:
    packages = {(package.name, package.version): package for package in read_lock()}
    for requirement in requirements:
        name = requirement.split("==")[0]
        try:
            archive = download(requirement, STORE / "sdists")
        except SystemExit as error:
            print(error)
            continue
        stem = re.sub(r"\.(tar\.(gz|bz2)|zip|tgz)$", "", archive.name)
        version = requirement.partition("==")[2] or stem.rpartition("-")[2]
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        package = Package(name, version, archive.name, digest, seen=seen, half=half)
        with tempfile.TemporaryDirectory(dir=STORE) as scratch:
            unpack(archive, Path(scratch) / "x")
            package = count(package, Path(scratch) / "x")
        if package.units:
            packages[name, version] = package
            write_lock(packages.values())
        print(f"{name} {version}: {package.units} units, {package.cuda_units} of them CUDA, {package.lines} lines")


def split() -> None:
    write_lock(deal(read_lock()))


def deal(locked: Sequence[Package]) -> list[Package]:
    """Deal each kind of package out in turn, in the order of a hash of the name. What was seen before is development's.

    A kind is (registered by pybind or by the library macros, CUDA or not, size over the median or not): so both halves
    hold each kind.
    """
    packages = [p for p in locked if p.half != CONTROL]
    middle = sorted(p.lines for p in packages)[len(packages) // 2]
    kinds: dict[tuple[bool, bool, bool], list[Package]] = {}
    for package in packages:
        kinds.setdefault((package.library > 0, package.cuda_units > 0, package.lines > middle), []).append(package)
    halves: dict[Package, str] = {}
    for kind in sorted(kinds):
        members = sorted(kinds[kind], key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
        for package in (p for p in members if p.seen):
            halves[package] = DEVELOPMENT
        for package in (p for p in members if not p.seen):
            ours = sum(halves.get(p) == DEVELOPMENT for p in members)
            theirs = sum(halves.get(p) == HELD_OUT for p in members)
            halves[package] = DEVELOPMENT if ours < theirs else HELD_OUT
    return [Package(**(asdict(p) | {"half": halves.get(p, p.half)})) for p in locked]


def fetch(half: str | None) -> None:
    for package in read_lock():
        if half and package.half != half:
            continue
        archive = STORE / "sdists" / package.file
        if not archive.exists():
            archive = download(f"{package.name}=={package.version}", STORE / "sdists")
        if (digest := hashlib.sha256(archive.read_bytes()).hexdigest()) != package.sha256:
            raise SystemExit(f"{archive}: sha256 is {digest}, the lock says {package.sha256}")
        unpack(archive, package.folder)
        print(f"{package.folder.relative_to(ROOT)}: {package.units} units")


def show() -> None:
    for package in read_lock():
        kinds = "+".join(k for k, n in (("pybind", package.pybind), ("library", package.library)) if n) or "none"
        numbers = f"{package.units:4} units {package.cuda_units:4} cuda {package.lines:7} lines"
        print(f"{package.name:28} {package.version:12} {package.half:12} {numbers} {kinds} {'seen' * package.seen}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("lock", help="add packages to the lock")
    add.add_argument("requirements", nargs="+", metavar="NAME[==VERSION]")
    add.add_argument("--seen", action="store_true", help="its sources were read before the split: development half")
    add.add_argument("--control", action="store_true", help="already migrated: lint must find nothing; in neither half")
    commands.add_parser("split", help="write each package's half")
    get = commands.add_parser("fetch", help="download and unpack")
    get.add_argument("--half", choices=[DEVELOPMENT, HELD_OUT, CONTROL])
    commands.add_parser("show", help="print the table")
    arguments = parser.parse_args()
    STORE.mkdir(exist_ok=True)
    if arguments.command == "lock":
        lock(arguments.requirements, arguments.seen, CONTROL if arguments.control else "")
    elif arguments.command == "split":
        split()
    elif arguments.command == "fetch":
        fetch(arguments.half)
    else:
        show()


if __name__ == "__main__":
    main()
