"""The variants for caches of whole rows, in bfloat16 and in FP8."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from prologue_rules import (
    APIS,
    DTYPES,
    assert_query,
    e4m3_by_torch,
    every,
    nearest,
    unrotated,
)

from abiding import mla_prologue, reference
from abiding.testing.cases.mla_prologue import (
    PrologueCase,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close, ulp_distance
from abiding.testing.guarded import guarded

SIBLING_CASES = [
    PrologueCase(1, 1),
    PrologueCase(17, 17, block_size=16, skipped=0.2, index_dtype=torch.int32),
    PrologueCase(40, 3, block_size=3, wild=0.4, position_dtype=torch.int32),
    PrologueCase(9, 2, inserted=5, q_stride=3 * 512, kv_stride=520, offset_bytes=16),
    PrologueCase(0, 2),
    PrologueCase(4, 0, block_size=1),
    *(PrologueCase(9, 3, values=values) for values in ("zero", "tiny", "subnormal", "huge", "nan", "inf", "bits")),
]


@pytest.mark.parametrize("strided", [False, True], ids=["dense cache", "strided cache"])
@pytest.mark.parametrize("case", SIBLING_CASES, ids=str)
def test_bf16_sibling(case: PrologueCase, strided: bool, device: torch.device) -> None:
    inputs, untouched = case.make(device), case.make(device)
    shape = (inputs.cache.shape[0], case.block_size, 512)
    strides = (case.block_size * 528 + 16, 528, 1) if strided else None
    ours = guarded(shape, torch.bfloat16, device, strides=strides, fill=0x11)
    theirs = ours.clone()
    rest = (inputs.slots, inputs.positions, inputs.cos_sin)
    mla_prologue.qnorm_rope_full_cache_bf16_insert(inputs.q, inputs.kv, ours.tensor, *rest, eps=case.eps)
    assert_query(inputs.q, untouched)
    expected_q = untouched.q.clone()
    reference.mla_prologue.qnorm_rope_full_cache_bf16_insert(expected_q, inputs.kv, theirs.tensor, *rest, eps=case.eps)
    ours.check()
    assert_bitwise_equal(ours.storage, theirs.storage, "cache, with what lies around it")
    assert_bitwise_equal(inputs.kv, untouched.kv, "kv, which is not to be written,")


@pytest.mark.parametrize(
    ("strided", "cache_dtype"), [(False, torch.uint8), (True, torch.float8_e4m3fn)], ids=["dense uint8", "strided e4m3"]
)
@DTYPES
@pytest.mark.parametrize("case", SIBLING_CASES, ids=str)
def test_fp8_sibling(
    case: PrologueCase, dtype: torch.dtype, cache_dtype: torch.dtype, strided: bool, device: torch.device
) -> None:
    case = replace(case, dtype=dtype)
    inputs, untouched = case.make(device), case.make(device)
    shape = (inputs.cache.shape[0], case.block_size, 512)
    strides = (case.block_size * 528 + 16, 528, 1) if strided else None
    ours = guarded(shape, cache_dtype, device, strides=strides, fill=0x11)
    theirs = ours.clone()
    scales: dict[str, Any] = {
        "kv_scale": torch.tensor([0.37], device=device),
        "q_scale_inv": torch.tensor([3.1], device=device),
        "eps": case.eps,
    }
    rest = (inputs.slots, inputs.positions, inputs.cos_sin)
    q8 = guarded(inputs.q.shape, torch.float8_e4m3fn, device)
    out = mla_prologue.qnorm_rope_full_cache_fp8_insert(
        inputs.q, inputs.kv, ours.tensor, *rest, **scales, out=q8.tensor
    )
    assert out is q8.tensor
    expected = reference.mla_prologue.qnorm_rope_full_cache_fp8_insert(
        inputs.q, inputs.kv, theirs.tensor, *rest, **scales
    )
    ours.check()
    q8.check()
    assert_bitwise_equal(ours.storage, theirs.storage, "cache, with what lies around it")
    assert expected.dtype == torch.float8_e4m3fn
    assert_close(out, expected, ulps=1, name="q")
    assert bool((out.view(torch.uint8)[out.float().isnan()] == 0x7F).all()), "NaN is 0x7F, whatever its sign was"
    off = int((ulp_distance(out, expected) > 0).sum())
    assert off <= 2 + out.numel() / 2000, f"{off} of {out.numel()} Q values are not the exact ones rounded once"
    assert_bitwise_equal(inputs.q, untouched.q, "q, which is not to be written,")
    allocated = mla_prologue.qnorm_rope_full_cache_fp8_insert(inputs.q, inputs.kv, ours.tensor, *rest, **scales)
    assert allocated.dtype == torch.float8_e4m3fn
    assert_bitwise_equal(allocated.view(torch.uint8), out.view(torch.uint8), "q, allocated")


@APIS
@DTYPES
def test_full_fp8_cache_of_every_value(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Every bit pattern as a KV value, saturating and not; the reciprocal of the scale is float32."""
    kv = torch.zeros(-(-65536 // 448), 512, dtype=dtype)
    kv[:, :448] = torch.nn.functional.pad(every(dtype), (0, 448 * len(kv) - 65536)).reshape(-1, 448)
    slots, positions, table = unrotated(len(kv), device)
    for scale in (1.0, 0.3, 3000.0):
        kv_scale = torch.tensor([scale], device=device)
        cache = torch.zeros(len(kv), 1, 512, dtype=torch.uint8, device=device)
        arguments = (kv[:, None].to(device), kv.to(device), cache, slots, positions, table)
        api.qnorm_rope_full_cache_fp8_insert(*arguments, kv_scale=kv_scale, q_scale_inv=torch.ones(1, device=device))
        factor = nearest(1 / Fraction(float(kv_scale)), torch.float32)
        product = kv[:, :448].double() * factor  # exact in float64; one rounding to float32 follows
        assert_bitwise_equal(cache[:, 0, :448].cpu(), e4m3_by_torch(product.float()), f"scale {scale}")
