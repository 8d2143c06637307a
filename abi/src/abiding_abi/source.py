"""Source files: reading them byte for byte, hiding comments and strings, and mapping offsets to lines and columns.

Text is the bytes decoded as latin-1, so that an offset in the text is an offset in the file and any encoding survives
a rewrite unchanged.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tree_sitter import Parser, Tree

EXTENSIONS = frozenset((".cpp", ".cc", ".cxx", ".c", ".cu", ".cuh", ".h", ".hpp", ".hh", ".hxx", ".inl"))
MAX_BYTES = 16 * 1024 * 1024
"""Larger files are generated data, not sources that a person maintains."""

# Every alternative begins with a literal character, so that the search skips from one to the next without matching.
_HIDDEN = re.compile(
    r"""//(?:[^\n\\]|\\(?:\r?\n)?.?)*"""
    r"""|/\*.*?(?:\*/|\Z)"""
    r"""|R"(?P<delimiter>[^ ()\\\t\r\n]{0,16})\(.*?\)(?P=delimiter)\""""
    r"""|"(?:[^"\\\n]|\\(?:\r\n|.))*(?:"|(?=\n)|\Z)"""
    r"""|'(?:[^'\\\n]|\\.)+'""",
    re.DOTALL,
)
_DIGITS = frozenset("0123456789abcdefABCDEF")
"""Before an apostrophe they make it a separator: 1'000."""
_NOT_NEWLINE = re.compile(r"[^\n]")
_CONDITION = re.compile(r"^[ \t]*#[ \t]*(if|ifdef|ifndef|elif|else|endif)\b[ \t]*([^\n]*)", re.MULTILINE)
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*(?:<([^>\n]+)>|\"([^\"\n]+)\")", re.MULTILINE)
_ANGLED = re.compile(r"^([ \t]*#[ \t]*include[ \t]*<)([^>\n]*)>", re.MULTILINE)
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(?:[^\n\\]|\\\r?\n|\\.)*", re.MULTILINE)


class UnreadableError(Exception):
    """A file that cannot be handled; the text says why in a few words."""


@dataclass(frozen=True)
class IncludeLine:
    """One include directive: offsets of the path between its delimiters."""

    path: str
    system: bool
    start: int
    end: int
    line_start: int
    line_end: int


@dataclass(frozen=True)
class Comment:
    """A comment with its offsets."""

    text: str
    start: int
    end: int


class Source:
    """One file, read once."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.data = data
        self.text = data.decode("latin-1")
        self.start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
        """Where the text begins: behind a byte order mark."""

    @cached_property
    def _hidden(self) -> tuple[str, tuple[Comment, ...]]:
        parts: list[str] = []
        comments: list[Comment] = []
        text, at = self.text, self.start
        parts.append(" " * at)
        search = at
        while match := _HIDDEN.search(text, search):
            start, end = match.span()
            if text[start] == "'" and start and text[start - 1] in _DIGITS:
                search = start + 1
                continue
            search = end
            parts.append(text[at:start])
            found = match.group()
            if found[0] == "/":
                comments.append(Comment(found, start, end))
                parts.append(_NOT_NEWLINE.sub(" ", found) if "\n" in found else " " * len(found))
            else:
                opening = found.index("'") if found[-1] == "'" else found.index('"')
                inner = found[opening + 1 : -1]
                blank = _NOT_NEWLINE.sub(" ", inner) if "\n" in inner else " " * len(inner)
                parts.append(" " * opening + found[opening] + blank + (found[-1] if len(found) > opening + 1 else ""))
            at = end
        parts.append(text[at:])
        code = "".join(parts)
        if "include" in code:
            code = _ANGLED.sub(lambda m: m[1] + " " * len(m[2]) + ">", code)
        return _without_dead_branches(code), tuple(comments)

    @property
    def code(self) -> str:
        """The text with comments, the insides of literals and ``#if 0`` branches as spaces; offsets stay."""
        return self._hidden[0]

    @property
    def comments(self) -> tuple[Comment, ...]:
        """Every comment, in order."""
        return self._hidden[1]

    @cached_property
    def includes(self) -> tuple[IncludeLine, ...]:
        """Include directives that are not commented out."""
        return tuple(self._find_includes())

    def _find_includes(self) -> Iterator[IncludeLine]:
        if "include" not in self.text:
            return
        for match in _INCLUDE.finditer(" " * self.start + self.text[self.start :]):
            if self.code[match.end() - 1].isspace() or "#" not in self.code[match.start() : match.end()]:
                continue
            group = 1 if match[1] is not None else 2
            begin = max(match.start(), self.start)
            path = match[group].replace("\\", "/")  # as Windows' compilers take it too
            yield IncludeLine(path, group == 1, *match.span(group), begin, match.end())

    @cached_property
    def defines(self) -> tuple[tuple[str, int, int], ...]:
        """Name and extent of every ``#define``, continuation lines included."""
        if "define" not in self.text:
            return ()
        return tuple((m[1], max(m.start(), self.start), m.end()) for m in _DEFINE.finditer(self.code))

    @cached_property
    def _newlines(self) -> list[int]:
        return [match.start() for match in re.finditer("\n", self.text)]

    def location(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both from 1; columns count characters where the line is UTF-8."""
        line = bisect_right(self._newlines, offset - 1)
        start = self._newlines[line - 1] + 1 if line else 0
        if start == 0:
            start = min(self.start, offset)
        return line + 1, len(self.data[start:offset].decode("utf-8", "replace")) + 1

    def line_of(self, offset: int) -> int:
        """Line of an offset, from 1."""
        return bisect_right(self._newlines, offset - 1) + 1

    def line_text(self, line: int) -> str:
        """A line for people: without its end, undecodable bytes replaced."""
        start = self._newlines[line - 2] + 1 if line > 1 else 0
        end = self._newlines[line - 1] if line <= len(self._newlines) else len(self.data)
        return self.data[start:end].decode("utf-8", "replace").rstrip("\r")

    @cached_property
    def tree(self) -> Tree:
        """The syntax tree; offsets are those of the text."""
        return _parser().parse(self.data)

    @cached_property
    def unparsed(self) -> tuple[tuple[int, int], ...]:
        """Extents of the smallest regions that the grammar does not understand; those of one line count as one."""
        found: list[tuple[int, int]] = []
        stack = [self.tree.root_node]
        while stack:
            node = stack.pop()
            inner = [child for child in node.children if child.has_error]
            if node.type == "ERROR" and not inner:
                found.append((node.start_byte, node.end_byte))
            stack += inner
        merged: list[tuple[int, int]] = []
        for start, end in sorted(found):
            if merged and "\n" not in self.text[merged[-1][1] : start]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        return tuple(merged)


def _without_dead_branches(code: str) -> str:
    """Blank what stands between ``#if 0`` and its else or end."""
    if "#" not in code or not re.search(r"#[ \t]*if[ \t]+0\b", code):
        return code
    dead: list[tuple[int, int]] = []
    stack: list[int | None] = []
    for match in _CONDITION.finditer(code):
        word = match[1]
        if word.startswith("if"):
            stack.append(match.end() if word == "if" and match[2].strip() == "0" else None)
        elif stack:
            start = stack.pop()
            if start is not None:
                dead.append((start, match.start()))
            if word != "endif":
                stack.append(None)
    for start, end in dead:
        code = code[:start] + _NOT_NEWLINE.sub(" ", code[start:end]) + code[end:]
    return code


@cache
def _parser() -> Parser:
    import tree_sitter_cuda
    from tree_sitter import Language, Parser

    return Parser(Language(tree_sitter_cuda.language()))


def read(path: Path) -> Source:
    """Read a file, or say why it cannot be handled."""
    try:
        if not path.is_file():
            raise UnreadableError("not a regular file" if path.exists() else "no such file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UnreadableError(f"{size / 2**20:.0f} MiB is too large for a source file; left out")
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableError((error.strerror or str(error)).lower()) from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableError("UTF-16 is not read; store it as UTF-8")
    if b"\0" in data:
        raise UnreadableError("binary; left out")
    return Source(path, data)
