"""``ABI-TODO(RULE)`` comments where a person has to decide."""

from __future__ import annotations

import re
from dataclasses import dataclass

from abiding_abi.lint.engine import Hit
from abiding_abi.migrate.edits import Edit, replace
from abiding_abi.migrate.work import Work

_MARK = re.compile(r"ABI-TODO\(([A-Z]{3}\d{3})\)")


@dataclass(frozen=True)
class Todo:
    """One place that was left for a person."""

    line: int
    rule: str
    found: str
    reason: str


def existing(text: str) -> list[tuple[str, int]]:
    """Marks in a text: rule and offset."""
    return [(match[1], match.start()) for match in _MARK.finditer(text)]


def mark(work: Work, places: list[tuple[Hit, str]]) -> list[Edit]:
    """Comment lines above the lines of the places, one per line and rule, where none stands yet."""
    edits: list[Edit] = []
    seen: set[tuple[int, str]] = set()
    for hit, reason in places:
        at = _line_start(work, hit.start)
        if at is None or (at, hit.rule.code) in seen:
            continue
        seen.add((at, hit.rule.code))
        if hit.rule.code in _above(work.text, at):
            continue
        indent = re.match(r"[ \t]*", work.text[at:]).group()  # type: ignore[union-attr]
        edits.append(
            replace(at, at, f"{indent}// ABI-TODO({hit.rule.code}): {reason}{work.newline}", rule=hit.rule.code)
        )
    return edits


def _line_start(work: Work, at: int) -> int | None:
    """The start of the line, of the macro definition around it, or of the literal that runs over lines."""
    for _, start, end in work.source.defines:
        if start <= at < end:
            return start
    begin = work.text.rfind("\n", 0, at) + 1
    while begin > 1 and work.text[:begin].rstrip("\r\n").endswith("\\") and work.text[begin - 1] == "\n":
        begin = work.text.rfind("\n", 0, begin - 1) + 1
    begin = max(begin, work.source.start)
    if any(comment.start < begin < comment.end for comment in work.source.comments):
        return None
    return begin


def _above(text: str, at: int) -> set[str]:
    """Rules that the comment lines right above already name."""
    found: set[str] = set()
    end = at
    while end > 0:
        begin = text.rfind("\n", 0, end - 1) + 1
        line = text[begin:end].strip()
        if not line.startswith("// ABI-TODO("):
            break
        found |= set(_MARK.findall(line))
        end = begin
    return found
