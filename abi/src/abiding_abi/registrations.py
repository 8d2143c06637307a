"""Registration blocks: TORCH_LIBRARY and its kin, stable or not, with their calls."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from abiding_abi import lexical
from abiding_abi.boxing import joined_literal
from abiding_abi.source import Source

_BLOCK = re.compile(r"(STABLE_)?TORCH_LIBRARY(_FRAGMENT|_IMPL|_EXPAND|_IMPL_EXPAND)?\s*(?=\()")
_FUNCTION = re.compile(r"(?:TORCH_BOX|TORCH_FN)?\s*\(?\s*&?\s*((?:\w+\s*::\s*)*\w+)\s*\)?\s*\Z")


@dataclass(frozen=True)
class Call:
    """``m.def(...)`` or ``m.impl(...)``."""

    method: str
    arguments: tuple[lexical.Span, ...]
    start: int
    end: int
    literal: str | None
    """The first argument where it is a string."""
    function: str | None
    """The name of the function that is registered."""


@dataclass(frozen=True)
class Block:
    """One block; offsets of the macro's name, of its body and of the end."""

    kind: str
    stable: bool
    namespace: str
    key: str
    variable: str
    start: int
    name_end: int
    body: lexical.Span
    end: int
    calls: tuple[Call, ...]


@lru_cache(maxsize=4096)
def blocks(source: Source) -> list[Block]:
    """The registration blocks of a file."""
    code = source.code
    found: list[Block] = []
    if "TORCH_LIBRARY" not in code:
        return found
    for match in _BLOCK.finditer(code):
        if code[match.start() - 1 : match.start()].isalnum() or code[match.start() - 1 : match.start()] == "_":
            continue
        read = lexical.arguments(code, match.end())
        if not read or len(read[0]) < 2:
            continue
        spans, after = read
        open_at = lexical.skip_space(code, after)
        if code[open_at : open_at + 1] != "{":
            continue
        close = lexical.closing(code, open_at)
        if close < 0:
            continue
        words = [code[slice(*span)] for span in spans]
        suffix = (match[2] or "").strip("_")
        kind = {"": "library", "FRAGMENT": "fragment", "IMPL": "impl"}.get(suffix, "other")
        key = words[1] if "IMPL" in suffix and len(words) > 2 else ""
        body = lexical.Span(open_at + 1, close)
        found.append(
            Block(kind, bool(match[1]), words[0], key, words[-1], match.start(), match.end(), body, close + 1,
                  tuple(calls(source, words[-1], body)))
        )  # fmt: skip
    return found


def _selected(code: str, span: lexical.Span) -> lexical.Span:
    """The name or schema inside TORCH_SELECTIVE_NAME(..) or TORCH_SELECTIVE_SCHEMA(..)."""
    macro = re.compile(r"TORCH_SELECTIVE_(?:NAME|SCHEMA)\s*(?=\()").match(code, span.start)
    read = lexical.arguments(code, macro.end()) if macro else None
    return read[0][0] if read and len(read[0]) == 1 else span


def calls(source: Source, variable: str, body: lexical.Span) -> list[Call]:
    """``variable.method(...)`` in a body, chained calls included."""
    code = source.code
    found: list[Call] = []
    pattern = re.compile(rf"\b{re.escape(variable)}\s*\.\s*(\w+)\s*(?=\()")
    at = body.start
    while match := pattern.search(code, at, body.end):
        start, method, paren = match.start(), match[1], match.end()
        while True:
            read = lexical.arguments(code, paren)
            if not read:
                return found
            spans, end = read
            spans = [_selected(code, spans[0]), *spans[1:]] if spans else spans
            literal = joined_literal(source.text[slice(*spans[0])]) if spans else None
            function = None
            if len(spans) > 1:
                named = _FUNCTION.match(code[slice(*spans[1])])
                function = re.sub(r"\s", "", named[1]) if named else None
            found.append(Call(method, tuple(spans), start, end, literal, function))
            chained = re.compile(r"\s*\.\s*(def|impl)\s*(?=\()").match(code, end)
            if not chained:
                break
            start, method, paren = chained.start(), chained[1], chained.end()
        at = end
    return found
