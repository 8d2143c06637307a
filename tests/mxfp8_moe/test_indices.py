"""Offsets and expert ids out of range: refused where ABIDING_CHECK_INDICES asks for it."""

from __future__ import annotations

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
