"""A call holds its communicator: what other threads dispose of and free meanwhile stays until the call returns."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path


def test_dispose_while_a_call_waits(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert python(Path("dispose_during_a_call.py")).stdout == "done\n"
