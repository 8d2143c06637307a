"""Lazily negated and conjugated views, which torch would resolve in a way that breaks the process: refused by name."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

PROGRAM = Path("lazy_views.py")
TENSORS = {"raw": 101, "aliases": 46, "public": 74}


@pytest.mark.parametrize("calls", ["raw", "aliases", "public"])
def test_lazy_views_are_refused(calls: str, python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Every tensor argument of every call, in one process; its death is a failure."""
    refusals = int(python(PROGRAM, calls).stdout.splitlines()[-1])  # in torch 2.10, gloo writes lines of its own
    assert refusals >= 2 * TENSORS[calls], f"torch {torch.__version__}"
