"""The form of a rule: one table of these feeds ``lint``, ``migrate``, ``explain`` and the documentation page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["mechanical", "context", "decide"]
"""By name alone; once types, constness or scope are known; or by a person, who gets an ``ABI-TODO``."""

Level = Literal["unstable", "wrong", "note"]
"""Outside the stable ABI; compiles but misbehaves; or legal but in a legacy spelling, which ``lint`` leaves out."""


@dataclass(frozen=True)
class Include:
    """An ``#include`` of one of ``paths`` (shell patterns); ``to`` are the headers that replace it."""

    paths: tuple[str, ...]
    to: tuple[str, ...] = ()


@dataclass(frozen=True)
class Name:
    """A name in the namespaces at, c10 or torch, or unqualified where a using directive makes it visible.

    ``names`` are written without the namespace (``Tensor``, ``cuda::getCurrentCUDAStream``); a trailing ``*`` matches
    any ending. ``to`` is the whole replacement; ``{name}`` stands for the name that matched.
    """

    names: tuple[str, ...]
    to: str | None = None
    spaces: tuple[str, ...] = ("at", "c10", "torch")
    called: bool | None = None
    """True: only where a call follows; False: only where none does."""
    legal: tuple[str, ...] = ()
    """Namespaces in which header-only torch declares the same name: that spelling compiles and is only a note."""


@dataclass(frozen=True)
class Macro:
    """An identifier that no namespace qualifies: macros and names of the global namespace. A trailing ``*`` is open."""

    names: tuple[str, ...]
    to: str | None = None


@dataclass(frozen=True)
class Method:
    """A member ``.name`` or ``->name`` of a tensor.

    ``distinct`` members belong to tensors alone (``data_ptr``), so that they match unless the receiver is known to be
    something else; others (``view``) match only where the receiver is known to be a tensor.
    ``to`` renames the member, ``free`` turns ``x.name(args)`` into ``free(x, args)``.
    """

    names: tuple[str, ...]
    distinct: bool = False
    to: str | None = None
    free: str | None = None
    called: bool | None = True


@dataclass(frozen=True)
class Check:
    """A function of ``abiding_abi.lint.checks`` by this name; it yields the places itself."""

    name: str


Match = Include | Name | Macro | Method | Check


@dataclass(frozen=True)
class Rule:
    """One legacy construct and what replaces it."""

    code: str
    legacy: str
    stable: str
    match: tuple[Match, ...]
    headers: str = "2.10"
    """The first release whose headers compile the replacement."""
    runs: str = "2.10"
    """The oldest release on which the result runs."""
    kind: Kind = "mechanical"
    level: Level = "unstable"
    why: str = ""
    """Empty: the reason of the rule's group."""
    pitfall: str = ""
    """What compiles and still goes wrong."""
    edit: str = ""
    """The pass of ``abiding_abi.migrate`` that rewrites it, where a rename in ``match`` is not enough."""
    before: str = ""
    """A source on which this rule fires."""
    after: str = ""
    """The same after the migration: no rule fires and it compiles against the stable headers alone."""
    scope: Literal["body", "file"] = "body"
    """``body``: the examples stand in a function with the tensors t and u and the integer n."""
    cuda: bool = False
    """The replacement needs ``USE_CUDA`` and CUDA's headers."""

    @property
    def group(self) -> str:
        """The letters of the code."""
        return self.code.rstrip("0123456789")
