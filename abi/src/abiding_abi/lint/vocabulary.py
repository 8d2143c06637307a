"""What declarations say: names, and what a project's files tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from abiding_abi import lexical

Kind = Literal["tensor", "list", "optional", "auto", "other"]


@dataclass(frozen=True)
class Declaration:
    """One declared name; ``value`` is the range of its initializer where the type is auto."""

    name: str
    kind: Kind
    at: int
    value: lexical.Span | None = None
    ranged: bool = False
    called: bool = False
    listed: bool = False
    """Whether it stands in a list of parameters (or of declarators)."""


@dataclass
class Vocabulary:
    """What a project's files tell each other: names of tensor type, functions that return tensors, tensor members."""

    types: set[str] = field(default_factory=lambda: {"Tensor"})
    functions: dict[str, Kind] = field(default_factory=dict)
    members: dict[str, Kind] = field(default_factory=dict)

    def add(self, other: Vocabulary) -> None:
        """Take over another file's."""
        self.types |= other.types
        self.functions.update(other.functions)
        self.members.update(other.members)
