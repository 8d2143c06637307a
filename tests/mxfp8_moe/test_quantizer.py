"""The quantizer and the layout of scales, bit for bit: reference and kernel against rules written a second time."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from mxfp8_rules import APIS, DTYPES, ONE, exact_bytes, exact_code, exact_value
from torch import Tensor

from abiding import reference
from abiding.mxfp8_moe import MXFP8
from abiding.testing.comparison import assert_bitwise_equal, assert_close


def assert_rows_of_blocks(api: ModuleType, blocks: Tensor, codes: Tensor, device: torch.device) -> None:
    """Scale blocks [n, 32], one per row, get these codes, and the bytes and rounded values that follow from them."""
    x = blocks.to(device)
    data, scales = api.quantize(x)
    found = api.unswizzle_scales(scales, len(scales), 32)[: len(x), 0].cpu()
    assert_bitwise_equal(found, codes.to(torch.uint8), "codes")
    expected = torch.where((codes == 255)[:, None], 0x7F, exact_bytes(blocks, codes))
    assert_bitwise_equal(data.view(torch.uint8).cpu(), expected, "bytes")
    kept = exact_value(expected, codes[:, None].expand(-1, 32)).to(torch.bfloat16)
    kept[kept.isnan()] = math.nan
    assert_bitwise_equal(api.round(x).cpu(), kept, "rounded values")


@APIS
@DTYPES
def test_every_amax(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Scale blocks whose amax is every finite magnitude of the dtype, and infinity."""
    count = 0x7F81 if dtype == torch.bfloat16 else 0x7C01
    amax = torch.arange(count).to(torch.int16).view(dtype)
    codes = torch.tensor([exact_code(float(value)) for value in amax])
    blocks = torch.rand(count, 32) * amax.double()[:, None]
    blocks = torch.where(amax.isinf()[:, None], torch.rand(count, 32) * torch.finfo(dtype).max, blocks)
    blocks = (blocks * torch.randint(0, 2, blocks.shape).mul(2).sub(1)).to(dtype)
    place = torch.randint(32, (count, 1))
    sign = torch.randint(0, 2, (count, 1)).mul(2).sub(1).to(dtype)
    blocks.scatter_(1, place, amax[:, None] * sign)
    assert_rows_of_blocks(api, blocks, codes, device)


@APIS
@DTYPES
def test_every_value_beside_one(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """All 65536 bit patterns, in scale blocks of one pattern and 448's."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    blocks = torch.full((len(x), 32), 448.0, dtype=dtype)
    blocks[torch.arange(len(x)), torch.arange(len(x)) % 32] = x
    amax = torch.where(x.isnan(), 0, x).abs().clamp(min=448)
    codes = {float(value): exact_code(float(value)) for value in amax.unique()}
    assert_rows_of_blocks(api, blocks, torch.tensor([codes[float(value)] for value in amax]), device)


@APIS
@DTYPES
def test_special_blocks(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    blocks = torch.zeros(7, 32, dtype=dtype)
    blocks[0, ::2] = -0.0
    blocks[1] = math.nan
    blocks[1, 5:7] = -math.nan
    blocks[2, 3], blocks[2, 4] = math.nan, 1.75
    blocks[3, 3], blocks[3, 4], blocks[3, 5] = math.inf, -math.inf, torch.finfo(dtype).max
    blocks[4] = math.nan
    blocks[4, 9] = -math.inf
    blocks[5] = math.nan
    blocks[5, 31] = -0.0
    blocks[6] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    codes = torch.tensor([0, 255, 119, 254, 254, 0, exact_code(float(blocks[6, 0]))])
    assert_rows_of_blocks(api, blocks, codes, device)
    rounded = api.round(blocks.to(device)).cpu()
    assert rounded[0].signbit().tolist() == [True, False] * 16
    assert rounded[3, 3:5].tolist() == [math.inf, -math.inf]


@APIS
@DTYPES
@pytest.mark.parametrize("k", [32, 96, 128, 1056, 8224])
def test_one_code_per_row(api: ModuleType, dtype: torch.dtype, k: int, device: torch.device) -> None:
    """The amax of a row decides; its scale blocks have the same code."""
    x = torch.randn(150, k) * torch.exp2(
        torch.randint(-9, 9, (150, -(-k // 32))).repeat_interleave(32, 1)[:, :k].float()
    )
    x = x.to(dtype)
    x[0] = torch.where(torch.arange(k) % 2 == 0, 0.0, -0.0)
    x[1] = math.nan
    x[2, ::3], x[3, 1], x[4, -1], x[5, -32:] = math.nan, math.inf, -math.inf, math.nan
    x[6, :32], x[6, 32:] = math.nan, math.nan
    x[6, -1] = 3.0
    amax = torch.where(x.isnan(), 0, x).abs().amax(1)
    of_rows = torch.tensor([exact_code(float(value)) for value in amax])
    of_rows = torch.where(x.isnan().all(1), 255, of_rows)
    codes = of_rows[:, None].expand(-1, k // 32).to(torch.uint8).contiguous()
    expected = torch.where((of_rows == 255)[:, None], 0x7F, exact_bytes(x, of_rows)).to(torch.uint8)
    data, scales = api.quantize(x.to(device), rowwise=True)
    assert_bitwise_equal(data.view(torch.uint8).cpu(), expected, "bytes")
    assert_bitwise_equal(api.unswizzle_scales(scales, 256, k)[:150].cpu(), codes, "codes")
    padding = scales.clone()
    padding.view(-1)[reference.mxfp8_moe.scale_offset(150, k // 32, scales.size(1)).to(device)] = 0
    assert not padding.any()


@APIS
@pytest.mark.parametrize("tokens", [1, 50, 120, 150])
def test_every_byte_under_every_code(api: ModuleType, tokens: int, device: torch.device) -> None:
    """For weights and for activations: a single byte in one of five scale blocks, among zeros, times ones."""
    count, k = 1 << 16, 160
    number = torch.arange(count)
    code, byte, block = number // 256, number % 256, number * 7 % 5
    rows = torch.zeros(count, k, dtype=torch.uint8)
    rows[number, block * 32 + number % 32] = byte.to(torch.uint8)
    codes = torch.full((count, k // 32), 127, dtype=torch.uint8)
    codes[number, block] = code.to(torch.uint8)
    scales = api.swizzle_scales(codes).to(device)
    expected = exact_value(byte, code).float()
    rows = rows.to(device)

    ones = torch.ones(tokens, k, dtype=torch.bfloat16, device=device)
    found = api.grouped_mm(ones, rows[None], scales[None], out_dtype=torch.float32)
    assert_close(found.cpu(), expected.expand(tokens, -1), name="weights")

    plain = torch.full((1, 32, k // 32), 127, dtype=torch.uint8, device=device)
    unit = torch.full((1, 32, k), ONE, dtype=torch.uint8, device=device)
    found = api.grouped_mm(MXFP8(rows, scales), unit, api.swizzle_scales(plain), out_dtype=torch.float32)
    assert_close(found.cpu(), expected[:, None].expand(-1, 32), name="activations")


@APIS
@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (3, 300, 7), (2, 2, 32, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu], ids=["uint8", "e8m0"])
def test_swizzle(api: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = torch.randint(0, 256, shape, dtype=torch.uint8)
    rows, columns = shape[-2:]
    tiled = api.swizzle_scales(plain.view(dtype))
    height, width = -(-rows // 128) * 128, -(-columns // 4) * 4
    assert tiled.dtype == dtype
    assert tiled.shape == (*shape[:-2], height, width)
    # The layout as cuBLAS documents it, tile by tile.
    padded = torch.nn.functional.pad(plain, (0, width - columns, 0, height - rows))
    tiles = padded.unflatten(-1, (width // 4, 4)).unflatten(-3, (height // 128, 4, 32))
    order = [*range(len(shape) - 2), *(len(shape) - 2 + axis for axis in (0, 3, 2, 1, 4))]
    assert_bitwise_equal(tiled.view(torch.uint8), tiles.permute(order).reshape(padded.shape))
    assert_bitwise_equal(api.unswizzle_scales(tiled, rows, 32 * columns).view(torch.uint8), plain)
