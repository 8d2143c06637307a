"""The scale of a quantization block, and the rounding of its values."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from prologue_rules import (
    APIS,
    DTYPES,
    e4m3_by_torch,
    every,
    exact_exponent,
    insert_unrotated,
    rows_of_blocks,
    unrotated,
)

from abiding import reference
from abiding.testing.cases.mla_prologue import (
    finite_magnitudes,
)
from abiding.testing.comparison import assert_bitwise_equal


@DTYPES
def test_scale_rule_of_the_reference(dtype: torch.dtype) -> None:
    amax = torch.arange(finite_magnitudes(dtype)).to(torch.int16).view(dtype)
    expected = torch.tensor([exact_exponent(value) for value in amax.tolist()])
    assert_bitwise_equal(reference.mla_prologue.quant_block_exponent(amax).long(), expected, "exponent")
    by_logarithm = torch.ceil(torch.log2(amax.double().clamp(min=1e-4) / 448)).long()
    assert_bitwise_equal(by_logarithm, expected, "exponent by logarithm")


@APIS
@DTYPES
def test_scale_of_every_magnitude(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Every finite magnitude as the amax of its quantization block, at every position in it."""
    amax = torch.arange(finite_magnitudes(dtype)).to(torch.int16).view(dtype)
    blocks = torch.zeros(len(amax), 64, dtype=dtype)
    index = torch.arange(len(amax))
    blocks[index, index % 64] = torch.where(index % 3 == 0, -amax, amax)
    data, codes = insert_unrotated(api, rows_of_blocks(blocks).to(device), block_size=64)
    expected = torch.tensor([exact_exponent(value) + 127 for value in amax.tolist()], dtype=torch.uint8)
    assert_bitwise_equal(codes[:, :7].cpu().reshape(-1)[: len(amax)], expected, "codes")
    assert not bool(codes[:, 7].any()), "the eighth scale byte is zero"
    scaled = blocks.double() * torch.exp2(127 - expected.double())[:, None]
    assert_bitwise_equal(data.cpu().reshape(-1, 64)[: len(amax)], e4m3_by_torch(scaled.float()), "values")
    assert int(data.cpu().reshape(-1, 64)[64:][: len(amax) - 64].bitwise_and(0x7F).amax()) <= 0x7E


@APIS
@pytest.mark.parametrize("exponent", [-22, -5, 0, 7, 100])
@DTYPES
def test_rounding_of_every_value(api: ModuleType, exponent: int, dtype: torch.dtype, device: torch.device) -> None:
    """Every value up to 448 * 2^exponent, in quantization blocks of that scale."""
    largest = torch.tensor(448.0 * 2.0**exponent, dtype=dtype)
    if not bool(largest.isfinite()) or float(largest) != 448.0 * 2.0**exponent:
        pytest.skip(f"{dtype} does not hold 448 * 2^{exponent}")
    values = every(dtype)
    values = values[values.abs() <= largest]
    blocks = torch.zeros(-(-len(values) // 63), 64, dtype=dtype)
    blocks[:, 0] = largest
    blocks[:, 1:] = torch.nn.functional.pad(values, (0, blocks[:, 1:].numel() - len(values))).reshape(-1, 63)
    data, codes = insert_unrotated(api, rows_of_blocks(blocks).to(device))
    assert bool((codes[:, :7].cpu().reshape(-1)[: len(blocks)] == exponent + 127).all())
    expected = e4m3_by_torch((blocks.double() * 2.0**-exponent).float())
    assert_bitwise_equal(data.cpu().reshape(-1, 64)[: len(blocks)], expected, "values")


@APIS
@DTYPES
def test_special_values(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Zeros, tiny values, infinities and NaN, with the expected bytes written out."""
    inf, nan = math.inf, math.nan
    top = torch.finfo(dtype).max
    top_code = 127 + (120 if dtype == torch.bfloat16 else 8)
    table: list[tuple[list[float], int, list[int]]] = [
        ([0.0, -0.0], 105, [0x00, 0x80]),
        ([2.0**-24, -(2.0**-23), 0.0, -0.0], 105, [0x28, 0xB0, 0x00, 0x80]),
        ([inf, 1.0, -1.0, -inf], 247, [0x7E, 0x00, 0x80, 0xFE]),
        ([-inf, nan, 2.0**15], 247, [0xFE, 0x7F, 0x00]),
        ([nan, 448.0, -448.0, 1.0], 127, [0x7F, 0x7E, 0xFE, 0x38]),
        ([-nan, 449.0 if dtype == torch.float16 else 450.0, 1.0], 128, [0x7F, 0x76, 0x30]),
        ([nan] * 64, 105, [0x7F] * 64),
        ([top, -top], top_code, [0x78, 0xF8]),
    ]
    blocks = torch.zeros(len(table), 64, dtype=dtype)
    expected = torch.zeros(len(table), 64, dtype=torch.uint8)
    for row, (values, _, bytes_) in enumerate(table):
        blocks[row, : len(values)] = torch.tensor(values, dtype=dtype)
        expected[row, : len(bytes_)] = torch.tensor(bytes_, dtype=torch.uint8)
    data, codes = insert_unrotated(api, rows_of_blocks(blocks).to(device))
    assert codes.cpu()[:, :7].reshape(-1)[: len(table)].tolist() == [code for _, code, _ in table]
    assert_bitwise_equal(data.cpu().reshape(-1, 64)[: len(table)], expected, "values")


@APIS
@DTYPES
def test_special_rows_write_only_their_own_record(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    kv = torch.randn(3, 512, dtype=dtype, device=device)
    slots, positions, table = unrotated(3, device)
    caches = []
    for special in (0.0, math.nan, math.inf):
        kv[1] = special
        cache = torch.full((1, 8 * 584 + 40), 0xEE, dtype=torch.uint8, device=device)
        api.insert_kv(kv, cache, slots + 2, positions, table, block_size=8)
        caches.append(cache)
    own = torch.zeros(8 * 584 + 40, dtype=torch.bool, device=device)
    own[3 * 576 : 4 * 576] = True
    own[8 * 576 + 3 * 8 : 8 * 576 + 4 * 8] = True
    for cache in caches[1:]:
        assert_bitwise_equal(cache[0, ~own], caches[0][0, ~own], "bytes of the neighbors")
