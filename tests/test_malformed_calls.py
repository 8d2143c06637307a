"""Malformed calls of every raw operator, each operator's in a process of their own: refused by name, and no crash."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calls.malformed import WELL_FORMED

CALLS = 2000
TAKE_NO_ARGUMENT = {"abiding_custom_ar::meta_size"}


@pytest.mark.parametrize("group", WELL_FORMED)
def test_malformed_calls_are_refused(group: str, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """A line per operator; that of one whose process died says how to make the last call again."""
    result = python(Path("malformed_calls.py"), group, CALLS)
    lines = result.stdout.splitlines()
    wrong = [line for line in lines if not re.fullmatch(rf"{CALLS} refused, \d+ accepted: .*", line)]
    assert not wrong, "\n".join([*wrong, result.stderr[-4000:]])
    assert [line.partition(": ")[2] for line in lines] == list(WELL_FORMED[group])


def test_every_operator_is_called() -> None:
    called = {op.partition(" ")[0] for ops in WELL_FORMED.values() for op in ops}
    called = {op if "::" in op else f"abiding::{op}" for op in called} | TAKE_NO_ARGUMENT
    names = torch._C._dispatch_get_all_op_names()
    assert called == {name for name in names if name.startswith(("abiding::", "abiding_custom_ar::"))}
