"""The interface of a group's benchmark."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from abiding.testing.timing import Roofline
from benchmarks.result_file import CaseResult, Param


@dataclass(frozen=True)
class Settings:
    """What to measure, and on which device."""

    device: torch.device
    roofline: Roofline
    peers: tuple[Path, ...]
    quick: bool
    ops: tuple[str, ...]
    at: tuple[int, ...] = ()
    """Only cases at these points of the axis that the group's tables have (tokens, bytes); all of them if empty."""

    def takes(self, point: int) -> bool:
        """Whether a case at this point of the axis is to be timed."""
        return not self.at or point in self.at

    @property
    def peer(self) -> Path | None:
        """The first shared library among the peers."""
        return next((path for path in self.peers if path.suffix == ".so"), None)


@dataclass(frozen=True)
class Benchmark:
    """A group's cases, and the layout of its tables: one row per `row(case)`, one column per value of `params[axis]`.

    `ops` begins with the operator that summaries and plots show. `target_us` returns None for a case without a target.
    The plot has one panel per row or, if `overlaid`, one panel with a line per row. `other_axes` maps operators to
    their axis where it is another one. `prepare` runs before a GPU is first used.
    """

    group: str
    ops: tuple[str, ...]
    axis: str
    measure: Callable[[Settings], Iterator[CaseResult]]
    row: Callable[[CaseResult], str]
    target_us: Callable[[CaseResult], float | None]
    overlaid: bool = False
    other_axes: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] = lambda: None

    def axis_of(self, op: str) -> str:
        """The parameter that runs across an operator's table."""
        return self.other_axes.get(op, self.axis)

    def place(self, case: CaseResult) -> tuple[Param, ...]:
        """The place of a case in the tables: no other case of a run has the same."""
        return case.op, self.row(case), case.params[self.axis_of(case.op)], case.l2_warm

    def verdict(self, case: CaseResult) -> str:
        """Met if the case is within its target and no slower than any peer; up to 1 % slower counts as equal."""
        target = self.target_us(case)
        if target is None:
            return "-"
        fast_enough = case.us <= target and all(case.us <= 1.01 * us for us in case.peers.values())
        return "met" if fast_enough else "missed"


def kind_of_ranks(case: CaseResult) -> str:
    """The label of a collective's row: the number and kind of its ranks."""
    return f"{case.params['ranks']} {'CPU processes' if case.op.endswith('_cpu') else 'virtual ranks'}"


def say(line: str) -> None:
    """Print progress to stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)
