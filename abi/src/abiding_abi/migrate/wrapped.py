"""Calls of functions that the stable API lacks, through the generated header of dispatcher wrappers."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from abiding_abi import lexical, wrappers
from abiding_abi.errors import UserError
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate import python_module
from abiding_abi.migrate.edits import replace
from abiding_abi.migrate.work import Answer, Handler, Work
from abiding_abi.rules import Method, Name
from abiding_abi.source import Source

OPERATORS = "operators"
_SIGNS = frozenset(
    [
        *("+", "-", "*", "/", "&", "|", "^", "~", "+=", "-=", "*=", "/=", "&=", "|=", "^="),
        *("==", "!=", "<", ">", "<=", ">="),
    ]
)
_OTHERWISE = frozenset(("detail", "operators", "contiguous_format", "indexing"))
NAMESPACE = wrappers.NAMESPACE
_USED = re.compile(rf"\b{NAMESPACE}::(\w+)")


def wrapped(work: Work, hit: Hit) -> Answer:
    """A call that a wrapper makes."""
    if hit.name == "tensor_arithmetic":
        sign = work.code[hit.start : hit.end]
        if sign not in _SIGNS:
            return f"operator{sign} of tensors has no stable form"
        work.shared.operators.add(os.path.abspath(work.source.path))
        return None
    name = hit.name.rpartition("::")[2]
    if name not in wrappers.NAMES or not name[:1].islower() or name in _OTHERWISE:
        return f"{name} has neither a stable function nor a wrapper"
    if isinstance(hit.match, Name):
        return replace(hit.start, hit.end, f"{NAMESPACE}::{name}", rule=hit.rule.code)
    if not isinstance(hit.match, Method):
        return f"use {hit.rule.stable}"
    return member(work, hit, name)


def indexing(work: Work, hit: Hit) -> Answer:
    """Names of torch::indexing; those that a using-declaration brought stay as they are."""
    text = work.code[hit.start : hit.end]
    if "::" not in text:
        return None
    path = "".join(text.split()).partition("indexing")[2]
    return replace(hit.start, hit.end, f"{NAMESPACE}::indexing{path}", rule=hit.rule.code)


_ITEMS = {"index": "get_item", "index_put_": "set_item"}


def _by_item(work: Work, indices: Span) -> bool:
    """Whether indices are more than a list of tensors, in which nothing stands for a whole dimension."""
    if work.code[indices.start] != "{":
        return "TensorIndex" in work.code and not work.plain(indices).endswith(")")
    inner = lexical.split(work.code, indices.start + 1, indices.end - 1)
    return any(work.tensors.infer(*span) != "tensor" for span in inner)


def member(work: Work, hit: Hit, name: str) -> Answer:
    """``t.name(args)`` as ``abi_ops::name(t, args)``."""
    read = work.call(hit.end)
    if not read or work.template(hit.end):
        return "the call is not readable"
    if name in _ITEMS and read[0] and _by_item(work, read[0][0]):
        name = _ITEMS[name]
    if name == "std" and read[0] and work.plain(read[0][0]) in ("true", "false"):
        return "std(bool) is of all elements, where the wrapper takes dimensions"
    target, star = work.receiver(hit.start)
    parts: list[str | Span] = [f"{NAMESPACE}::{name}({star}", target]
    if read[0]:
        parts += [", ", Span(read[0][0].start, read[0][-1].end)]
    return replace(target.start, read[2], *parts, ")", rule=hit.rule.code)


def used(source: Source) -> set[str]:
    """Wrappers that a text calls."""
    return set(_USED.findall(source.code)) & wrappers.NAMES


def users(sources: Iterable[Source], operators: set[str]) -> dict[str, set[str]]:
    """Files that need the header, and what each takes from it."""
    found: dict[str, set[str]] = {}
    for source in sources:
        if source.path.name == wrappers.HEADER_NAME:
            continue
        path = os.path.abspath(source.path)
        names = used(source) | ({OPERATORS} if path in operators else set())
        if names:
            found[path] = names
    return found


def places(paths: Iterable[str]) -> dict[str, Path]:
    """Each file's header: of the files that are built together, in the nearest folder above all that need it."""
    built: dict[Path, list[str]] = defaultdict(list)
    for path in paths:
        built[python_module.build_folder(Path(path).parent)].append(path)
    found: dict[str, Path] = {}
    for together in built.values():
        folder = os.path.commonpath([os.path.dirname(path) for path in together])
        found |= dict.fromkeys(together, Path(folder, wrappers.HEADER_NAME))
    return found


def text(path: Path, names: set[str]) -> str:
    """The header, with what an earlier run has put there."""
    kept: set[str] = set()
    if path.exists():
        before = path.read_text(encoding="utf-8", errors="replace")
        if f"namespace {NAMESPACE}" not in before:
            raise UserError(f"{path} is not the header of wrappers, which would be written there: rename it")
        kept = set(re.findall(r"^inline [^(\n]*?(\w+)\(", before, re.MULTILINE)) & wrappers.NAMES
        kept |= {OPERATORS} if "operator" in before else set()
        if names <= kept:
            return before
    return wrappers.header(sorted(names | kept))


HANDLERS: dict[str, Handler] = {"wrappers": wrapped, "indexing": indexing}
