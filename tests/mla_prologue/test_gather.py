"""Reading a cache back."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from prologue_rules import (
    APIS,
    DTYPES,
    unrotated,
)

from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import guarded


@APIS
@DTYPES
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_gather_of_every_code_and_byte(
    api: ModuleType, dtype: torch.dtype, index_dtype: torch.dtype, device: torch.device
) -> None:
    block_size, pages = 16, 10
    rows = block_size * pages
    blocks = torch.arange(rows * 7)
    codes = (blocks // 4 % 256).to(torch.uint8)
    values = (torch.arange(64) + 64 * (blocks[:, None] % 4)).to(torch.uint8)
    rope = torch.randint(0, 256, (rows, 128), dtype=torch.uint8)
    data = torch.cat([values.reshape(rows, 448), rope], dim=1).reshape(pages, -1)
    scales = torch.cat([codes.reshape(rows, 7), torch.full((rows, 1), 0xEE)], dim=1).to(torch.uint8).reshape(pages, -1)
    cache = guarded(
        (pages, block_size * 584),
        torch.uint8,
        device,
        strides=(block_size * 584 + 24, 1),
        fill=torch.cat([data, scales], 1).to(device),
    )

    order = torch.randperm(rows)
    slots = torch.cat([order, torch.tensor([-1, rows, -(1 << 31), (1 << 31) - 1, rows + 5])]).to(index_dtype)
    if index_dtype == torch.int64:
        slots = torch.cat([slots, torch.tensor([-(1 << 63), (1 << 63) - 1, 1 << 32])])
    shuffled = api.gather_kv(cache.tensor, slots.to(device), block_size=block_size, dtype=dtype).cpu()
    cache.check()
    assert_bitwise_equal(shuffled[rows:], torch.zeros_like(shuffled[rows:]), "rows without a slot")
    actual = torch.empty(rows, 512, dtype=dtype)
    actual[order] = shuffled[:rows]

    factor = torch.where(codes == 255, math.nan, torch.exp2(codes.double() - 127))
    exact = values.view(torch.float8_e4m3fn).double() * factor[:, None]  # what float32 holds exactly, or overflows
    assert_close(actual[:, :448], exact.reshape(rows, 448).float().to(dtype), name="values")
    signs = torch.signbit(actual[:, :448]) == torch.signbit(values.view(torch.float8_e4m3fn).float().reshape(rows, 448))
    assert bool((signs | actual[:, :448].isnan()).all())
    assert_bitwise_equal(actual[:, 448:].contiguous().view(torch.int16), rope.view(torch.int16), "RoPE values")


@APIS
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0])
@DTYPES
def test_round_trip(api: ModuleType, scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """Values read back are within half a step of e4m3 at the scale of their quantization block."""
    kv = (torch.randn(200, 512) * torch.rand(200, 1) * scale).to(dtype).to(device)
    slots, positions, table = unrotated(200, device)
    cache = torch.zeros(4, 64 * 584, dtype=torch.uint8, device=device)
    api.insert_kv(kv, cache, slots, positions, table, block_size=64)
    back = api.gather_kv(cache, slots, block_size=64, dtype=dtype)
    assert_close(back[:, 448:], kv[:, 448:], name="RoPE values")  # -0 may become +0, even when nothing is rotated
    x, y = kv[:, :448].double(), back[:, :448].double()
    amax = x.abs().unflatten(1, (7, 64)).amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1).clamp(min=1e-4)
    # The scale is less than 2 * amax / 448; e4m3 has steps of 2^-9 up to 2^-6, of 2^-3 of a power of two above.
    subnormal = 2.0**-10 * 2 * amax / 448
    allowed = torch.maximum(x.abs() * 2.0**-4, subnormal)
    if dtype == torch.float16:
        allowed += 2.0**-25
    worst = ((x - y).abs() - allowed).max()
    assert float(worst) <= 0, f"off by {float(worst)} more than half a step"
    assert bool((y[x == 0] == 0).all())
