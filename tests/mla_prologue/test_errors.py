"""Refused arguments: error types and messages; nothing is written after an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calls import Spoil, assert_function_refuses, assert_operator_refuses, every, words
from calls.mla_prologue import (
    BF16,
    BLOCK_SIZE,
    FP8,
    GATHER,
    PADDED,
    PUBLIC_FUNCTIONS,
    PUBLIC_NAMES,
    QUANT,
    SPOILS,
    public,
    well_formed,
)
from torch import Tensor

from abiding import mla_prologue

SPOILED = list(every(SPOILS, prefix="fused_deepseek_v4_"))


@pytest.mark.parametrize("op", SPOILS)
def test_the_call_that_gets_spoiled_is_accepted(op: str, device: torch.device) -> None:
    for call in (well_formed(op, device), well_formed(op, device)):
        call.raw()
        call.check()
    public(well_formed(op, device))


@pytest.mark.parametrize(("op", "name", "spoil"), SPOILED)
def test_operator_refuses(op: str, name: str, spoil: Spoil, device: torch.device) -> None:
    blamed = {"q_in": ["kv"]}.get(name, ["q_in", "q"] if name in ("kv", "out", "q_fp8") else [])
    assert_operator_refuses(well_formed(op, device), name, spoil, blamed)


def is_a_public_argument(op: str, name: str) -> bool:
    """gather_kv allocates its own output; the full-cache functions take the block size from their cache."""
    return (op, name) != (GATHER, "out") and not (op in (BF16, FP8) and name == "cache_block_size")


@pytest.mark.parametrize(("op", "name", "spoil"), [p for p in SPOILED if is_a_public_argument(*p.values[:2])])
def test_public_function_refuses(op: str, name: str, spoil: Spoil) -> None:
    blamed = {PUBLIC_NAMES.get(name, name)} | (
        {"kv", "q", "out"} if name in ("q_in", "q", "kv", "out", "q_fp8") else set()
    )
    assert_function_refuses(well_formed(op), name, spoil, PUBLIC_FUNCTIONS[op][0], public, blamed)


@pytest.mark.parametrize("wrong", [None, 3, [1.0, 2.0], "cache"], ids=str)
def test_public_function_refuses_what_is_no_tensor(wrong: Any) -> None:
    for op in SPOILS:
        template = well_formed(op)
        for name, value in template.args.items():
            if not isinstance(value, Tensor) or (wrong is None and name in ("out", "q_fp8")):
                continue
            if not is_a_public_argument(op, name):
                continue
            call = well_formed(op).remember()
            call.args[name] = wrong
            with pytest.raises(TypeError) as caught:
                public(call)
            assert PUBLIC_NAMES.get(name, name) in words(str(caught.value)), f"{op}, {name}: {caught.value}"
            call.assert_untouched()


def test_public_function_refuses_contradictions() -> None:
    call = well_formed(QUANT + ".out").remember()
    args = {PUBLIC_NAMES.get(name, name): value for name, value in call.args.items()}
    with pytest.raises(ValueError, match=r"padded_heads|out has shape"):
        mla_prologue.qnorm_rope_kv_insert(**args, padded_heads=PADDED + 1)
    with pytest.raises(TypeError, match="dtype"):
        mla_prologue.gather_kv(args["cache"], args["slots"], block_size=BLOCK_SIZE, dtype=torch.float32)
    call.assert_untouched()
