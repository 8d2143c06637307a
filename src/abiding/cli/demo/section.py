"""What a group contributes to the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Say = Callable[[str], None]
"""Tells the reader what is being worked on."""


@dataclass(frozen=True)
class Row:
    """A case's cells, by column, and what is wrong with it, if anything."""

    cells: dict[str, str]
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """A group's table: `rows` works through its cases on a device."""

    title: str
    rows: Callable[[torch.device, Say], Iterator[Row]]
