"""Settings: command line over ``[tool.abiding-abi]`` of pyproject.toml over defaults."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from abiding_abi import rules, versions
from abiding_abi.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLE = "abiding-abi"


@dataclass(frozen=True)
class Config:
    """What to lint, and against what."""

    target: versions.Version = versions.OLDEST
    """The oldest torch that the binary has to run on."""
    headers: versions.Version = versions.NEWEST
    """The torch whose headers it is built with."""
    root: Path = field(default_factory=Path.cwd)
    """Paths in reports are relative to it."""
    include: tuple[Path, ...] = ()
    """Folders in which quoted and angled includes of the project are looked up."""
    exclude: tuple[str, ...] = ()
    """Patterns of paths that are left out, relative to the root."""
    ignore: tuple[str, ...] = ()
    """Rules, or beginnings of rule codes, that are not reported."""
    notes: bool = False
    """Whether legal but legacy spellings are reported too."""
    follow: bool = True
    """Whether project headers that the given files include are read and reported as well."""

    def reports(self, rule: rules.Rule) -> bool:
        """Whether findings of a rule are wanted."""
        return (self.notes or rule.level != "note") and not rule.code.startswith(tuple(self.ignore) or ("\0",))


def load(start: Path, **overrides: Any) -> Config:
    """Settings of the nearest pyproject.toml at or above ``start``; overrides that are None do not count."""
    config = Config()
    for folder in (start, *start.parents) if start.is_dir() else start.parents:
        path = folder / "pyproject.toml"
        if path.is_file():
            table = _table(path)
            if table is not None:
                config = _configured(path, table)
                break
    given = {key: value for key, value in overrides.items() if value is not None}
    return replace(config, **given)


def _table(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    tools = data.get("tool", {})
    table = tools.get(TABLE) if isinstance(tools, dict) else None
    if table is not None and not isinstance(table, dict):
        raise UserError(f"{path}: [tool.{TABLE}] has to be a table")
    return table


def _configured(path: Path, table: dict[str, Any]) -> Config:
    known = {"target", "headers", "include", "exclude", "ignore", "notes", "follow", "ratchet"}
    if unknown := sorted(set(table) - known):
        raise UserError(f"{path}: [tool.{TABLE}] has no setting '{unknown[0]}'; known are {', '.join(sorted(known))}")
    config = Config(root=path.parent)
    changes: dict[str, Any] = {}
    for key in "target", "headers":
        if key in table:
            if not isinstance(table[key], str):
                raise UserError(f'{path}: {key} of [tool.{TABLE}] has to be a version in quotes, such as "2.10"')
            changes[key] = versions.parse(table[key])
    for key in "include", "exclude", "ignore":
        if key in table:
            changes[key] = tuple(_strings(path, key, table[key]))
    for key in "notes", "follow":
        if key in table:
            if not isinstance(table[key], bool):
                raise UserError(f"{path}: {key} of [tool.{TABLE}] has to be true or false")
            changes[key] = table[key]
    if "include" in changes:
        changes["include"] = tuple(path.parent / name for name in changes["include"])
    return replace(config, **changes)


def _strings(path: Path, key: str, value: object) -> Sequence[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{path}: {key} of [tool.{TABLE}] has to be a list of strings")
    return value
