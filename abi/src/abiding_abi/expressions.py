"""Expressions in text: what surrounds a name, and the whole of which it is a part."""

from __future__ import annotations

import re
from collections.abc import Iterator

from abiding_abi import lexical
from abiding_abi.lexical import Span

_CALLEE = re.compile(r"((?:[A-Za-z_]\w*\s*::\s*)*[A-Za-z_]\w*)\s*(?:<[^;{}()]*>)?\s*(?:<<<[^;{}]*>>>)?\s*\Z")


def occurrences(code: str, region: Span, name: str) -> Iterator[tuple[int, int]]:
    """Where a region names a variable; members of other objects and qualified names are not it."""
    for match in re.compile(rf"(?<![\w.]){re.escape(name)}\b").finditer(code, region.start, region.end):
        before = lexical.back_over_space(code, match.start())
        if code[before - 2 : before] not in ("->", "::"):
            yield match.start(), match.end()


def is_unary(code: str, star: int) -> bool:
    """Whether a ``*`` dereferences, rather than multiplies or declares."""
    before = lexical.back_over_space(code, star)
    char = code[before - 1 : before]
    return not (char.isalnum() or char in "_)]>") or code[max(0, before - 6) : before].endswith("return")


def whole_choice(code: str, start: int, end: int) -> tuple[int, int]:
    """The whole ``a ? b : c`` of which an expression is b or c; else the expression."""
    before = lexical.back_over_space(code, start)
    char = code[before - 1 : before]
    if char not in ("?", ":") or code[before - 2 : before] == "::":
        return start, end
    left, asked = start, char == "?"
    while left > 0:
        char = code[left - 1]
        if char in ")]}" and (opened := lexical.opening(code, left - 1)) >= 0:
            left = opened
            continue
        comparison = char == "=" and (code[left - 2 : left - 1] in "=!<>" or code[left : left + 1] == "=")
        if char in "([{},;" or (char == "=" and not comparison) or code[max(0, left - 6) : left] == "return":
            break
        asked = asked or char == "?"
        left -= 1
    right = end
    while right < len(code) and code[right] not in ",;)]}":
        closed = lexical.closing(code, right) if code[right] in "([{" else -1
        right = closed + 1 if closed > 0 else right + 1
    return (lexical.skip_space(code, left), lexical.back_over_space(code, right)) if asked else (start, end)


def whole_sum(code: str, start: int, end: int) -> tuple[int, int]:
    """An expression with what is added to it: ``p + i * n``."""
    at = lexical.skip_space(code, end)
    if code[at : at + 1] in "+-" and code[at : at + 1] and code[at + 1 : at + 2] not in "=>+-":
        depth = 0
        for match in re.compile(r"[()\[\]{},;?<>=]").finditer(code, at, min(len(code), at + 400)):
            char = match.group()
            if char in "([{":
                depth += 1
            elif char in ")]}" and depth:
                depth -= 1
            elif not depth:
                return start, lexical.back_over_space(code, match.start())
    return start, end


def enclosing_call(code: str, at: int) -> tuple[str, int, int, int, int] | None:
    """The call in whose arguments an offset stands: callee, index, number of arguments, its two parentheses."""
    depth = 0
    low = max(0, at - 4000)
    position = at - 1
    while position >= low:
        char = code[position]
        if char in ")]}":
            opened = lexical.opening(code, position)
            if opened < 0:
                return None
            position = opened
        elif char in "([{":
            break
        elif char == ";" and depth == 0:
            return None
        position -= 1
    else:
        return None
    if code[position] != "(":
        return None
    close = lexical.closing(code, position)
    if close < 0:
        return None
    spans = lexical.split(code, position + 1, close)
    index = next((i for i, span in enumerate(spans) if span.start <= at < span.end), -1)
    callee = _CALLEE.search(code, max(0, position - 400), position)
    name = re.sub(r"\s", "", callee[1]) if callee else ""
    return name, index, len(spans), position, close


def callee_start(code: str, paren: int) -> int:
    """The start of the callee's name in front of a parenthesis."""
    callee = _CALLEE.search(code, max(0, paren - 400), paren)
    return callee.start() if callee else paren
