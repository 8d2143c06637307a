"""The command `abiding doctor`: :func:`abiding.engines.report` as text."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from abiding import engines

_STYLES = {"active": "green", "ready": "green", "off": "dim", "unavailable": "yellow"}


def run(as_json: bool) -> None:
    """Print what runs here, and what each engine would take over."""
    console = Console(soft_wrap=True)
    report = engines.report(probe=True)
    if as_json:
        console.print_json(data=report)
        return
    _print_machine(console, report)
    for name, engine in report["engines"].items():
        _print_engine(console, name, engine)


def _print_machine(console: Console, report: dict[str, Any]) -> None:
    driver = f"driver for CUDA {report['driver_cuda']}" if report["driver_cuda"] else "no CUDA driver"
    console.print(f"abiding {report['abiding']}, Python {report['python']}")
    console.print(f"torch {report['torch']}, CUDA {report['cuda'] or 'none'}, {driver}")
    for number, gpu in enumerate(report["gpus"]):
        console.print(f"GPU {number}: {gpu['name']}, {gpu['compute_capability']}, {gpu['memory_gib']} GiB")
    if not report["gpus"]:
        console.print("no GPU is visible")
    for binary in report["binaries"]:
        console.print(f"{binary['name']}: {'loaded' if binary['usable'] else binary['reason']}", highlight=False)
        if binary["path"]:
            console.print(f"  {binary['path']}", style="dim", highlight=False)


def _print_engine(console: Console, name: str, engine: dict[str, Any]) -> None:
    console.print(f"\n{name} {engine['installed'] or 'is not installed'}")
    for job, status in engine["jobs"].items():
        console.print(f"  {job}: [{_STYLES[status['state']]}]{status['state']}[/], ", end="")
        console.print(status["reason"], markup=False, highlight=False)
    for remedy in dict.fromkeys(status["remedy"] for status in engine["jobs"].values() if status["remedy"]):
        console.print(f"  to change this: {remedy}", markup=False, highlight=False)
