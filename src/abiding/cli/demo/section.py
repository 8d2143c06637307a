"""The interface of a group's part of the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Say = Callable[[str], None]
"""Shows the user what is being computed."""


@dataclass(frozen=True)
class Row:
    """The cells of a case by column, and its faults, if any."""

    cells: dict[str, str]
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """The table of a group: `rows` runs its cases on a device."""

    title: str
    rows: Callable[[torch.device, Say], Iterator[Row]]
