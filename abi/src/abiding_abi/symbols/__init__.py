"""``symbols``: every name that torch's stable headers offer, and which torch it needs.

``data.tsv`` is made by ``tools/make_symbols.py`` from the headers themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from abiding_abi.errors import UserError
from abiding_abi.versions import Version, dotted, parse

Kind = Literal["shim", "function", "overload", "member", "type", "constant", "macro"]


@dataclass(frozen=True, order=True)
class Symbol:
    """One name of the stable API."""

    name: str
    kind: Kind
    header: str
    headers: Version
    """The first release whose headers declare it."""
    runs: Version
    """The oldest torch on which a binary that uses it runs."""
    needs: str = ""
    """``cuda``: declared only with USE_CUDA or under nvcc."""
    until: Version | None = None
    """The last release whose headers declare it, if the newest do not."""

    def as_json(self) -> dict[str, object]:
        """The symbol as plain data."""
        until = dotted(self.until) if self.until else None
        return asdict(self) | {"headers": dotted(self.headers), "runs": dotted(self.runs), "until": until}


@cache
def table() -> tuple[Symbol, ...]:
    """All symbols, by name."""
    lines = files(__package__).joinpath("data.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return tuple(_symbol(*line.split("\t")) for line in lines)


def _symbol(name: str, kind: str, header: str, headers: str, runs: str, needs: str, until: str) -> Symbol:
    assert kind in get_args(Kind)
    known: Kind = kind  # type: ignore[assignment]
    return Symbol(name, known, header, parse(headers), parse(runs), needs, parse(until) if until else None)


@cache
def _by_last_part() -> dict[str, list[Symbol]]:
    found: dict[str, list[Symbol]] = {}
    for symbol in table():
        found.setdefault(symbol.name.partition("(")[0].split("::")[-1], []).append(symbol)
    return found


def named(name: str) -> list[Symbol]:
    """Symbols of this name, qualified or not."""
    last = name.split("::")[-1]
    return [s for s in _by_last_part().get(last, []) if s.name == name or s.name.endswith("::" + name)]


def search(
    pattern: str = "", kind: str | None = None, target: Version | None = None, headers: Version | None = None
) -> list[Symbol]:
    """Symbols whose name has the pattern in it, or matches it if it has ``*`` or ``?``; capitals do not matter.

    ``target`` and ``headers`` leave out what a binary for that torch, or a build with those headers, cannot use.
    """
    if kind and kind not in get_args(Kind):
        raise UserError(f"'{kind}' is no kind of symbol; there are {', '.join(get_args(Kind))}")
    wanted = pattern.lower()
    glob = any(c in wanted for c in "*?")
    return [
        s
        for s in table()
        if (_matches(s.name.lower(), wanted) if glob else wanted in s.name.lower())
        and (kind is None or s.kind == kind)
        and (target is None or s.runs <= target)
        and (headers is None or (s.headers <= headers and (s.until is None or headers <= s.until)))
    ]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.split("::")[-1], pattern)


def listing(found: Iterable[Symbol]) -> Iterator[str]:
    """Lines for people."""
    rows = [("headers", "runs on", "kind", "name", "header")]
    for s in found:
        marks = f"{' (CUDA)' if s.needs else ''}{f' (until {dotted(s.until)})' if s.until else ''}"
        rows.append((dotted(s.headers), dotted(s.runs), s.kind, s.name + marks, f"<{s.header}>"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    for row in rows:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
