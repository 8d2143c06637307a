"""The rule table."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from abiding_abi.errors import UserError
from abiding_abi.rules.model import Check, Include, Kind, Level, Macro, Match, Method, Name, Rule

__all__ = ["Check", "Include", "Kind", "Level", "Macro", "Match", "Method", "Name", "Rule"]
__all__ += ["GROUPS", "find", "table"]

GROUPS: dict[str, tuple[str, str]] = {
    "INC": ("Includes", "The header is C++ API without a promise, and TORCH_STABLE_ONLY makes it an error."),
    "TYP": ("Types", "The type's layout and its member functions are C++ ABI that may change in every release."),
    "CHK": ("Checks and errors", "The macro calls into c10, whose C++ symbols are not stable."),
    "MET": ("Tensor methods", "torch::stable::Tensor does not have this member."),
    "FUN": ("Functions and autograd", "The function is a C++ symbol of libtorch, which may change in every release."),
    "CUD": ("CUDA", "The function or class lives in c10_cuda or torch_cuda, which have no stable C++ symbols."),
    "DIS": ("Dispatch on dtype", "The macro expands to at:: and c10:: names."),
    "REG": (
        "Registration",
        "The registration code is compiled against torch::Library or pybind11's view of at::Tensor.",
    ),
    "BOX": ("Boxing", "TORCH_BOX passes 64-bit slots and does not convert."),
    "ABI": ("Everything else", "The name is not in torch/csrc/stable, torch/headeronly or the C shims."),
}
"""Code letters: title and the reason that holds for the whole group."""

_MODULES = (
    *("includes", "types", "checks", "pointers", "methods", "functions", "cuda", "dispatch", "registration", "boxing"),
    "rest",
)


@cache
def table() -> tuple[Rule, ...]:
    """Every rule, in the order of the documentation page."""
    return tuple(rule for name in _MODULES for rule in import_module(f"abiding_abi.rules.{name}").RULES)


@cache
def _by_code() -> dict[str, Rule]:
    return {rule.code: rule for rule in table()}


def find(code: str) -> Rule:
    """The rule of a code, in either case of letters."""
    try:
        return _by_code()[code.upper()]
    except KeyError:
        raise UserError(f"no rule is called '{code}'; 'abiding-abi explain --list' lists them") from None
