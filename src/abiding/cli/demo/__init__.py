"""The demo: the main operators of every group at real sizes, compared with the float64 reference; a table per group."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import abiding
from abiding.cli.demo import collectives, mla_prologue, mxfp8_moe
from abiding.cli.demo.section import Row, Section

SECTIONS = [mla_prologue.SECTION, mxfp8_moe.SECTION, collectives.SECTION]


def run() -> bool:
    """Run all sections and print their tables; returns whether every case was right."""
    device = torch.device("cuda" if abiding.has_cuda_kernels() and torch.cuda.is_available() else "cpu")
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(f"abiding {abiding.__version__}, torch {torch.__version__}, {_describe(device)}")
    faults: list[str] = []
    for section in SECTIONS:
        rows = _run_section(section, device)
        console.print(_table(section, rows))
        faults += [f"{next(iter(row.cells.values()))}: {fault}" for row in rows for fault in row.faults]
    for fault in faults:
        console.print(f"WRONG  {fault}", style="bold red", markup=False, highlight=False)
    if not faults:
        console.print("All results agree with the reference.", style="green")
    return not faults


def _run_section(section: Section, device: torch.device) -> list[Row]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(section.title)
        return list(section.rows(device, lambda text: progress.update(task, description=text)))


def _table(section: Section, rows: list[Row]) -> Table:
    table = Table(title=section.title, title_justify="left")
    for column in rows[0].cells:
        table.add_column(column)
    table.add_column("")
    for row in rows:
        verdict = "[red]WRONG[/red]" if row.faults else "[green]ok[/green]"
        table.add_row(*row.cells.values(), verdict)
    return table


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads ({abiding.cuda_unavailable_reason()})"
