"""Edits: ranges of a source and what replaces them, nested freely and applied without touching any other byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abiding_abi.lexical import Span

Part = str | Span
"""New text, or a range of the old one, with the edits inside it."""


@dataclass(frozen=True)
class Edit:
    """Replace ``start`` to ``end``; an empty range inserts."""

    start: int
    end: int
    parts: tuple[Part, ...]
    rule: str


def replace(start: int, end: int, *parts: Part, rule: str = "") -> Edit:
    """An edit from its parts."""
    return Edit(start, end, parts, rule)


def consistent(edits: Iterable[Edit]) -> tuple[list[Edit], list[Edit]]:
    """Edits that can be applied together, outermost first at each start, and those that cross one of them."""
    kept: list[Edit] = []
    crossing: list[Edit] = []
    for edit in sorted(set(edits), key=lambda e: (e.start, -e.end, e.rule)):
        if any(_crosses(other, edit) for other in kept[-64:]):
            crossing.append(edit)
        else:
            kept.append(edit)
    return kept, crossing


def _crosses(outer: Edit, edit: Edit) -> bool:
    if edit.start >= outer.end or ((edit.start, edit.end) == (outer.start, outer.end) and edit.start == edit.end):
        return False
    if (edit.start, edit.end) == (outer.start, outer.end):
        return True
    if edit.end > outer.end:
        return edit.start > outer.start or edit.start < outer.end
    spans = [part for part in outer.parts if isinstance(part, Span)]
    if not spans:
        return True
    return not any(span.start <= edit.start and edit.end <= span.end for span in spans) and not _deleted(outer, edit)


def _deleted(outer: Edit, edit: Edit) -> bool:
    """An edit in a part of the outer one that goes away does not matter."""
    spans = [part for part in outer.parts if isinstance(part, Span)]
    return all(edit.end <= span.start or edit.start >= span.end for span in spans)


def render(text: str, edits: Sequence[Edit], start: int = 0, end: int | None = None) -> str:
    """The text of a range after the edits, which have to be consistent and in order."""
    end = len(text) if end is None else end
    inside = [edit for edit in edits if start <= edit.start and edit.end <= end]
    out: list[str] = []
    at = start
    for index, edit in enumerate(inside):
        if edit.start < at:
            continue
        out.append(text[at : edit.start])
        inner = inside[index + 1 :]
        for part in edit.parts:
            out.append(part if isinstance(part, str) else render(text, _within(inner, part), part.start, part.end))
        at = edit.end
    out.append(text[at:end])
    return "".join(out)


def _within(edits: Sequence[Edit], span: Span) -> list[Edit]:
    found = []
    for edit in edits:
        if edit.start >= span.end and edit.start > span.start:
            break
        if edit.end <= span.end and edit.start >= span.start:
            found.append(edit)
    return found
