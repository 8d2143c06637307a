"""Errors whose `expected` clause was not true for the cause, or named no remedy: one case of each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import refusal

from abiding import Communicator, reduce_rms
from abiding.testing.ranks import virtual_ranks

ops, raw = torch.ops.abiding, torch.ops.abiding_custom_ar


def fa(comm: Communicator) -> int:
    return comm._handle


CASES: dict[str, tuple[Callable[[Communicator], Any], str]] = {
    "a timeout that is too long": (
        lambda comm: raw.configure(fa(comm), 1e10, 8),
        r"timeout_s is 1e\+10; expected seconds, more than 0 and less than 1e9",
    ),
    "no number of tokens": (
        lambda comm: ops.mxfp8_moe_workspace_bytes(-1, 2, 4, 64, 96),
        "tokens is -1; expected 0 or more, and fewer",
    ),
    "more pairs than 31 bits count": (
        lambda comm: ops.mxfp8_moe_workspace_bytes((1 << 31) - 1, 2, 4, 64, 96),
        r"tokens is 2147483647; expected 0 or more, and fewer than 2\^31 pairs with the 2 experts of a token",
    ),
    "strides": (
        lambda comm: ops.mxfp8_quantize(
            torch.zeros(2, 64).bfloat16(),
            torch.zeros(4, dtype=torch.int32)[::2],
            False,
            data=torch.zeros(2, 64, dtype=torch.uint8),
            scales=torch.zeros(512, dtype=torch.uint8),
        ),
        r"offsets has .*; expected a contiguous tensor, as offsets\.contiguous\(\) is",
    ),
    "scales that overlap": (
        lambda comm: ops.mxfp8_quantize(
            torch.zeros(2, 64).bfloat16(),
            None,
            False,
            data=torch.zeros(2, 64, dtype=torch.uint8),
            scales=torch.zeros(1, dtype=torch.uint8).expand(512),
        ),
        r"scales has .*; expected memory without gaps or overlaps, as scales\.contiguous\(\) has",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_expected_clause_is_true_for_the_cause(name: str) -> None:
    call, text = CASES[name]
    with virtual_ranks(1) as (comm,):
        refusal(lambda: call(comm), RuntimeError, text)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fnuz])
def test_a_dtype_that_no_kernel_takes_is_named(dtype: torch.dtype) -> None:
    x, name = torch.zeros(4, dtype=dtype), str(dtype).removeprefix("torch.")
    with virtual_ranks(2) as (comm, _):
        text = rf"all_reduce: inp has dtype {name}; expected dtype float32 or float16 or bfloat16"
        refusal(lambda: raw.all_reduce(fa(comm), x, x, 0, 0), RuntimeError, text)
        text = rf"out has dtype {name}; expected dtype float32 as x"
        refusal(lambda: comm.all_reduce(torch.zeros(4), x), TypeError, text)


def test_a_result_without_memory_is_no_wrong_value() -> None:
    """What a caller may catch to try less is torch's OutOfMemoryError, and the message says what asked for how much."""
    few = torch.zeros(1, 1).expand(1 << 45, 1)
    with virtual_ranks(2) as (comm, _):
        call = ops.reduce_rms.default
        text = r"reduce_rms: input has shape \[35184372088832, 1\], and there is no memory for a tensor of shape"
        refusal(lambda: call(few, torch.zeros(1), comm._token, fa(comm), 1e-6), RuntimeError, text)
        with pytest.raises(torch.OutOfMemoryError, match=r"rms_norm: x has shape .* expected .* GiB that are free"):
            reduce_rms.rms_norm(few, torch.zeros(1), comm)
