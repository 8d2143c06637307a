"""``lint``: what is outside the stable ABI, and what compiles but is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from abiding_abi import rules, versions
from abiding_abi.lint.config import Config, load
from abiding_abi.lint.engine import Context, Hit, scan
from abiding_abi.lint.project import Progress, Project, collect, shown
from abiding_abi.source import Source

__all__ = ["Config", "Finding", "Report", "find", "load", "run"]

_ALLOW = re.compile(r"\babi:\s*allow\(([^)]*)\)[ \t]*([^\n]*)")


@dataclass(frozen=True)
class Finding:
    """One place and the rule that it breaks."""

    path: str
    line: int
    column: int
    end_line: int
    end_column: int
    rule: rules.Rule
    level: rules.Level
    found: str
    """The source text at the place."""
    detail: str = ""
    notice: str = ""
    """What the chosen target or headers lack."""

    @property
    def message(self) -> str:
        """One sentence: what was found and what replaces it."""
        rule = self.rule
        what = f"{self.found}: {self.detail}" if self.detail and rule.level == "wrong" else self.found
        if rule.level == "wrong":
            return f"{what} ({rule.legacy}); use {rule.stable}"
        return (
            f"{what} is outside the stable ABI; use {rule.stable}" if self.level != "note" else f"{what}: {rule.stable}"
        )

    @property
    def why(self) -> str:
        """The reason, from the rule or from its group."""
        return self.rule.why or rules.GROUPS[self.rule.group][1]


@dataclass(frozen=True)
class Report:
    """Findings of a run, and files that could not be read."""

    findings: tuple[Finding, ...]
    problems: tuple[tuple[str, str], ...]
    files: int
    allowed: int = 0


def run(paths: Iterable[Path], config: Config, progress: Progress | None = None) -> Report:
    """Lint files and folders, and the project headers that they include."""
    project = Project(config)
    sources = project.gather(collect(paths, config), progress)
    findings: list[Finding] = []
    allowed = 0
    for source in sources:
        found, suppressed = find(project, source)
        findings += found
        allowed += suppressed
    findings.sort(key=lambda f: (f.path, f.line, f.column, f.rule.code))
    problems = tuple((shown(path, config), reason) for path, reason in project.problems)
    return Report(tuple(findings), problems, len(sources), allowed)


def find(project: Project, source: Source) -> tuple[list[Finding], int]:
    """Findings of one file and how many were allowed by comments."""
    config = project.config
    hits = scan(Context(project, source))
    allows = _allows(source)
    kept: list[Finding] = []
    allowed = 0
    path = shown(source.path, config)
    for hit in hits:
        line = source.line_of(hit.start)
        allow = next((a for a in allows if line in a.lines and hit.rule.code in a.codes), None)
        if allow:
            allow.used.add(hit.rule.code)
            allowed += 1
        elif config.reports(hit.rule) and (config.notes or hit.level != "note"):
            kept.append(_finding(source, path, config, hit))
    for allow in allows:
        kept += [f for f in _judge(source, path, allow) if config.reports(f.rule)]
    return kept, allowed


def _finding(source: Source, path: str, config: Config, hit: Hit) -> Finding:
    line, column = source.location(hit.start)
    end_line, end_column = source.location(hit.end)
    found = " ".join(source.data[hit.start : hit.end].decode("utf-8", "replace").split())
    return Finding(path, line, column, end_line, end_column, hit.rule, hit.level,
                   found, hit.detail, _notice(hit.rule, config))  # fmt: skip


def _notice(rule: rules.Rule, config: Config) -> str:
    lacks = []
    if versions.parse(rule.runs) > config.target:
        lacks.append(f"the replacement runs on torch {rule.runs} and newer, later than the target")
    if versions.parse(rule.headers) > config.headers:
        lacks.append(f"the replacement needs the headers of torch {rule.headers}")
    return "; ".join(lacks)


@dataclass(frozen=True)
class _Allow:
    codes: tuple[str, ...]
    reason: str
    lines: frozenset[int]
    start: int
    end: int
    used: set[str]


def _allows(source: Source) -> Sequence[_Allow]:
    """Suppressions: of their own line, or of the next line of code where a comment stands alone."""
    found = []
    if "abi:" not in source.text:
        return ()
    for comment in source.comments:
        match = _ALLOW.search(comment.text)
        if not match:
            continue
        codes = tuple(code.strip().upper() for code in match[1].split(",") if code.strip())
        line = source.line_of(comment.start)
        lines = {line}
        begin = source.text.rfind("\n", 0, comment.start) + 1
        if not source.code[begin : comment.start].strip():
            after = re.compile(r"\s*").match(source.code, comment.end)
            lines.add(source.line_of(after.end() if after else comment.end))
        reason = match[2].removesuffix("*/").strip()
        found.append(_Allow(codes, reason, frozenset(lines), comment.start, comment.end, set()))
    return found


def _judge(source: Source, path: str, allow: _Allow) -> Iterable[Finding]:
    def finding(code: str, detail: str) -> Finding:
        rule = rules.find(code)
        line, column = source.location(allow.start)
        end_line, end_column = source.location(allow.end)
        text = source.data[allow.start : allow.end].decode("utf-8", "replace")
        return Finding(path, line, column, end_line, end_column, rule, rule.level, text, detail)

    if not allow.reason:
        yield finding("ABI901", "no reason is given")
    for code in allow.codes:
        if code not in allow.used:
            yield finding("ABI902", f"{code} is not found here")
