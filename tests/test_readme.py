"""The README's examples run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from abiding.testing.ranks import run_processes

EXAMPLES = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[1] / "README.md").read_text(), re.M | re.S)
GIVEN = {"x": (8, 64), "qkv": (8, 128), "wq": (64,), "wk": (32,)}
"""Tensors that the example between ranks takes as given, by shape."""


def run(example: str) -> dict[str, Any]:
    names: dict[str, Any] = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in GIVEN.items()}
    exec(compile(example, "README.md", "exec"), names)
    return names


def between_ranks(_: int, example: str) -> tuple[torch.Tensor, torch.Tensor]:
    names = run(example)
    return names["y"], names["q"]


@pytest.mark.parametrize("example", [one for one in EXAMPLES if "Communicator" not in one])
def test_an_example_runs(example: str) -> None:
    names = run(example)
    result = names["y"] if "y" in names else names["k"]
    assert result.isfinite().all()
    assert result.float().std() > 0


@pytest.mark.parametrize("example", [one for one in EXAMPLES if "Communicator" in one])
def test_an_example_between_ranks_runs(example: str) -> None:
    for y, q in run_processes(between_ranks, 2, example):
        assert y.eq(2).all()
        assert q.isfinite().all()


def test_there_is_an_example_of_each_group() -> None:
    text = "\n".join(EXAMPLES)
    groups = ("mla_prologue.", "comm.all_reduce(", "reduce_rms.", "mxfp8_moe.")
    assert all(group in text for group in groups)
