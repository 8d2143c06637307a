"""Slots and positions out of range: skipped, or refused where ABIDING_CHECK_INDICES asks for it."""

from __future__ import annotations

import pytest
import torch
from calls.mla_prologue import BLOCK_SIZE, GATHER, PAGES, POSITIONS, PUBLIC_NAMES, QUANT, SPOILS, public, well_formed

from abiding.testing.comparison import assert_bitwise_equal

BAD_SLOTS = [PAGES * BLOCK_SIZE, PAGES * BLOCK_SIZE + 1, 1 << 31, 1 << 40, (1 << 63) - 1]
BAD_POSITIONS = [-1, -(1 << 63), POSITIONS, POSITIONS + 1, 1 << 31, 1 << 57, (1 << 63) - 1]


@pytest.mark.parametrize("op", SPOILS)
def test_wild_indices_stay_inside(op: str, device: torch.device) -> None:
    """A row with a bad slot or position is skipped: the cache and the memory around every tensor stay unchanged."""
    slots = [*BAD_SLOTS, -1, -(1 << 63)]
    for index, slot in enumerate(slots):
        call = well_formed(op, device).remember()
        call.args["slot_mapping"].fill_(slot)
        if "position_ids" in call.args:
            call.args["position_ids"][0] = BAD_POSITIONS[index % len(BAD_POSITIONS)]
        call.raw()
        call.check()
        assert_bitwise_equal(call.guards["k_cache"].storage, call.before["k_cache"], "cache")
    for position in BAD_POSITIONS if op != GATHER else []:
        call = well_formed(op, device).remember()
        call.args["position_ids"].fill_(position)
        call.raw()
        call.check()
        assert_bitwise_equal(call.guards["k_cache"].storage, call.before["k_cache"], "cache")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("op", SPOILS)
def test_checked_indices_raise(
    op: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = PAGES * BLOCK_SIZE
    bad = [("slot_mapping", value, limit) for value in BAD_SLOTS]
    if op != GATHER:
        bad += [("position_ids", value, POSITIONS) for value in BAD_POSITIONS]
    for name, value, bound in bad:
        if not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
            continue
        call = well_formed(op, device)
        call.args[name] = call.args[name].to(dtype)
        call.args[name][2] = value
        call.remember()
        monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
        with pytest.raises(RuntimeError) as caught:
            call.raw()
        text = next(line for line in str(caught.value).splitlines() if line.startswith("abiding::"))
        for part in (f"abiding::{op.removesuffix('.out')}", f"{name}[2]", f"{value}", f"{bound}", "expected"):
            assert part in text, (part, text)
        if op != QUANT:
            call.assert_untouched()
        with pytest.raises((RuntimeError, ValueError), match=rf"{PUBLIC_NAMES[name]}.*2.*{value}|{name}.*2.*{value}"):
            public(call)
        for off in ("0", ""):
            monkeypatch.setenv("ABIDING_CHECK_INDICES", off)
            call.raw()


@pytest.mark.parametrize("op", SPOILS)
def test_checked_indices_accept_what_is_legal(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
    call = well_formed(op, device)
    call.args["slot_mapping"][:] = torch.tensor([-1, -(1 << 63), PAGES * BLOCK_SIZE - 1, 0])
    if op != GATHER:
        call.args["position_ids"][:] = torch.tensor([0, POSITIONS - 1, 3, 3])
    call.raw()
    call.check()
