"""``verify``: compile against the stable headers alone, and say how old a torch the result can run on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from abiding_abi import symbols
from abiding_abi.compilers import CUDA_SUFFIXES, CXX_SUFFIXES, Diagnostic, Options, compile_stable
from abiding_abi.errors import UserError
from abiding_abi.headers import STABLE, Headers
from abiding_abi.versions import OLDEST, Version, dotted

Status = Literal["stable", "unstable", "unknown"]

_DEFAULT = Options()
_SKIPPED_FOLDERS = {".git", "build", "dist", "node_modules", "__pycache__", ".venv"}
_TORCH_HEADER = re.compile(r"(torch|ATen|c10|caffe2|THC?)/")
_ABSENT = re.compile(
    r"no member (?:named )?['\"]([\w:]+)"
    r"|['\"]([\w:]+)['\"] (?:is not a member|is undefined|was not declared|has not been)"
)


@dataclass(frozen=True)
class Result:
    """What is known of one file: ``target`` is the oldest torch that it compiles for."""

    path: Path
    status: Status
    target: Version | None = None
    forced_by: tuple[Diagnostic, ...] = ()
    """What fails at the release before ``target``."""
    errors: tuple[Diagnostic, ...] = ()
    note: str = ""

    def as_json(self) -> dict[str, object]:
        """The result as plain data."""

        def plain(found: Sequence[Diagnostic]) -> list[dict[str, object]]:
            return [{"path": str(d.path), "line": d.line, "column": d.column, "message": d.message} for d in found]

        target = dotted(self.target) if self.target else None
        data: dict[str, object] = {"path": str(self.path), "status": self.status, "target": target, "note": self.note}
        return data | {"forced_by": plain(self.forced_by), "errors": plain(self.errors)}


def units(paths: Sequence[Path]) -> Iterator[Path]:
    """The files given, and every C++ and CUDA source under the folders given, in a fixed order."""
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS)
                yield from (Path(folder, n) for n in sorted(names) if n.endswith((*CXX_SUFFIXES, *CUDA_SUFFIXES)))
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path}: no such file or folder")


def verify(source: Path, headers: Headers, options: Options = _DEFAULT, whole: bool = True) -> Result:
    """Find the oldest target at which a file compiles against the stable headers alone."""
    if options.compiler_of(source) is None:
        missing = "nvcc (give --nvcc)" if source.suffix in CUDA_SUFFIXES else "C++ compiler (give --cxx)"
        return Result(source, "unknown", note=f"not compiled: no {missing} on this machine")
    try:
        source.read_bytes()
    except OSError as error:
        return Result(source, "unknown", note=f"not read: {error.strerror}")
    releases = [(OLDEST[0], minor) for minor in range(OLDEST[1], headers.version[1] + 1)]
    if not releases:
        raise UserError(f"the headers of torch {headers.release} are older than {dotted(OLDEST)}, the oldest target")
    errors = {releases[0]: compile_stable(source, headers.include, releases[0], options)}
    if errors[releases[0]]:
        errors[releases[-1]] = compile_stable(source, headers.include, releases[-1], options)
        if errors[releases[-1]]:
            return _failed(source, errors[releases[-1]], headers)
    low, high = -1, len(releases) - 1  # compiles at high, fails at low
    if not errors[releases[0]]:
        high = 0
    else:
        low = 0
    while high - low > 1:
        middle = (low + high) // 2
        errors[releases[middle]] = compile_stable(source, headers.include, releases[middle], options)
        low, high = (middle, high) if errors[releases[middle]] else (low, middle)
    if whole and source.suffix in CUDA_SUFFIXES:
        rest = compile_stable(source, headers.include, releases[high], options, whole=True)
        if rest:
            return _failed(source, rest, headers)
    forced_by = tuple(errors[releases[low]]) if low >= 0 else ()
    return Result(source, "stable", releases[high], forced_by)


def _failed(source: Path, errors: Sequence[Diagnostic], headers: Headers) -> Result:
    if trouble := next((d for d in errors if d.trouble), None):
        return Result(source, "unknown", note=f"not compiled: {trouble.message}")
    missing = [d for d in errors if d.missing_header]
    others = [d.missing_header for d in missing if not _TORCH_HEADER.match(d.missing_header or "")]
    if others:
        note = f"not compiled: {others[0]} was not found (give its folder with -I)"
        return Result(source, "unknown", errors=tuple(errors), note=note)
    explained = [replace(d, message=_why_missing(name, headers)) if (name := d.missing_header) else d for d in errors]
    return Result(source, "unstable", errors=tuple(explained))


def _why_missing(name: str, headers: Headers) -> str:
    if STABLE.fullmatch(name):
        return f"<{name}> is not among the stable headers of torch {headers.release}; newer headers may have it"
    return f"<{name}> is not a stable header"


def report(results: Sequence[Result], target: Version | None = None) -> Iterator[str]:
    """Lines for people: files that fail first, then the verdict on the whole."""
    for result in results:
        if result.status == "unknown":
            yield f"{result.path}: unknown: {result.note}"
        elif result.status == "unstable":
            yield f"{result.path}: not stable: {len(result.errors)} errors"
            yield from _listed(result.errors)
        else:
            yield f"{result.path}: stable, runs on torch >= {dotted(result.target or OLDEST)}"
            if result.forced_by:
                yield f"  an older target fails, for want of {', '.join(_absent(result.forced_by)) or 'what follows'}:"
                yield from _listed(result.forced_by)
    count = {status: sum(r.status == status for r in results) for status in ("stable", "unstable", "unknown")}
    lowest = max((r.target for r in results if r.target), default=None)
    verdict = f"{len(results)} files: " + ", ".join(f"{n} {status}" for status, n in count.items() if n)
    yield verdict + (f"; together they need torch >= {dotted(lowest)}" if lowest else "")
    if target and lowest and lowest > target:
        yield f"torch {dotted(target)} was asked for"


def exit_status(results: Sequence[Result], target: Version | None = None) -> int:
    """0: all stable, at the target asked for; 1: some are not; 2: nothing worse than files that nothing is known of."""
    if any(r.status == "unstable" or (target and r.target and r.target > target) for r in results):
        return 1
    return 2 if any(r.status == "unknown" for r in results) or not results else 0


def _listed(found: Sequence[Diagnostic], limit: int = 20) -> Iterator[str]:
    for d in found[:limit]:
        yield f"  {d.path}:{d.line}:{d.column or 1}: {d.message}"
    if len(found) > limit:
        yield f"  and {len(found) - limit} more"


def _absent(found: Sequence[Diagnostic]) -> list[str]:
    """The names that the compiler did not find, each with the torch that it needs where that is known."""
    names = (next(filter(None, m.groups())) for d in found if (m := _ABSENT.search(d.message)))
    return [_with_version(name) for name in dict.fromkeys(names)]


def _with_version(name: str) -> str:
    needed = max((s.runs for s in symbols.named(name)), default=OLDEST)
    return f"{name} (torch {dotted(needed)})" if needed > OLDEST else name
