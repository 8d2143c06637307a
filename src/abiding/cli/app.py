"""The commands; each is a thin call of the module that does the work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

import abiding
from abiding.cli import demo as demo_module
from abiding.cli import doctor as doctor_module

app = typer.Typer(
    help="LLM-serving kernels that abide across PyTorch releases.", no_args_is_help=True, add_completion=False
)


@app.command()
def demo() -> None:
    """Run every kernel group at its model's real sizes and compare the results with the float64 reference."""
    if not demo_module.run():
        raise typer.Exit(1)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def abi(context: typer.Context) -> None:
    """Move an extension to the stable ABI and keep it there: the commands of abiding-abi, where that is installed."""
    if importlib.util.find_spec("abiding_abi") is None:
        typer.echo("`abiding abi` needs another package: pip install abiding-abi", err=True)
        raise typer.Exit(2)
    raise typer.Exit(subprocess.call([sys.executable, "-m", "abiding_abi", *context.args]))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> None:
    """Show what runs here: torch, CUDA, GPUs, binaries; per engine what Abiding takes over, or why not."""
    doctor_module.run(as_json)


@app.command()
def audit(
    paths: Annotated[list[Path] | None, typer.Argument(help="Shared libraries; abiding's own by default.")] = None,
) -> None:
    """Show which libtorch symbols the binaries use, and whether the stable ABI covers them."""
    from abiding.abi.audit import run

    raise typer.Exit(run(paths or abiding.binaries()))
