"""Helpers that every test uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from abiding_abi import lint, migrate
from abiding_abi.lint import Config, Finding


@pytest.fixture
def lint_text(tmp_path: Path) -> Callable[..., list[Finding]]:
    """Lint one file that holds a text, and return its findings."""

    def run(text: str | bytes, name: str = "a.cu", **settings: object) -> list[Finding]:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        config = Config(root=tmp_path, **settings)  # type: ignore[arg-type]
        return list(lint.run([path], config).findings)

    return run


@pytest.fixture
def migrated(tmp_path: Path) -> Callable[..., str]:
    """Migrate one file and return its text."""

    def run(text: str | bytes, name: str = "a.cu") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return migrate.run([path], Config(root=tmp_path)).files[0].after.decode("latin-1")

    return run
