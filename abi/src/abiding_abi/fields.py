"""What a project does with the pointers that lie in a member of its structs, such as a kernel's ``params.out_ptr``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from abiding_abi import lexical
from abiding_abi.expressions import occurrences
from abiding_abi.lexical import Span
from abiding_abi.source import Source

if TYPE_CHECKING:
    from abiding_abi.usage import Usage, Use

TARGET = re.compile(r"(?:[A-Za-z_]\w*(?:\s*\[[^\[\]]*\])?\s*(?:\.|->)\s*)+([A-Za-z_]\w*)\s*=\Z")
"""The member that an assignment ends at its ``=``."""
_SET = re.compile(r"\s*=(?!=)")
_FUNCTION_HEAD = re.compile(r"\)\s*(?:const\b\s*|noexcept\b\s*|mutable\b\s*|->\s*[\w:<>,&*\s]+)*\Z")


class Fields:
    """Answers by the name of a member, whichever struct has it, remembered."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._known: dict[str, Use | None] = {}

    def use(self, name: str) -> Use | None:
        """What happens to the pointer in members of that name; None where no code at hand reads one."""
        if name not in self._known:
            self._known[name] = None  # a chain of members that leads back here adds nothing
            by_place: dict[tuple[str, Span], Use] = {}
            for source in self._usage.sources:
                for place, use in self._uses(source, name) if name in source.code else ():
                    by_place[str(source.path), place] = max(use, by_place.get((str(source.path), place), use))
            self._known[name] = _together(set(by_place.values()))
        return self._known[name]

    def _uses(self, source: Source, name: str) -> Iterator[tuple[Span, Use]]:
        """Functions, or structs, and what they do with such a member."""
        code = source.code
        for match in re.compile(rf"(\.|->)\s*{re.escape(name)}\b(?!\s*\()").finditer(code):
            if not _SET.match(code, match.end()):
                start = lexical.receiver(code, match.start())
                place = _function(code, start)
                yield place, self._usage.pointer_use(source, place, start, match.end())
        declared = re.compile(rf"\*\s*(?:(?:__restrict__|__restrict|const)\s+)*{re.escape(name)}\s*(?:=[^;,]*)?[;,]")
        for match in declared.finditer(code):
            struct = _struct(code, match.start())
            if struct is None:
                continue
            for start, end in occurrences(code, struct, name):
                if not match.start() < start < match.end() and not _SET.match(code, end):
                    yield struct, self._usage.pointer_use(source, struct, start, end)


def _together(uses: set[Use]) -> Use | None:
    """One answer for functions of which nobody knows which of them gets the pointer."""
    if not uses:
        return None
    written = type(max(uses)).WRITTEN
    return type(written).UNKNOWN if written in uses and len(uses) > 1 else max(uses)


@lru_cache(maxsize=4)
def _blocks(code: str) -> list[tuple[int, int]]:
    braces = ((match.start(), lexical.closing(code, match.start())) for match in re.finditer(r"\{", code))
    return [(start, end) for start, end in braces if end > 0]


def _function(code: str, at: int) -> Span:
    """The outermost function around an offset, or what is left of the file."""
    for start, end in _blocks(code):
        if start < at < end and _FUNCTION_HEAD.search(code, max(0, start - 80), start):
            return Span(start + 1, end)
    return Span(at, len(code))


def _struct(code: str, at: int) -> Span | None:
    """The body of the struct right around an offset."""
    around = [(start, end) for start, end in _blocks(code) if start < at < end]
    if not around:
        return None
    start, end = around[-1]
    head = code[max(code.rfind(char, 0, start) for char in ";{}") + 1 : start]
    return Span(start + 1, end) if re.search(r"\b(?:struct|class|union)\b", head) else None
