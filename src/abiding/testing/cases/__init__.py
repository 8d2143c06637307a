"""Test and benchmark inputs, one module per kernel group: cases as frozen dataclasses in the lists REGULAR, ODD, CORNER
and PERFORMANCE, and further lists that a group has."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def describe(case: Any) -> str:
    """The fields of a case that differ from their defaults, as a test id."""
    values = [(field.name, getattr(case, field.name), field.default) for field in fields(case)]
    changed = [(name, str(value).removeprefix("torch.")) for name, value, default in values if value != default]
    return "-".join(f"{name}={value}" for name, value in changed).replace(" ", "")
