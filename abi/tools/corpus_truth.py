"""Find the sites in the corpus at which compilation against the stable headers alone fails: what lint must find.

    python tools/corpus_truth.py [--half development|held-out|control] [--package NAME] [--headers 2.15.0]

Sites go to `.corpus/truth/<half>/<package>.json`, which git ignores; corpus_score.py compares lint with them.

A compiler stops at the first missing header and then reports the consequences of what it missed. So each unit is
compiled twice. First with empty files in the place of every header that the stable tree lacks: names that are not
declared are found. Then with corpus_bridge.h, which declares the common unstable names for stable types: members and
operators that the stable tensor lacks are found. An error is a site if it names something of torch's; errors that
follow from others (a variable whose type is unknown) are left out. Includes of torch's unstable headers are sites too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import DEVELOPMENT, HEADERS, SOURCES, STORE, Package, own_files, read_lock, units

from abiding_abi.compilers import (
    CUDA_SUFFIXES,
    Diagnostic,
    Options,
    compile_stable,
    cuda_include,
    find_cxx,
    find_nvcc,
    target_macro,
)
from abiding_abi.headers import STABLE, Headers, fetch
from abiding_abi.versions import NEWEST

BRIDGE = Path(__file__).resolve().parent / "corpus_bridge.h"
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)[>"]', re.MULTILINE)
TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2|THC?|pybind11)/")
UMBRELLA = """#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/TensorAccessor.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <unordered_set>
#include <vector>
"""
GNU_FLAGS = ("-fmax-errors=0",)
EDG_FLAGS = ("-Xcicc", "--error_limit=9999", "-arch=sm_90")
SPACES = {"at", "c10", "torch", "py", "pybind11", "caffe2", "THC"}
ABSENT = re.compile(
    r"['\"]([\w:<>~]+)['\"] (?:is not a member of|was not declared|has not been declared|does not name a|is undefined"
    r"|in namespace|is not a class or namespace|is not a namespace-name|is not a template|in 'class)"
    r"|(?:namespace|class) \"([\w:<>, ]+)\" has no member|name followed by \"::\" must be"
)
NO_MEMBER = re.compile(
    r"['\"](?:const )?(?:class |struct )?([\w:<>, ]+)['\"] has no (?:non-static data )?member (?:named )?['\"]?(\w+)"
)
STABLE_OPERANDS = re.compile(r"torch::(stable|headeronly)::|bridge::")
MISMATCH = re.compile(r"no match for 'operator|no operator \"|invalid operands")
CALL = re.compile(r"no matching function for call to '([\w:~]+)|no instance of .*? \"([\w:~]+)")
DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(?:[^\n\\]|\\(?:\r?\n|.))*", re.MULTILINE)
WORD = re.compile(r"[A-Za-z_]\w*")


@cache
def torch_words() -> frozenset[str]:
    """Every identifier in the unstable headers of the torch at hand; without one, `pip install torch` first."""
    import importlib.util

    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("corpus_truth.py needs an installed torch, for the words of its unstable headers")
    include = Path(spec.origin).parent / "include"
    words: set[str] = set()
    for path in include.rglob("*.h"):
        if not STABLE.match(path.relative_to(include).as_posix()):
            text = re.sub(r"//.*|/\*.*?\*/|\"[^\"\n]*\"", "", path.read_text(errors="replace"), flags=re.DOTALL)
            words.update(WORD.findall(text) if len(text) < 3_000_000 else ())
    return frozenset(words)


def precompile(folder: Path, headers: Headers) -> None:
    """Write umbrella.h and bridge.h, and have g++ compile them once for all units."""
    (folder / "umbrella.h").write_text(UMBRELLA)
    (folder / "bridge.h").write_text(UMBRELLA + BRIDGE.read_text())
    for name in ("umbrella.h", "bridge.h"):
        command = [find_cxx() or "g++", "-std=c++20", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA", "-w", *GNU_FLAGS]
        command += [f"-DTORCH_TARGET_VERSION={target_macro(NEWEST)}", "-isystem", str(headers.include)]
        command += ["-isystem", str(cuda_include(find_nvcc()) or headers.include)]
        output = str(folder / f"{name}.gch")
        subprocess.run([*command, "-x", "c++-header", str(folder / name), "-o", output], check=True)


class Record(TypedDict):
    """What compiling a package brought."""

    errors: list[tuple[str, int, int, str]]
    trouble: list[str]
    foreign: list[str]


class Code:
    """What a package's own code holds and declares."""

    def __init__(self, folder: Path, own: Sequence[Path], foreign: frozenset[str]) -> None:
        self.folder = folder
        self.texts = {p.resolve(): p.read_text(encoding="utf-8", errors="replace") for p in own}
        self.foreign = foreign

    def declares(self, path: Path, name: str) -> bool:
        """Whether own code declares this name, as far as patterns can tell: an error about it is a consequence."""
        pattern = (
            rf"(?:\b(?!return|new|case|throw|else|goto|delete|sizeof\b)[\w>]+|[>&*\]])\s*[&*\s]\s*{name}\s*[;,=)({{\[:]"
        )
        other = rf"#\s*define\s+{name}\b|\b(?:using|struct|class|enum|typename|namespace)\s+{name}\b"
        other += rf"|\btypedef\b[^;]*\b{name};"
        return any(re.search(f"{pattern}|{other}", text) for text in self._near(path))

    def macros_on(self, path: Path, first: int, last: int) -> Iterator[tuple[str, int, int]]:
        """Definitions of the own macros that these lines use, and of those that they use."""
        lines = self.texts[path].splitlines()[first - 1 : last]
        waiting = [w for line in lines for w in WORD.findall(line)]
        done: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in self.macros and name not in done:
                done.add(name)
                for file, start, end in self.macros[name]:
                    yield file.relative_to(self.folder.resolve()).as_posix(), start, end
                    waiting += [
                        w for line in self.texts[file].splitlines()[start - 1 : end] for w in WORD.findall(line)
                    ]

    @cached_property
    def macros(self) -> dict[str, list[tuple[Path, int, int]]]:
        """Where the package defines macros: name, file, first and last line."""
        found: dict[str, list[tuple[Path, int, int]]] = {}
        for path, text in self.texts.items():
            for match in DEFINE.finditer(text):
                first = text.count("\n", 0, match.start()) + 1
                found.setdefault(match[1], []).append((path, first, first + match[0].count("\n")))
        return found

    def _near(self, path: Path) -> Iterable[str]:
        yield self.texts.get(path.resolve(), "")
        for own, text in self.texts.items():
            if own.suffix in HEADERS:
                yield text


class Tree(Code):
    """A package to compile: where its includes lead."""

    def __init__(self, package: Package, headers: Headers, scratch: Path, prefix: Path) -> None:
        super().__init__(package.folder, own_files(package.folder, SOURCES + HEADERS), frozenset())
        self.headers = headers
        self.scratch = scratch
        self.prefix = prefix
        self.include, foreign = self._resolve()
        self.foreign = frozenset(foreign)

    def _resolve(self) -> tuple[list[Path], set[str]]:
        """Folders for -I, and an empty file for each header that is nowhere; those of others are named."""
        by_name: dict[str, list[Path]] = {}
        for path in self.folder.rglob("*"):
            if path.is_file():
                by_name.setdefault(path.name, []).append(path)
        system = [p for p in (cuda_include(find_nvcc()),) if p]
        system += [*Path("/usr/include/c++").glob("*"), Path("/usr/include"), Path("/usr/include/x86_64-linux-gnu")]
        system += [p / "cccl" for p in system[:1]] + sorted(Path("/usr/lib/gcc").glob("*/*/include"))
        folders: dict[Path, None] = {}
        foreign: set[str] = set()
        for path, text in self.texts.items():
            for _, name in INCLUDE.findall(text):
                if (path.parent / name).is_file() or (self.headers.include / name).is_file():
                    continue
                if any((folder / name).is_file() for folder in system):
                    continue
                found = [p for p in by_name.get(Path(name).name, []) if p.as_posix().endswith("/" + name.lstrip("./"))]
                if found and not TORCH_HEADER.match(name):
                    nearest = max(found, key=lambda p: len(set(p.parents) & set(path.parents)))
                    folders[Path(nearest.as_posix()[: -len(name.lstrip("./")) - 1])] = None
                elif not name.startswith(".."):
                    stub = self.scratch / "stubs" / name
                    stub.parent.mkdir(parents=True, exist_ok=True)
                    stub.touch()
                    foreign |= set() if TORCH_HEADER.match(name) else {name}
        return [*folders, self.scratch / "stubs"], foreign


def is_site(diagnostic: Diagnostic, tree: Code) -> bool:
    """Whether this error names something of torch's, rather than following from another error."""
    message = diagnostic.message.partition("; did you mean")[0]
    if match := NO_MEMBER.search(message):
        return bool(STABLE_OPERANDS.search(match[1])) or match[1].split("::")[0] in SPACES
    if MISMATCH.search(message):
        return bool(re.search(r"torch::stable::Tensor|bridge::Scalar|ArrayRef", message))
    if match := CALL.search(message):
        name = match[1] or match[2]
        return name.startswith(("torch::stable::", "torch::headeronly::")) or name.split("::")[0] in SPACES
    if "expected constructor, destructor" in message:  # a macro at the top level that nothing declares
        line = tree.texts.get(diagnostic.path.resolve(), "").splitlines()[diagnostic.line - 1]
        before = WORD.findall(line[: diagnostic.column - 1])
        return bool(before) and before[-1].isupper() and before[-1] in torch_words()
    if match := ABSENT.search(message):
        quoted = [n for n in re.findall(r"['\"](?:class |struct |namespace )?([\w:]+)['\"]", message) if n]
        line = (tree.texts.get(diagnostic.path.resolve(), "").splitlines() or [""])[diagnostic.line - 1]
        name = quoted[0] if quoted else ""
        if name in SPACES:
            return bool(re.search(rf"\b{name}\s*(::|;)", line))
        if any(part in SPACES for name in quoted for part in name.split("::")):
            return True
        if tree.foreign and not re.match(r"(TORCH|AT|C10|PYBIND11?|STD_TORCH|THC|CUDA)_", name):
            return False
        used = re.search(rf"\b{re.escape(name)}\s*(\(|::|<)", line) or re.match(r"[A-Z]|k[A-Z]", name)
        return bool(used) and name in torch_words() and not tree.declares(diagnostic.path, name)
    return False


def compile_all(tree: Tree, timeout: float, say: bool) -> Record:
    """Every error in the package's own code, of both ways to compile each unit."""
    errors: set[tuple[str, int, int, str]] = set()
    trouble: list[str] = []
    reached = units(tree.folder)
    for number, unit in enumerate(reached, 1):
        start = time.time()
        for name in ("umbrella.h", "bridge.h"):
            extra: tuple[str, ...] = ("-include", str(tree.prefix / name))
            extra += EDG_FLAGS if unit.suffix in CUDA_SUFFIXES else GNU_FLAGS
            options = Options(include=(*tree.include, tree.folder), timeout=timeout, extra=extra)
            source = unit
            if unit.suffix in CUDA_SUFFIXES:  # an error at its end keeps nvcc from generating code, which takes minutes
                source = tree.scratch / "unit.cu"
                source.write_text(f'#include "{unit.resolve()}"\nstatic_assert(false, "end of unit");\n')
            for error in compile_stable(source, tree.headers.include, NEWEST, options):
                if error.trouble:
                    trouble.append(f"{unit.name}: {error.message}")
                elif (path := error.path.resolve()) in tree.texts:
                    errors.add((path.relative_to(tree.folder.resolve()).as_posix(), *_place(error), error.message))
        if say:
            print(f"  {number}/{len(reached)} {time.time() - start:.1f} s {unit.name}", flush=True)
    return {"errors": sorted(errors), "trouble": trouble, "foreign": sorted(tree.foreign)}


def _place(error: Diagnostic) -> tuple[int, int]:
    return error.line, error.column


@dataclass(frozen=True, order=True)
class Site:
    """One place and the name that the compiler lacks there.

    nvcc tells an error in a macro's argument at the macro: the name is then somewhere up to ``last_line``. What an own
    macro expands to is told where it is used: the name is then in one of ``macros``, (file, first line, last line).
    """

    path: str
    line: int
    last_line: int
    name: str
    message: str = field(compare=False)
    macros: tuple[tuple[str, int, int], ...] = field(default=(), compare=False)


def sites(package: Package) -> list[Site]:
    """The sites of a package that was compiled before; see the module's text."""
    record: Record = json.loads(_record_of(package).read_text())
    folder = package.folder.resolve()
    code = Code(folder, own_files(folder, SOURCES + HEADERS), frozenset(record["foreign"]))
    found: dict[Site, None] = {}
    for path, text in code.texts.items():
        for match in INCLUDE.finditer(text):
            if TORCH_HEADER.match(match[2]) and not STABLE.fullmatch(match[2]):
                line = text.count("\n", 0, match.start(2)) + 1
                found[Site(path.relative_to(folder).as_posix(), line, line, match[2], f"<{match[2]}>")] = None
    for name, line, column, message in record["errors"]:
        unplaced = line == 1 and not column  # an error in foreign code that nothing ties to a line
        if not unplaced and is_site(Diagnostic(folder / name, line, column, message), code):
            last = line if column else _end_of_call(code.texts[folder / name], line)
            macros = tuple(code.macros_on(folder / name, line, last))
            found[Site(name, line, last, name_of(message), message, macros)] = None
    return sorted(found)


def _end_of_call(text: str, line: int) -> int:
    """The line at which the parentheses close that open on this line."""
    lines = text.splitlines()
    depth = 0
    for number in range(line, min(len(lines), line + 400) + 1):
        code = re.sub(r"//.*|\"(?:[^\"\\]|\\.)*\"", "", lines[number - 1])
        depth += code.count("(") - code.count(")")
        if depth <= 0:
            return number
    return line


def name_of(message: str) -> str:
    """The name that the compiler lacks, without its namespace; empty if it lacks an operator."""
    if message.startswith("<"):
        return message.strip("<>")
    if match := NO_MEMBER.search(message):
        return match[2]
    if match := CALL.search(message):
        return (match[1] or match[2]).split("::")[-1]
    if match := re.search(r"has no member \"(\w+)\"", message):
        return match[1]
    if match := re.search(r"['\"](?:class |struct |namespace )?([\w:]+)['\"]", message):
        return match[1].split("::")[-1] if ABSENT.search(message) else ""
    return ""


def _record_of(package: Package) -> Path:
    return STORE / "truth" / package.half / f"{package.name}-{package.version}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", default=DEVELOPMENT)
    parser.add_argument("--package", action="append", default=[])
    parser.add_argument("--headers", default="2.15.0")
    parser.add_argument("--timeout", type=float, default=120)
    parser.add_argument("--again", action="store_true", help="also packages whose sites are known")
    arguments = parser.parse_args()
    headers = fetch(arguments.headers, print)
    prefix = Path(tempfile.mkdtemp(prefix="abiding-truth-"))
    precompile(prefix, headers)
    for package in sorted(read_lock(), key=lambda p: p.units):
        if package.half != arguments.half or (arguments.package and package.name not in arguments.package):
            continue
        target = _record_of(package)
        if target.exists() and not arguments.again:
            continue
        start = time.time()
        with tempfile.TemporaryDirectory() as scratch:
            tree = Tree(package, headers, Path(scratch), prefix)
            record = compile_all(tree, arguments.timeout, say=package.half == DEVELOPMENT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")
        count = len(sites(package))
        took = f"{time.time() - start:.0f} s"
        print(f"{package.name}: {count} sites, {len(record['trouble'])} units not compiled, {took}", flush=True)


if __name__ == "__main__":
    main()
