"""The command line; every command imports what it needs, so that ``lint`` of a few files starts at once."""

from __future__ import annotations

import sys

import typer

from abiding_abi.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Move PyTorch extensions to the LibTorch Stable ABI and keep them there."""


def main() -> None:
    """Run the command line; what the user can repair is one line and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"abiding-abi: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
