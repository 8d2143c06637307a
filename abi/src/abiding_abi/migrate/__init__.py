"""``migrate``: rewrite sources for the stable ABI, pass by pass, touching no byte outside the edits."""

from __future__ import annotations

import difflib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from abiding_abi.errors import UserError
from abiding_abi.lint import Config
from abiding_abi.lint.engine import Hit, scan
from abiding_abi.lint.project import Progress, Project, collect, shown
from abiding_abi.migrate import (
    arguments,
    cuda,
    dispatch,
    factories,
    includes,
    library,
    pybind,
    simple,
    tensors,
    todo,
    wrapped,
)
from abiding_abi.migrate.edits import Edit, consistent, render
from abiding_abi.migrate.work import Handler, Shared, Work
from abiding_abi.rules import Include, Macro, Method, Name
from abiding_abi.source import Source
from abiding_abi.usage import Usage

HANDLERS: dict[str, Handler] = {
    **simple.HANDLERS,
    **dispatch.HANDLERS,
    **tensors.HANDLERS,
    **factories.HANDLERS,
    **cuda.HANDLERS,
    **library.HANDLERS,
    **pybind.HANDLERS,
    **wrapped.HANDLERS,
    **arguments.HANDLERS,
}
PASSES = frozenset((*HANDLERS, "includes", "using", "widen"))
"""Names that a rule's ``edit`` may have."""

_OPTIONS = ("FUN001", "FUN002", "FUN003", "FUN004", "FUN009", "FUN016", "MET041", "MET042", "MET044", "TYP025")


class Pass(NamedTuple):
    """Rules whose places are rewritten together."""

    kind: str
    """The kind of change; passes of one kind in a row are one stage of the result."""
    rules: tuple[str, ...]
    """Beginnings of codes."""
    keep_options: bool = False


_PASSES = (
    Pass("registration", ("REG",)),
    Pass("checks", ("CHK",)),
    Pass("types", (*(f"TYP00{n}" for n in range(1, 10)), "TYP01", "TYP029", "TYP030", "TYP031", "MET005", "MET006")),
    Pass("accessors", ("MET031", "MET032", "TYP021", "TYP022")),
    Pass("data pointers", ("MET001", "MET003")),
    Pass("options", (*_OPTIONS, "MET024")),
    Pass("options", _OPTIONS, keep_options=True),
    Pass("members", ("MET",)),
    Pass("functions", ("FUN", "TYP", "ABI")),
    Pass("dispatch", ("DIS",)),
    Pass("streams and guards", ("CUD",)),
    Pass("boxing", ("BOX",)),
)
INCLUDES, NOTES = "includes", "notes"
KINDS = (*dict.fromkeys(step.kind for step in _PASSES), INCLUDES, NOTES)
"""Kinds of change in their order."""


@dataclass(frozen=True)
class Stage:
    """What one kind of change made of a file."""

    kind: str
    data: bytes
    edits: Counter[str]
    """Edits by rule, or marks in the stage of notes."""


@dataclass
class FileResult:
    """One file: its text after every stage, and what is left."""

    path: Path
    shown: str
    before: bytes
    after: bytes
    stages: list[Stage] = field(default_factory=list)
    """The kinds of change that changed something, in order."""
    todos: list[todo.Todo] = field(default_factory=list)

    def add(self, kind: str, data: bytes, edits: Counter[str]) -> None:
        """Go on to the text after another pass; passes of one kind in a row are one stage."""
        if self.stages and self.stages[-1].kind == kind:
            edits = self.stages.pop().edits + edits
        self.stages.append(Stage(kind, data, edits))
        self.after = data

    @property
    def edits(self) -> Counter[str]:
        """Edits by rule, notes left out."""
        return sum((stage.edits for stage in self.stages if stage.kind != NOTES), Counter())


@dataclass
class Result:
    """A run."""

    files: list[FileResult]
    modules: dict[Path, str]
    """New files: Python modules and the header of wrappers."""
    problems: list[tuple[str, str]]
    notes: list[str]
    config: Config

    @property
    def new(self) -> list[tuple[str, Path, bytes]]:
        """New files as reports show them, their paths and contents."""
        return [(shown(path, self.config), path, text.encode()) for path, text in sorted(self.modules.items())]

    @property
    def edits(self) -> int:
        """Edits over all files."""
        return sum(sum(file.edits.values()) for file in self.files)

    @property
    def todos(self) -> int:
        """Places that are left for a person."""
        return sum(len(file.todos) for file in self.files)


class Migration:
    """The sources of one run as they change."""

    def __init__(self, paths: Iterable[Path], config: Config, namespace: str | None, progress: Progress | None) -> None:
        self.config = config
        self.project = Project(config)
        self.progress = progress
        self.sources = self.project.gather(collect(paths, config), progress)
        self.shared = Shared(namespace=namespace)
        self.results = [FileResult(s.path, shown(s.path, config), s.data, s.data) for s in self.sources]
        self.reasons: dict[tuple[int, str, str], str] = {}

    def run(self, step: Pass, only: Sequence[str]) -> None:
        """Run one pass over every file."""
        usage = Usage(self.project, self.sources)
        self.shared.kind, self.shared.keep_options = step.kind, step.keep_options
        changed: list[Source] = []
        for index, source in enumerate(self.sources):
            work = Work(self.project, source, self.shared, usage)
            edits = self._edits(index, work, step.rules, only)
            changed.append(self._apply(index, step.kind, source, edits))
        self._exchange(changed)

    def _edits(self, index: int, work: Work, prefixes: tuple[str, ...], only: Sequence[str]) -> list[Edit]:
        edits: list[Edit] = []
        for hit in scan(work):
            code = hit.rule.code
            if not code.startswith(prefixes) or (only and not code.startswith(tuple(only))):
                continue
            if isinstance(hit.match, Include) or _allowed(work, hit):
                continue
            answer = _UNPARSED if _in_unparsed(work, hit) else _answer(work, hit)
            if isinstance(answer, str):
                self.reasons[(index, code, hit.name)] = answer
            elif isinstance(answer, Edit):
                edits.append(answer)
            elif answer is not None:
                edits += answer
        return [*edits, *factories.declarations(work), *library.moved_blocks(work)]

    def _apply(self, index: int, kind: str, source: Source, edits: list[Edit]) -> Source:
        if not edits:
            return source
        kept, _ = consistent(edits)
        text = render(source.text, kept)
        data = text.encode("latin-1")
        if data == source.data:
            return source
        result = self.results[index]
        result.add(kind, data, Counter(edit.rule for edit in kept))
        return Source(source.path, data)

    def _exchange(self, sources: list[Source]) -> None:
        """Go on with the changed texts."""
        self.sources = sources
        self.project = self.project.with_sources(sources)

    def finish(self, only: Sequence[str]) -> None:
        """Exchange the includes, then mark what is left."""
        usage = Usage(self.project, self.sources)
        users = wrapped.users(self.sources, self.shared.operators)
        self.shared.headers = wrapped.places(users)
        for header in set(self.shared.headers.values()):
            names = {name for path, found in users.items() if self.shared.headers[path] == header for name in found}
            self.shared.modules[header] = wrapped.text(header, names)
        for index in self._headers_first():
            source = self.sources[index]
            work = Work(self.project, source, self.shared, usage)
            hits = scan(work)
            left = any(
                h.level == "unstable" and not isinstance(h.match, Include) and not includes.by_include(h) for h in hits
            )
            touched = bool(self.results[index].stages)
            edits, open_ = includes.includes(work, hits, left, touched)
            if only:
                edits = [edit for edit in edits if edit.rule.startswith(tuple(only))]
            self.sources[index] = self._apply(index, INCLUDES, source, edits)
            self.reasons.update({(index, hit.rule.code, hit.name): reason for hit, reason in open_})
            self.project = self.project.with_sources(self.sources)
        for index, source in enumerate(self.sources):
            self._mark(index, Work(self.project, source, self.shared, usage), only)

    def _headers_first(self) -> list[int]:
        depth = {index: len(self.project.closure(source)) for index, source in enumerate(self.sources)}
        return sorted(depth, key=lambda index: (depth[index], index))

    def _mark(self, index: int, work: Work, only: Sequence[str]) -> None:
        places: list[tuple[Hit, str]] = []
        for hit in scan(work):
            if hit.level != "unstable" or _allowed(work, hit) or (only and not hit.rule.code.startswith(tuple(only))):
                continue
            reason = self.reasons.get((index, hit.rule.code, hit.name), hit.detail or f"use {hit.rule.stable}")
            places.append((hit, reason))
        result = self.results[index]
        for hit, reason in places:
            found = " ".join(work.text[hit.start : hit.end].split())
            result.todos.append(todo.Todo(work.source.line_of(hit.start), hit.rule.code, found, reason))
        result.todos += [
            todo.Todo(work.source.line_of(at), rule, "ABI-TODO", "")
            for rule, at in todo.existing(work.text)
            if rule in ("BOX005", "REG008")
        ]
        edits = todo.mark(work, places)
        if edits:
            text = render(work.text, consistent(edits)[0])
            result.add(NOTES, text.encode("latin-1"), Counter(edit.rule for edit in edits))


def _answer(work: Work, hit: Hit) -> Edit | Iterable[Edit] | str | None:
    edit = hit.rule.edit
    if isinstance(hit.match, Name | Macro | Method) and not edit:
        if hit.rule.code in ("MET018", "MET019"):
            return tensors.referenced(work, hit)
        return simple.rename(work, hit)
    if edit in HANDLERS:
        return HANDLERS[edit](work, hit)
    if isinstance(hit.match, Name | Macro | Method) and (
        getattr(hit.match, "to", None) or getattr(hit.match, "free", None)
    ):
        return simple.rename(work, hit)
    return f"use {hit.rule.stable}" if hit.rule.stable != "none" else "no stable form"


_UNPARSED = "this did not parse, and is left alone"


def _in_unparsed(work: Work, hit: Hit) -> bool:
    return any(start <= hit.start < end for start, end in work.source.unparsed)


def _allowed(work: Work, hit: Hit) -> bool:
    """Whether a comment allows the place."""
    if "abi: allow" not in work.text:
        return False
    line = work.source.line_of(hit.start)
    texts = (work.source.line_text(line), work.source.line_text(line - 1) if line > 1 else "")
    return any(f"allow({hit.rule.code}" in text.replace(" ", "").replace("abi:", "") for text in texts)


def run(
    paths: Iterable[Path],
    config: Config,
    only: Sequence[str] = (),
    namespace: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Migrate files, folders and the project headers that they include; nothing is written."""
    migration = Migration(paths, config, namespace, progress)
    for step in _PASSES:
        migration.run(step, only)
    migration.finish(only)
    problems = [(shown(path, config), reason) for path, reason in migration.project.problems]
    return Result(migration.results, migration.shared.modules, problems, migration.shared.notes, config)


def diff(result: Result) -> str:
    """A unified diff of everything, new Python modules included."""
    parts: list[str] = []
    for file in result.files:
        parts += _file_diff(file.shown, file.before, file.after)
    for name, path, data in result.new:
        parts += _file_diff(name, path.read_bytes() if path.exists() else b"", data)
    return "".join(parts)


def _file_diff(name: str, before: bytes, after: bytes) -> list[str]:
    if before == after:
        return []
    old, new = (data.decode("utf-8", "replace").splitlines(keepends=True) for data in (before, after))
    lines = difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")
    return [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]


def write(result: Result) -> int:
    """Write every changed and new file; the number of files.

    Raises:
        UserError: a file changed since it was read, is read-only, or cannot be written. Nothing was written then.
    """
    changed = {file.path: file.after for file in result.files if file.before != file.after}
    for file in result.files:
        if file.path in changed and file.path.read_bytes() != file.before:
            raise UserError(f"{file.shown} changed meanwhile; nothing written")
    for _, path, data in result.new:
        if not path.exists() or path.read_bytes() != data:
            changed[path] = data
    ready: list[tuple[Path, Path]] = []
    done = 0
    try:
        for path, data in changed.items():
            temporary = path.with_name(path.name + ".abi-new")
            ready.append((temporary, path))
            _prepare(temporary, path, data)
        for temporary, path in ready:
            os.replace(temporary, path)
            done += 1
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{shown(path, result.config)}: {reason}; {done or 'nothing'} written") from None
    finally:
        for temporary, _ in ready:
            temporary.unlink(missing_ok=True)
    return len(changed)


def _prepare(temporary: Path, path: Path, data: bytes) -> None:
    """Write a file's new text beside it, with its mode."""
    mode = path.stat().st_mode if path.exists() else None
    if mode is not None and not mode & 0o222:
        raise OSError(0, "read-only")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(data)
    if mode is not None:
        os.chmod(temporary, mode)


def summary(result: Result) -> str:
    """What was done and what is left, for people."""
    changed = sum(1 for file in result.files if file.before != file.after)
    lines = [f"{result.edits} edits in {changed} of {len(result.files)} files, {result.todos} places for a person"]
    left = Counter(item.rule for file in result.files for item in file.todos)
    lines += [f"  {count:5} ABI-TODO({rule})" for rule, count in left.most_common()]
    lines += [f"new: {name}" for name, _, _ in result.new]
    lines += [f"{path}: {reason}" for path, reason in result.problems]
    return "\n".join(lines + result.notes)


def as_json(result: Result) -> str:
    """Edits by rule and open places, by file."""
    files = [
        {
            "path": file.shown,
            "edits": dict(sorted(file.edits.items())),
            "stages": [stage.kind for stage in file.stages],
            "todos": [{"line": t.line, "rule": t.rule, "found": t.found, "reason": t.reason} for t in file.todos],
        }
        for file in result.files
    ]
    problems = [{"path": path, "reason": reason} for path, reason in result.problems]
    modules = [name for name, _, _ in result.new]
    return json.dumps({"version": 1, "files": files, "modules": modules, "problems": problems}, indent=1)
