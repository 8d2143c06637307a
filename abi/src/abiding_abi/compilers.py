"""Run a C++ or CUDA compiler for its errors alone, and read them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from abiding_abi.errors import UserError
from abiding_abi.versions import Version

CUDA_SUFFIXES = (".cu",)
NVCC_FLAGS = (
    "--expt-relaxed-constexpr",
    *(f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")),
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
)
"""What torch.utils.cpp_extension passes to nvcc: torch's Half and CUDA's would have ambiguous operators otherwise."""
CXX_SUFFIXES = (".cpp", ".cc", ".cxx", ".c++")


@dataclass(frozen=True, order=True)
class Diagnostic:
    """One error, where the user's own code causes it; ``column`` is 0 where the compiler names none."""

    path: Path
    line: int
    column: int
    message: str
    fatal: bool = field(default=False, compare=False)
    trouble: bool = field(default=False, compare=False)
    """The compiler itself could not be run to its end: nothing is known of the file."""

    @property
    def missing_header(self) -> str | None:
        """The header that was not found, if that is the error."""
        return next(filter(None, m.groups())) if (m := _MISSING.search(self.message)) else None


@dataclass(frozen=True)
class Options:
    """What to compile with."""

    cxx: str = ""
    nvcc: str = ""
    standard: str = "c++20"
    include: tuple[Path, ...] = ()
    define: tuple[str, ...] = ()
    use_cuda: bool = True
    timeout: float = 600
    extra: tuple[str, ...] = ()
    """More arguments, for both compilers."""

    def compiler_of(self, source: Path) -> str | None:
        """The compiler for this file, or None if this machine has none."""
        if source.suffix in CUDA_SUFFIXES:
            return shutil.which(self.nvcc) if self.nvcc else find_nvcc()
        return find_cxx(self.cxx)


_DEFAULT = Options()


def find_cxx(given: str = "") -> str | None:
    """The C++ compiler: as given, ``CXX``, or the first of the usual names."""
    names = [given] if given else [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((path for name in names if name and (path := shutil.which(name.split()[0]))), None)


def find_nvcc() -> str | None:
    """nvcc from PATH or from CUDA's usual folders."""
    return shutil.which("nvcc") or next((p for home in _cuda_homes() if (p := shutil.which(f"{home}/bin/nvcc"))), None)


def cuda_include(nvcc: str | None) -> Path | None:
    """CUDA's headers, for C++ files that include cuda_runtime.h."""
    if not nvcc:
        return None
    homes = [str(Path(nvcc).resolve().parents[1]), *_cuda_homes()]  # nvcc on PATH may be a wrapper from elsewhere
    places = [p for home in homes for p in (Path(home, "include"), *sorted(Path(home).glob("targets/*/include")))]
    return next((p for p in places if (p / "cuda_runtime.h").is_file()), None)


def _cuda_homes() -> list[str]:
    return [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda") if home]


def target_macro(target: Version) -> str:
    """``TORCH_TARGET_VERSION`` of a release."""
    return f"0x{(target[0] << 56) | (target[1] << 48):016x}"


def compile_stable(
    source: Path, include: Path, target: Version, options: Options = _DEFAULT, whole: bool = False
) -> list[Diagnostic]:
    """Compile one file against the stable headers in ``include`` alone; no error: an empty list.

    nvcc has no mode that only checks. Its device front end reads host code too and is three times faster than the
    rest, so that is run unless ``whole`` asks for the host compiler as well.
    """
    compiler = options.compiler_of(source)
    if compiler is None:
        kind = "nvcc" if source.suffix in CUDA_SUFFIXES else "C++ compiler"
        raise UserError(f"{source}: no {kind} found")
    is_cuda = source.suffix in CUDA_SUFFIXES
    command = [compiler, f"-std={options.standard}", "-DTORCH_STABLE_ONLY"]
    command += [f"-DTORCH_TARGET_VERSION={target_macro(target)}", *(f"-D{d}" for d in options.define)]
    command += ["-DUSE_CUDA"] if options.use_cuda else []
    command += [f"-I{folder}" for folder in options.include] + ["-isystem", str(include), *options.extra]
    with tempfile.TemporaryDirectory() as scratch:
        output = f"{scratch}/out.o"
        if is_cuda:
            command += [
                "-x",
                "cu",
                *NVCC_FLAGS,
                *(["-c", "-Xcompiler", "-fsyntax-only"] if whole else ["-ptx"]),
                "-o",
                output,
            ]
        else:
            folder = cuda_include(options.nvcc or find_nvcc())
            command += ["-isystem", str(folder)] if folder else []
            command += ["-fsyntax-only", "-w", "-x", "c++"]
        status, text = _run([*command, str(source)], options.timeout)
    found = read_diagnostics(text, own_roots(source, options.include), source)
    if status and not found:
        reason = text.strip().splitlines()[-1] if text.strip() else f"exit status {status}"
        return [Diagnostic(source, 1, 0, f"{Path(compiler).name}: {reason}", fatal=True, trouble=True)]
    return found if status else []


def own_roots(source: Path, include: Iterable[Path]) -> list[Path]:
    """Folders whose files are the user's own: what is wrong elsewhere is told at the line of theirs that led there."""
    return [source.parent.resolve(), *(folder.resolve() for folder in include)]


def _run(command: Sequence[str], timeout: float) -> tuple[int, str]:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return 1, f"stopped after {timeout:.0f} s"
    except OSError as error:
        raise UserError(f"{command[0]}: {error.strerror}") from None
    return done.returncode, done.stdout + done.stderr


_GNU = re.compile(r"(?P<path>[^\s:][^:]*):(?P<line>\d+):(?P<column>\d+): (?P<kind>fatal error|error): (?P<message>.*)")
_EDG = re.compile(
    r"(?P<path>[^\s(][^(]*)\((?P<line>\d+)\): (?P<kind>catastrophic error|error)\s*(?:#[\w-]+)?: (?P<message>.*)"
)
_GNU_FROM = re.compile(r"(?P<path>[^\s:][^:]*):(?P<line>\d+):(?P<column>\d+):\s+(?:required|recursively required) ")
_GNU_NOTE = re.compile(r"(?P<path>[^\s:][^:]*):(?P<line>\d+):(?P<column>\d+): note: (?:in instantiation|in expansion)")
_EDG_FROM = re.compile(r"\s+(?:detected during )?instantiation of .* at line (?P<line>\d+)(?: of (?P<path>\S+))?")
_MISSING = re.compile(
    r"(?:^|: )([^\s:'\"]+): No such file or directory|'([^']+)' file not found|cannot open source file \"([^\"]+)\""
)


def read_diagnostics(text: str, roots: Sequence[Path], source: Path) -> list[Diagnostic]:
    """Errors of g++, clang++ and nvcc, in order and without repetition, each at a line of the user's own code."""
    found: dict[Diagnostic, None] = {}
    origin: tuple[Path, int, int] | None = None  # the nearest own line of the instantiation that g++ announces first
    pending: Diagnostic | None = None  # an error in foreign code, whose own line nvcc and clang tell afterwards
    last = source  # nvcc names the file of an instantiation only where it is another than the error's
    for line in text.splitlines():
        if match := _GNU.match(line) or _EDG.match(line):
            last = path = Path(match["path"])
            number = int(match["line"])
            column = int(match.groupdict().get("column") or 0)
            fatal = match["kind"] in ("fatal error", "catastrophic error")
            if pending:
                found[pending] = None
            pending = None
            if _is_own(path, roots):
                found[Diagnostic(path, number, column, match["message"], fatal)] = None
            elif origin:
                found[Diagnostic(*origin, f"{match['message']} [{path.name}:{number}]", fatal)] = None
            else:
                pending = Diagnostic(source, 1, 0, f"{match['message']} [{path.name}:{number}]", fatal)
            origin = None
        elif match := _GNU_FROM.match(line) or _GNU_NOTE.match(line) or _EDG_FROM.match(line):
            named = match.groupdict()
            path = Path(named["path"]) if named.get("path") else last
            if _is_own(path, roots):
                place = (path, int(named["line"] or 1), int(named.get("column") or 0))
                if pending:
                    found[Diagnostic(*place, pending.message, pending.fatal)] = None
                    pending = None
                else:
                    origin = place
    if pending:
        found[pending] = None
    return list(found)


def _is_own(path: Path, roots: Sequence[Path]) -> bool:
    resolved = path.resolve()
    return any(resolved.is_relative_to(root) for root in roots)
