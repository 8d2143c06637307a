"""Includes: legacy headers out, the stable headers and the standard headers that the code uses in."""

from __future__ import annotations

import os
import re

from abiding_abi.lint.engine import Hit
from abiding_abi.migrate.edits import Edit, replace
from abiding_abi.migrate.header_names import C_NAMES, needed
from abiding_abi.migrate.helpers import HELPERS, helper_lines, helpers_of
from abiding_abi.migrate.simple import whole_line
from abiding_abi.migrate.work import Work
from abiding_abi.rules import Include


def includes(work: Work, hits: list[Hit], unresolved: bool, touched: bool) -> tuple[list[Edit], list[tuple[Hit, str]]]:
    """Edits that exchange the headers of a file, and includes that a person has to look at."""
    legacy: list[Hit] = []
    open_: list[tuple[Hit, str]] = []
    for hit in hits:
        if not isinstance(hit.match, Include):
            continue
        if hit.rule.kind == "decide" and unresolved and not hit.match.to:
            open_.append((hit, "what the file takes from this header is still there"))
        elif (hit.rule.code == "INC020" and re.search(r"\b(?:py|pybind11)\s*::|\bPYBIND11_", work.code)) or (
            "py::" in work.code and "extension" in hit.name
        ):
            open_.append((hit, "the file still uses pybind11"))
        else:
            legacy.append(hit)
    added = helpers_of(work.code)
    sources = work.project.closure(work.source)
    own_header = _wrapper_header(work)
    missing = any(by_include(hit) for hit in hits)
    if not legacy and not added and not own_header and not missing and not (touched and _migrated(work)):
        return [], open_
    code = "\n".join([work.code, *(line for name in added for line in helper_lines(name))])
    kept = [header for hit in legacy for header in _same(hit)]
    present = {line.path for source in sources for line in source.includes}
    own = {line.path for line in work.source.includes}
    wanted = [
        header
        for header in dict.fromkeys([*needed(code, nvcc=work.source.path.suffix in (".cu", ".cuh")), *kept])
        if header not in own
        and (header not in present or header.startswith("torch/"))
        and not _spelled(header, present)
    ]
    if not legacy:
        wanted = [header for header in wanted if header not in present and header.startswith(("torch/", "cuda"))]
    return [*_edits(work, legacy, wanted, added, own_header)], open_


def by_include(hit: Hit) -> bool:
    """Whether another header is all that a place needs, as for a macro that so far came by the includer's headers."""
    return hit.rule.edit == "includes" and not isinstance(hit.match, Include)


def _wrapper_header(work: Work) -> str:
    """How the file includes the header of wrappers, unless it does."""
    header = work.shared.headers.get(os.path.abspath(work.source.path))
    if header is None:
        return ""
    path = os.path.relpath(header, work.source.path.parent.absolute()).replace(os.sep, "/")
    return "" if any(line.path == path for line in work.source.includes) else path


def _same(hit: Hit) -> list[str]:
    """The header that is the legacy one under another name, which stays whether this file uses it or not."""
    assert isinstance(hit.match, Include)
    headers = (header.replace("{file}", hit.name.rpartition("/")[2]) for header in hit.match.to)
    return [
        header
        for header in headers
        if header.startswith("torch/headeronly/") or ("/" not in header and hit.rule.code == "INC018")
    ]


def _spelled(header: str, present: set[str]) -> bool:
    return C_NAMES.get(header, "") in present


def _migrated(work: Work) -> bool:
    """Whether the file uses the stable API without including any of it."""
    return bool(
        re.search(r"torch::stable::|STD_TORCH_CHECK|THO_DISPATCH|STABLE_TORCH_LIBRARY|torch::headeronly::", work.code)
    )


def _edits(work: Work, legacy: list[Hit], wanted: list[str], added: list[str], own: str) -> list[Edit]:
    newline = work.newline
    written = [f"#include <{header}>" for header in wanted] + ([f'#include "{own}"'] if own else [])
    lines = newline.join(written)
    by_path = {line.start: line for line in work.source.includes}
    edits: list[Edit] = []
    placed = not written
    for hit in legacy:
        line = by_path[hit.start]
        if not placed and not _conditional(work, line.line_start):
            end = line.line_end
            edits.append(replace(line.line_start, end, lines, rule=hit.rule.code))
            placed = True
        else:
            edits.append(replace(*whole_line(work, line.line_start, line.line_end), rule=hit.rule.code))
    if not placed:
        at = _first_place(work)
        edits.append(replace(at, at, lines + newline, rule=legacy[0].rule.code if legacy else "INC001"))
    at = _last_include(work)
    for name in added:
        text = newline + newline.join(helper_lines(name)) + newline
        edits.append(replace(at, at, text, rule=HELPERS[name].rule))
    return edits


def _conditional(work: Work, at: int) -> bool:
    """Whether a line stands inside #if: what goes there is not seen by every build."""
    depth = 0
    for match in re.compile(r"^[ \t]*#[ \t]*(if|ifdef|ifndef|endif)\b([^\n]*)", re.MULTILINE).finditer(
        work.code, 0, at
    ):
        depth += -1 if match[1] == "endif" else 1
    guard = re.compile(r"\s*#[ \t]*ifndef[ \t]+(\w+)\s*\n\s*#[ \t]*define[ \t]+\1\b").match(work.code)
    return depth > (1 if guard else 0)


def _first_place(work: Work) -> int:
    """In front of the first include, or behind an include guard, or at the top."""
    for line in work.source.includes:
        if not _conditional(work, line.line_start):
            return line.line_start
    found = re.compile(r"^[ \t]*#[ \t]*(?:pragma[ \t]+once|define[ \t]+\w+_H\w*)[^\n]*\n", re.MULTILINE).search(
        work.code
    )
    return found.end() if found else work.source.start


def _last_include(work: Work) -> int:
    """Behind the last include that every build sees."""
    lines = [line for line in work.source.includes if not _conditional(work, line.line_start)]
    if not lines:
        return _first_place(work)
    end = work.text.find("\n", lines[-1].line_end)
    return len(work.text) if end < 0 else end + 1
