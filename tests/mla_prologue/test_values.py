"""Every case of the prologue against its reference, byte for byte, and where results go."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from prologue_rules import (
    DTYPES,
    assert_padding,
    assert_query,
)

from abiding import mla_prologue, reference
from abiding.testing.cases.mla_prologue import (
    CORNER,
    ODD,
    REGULAR,
    PrologueCase,
    Values,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import guarded


@pytest.mark.parametrize("case", [*REGULAR, *ODD, *CORNER], ids=str)
def test_case(case: PrologueCase, device: torch.device) -> None:
    ours = case.make(device, seed=1)
    given = [tensor.clone() for tensor in (ours.q, ours.kv, ours.slots, ours.positions, ours.cos_sin)]
    theirs, kv_only = ours.clone(), ours.clone()
    out = ours.run(mla_prologue)
    expected = theirs.run(reference.mla_prologue)
    assert out.shape == expected.shape == (case.tokens, case.out_heads, 512)
    assert out.dtype == case.dtype

    ours.check()
    assert_bitwise_equal(ours.storage, theirs.storage, "cache, with what lies around it")
    assert_query(out, ours)
    assert_padding(out, case.heads)
    for name, before in zip(("q", "kv", "slots", "positions", "cos_sin"), given, strict=True):
        assert_bitwise_equal(getattr(ours, name), before, f"{name}, which is not to be written,")

    rows = (kv_only.kv, kv_only.cache, kv_only.slots, kv_only.positions, kv_only.cos_sin)
    mla_prologue.insert_kv(*rows, block_size=case.block_size)
    assert_bitwise_equal(kv_only.storage, theirs.storage, "insert_kv: cache, with what lies around it")
    read: dict[str, Any] = {"block_size": case.block_size, "dtype": case.dtype}
    gathered = mla_prologue.gather_kv(ours.cache, ours.slots, **read)
    assert_close(gathered, reference.mla_prologue.gather_kv(ours.cache, ours.slots, **read), name="gather_kv")


@pytest.mark.parametrize(
    "options",
    [{}, {"apply_q_norm": False}, {"apply_q_rope": False}, {"apply_q_norm": False, "apply_q_rope": False}],
    ids=str,
)
@pytest.mark.parametrize("values", ["normal", "nan", "inf", "huge"])
@DTYPES
def test_query_options(options: dict[str, bool], values: Values, dtype: torch.dtype, device: torch.device) -> None:
    case = PrologueCase(17, 3, 5, values=values, dtype=dtype, wild=0.3)
    ours, theirs = case.make(device), case.make(device)
    out = ours.run(mla_prologue, **options)
    theirs.run(reference.mla_prologue, **options)
    assert_bitwise_equal(ours.storage, theirs.storage, "cache")
    assert_query(out, ours, **options)
    assert_padding(out, 3)
    if options.get("apply_q_rope", True):
        lost = (ours.positions < 0) | (ours.positions >= case.max_position)
        assert bool(lost.any())
        assert bool(out[lost, :3].isnan().all())
    elif not options.get("apply_q_norm", True):
        assert_close(out[:, :3], ours.q, name="q, which nothing changes,")


@pytest.mark.parametrize("tokens", [1, 2, 31, 64, 257])
def test_plain_operator_agrees_with_the_public_api(tokens: int, device: torch.device) -> None:
    case = PrologueCase(tokens, 3, 5, skipped=0.1, wild=0.1)
    ours, theirs = case.make(device), case.make(device)
    out = torch.ops.abiding.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
        ours.q, ours.kv, ours.cache, ours.slots, ours.positions, ours.cos_sin, 5, 1e-6, case.block_size
    )
    assert_bitwise_equal(out, theirs.run(mla_prologue), "q")
    assert_bitwise_equal(ours.storage, theirs.storage, "cache")


def test_cuda_agrees_with_cpu(cuda: torch.device) -> None:
    for case in [case for case in (*ODD, *CORNER) if case.tokens]:
        here = case.make("cpu", seed=5)
        moved = {name: getattr(here, name).to(cuda) for name in ("q", "kv", "slots", "positions", "cos_sin")}
        pages = guarded(here.cache.shape, torch.uint8, cuda, strides=here.cache.stride(), fill=here.cache.to(cuda))
        there = replace(here, **moved, cache=pages.tensor)
        here.run(mla_prologue)
        there.run(mla_prologue)
        assert_bitwise_equal(there.cache.cpu(), here.cache, f"{case}: cache")


@pytest.mark.parametrize("padded", [3, 5])
@DTYPES
def test_out_may_be_q_itself(padded: int, dtype: torch.dtype, device: torch.device) -> None:
    case = PrologueCase(19, 3, padded, dtype=dtype, wild=0.2)
    plain, inputs = case.make(device), case.make(device)
    expected = plain.run(mla_prologue)
    rows = guarded((19, padded, 512), dtype, device, strides=(padded * 512 + 8, 512, 1))
    rows.tensor[:, :3] = inputs.q
    inputs = replace(inputs, q=rows.tensor[:, :3])
    assert inputs.run(mla_prologue, out=rows.tensor) is rows.tensor
    rows.check()
    assert_bitwise_equal(rows.tensor, expected, "q")
    assert_bitwise_equal(inputs.storage, plain.storage, "cache")


def test_out_of_the_caller(device: torch.device) -> None:
    case = PrologueCase(19, 3, 6)
    plain, inputs = case.make(device), case.make(device)
    expected = plain.run(mla_prologue)
    out = guarded((19, 6, 512), torch.bfloat16, device, strides=(6 * 520 + 40, 520, 1), offset_bytes=16)
    inputs.run(mla_prologue, out=out.tensor)
    out.check()
    assert_bitwise_equal(out.tensor, expected, "q")

    kept = guarded((19, 6, 512), torch.bfloat16, device, fill=0x3C)
    before = kept.tensor[:, 3:].clone()
    inputs.run(mla_prologue, out=kept.tensor, zero_padding=False)
    assert_bitwise_equal(kept.tensor[:, :3], expected[:, :3], "live heads")
    assert_bitwise_equal(kept.tensor[:, 3:], before, "padding heads that are not to be written")
    kept.check()


@pytest.mark.parametrize("tokens", [33, 1100])
def test_rows_do_not_depend_on_their_neighbors(tokens: int, device: torch.device) -> None:
    case = PrologueCase(tokens, 5, 7, skipped=0.1)
    together = case.make(device)
    out = together.run(mla_prologue)
    single = case.make(device)
    for t in {0, 1, 7, tokens // 2, tokens - 1}:
        row = replace(single, **{name: getattr(single, name)[t : t + 1] for name in ("q", "kv", "slots", "positions")})
        assert_bitwise_equal(row.run(mla_prologue)[0], out[t], f"q of token {t}")
    rest = case.make(device)
    first = replace(rest, **{name: getattr(rest, name)[: tokens // 2] for name in ("q", "kv", "slots", "positions")})
    other = replace(rest, **{name: getattr(rest, name)[tokens // 2 :] for name in ("q", "kv", "slots", "positions")})
    assert_bitwise_equal(torch.cat([first.run(mla_prologue), other.run(mla_prologue)]), out, "q in two calls")
    assert_bitwise_equal(rest.storage, together.storage, "cache in two calls")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "stride", "block_size", "slots"),
    [
        (5, (1 << 29) + 576, 2, [9, 0, 7, 8, 3]),
        (1, 4_000_000 * 584, 4_000_000, [3_999_999, 0, 3_728_271, 2_000_000, 3_728_270]),
    ],
    ids=["many pages", "one large page"],
)
def test_cache_over_2_gib(pages: int, stride: int, block_size: int, slots: list[int], device: torch.device) -> None:
    """Byte offsets beyond 32 bits. The memory is allocated and not filled, so this is fast."""
    inputs = PrologueCase(5, 2).make(device)
    cache = torch.empty(pages * stride, dtype=torch.uint8, device=device).view(pages, stride)
    where = torch.tensor(slots, device=device)
    replace(inputs, cache=cache, slots=where).run(mla_prologue, block_size=block_size)
    small = torch.zeros(5, 584, dtype=torch.uint8, device=device)
    reference.mla_prologue.insert_kv(
        inputs.kv, small, torch.arange(5, device=device), inputs.positions, inputs.cos_sin, block_size=1
    )
    for token, slot in enumerate(slots):
        page, index = divmod(slot, block_size)
        scales = block_size * 576 + index * 8
        record = torch.cat([cache[page, index * 576 :][:576], cache[page, scales:][:8]])
        assert_bitwise_equal(record, small[token], f"record of token {token}")
    gathered = mla_prologue.gather_kv(cache, where, block_size=block_size)
    expected = mla_prologue.gather_kv(small, torch.arange(5, device=device), block_size=1)
    assert_bitwise_equal(gathered, expected, "gather_kv")
