"""Dense layers of MXFP8 weights."""

from __future__ import annotations

import math

import pytest
import torch

from abiding import mxfp8_moe, reference
from abiding.testing.cases.mxfp8_moe import (
    GemmCase,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import guarded


@pytest.mark.parametrize("mode", ["w8a8", "w8a16", "fp8"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (2, 0), (2, 3), (2, 3, 11)], ids=str)
def test_linear(shape: tuple[int, ...], mode: mxfp8_moe.Mode, device: torch.device) -> None:
    rows = math.prod(shape)
    i = GemmCase((rows,), 96, 160, form="whole").make(device)
    i = i.rebased() if mode == "fp8" else i
    x, weight, scale = i.x.view(*shape, 160), i.weight[0], i.weight_scale[0]
    for out_dtype in (None, torch.float16, torch.float32):
        y = mxfp8_moe.linear(x, weight, scale, mode=mode, out_dtype=out_dtype)
        assert y.shape == (*shape, 96)
        assert y.dtype == (out_dtype or torch.bfloat16)
        a = mxfp8_moe.round(i.x) if mode == "w8a8" else i.x
        compute: mxfp8_moe.Compute = "fp8" if mode == "fp8" else "exact"
        expected = mxfp8_moe.grouped_mm(a, i.weight, i.weight_scale, compute=compute, out_dtype=y.dtype)
        assert_bitwise_equal(y, expected.view(y.shape))
        theirs = reference.mxfp8_moe.linear(x, weight, scale, mode=mode, out_dtype=out_dtype)
        assert theirs.shape == y.shape
        assert theirs.dtype == y.dtype
        assert_close(y, theirs, ulps=1, atol=2.0**-6 if mode == "fp8" else 1e-3)
    out = torch.full((*shape, 96), math.nan, dtype=torch.float32, device=device)
    assert mxfp8_moe.linear(x, weight.view(torch.uint8), scale, mode=mode, out=out) is out
    assert_bitwise_equal(out, y)


def test_linear_of_strided_rows(device: torch.device) -> None:
    i = GemmCase((6,), 96, 160, form="whole", gap=32).make(device)
    expected = mxfp8_moe.linear(i.x.contiguous(), i.weight[0], i.weight_scale)
    assert_bitwise_equal(mxfp8_moe.linear(i.x, i.weight[0], i.weight_scale), expected)
    x = i.x.contiguous().view(2, 3, 160).transpose(0, 1)
    assert_bitwise_equal(mxfp8_moe.linear(x, i.weight[0], i.weight_scale), expected.view(2, 3, 96).transpose(0, 1))
    out = guarded((6, 96), torch.bfloat16, device, strides=(104, 1))
    mxfp8_moe.linear(i.x, i.weight[0], i.weight_scale, out=out.tensor)
    out.check()
    assert_bitwise_equal(out.tensor, expected)
