"""The ratchet: one committed file of counts that may only fall.

Counts are by file and rule, and by binary and symbol. A count that rises fails, in whatever file; one that has fallen
fails as well until ``tighten`` has written it down, so that the file never promises more than is true.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abiding_abi import lint
from abiding_abi.errors import UserError
from abiding_abi.lint import Config
from abiding_abi.lint.project import Progress, shown

DEFAULT = Path("abi-ratchet.json")
_VERSION = 1

Counts = dict[str, dict[str, int]]


@dataclass
class Ledger:
    """What the file holds."""

    paths: list[str] = field(default_factory=list)
    binary_paths: list[str] = field(default_factory=list)
    sources: Counts = field(default_factory=dict)
    binaries: Counts = field(default_factory=dict)

    def text(self) -> str:
        """As it is written: sorted, one count per line, so that two branches merge."""
        data = {
            "version": _VERSION,
            "paths": self.paths,
            "binary_paths": self.binary_paths,
            "sources": _sorted(self.sources),
            "binaries": _sorted(self.binaries),
        }
        return json.dumps(data, indent=1) + "\n"


def _sorted(counts: Counts) -> Counts:
    return {key: dict(sorted(counts[key].items())) for key in sorted(counts)}


def read(path: Path) -> Ledger:
    """Read a committed file, or say what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; 'abiding-abi ratchet init PATH...' makes it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(data, dict) or data.get("version") != _VERSION:
        raise UserError(f"{path}: not a ratchet of version {_VERSION}")
    names = _list(path, data, "paths"), _list(path, data, "binary_paths")
    return Ledger(*names, _counts(path, data, "sources"), _counts(path, data, "binaries"))


def _list(path: Path, data: dict[str, Any], key: str) -> list[str]:
    value = data.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}: '{key}' has to be a list of paths")
    return value


def _counts(path: Path, data: dict[str, Any], key: str) -> Counts:
    value = data.get(key, {})
    entries = list(value.values()) if isinstance(value, dict) else [None]
    if not all(isinstance(e, dict) and all(type(n) is int and n > 0 for n in e.values()) for e in entries):
        raise UserError(f"{path}: '{key}' has to be counts above 0, by file and then by name")
    return value  # type: ignore[no-any-return]


def measure(
    paths: Sequence[Path], binaries: Sequence[Path], config: Config, progress: Progress | None = None
) -> Ledger:
    """Count what is there now."""
    report = lint.run(paths, config, progress)
    if report.problems:
        raise UserError("; ".join(f"{path}: {reason}" for path, reason in report.problems))
    sources: dict[str, Counter[str]] = defaultdict(Counter)
    for finding in report.findings:
        sources[finding.path][finding.rule.code] += 1
    found = {shown(path, config): symbols for path in binaries if (symbols := unstable_symbols(path))}
    return Ledger(
        sorted(shown(path, config) for path in paths),
        sorted(shown(path, config) for path in binaries),
        {path: dict(counts) for path, counts in sources.items()},
        found,
    )


def unstable_symbols(path: Path) -> dict[str, int]:
    """The unstable symbols of libtorch that a library imports."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                raise UserError(f"{path}: not an ELF library")
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    try:
        from torch_abi_audit import inspect_extension
    except ImportError:
        raise UserError("counting a binary's symbols needs torch-abi-audit, and that Python 3.11") from None
    try:
        verdict = inspect_extension(path)
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a shared library: {error}") from None
    if verdict.error:
        raise UserError(f"{path}: {verdict.error}")
    return dict.fromkeys(sorted(verdict.torch.unstable_symbols), 1)


def compare(allowed: Ledger, now: Ledger) -> tuple[list[str], list[str]]:
    """Counts that rose, and entries that are stale, each as one line."""
    rises: list[str] = []
    stale: list[str] = []
    for before, after in ((allowed.sources, now.sources), (allowed.binaries, now.binaries)):
        falls = _falls(before, after)
        for path, name, old, new in _changes(before, after):
            if new > old:
                origin = sorted(falls.get(name, ()))
                moved = f" (it fell in {', '.join(origin)}: moving is not falling)" if origin else ""
                rises.append(f"{path}: {name} rose from {old} to {new}{moved}")
            else:
                stale.append(f"{path}: {name} fell from {old} to {new}")
    return rises, stale


def _falls(before: Counts, after: Counts) -> dict[str, set[str]]:
    falls: dict[str, set[str]] = defaultdict(set)
    for path, name, old, new in _changes(before, after):
        if new < old:
            falls[name].add(path)
    return falls


def _changes(before: Counts, after: Counts) -> Iterable[tuple[str, str, int, int]]:
    for path in sorted({*before, *after}):
        old, new = before.get(path, {}), after.get(path, {})
        for name in sorted({*old, *new}):
            if old.get(name, 0) != new.get(name, 0):
                yield path, name, old.get(name, 0), new.get(name, 0)


def total(ledger: Ledger) -> str:
    """What a ledger adds up to."""
    findings = sum(sum(counts.values()) for counts in ledger.sources.values())
    symbols = sum(sum(counts.values()) for counts in ledger.binaries.values())
    binaries = f", {symbols} unstable symbols in {len(ledger.binaries)} binaries" if ledger.binary_paths else ""
    return f"{findings} findings in {len(ledger.sources)} files{binaries}"


def write(path: Path, ledger: Ledger) -> None:
    """Write the file, whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(ledger.text(), encoding="utf-8")
    os.replace(temporary, path)
