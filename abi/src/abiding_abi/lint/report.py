"""Reports: text, JSON, SARIF and GitHub annotations."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from abiding_abi import __version__, rules
from abiding_abi.lint import Finding, Report

_SARIF_LEVEL = {"unstable": "error", "wrong": "error", "note": "note"}


def text(report: Report) -> str:
    """One line per finding with why and versions, and a summary."""
    lines: list[str] = []
    for f in report.findings:
        lines.append(f"{f.path}:{f.line}:{f.column}: {f.rule.code} {f.message} {_versions(f.rule)}")
        lines.append(f"    {f.why}{' ' + f.rule.pitfall if f.rule.pitfall else ''}")
        if f.notice:
            lines.append(f"    note: {f.notice}")
    lines += [f"{path}: {reason}" for path, reason in report.problems]
    lines.append(summary(report))
    return "\n".join(lines)


def _versions(rule: rules.Rule) -> str:
    return f"[headers {rule.headers}, runs on {rule.runs}]"


def summary(report: Report) -> str:
    """The last line of a report."""
    counts = Counter(f.rule.kind for f in report.findings)
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("mechanical", "context", "decide") if counts[kind])
    files = len({f.path for f in report.findings})
    allowed = f", {report.allowed} allowed" if report.allowed else ""
    unread = f", {len(report.problems)} not read" if report.problems else ""
    if not report.findings:
        return f"no findings in {report.files} files{allowed}{unread}"
    return f"{len(report.findings)} findings in {files} of {report.files} files ({kinds}){allowed}{unread}"


def as_json(report: Report) -> str:
    """Everything, for programs."""
    return json.dumps(
        {
            "version": 1,
            "tool": __version__,
            "files": report.files,
            "allowed": report.allowed,
            "findings": [_object(f) for f in report.findings],
            "problems": [{"path": path, "reason": reason} for path, reason in report.problems],
        },
        indent=1,
    )


def _object(f: Finding) -> dict[str, Any]:
    return {
        "path": f.path,
        "line": f.line,
        "column": f.column,
        "end_line": f.end_line,
        "end_column": f.end_column,
        "rule": f.rule.code,
        "level": f.level,
        "kind": f.rule.kind,
        "found": f.found,
        "detail": f.detail,
        "message": f.message,
        "why": f.why,
        "pitfall": f.rule.pitfall,
        "replacement": f.rule.stable,
        "headers": f.rule.headers,
        "runs": f.rule.runs,
        "notice": f.notice,
    }


def sarif(report: Report) -> str:
    """SARIF 2.1.0."""
    used = sorted({f.rule.code for f in report.findings})
    driver = {
        "name": "abiding-abi",
        "version": __version__,
        "rules": [_sarif_rule(rules.find(code)) for code in used],
    }
    results = [
        {
            "ruleId": f.rule.code,
            "ruleIndex": used.index(f.rule.code),
            "level": _SARIF_LEVEL[f.level],
            "message": {"text": f"{f.message}. {f.why}"},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": f.path, "uriBaseId": "%SRCROOT%"},
                        "region": {
                            "startLine": f.line,
                            "startColumn": f.column,
                            "endLine": f.end_line,
                            "endColumn": f.end_column,
                        },
                    }
                }
            ],
        }
        for f in report.findings
    ]
    notes = [{"level": "warning", "message": {"text": f"{path}: {reason}"}} for path, reason in report.problems]
    invocation = {"executionSuccessful": True, "toolExecutionNotifications": notes}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results, "invocations": [invocation]}],
    }
    return json.dumps(log, indent=1)


def _sarif_rule(rule: rules.Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "shortDescription": {"text": rule.legacy},
        "fullDescription": {"text": rule.why or rules.GROUPS[rule.group][1]},
        "help": {"text": f"Use {rule.stable} (headers {rule.headers}, runs on {rule.runs}). {rule.pitfall}".strip()},
        "properties": {"kind": rule.kind, "headers": rule.headers, "runsOn": rule.runs},
    }


def github(report: Report) -> str:
    """Workflow commands that annotate the lines of a pull request."""
    return "\n".join([*_annotations(report), summary(report)])


def _annotations(report: Report) -> Iterator[str]:
    for f in report.findings:
        kind = "notice" if f.level == "note" else "error"
        place = f"file={_property(f.path)},line={f.line},col={f.column},endLine={f.end_line},endColumn={f.end_column}"
        yield f"::{kind} {place},title={f.rule.code}::{_data(f'{f.message}. {f.why}')}"
    for path, reason in report.problems:
        yield f"::warning file={_property(path)}::{_data(reason)}"


def _data(value: str) -> str:
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


FORMATS: dict[str, Callable[[Report], str]] = {"text": text, "json": as_json, "sarif": sarif, "github": github}
"""Formats by the name that the command line takes."""
