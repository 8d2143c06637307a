"""What a pass sees of one file, and how it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abiding_abi import lexical
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Context, Hit
from abiding_abi.lint.project import Project
from abiding_abi.migrate.edits import Edit
from abiding_abi.migrate.python_module import Bindings
from abiding_abi.source import Source
from abiding_abi.usage import Usage


@dataclass
class Shared:
    """What the files of one run share."""

    operators: set[str] = field(default_factory=set)
    """Files with tensor arithmetic, which needs the wrapper header's operators."""
    headers: dict[str, Path] = field(default_factory=dict)
    """The wrapper header of each file that needs it."""
    bindings: dict[Path, Bindings] = field(default_factory=dict)
    """The old names behind each Python module."""
    modules: dict[Path, str] = field(default_factory=dict)
    """Python modules and headers to write, by path."""
    namespaces: set[str] = field(default_factory=set)
    """Namespaces that a block of this run already defines."""
    notes: list[str] = field(default_factory=list)
    """What a person has to do outside the sources, such as the build script."""
    namespace: str | None = None
    kind: str = ""
    """The kind of change that is being made."""
    keep_options: bool = False
    """Whether options that could not be written out as dtype and device stay a value, through the wrapper header."""


class Work(Context):
    """One file in one pass."""

    def __init__(self, project: Project, source: Source, shared: Shared, usage: Usage) -> None:
        super().__init__(project, source)
        self.shared = shared
        self.usage = usage
        self.scratch: dict[str, dict[Any, Any]] = {}
        self.text = source.text
        self.newline = "\r\n" if "\r\n" in source.text else "\n"

    def call(self, name_end: int) -> tuple[list[Span], int, int] | None:
        """Arguments, parenthesis and end of the call whose name (template list included) ends at ``name_end``."""
        at = lexical.skip_space(self.code, name_end)
        if self.code[at : at + 1] == "<":
            close = lexical.closing_angle(self.code, at)
            if close < 0:
                return None
            at = lexical.skip_space(self.code, close + 1)
        read = lexical.arguments(self.code, at)
        return (read[0], at, read[1]) if read else None

    def template(self, name_end: int) -> list[Span] | None:
        """Template arguments behind a name."""
        at = lexical.skip_space(self.code, name_end)
        if self.code[at : at + 1] != "<":
            return None
        close = lexical.closing_angle(self.code, at)
        return lexical.split(self.code, at + 1, close) if close > 0 else None

    def dot(self, name_start: int) -> int:
        """The offset of the ``.`` or ``->`` in front of a member's name, ``template`` left out."""
        end = lexical.back_over_space(self.code, name_start)
        if self.code[:end].endswith("template"):
            end = lexical.back_over_space(self.code, end - len("template"))
        return end - (2 if self.code[end - 2 : end] == "->" else 1)

    def receiver(self, name_start: int) -> tuple[Span, str]:
        """The receiver of a member, and what has to stand in front of it as a value (``*`` for a pointer)."""
        dot = self.dot(name_start)
        start = lexical.receiver(self.code, dot)
        star = "*" if self.code[dot : dot + 2] == "->" else ""
        return Span(start, lexical.back_over_space(self.code, dot)), star

    def word(self, span: Span) -> str:
        """The text of a range without white space around it, comments blank."""
        return self.code[span.start : span.end].strip()

    def plain(self, span: Span) -> str:
        """The text of a range without any white space."""
        return "".join(self.code[span.start : span.end].split())


Answer = Edit | Iterable[Edit] | str | None
"""Edits; or, as text, why a person has to decide; None where another edit covers the place."""
Handler = Callable[[Work, Hit], Answer]
