"""Offsets and expert ids out of range: refused where ABIDING_CHECK_INDICES asks for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from calls.mxfp8_moe import (
    MM,
    MM_BF16,
    MOE,
    MOE_MAPPED,
    QUANT,
    QUANTIZE,
    RAW_MM,
    SPOILS,
    well_formed,
)
from torch import Tensor

from abiding import mxfp8_moe
from abiding.mxfp8_moe import MXFP8
from abiding.testing.cases.mxfp8_moe import GemmCase, GemmInputs, LayerCase
from abiding.testing.comparison import assert_bitwise_equal


def test_checked_indices_raise(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [
        *((op, "offsets", 1, value, 9) for op in (QUANTIZE, MM, MM_BF16) for value in (-1, 9, 2**31 - 1)),
        *((op, "expert_offsets", 2, value, 9) for op in (QUANT, RAW_MM) for value in (-5, 9)),
        *((op, "blockscale_offsets", 0, value, 385) for op in (QUANT, RAW_MM) for value in (-128, 385)),
        *((op, "topk_ids", 3, value, 4) for op in (MOE, MOE_MAPPED) for value in (4, 2**40)),
        *((MOE_MAPPED, "expert_map", 2, value, 4) for value in (4, 2**31 - 1)),
    ]
    for op, name, at, value, bound in bad:
        call = well_formed(op, device)
        call.args[name].view(-1)[at] = value
        call.remember()
        monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
        with pytest.raises(RuntimeError, match=rf"{name}\[{at}\] is {value}; expected .*less than {bound}"):
            call.raw()
        call.assert_untouched()
        monkeypatch.setenv("ABIDING_CHECK_INDICES", "0")
        call.raw()
        call.check()


@pytest.mark.parametrize("op", SPOILS)
def test_checked_indices_accept_valid_values(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
    call = well_formed(op, device)
    if op == MOE:
        call.args["topk_ids"].view(-1)[:2] = torch.tensor([-1, -(1 << 63)])
    call.raw()
    call.check()


def test_weights_that_are_not_rebased_raise_in_fp8(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    i = GemmCase((7, 40), 160, 224).make(device).rebased()
    layer = LayerCase(6, 96, 160, 3, 2, mode="fp8").make(device)
    a = i.quantize(mxfp8_moe, rowwise=True)
    plain = i.codes.clone()
    plain[1, 130, 6] += 1  # the last one of K
    spoiled = replace(i, weight_scale=mxfp8_moe.swizzle_scales(plain))

    def multiply(one: GemmInputs, rows: MXFP8 | Tensor) -> Tensor:
        return one.run(mxfp8_moe, rows, compute="fp8")

    monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
    message = r"weight_scale has several codes in row 130 of expert 1; expected one per row, as rebase makes them"
    for rows in (a, i.x):
        multiply(i, rows)
        with pytest.raises(ValueError, match="^grouped_mm: " + message):
            multiply(spoiled, rows)
    spoiled.run(mxfp8_moe, a)  # exact products take any codes
    with pytest.raises(ValueError, match=r"^linear: scale has several codes in row 130 of expert 0; expected .*rebase"):
        mxfp8_moe.linear(i.x, i.weight[1], spoiled.weight_scale[1], mode="fp8")
    mxfp8_moe.linear(i.x, i.weight[1], spoiled.weight_scale[1], mode="w8a8")
    checked = layer.run(mxfp8_moe)
    for name, row in (("s13", 319), ("s2", 0)):
        scales = getattr(layer, name)
        n, k = (320, 96) if name == "s13" else (96, 160)
        codes = mxfp8_moe.unswizzle_scales(scales, n, k)
        codes[2, row, 1] ^= 1
        spoiled_scales = mxfp8_moe.swizzle_scales(codes)
        bad = replace(layer, s13=spoiled_scales) if name == "s13" else replace(layer, s2=spoiled_scales)
        with pytest.raises(ValueError, match=f"^moe: {name} has several codes in row {row} of expert 2; expected"):
            bad.run(mxfp8_moe)
        bad.run(mxfp8_moe, mode="w8a8")
    monkeypatch.setenv("ABIDING_CHECK_INDICES", "0")
    multiply(spoiled, a)
    assert_bitwise_equal(layer.run(mxfp8_moe), checked)
