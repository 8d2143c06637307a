"""The commands; each is a thin call of the module that does the work."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import abiding
from abiding.cli import demo as demo_module
from abiding.cli import doctor as doctor_module
from abiding.testing import benchmarks, multi_gpu
from abiding.testing.benchmarks import limits
from abiding.testing.benchmarks import report as reports
from abiding.testing.results import Results

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
def bench(
    group: Annotated[
        str | None, typer.Argument(help=f"{', '.join(benchmarks.GROUPS)}; all of them by default.")
    ] = None,
    peer: Annotated[
        list[Path] | None, typer.Option(help="A file with a peer's kernels to time too; repeatable.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help=f"A .json file, or a folder for one; of whole runs on a GPU {benchmarks.DEFAULT_OUTPUT} by default."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few sizes only.")] = False,
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; repeatable.")] = None,
    commit: Annotated[str | None, typer.Option(help="Commit to record; that of the source tree by default.")] = None,
) -> None:
    """Time a group's kernels on this machine and compare them with the roofline bound and with peers."""
    if group is not None and group not in benchmarks.GROUPS:
        raise typer.BadParameter(f"{group!r}; expected one of {list(benchmarks.GROUPS)}")
    if group is None and op:
        raise typer.BadParameter(f"--op {op[0]} without a group; expected the group of the operator as well")
    if group is None:
        # One process per group: virtual ranks need settings of CUDA that must be made before its first use.
        for one in benchmarks.GROUPS:
            if status := subprocess.run([sys.executable, "-m", "abiding", "bench", one, *sys.argv[2:]]).returncode:
                raise typer.Exit(status)
        return
    try:
        benchmarks.run(group, peers=peer or (), output=output, quick=quick, ops=op or (), commit=commit)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def report(
    results: Annotated[Path, typer.Option(help="Folder of result files.")] = Path("benchmarks/results"),
    documents: Annotated[list[Path] | None, typer.Option("--document", help="Files with markers to fill.")] = None,
    plots: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path("docs/plots"),
) -> None:
    """Write the tables of README.md and docs/*.md, and the plots, from the result files."""
    found = [Results.read(path) for path in sorted(results.glob("*.json"))]
    if not found:
        typer.echo(f"{results} holds no result files; `abiding bench` on a machine with a GPU makes one.", err=True)
        raise typer.Exit(1)
    targets = documents or [path for path in (Path("README.md"), *sorted(Path("docs").glob("*.md"))) if path.exists()]
    for group, benchmark in (benchmarks.GROUPS | {"multi_gpu": multi_gpu.BENCHMARK}).items():
        members = [one for one in found if one.group == group]
        for one in members:
            if not any(case.op == benchmark.ops[0] for case in one.cases):
                continue
            plot = plots / f"{Path(one.file_name).stem}.svg"
            reports.plot(one, benchmark, plot)
            typer.echo(f"Wrote {plot}")
        if members:
            _rewrite(targets, partial(reports.rewrite, group=group, results=members, benchmark=benchmark))
    _rewrite(targets, lambda text: reports.fill(text, "results:headline", [reports.headline(found)]))
    ratios = plots / "ratios.svg"
    reports.plot_ratios(found, ratios)
    typer.echo(f"Wrote {ratios}")
    profiled = [limits.to_markdown(one) for one in found if one.group == limits.GROUP]
    if profiled:
        _rewrite(targets, lambda text: reports.fill(text, limits.MARKER, profiled))


def _rewrite(documents: list[Path], rewritten: Callable[[str], str]) -> None:
    for document in documents:
        text = document.read_text()
        if (new := rewritten(text)) != text:
            document.write_text(new)
            typer.echo(f"Wrote {document}")


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
