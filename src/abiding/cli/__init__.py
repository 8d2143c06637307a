"""The command `abiding`, also `python -m abiding`: `demo`, `doctor`, `audit`, `abi`."""

from __future__ import annotations

import sys

_EXTRA = ("typer", "rich", "elftools", "torch_abi_audit")


def main() -> None:
    """Run the command line, or print which package it lacks."""
    try:
        from abiding.cli.app import app

        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f"abiding's command line needs {error.name}; install it with: pip install 'abiding[cli]'")
