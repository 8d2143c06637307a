"""RoPE: two fused multiply-adds in float32, for KV and Q alike."""

from __future__ import annotations

from fractions import Fraction
from types import ModuleType

import torch
from prologue_rules import (
    APIS,
    DTYPES,
    e4m3_by_torch,
    nearest,
)
from torch import Tensor

from abiding import mla_prologue
from abiding.testing.comparison import assert_bitwise_equal


def rotated_exactly(row: list[float], cos: list[float], sin: list[float]) -> list[float]:
    """fma(e, c, -(o * s)) and fma(e, s, o * c) in float32, one rounding per product and one per fma."""
    result = []
    for j in range(32):
        e, o, c, s = Fraction(row[2 * j]), Fraction(row[2 * j + 1]), Fraction(cos[j]), Fraction(sin[j])
        result.append(nearest(e * c - Fraction(nearest(o * s, torch.float32)), torch.float32))
        result.append(nearest(e * s + Fraction(nearest(o * c, torch.float32)), torch.float32))
    return result


def cancelling_rows(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs and angles whose rotation cancels to rounding error, so that another FMA contraction changes all bits."""
    angle = torch.rand(rows, 64)
    angle[:, 32:] = angle[:, :32]
    kv = torch.randn(rows, 512).to(dtype)
    kv[:, 449::2] = kv[:, 448::2]
    kv[::2, 449::2] *= -1
    # A third of the pairs cancels nearly, a third not at all.
    kv[::3, 449::2] = torch.randn(len(kv[::3]), 32).to(dtype)
    angle[1::3, 32:] *= 1 + 2.0**-20
    return kv, angle


@APIS
@DTYPES
def test_rotation_is_two_fused_multiply_adds(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    rows = 24
    kv, table = cancelling_rows(rows, dtype)
    exact = [rotated_exactly(kv[i, 448:].tolist(), table[i, :32].tolist(), table[i, 32:].tolist()) for i in range(rows)]
    expected = torch.tensor(
        [[nearest(Fraction(value), dtype) for value in row] for row in exact], dtype=torch.float64
    ).to(dtype)
    slots = positions = torch.arange(rows, device=device)
    kv, table = kv.to(device), table.to(device)

    cache = torch.zeros(rows, 584, dtype=torch.uint8, device=device)
    api.insert_kv(kv, cache, slots, positions, table, block_size=1)
    assert_bitwise_equal(cache[:, 448:576].contiguous().view(dtype).cpu(), expected, "cache")

    scale = torch.full((1,), 2.0**-24, device=device)
    one = torch.ones(1, device=device)
    cache8 = torch.zeros(rows, 1, 512, dtype=torch.uint8, device=device)
    api.qnorm_rope_full_cache_fp8_insert(
        kv[:, None], kv, cache8, slots, positions, table, kv_scale=scale, q_scale_inv=one
    )
    scaled = torch.tensor(exact, dtype=torch.float64).float() * 2.0**24
    assert_bitwise_equal(cache8[:, 0, 448:].cpu(), e4m3_by_torch(scaled), "e4m3 cache")
    if dtype == torch.bfloat16:
        cache16 = torch.zeros(rows, 1, 512, dtype=dtype, device=device)
        api.qnorm_rope_full_cache_bf16_insert(kv[:, None].clone(), kv, cache16, slots, positions, table)
        assert_bitwise_equal(cache16[:, 0, 448:].cpu(), expected, "bfloat16 cache")
        assert_bitwise_equal(cache16[:, 0, :448], kv[:, :448], "bfloat16 cache")


@DTYPES
def test_rotation_of_q_is_the_same(dtype: torch.dtype, device: torch.device) -> None:
    rows = 24
    kv, table = cancelling_rows(rows, dtype)
    positions = torch.arange(rows)
    exact = [rotated_exactly(kv[i, 448:].tolist(), table[i, :32].tolist(), table[i, 32:].tolist()) for i in range(rows)]
    expected = torch.tensor(
        [[nearest(Fraction(value), dtype) for value in row] for row in exact], dtype=torch.float64
    ).to(dtype)
    q, table, positions = kv.to(device), table.to(device), positions.to(device)
    cache = torch.zeros(0, 584, dtype=torch.uint8, device=device)
    out = mla_prologue.qnorm_rope_kv_insert(
        q[:, None], q, cache, positions[:0], positions, table, block_size=1, apply_q_norm=False
    )
    assert_bitwise_equal(out[:, 0, 448:].cpu(), expected, "q")
    assert_bitwise_equal(out[:, 0, :448], q[:, :448], "q")


def test_quantized_values_are_rounded_to_the_dtype_of_kv_first(device: torch.device) -> None:
    """RoPE comes before quantization, also where a whole row is quantized."""
    kv, table = torch.zeros(1, 512, dtype=torch.bfloat16, device=device), torch.zeros(1, 64, device=device)
    kv[0, 448], table[0, 0] = 1.0, 1.0625 + 2.0**-10  # between two bfloat16 values, just above a tie of e4m3
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    cache8 = torch.zeros(1, 1, 512, dtype=torch.uint8, device=device)
    one = torch.ones(1, device=device)
    mla_prologue.qnorm_rope_full_cache_fp8_insert(
        kv[:, None], kv, cache8, zero, zero, table, kv_scale=one, q_scale_inv=one
    )
    assert int(cache8[0, 0, 448]) == 0x39, "1.0625 + 2^-10 is rounded once, to 1.125"
