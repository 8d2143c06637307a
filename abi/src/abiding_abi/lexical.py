"""Reading C++ expressions in text whose comments and literals are blank: brackets, arguments, receivers."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_BRACKETS = re.compile(r"[()\[\]{}]")
_OPEN = {")": "(", "]": "[", "}": "{"}
_POSTFIX_WORD = re.compile(r"\s*(?:\.|->|::)\s*[A-Za-z_]\w*|[A-Za-z_]\w*")
_ANGLE_STOP = re.compile(r"[<>;{}()&|]")
_SMALL = 500
"""Texts up to this length are not worth remembering."""
_HOPS = 60
"""Members in one chain after which a receiver counts as read: nobody writes more, and a broken file may."""


class Span(NamedTuple):
    """A half-open range of offsets."""

    start: int
    end: int


def skip_space(code: str, at: int) -> int:
    """The first offset at or after ``at`` that is no white space (a line's continuation counts as such)."""
    size = len(code)
    while at < size and (code[at].isspace() or (code[at] == "\\" and code[at + 1 : at + 2] in ("\n", "\r"))):
        at += 1
    return at


def back_over_space(code: str, at: int) -> int:
    """The end of what stands before ``at``, white space left out."""
    while at > 0 and (code[at - 1].isspace() or (code[at - 1] == "\\" and code[at : at + 1] in ("\n", "\r"))):
        at -= 1
    return at


def word_start(code: str, end: int) -> int:
    """Where the identifier that ends at ``end`` begins; ``end`` if there is none."""
    at = end
    while at > 0 and (code[at - 1].isalnum() or code[at - 1] == "_"):
        at -= 1
    return end if at < end and code[at].isdigit() else at


def closing(code: str, at: int) -> int:
    """The offset of the bracket that closes the one at ``at``; -1 if there is none."""
    if len(code) > _SMALL:
        return _pairs(code)[0].get(at, -1)
    return _match(code).get(at, -1)


def opening(code: str, at: int) -> int:
    """The offset of the bracket that the one at ``at`` closes; -1 if there is none."""
    if len(code) > _SMALL:
        return _pairs(code)[1].get(at, -1)
    return {close: start for start, close in _match(code).items()}.get(at, -1)


@lru_cache(maxsize=8)
def _pairs(code: str) -> tuple[dict[int, int], dict[int, int]]:
    """Every pair of a whole file, found once: looking for each bracket's partner by itself costs the square."""
    closes = _match(code)
    return closes, {close: start for start, close in closes.items()}


def _match(code: str) -> dict[int, int]:
    """Closing bracket by opening one. A bracket that fits nothing is left out, with those opened since."""
    pairs: dict[int, int] = {}
    stack: list[tuple[str, int]] = []
    depth = dict.fromkeys("([{", 0)
    for match in _BRACKETS.finditer(code):
        bracket = match.group()
        if bracket in depth:
            stack.append((bracket, match.start()))
            depth[bracket] += 1
            continue
        wanted = _OPEN[bracket]
        if not depth[wanted]:
            continue
        while True:
            kind, start = stack.pop()
            depth[kind] -= 1
            if kind == wanted:
                pairs[start] = match.start()
                break
    return pairs


def closing_angle(code: str, at: int) -> int:
    """The ``>`` that closes the template list opened at ``at``; -1 if it is a comparison."""
    depth = 0
    position = at
    end = min(len(code), at + 2000)
    while position < end:
        match = _ANGLE_STOP.search(code, position, end)
        if not match:
            return -1
        char, position = match.group(), match.end()
        if char == "<":
            depth += 1
        elif char == ">":
            if code[match.start() - 1] == "-":
                continue
            depth -= 1
            if depth == 0:
                return match.start()
        elif char == "(":
            close = closing(code, match.start())
            if close < 0:
                return -1
            position = close + 1
        elif char in ";{})" or code[position : position + 1] == char:
            return -1
    return -1


def opening_angle(code: str, at: int) -> int:
    """The ``<`` that the ``>`` at ``at`` closes; -1 if it is a comparison."""
    depth = 0
    low = max(0, at - 2000)
    while at >= low:
        char = code[at]
        if char == ">" and code[at - 1] != "-":
            depth += 1
        elif char == "<":
            depth -= 1
            if depth == 0:
                return at
        elif char == ")":
            at = opening(code, at)
            if at < 0:
                return -1
        elif char in ";{}(":
            return -1
        at -= 1
    return -1


def split(code: str, start: int, end: int, separator: str = ",") -> list[Span]:
    """The parts between top-level separators, white space around them left out; none for an empty range."""
    parts: list[Span] = []
    begin = at = start
    while at < end:
        char = code[at]
        if char in "([{":
            close = closing(code, at)
            if close < 0 or close >= end:
                break
            at = close
        elif char == "<" and at > start and (code[at - 1].isalnum() or code[at - 1] == "_"):
            close = closing_angle(code, at)
            if 0 <= close < end:
                at = close
        elif char == separator:
            parts.append(trim(code, begin, at))
            begin = at + 1
        at += 1
    last = trim(code, begin, end)
    if parts or last.start < last.end:
        parts.append(last)
    return parts


def trim(code: str, start: int, end: int) -> Span:
    """The range without white space at its ends."""
    start = min(skip_space(code, start), end)
    return Span(start, max(start, back_over_space(code, end)))


def arguments(code: str, at: int) -> tuple[list[Span], int] | None:
    """Arguments of the call whose parenthesis opens at ``at``, and the offset behind the closing one."""
    if code[at : at + 1] != "(":
        return None
    close = closing(code, at)
    return None if close < 0 else (split(code, at + 1, close), close + 1)


def receiver(code: str, at: int) -> int:
    """The start of the postfix expression that ends at ``at`` (where ``.`` or ``->`` stands)."""
    start = at
    need = True
    for _ in range(_HOPS):
        end = back_over_space(code, start)
        if end == 0:
            return start
        char = code[end - 1]
        if char in ")]" and need:
            open_at = opening(code, end - 1)
            if open_at < 0:
                return start
            start = open_at
            before = back_over_space(code, open_at)
            follows = before > 0 and (code[before - 1].isalnum() or code[before - 1] in "_)]>")
            if not follows or (char == ")" and _is_keyword(code, before)):
                return start
            continue
        if char == ">" and code[end - 2 : end] != "->" and need:
            open_at = opening_angle(code, end - 1)
            if open_at < 0:
                return start
            start = open_at
            continue
        if need and (begin := word_start(code, end)) < end:
            start = begin
            need = False
            continue
        if not need:
            if code[end - 2 : end] in ("::", "->"):
                start = end - 2
                if code[end - 2 : end] == "::" and not _name_before(code, start):
                    return start
                need = True
                continue
            if char == ".":
                start = end - 1
                need = True
                continue
        return start
    return start


def postfix_end(code: str, at: int) -> int:
    """The end of the postfix expression that begins at ``at``: a name with members, calls and indices."""
    end = at
    for _ in range(_HOPS):
        word = _POSTFIX_WORD.match(code, end)
        if word:
            end = word.end()
            continue
        opened = skip_space(code, end)
        if code[opened : opened + 1] not in ("(", "["):
            return end
        close = closing(code, opened)
        if close < 0:
            return end
        end = close + 1
    return end


def _name_before(code: str, at: int) -> bool:
    end = back_over_space(code, at)
    return end > 0 and (code[end - 1].isalnum() or code[end - 1] in "_>")


def _is_keyword(code: str, end: int) -> bool:
    return code[word_start(code, end) : end] in {"return", "if", "while", "for", "switch", "case", "throw"}
