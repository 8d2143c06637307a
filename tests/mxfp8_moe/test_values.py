"""Results: the quantizer bit for bit, GEMMs within the error bound of float32 sums, layers as compositions.

Rules that decide bits are written a second time here, by rational numbers and by a table of the 127 magnitudes of e4m3,
so that reference and kernel cannot be wrong together.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding import mxfp8_moe, reference
from abiding.mxfp8_moe import MXFP8
from abiding.testing.cases.mxfp8_moe import (
    CORNER,
    LAYERS,
    ODD,
    REGULAR,
    GemmCase,
    GemmInputs,
    LayerCase,
    LayerInputs,
    expert_weights,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close, round_once
from abiding.testing.guarded import guarded

DTYPES_16_BIT = (torch.bfloat16, torch.float16)
APIS = pytest.mark.parametrize("api", [mxfp8_moe, reference.mxfp8_moe], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", DTYPES_16_BIT, ids=["bfloat16", "float16"])
GEMMS = [*REGULAR, *ODD, *CORNER]

ONE = 0x38  # 1.0 in e4m3


# --- the rules, a second time -----------------------------------------------------------------------------------------


def exact_code(amax: float) -> int:
    """The smallest code with amax <= 448 * 2^(code - 127), in rational numbers; infinity is above all of them."""
    if math.isinf(amax):
        return 254
    wanted = Fraction(amax) / 448
    code = max(wanted.numerator.bit_length() - wanted.denominator.bit_length() + 126, 0) if wanted else 0
    while Fraction(2) ** (code - 127) < wanted:
        code += 1
    return code


def magnitudes() -> Tensor:
    """The values of the bytes 0 to 0x7E."""
    byte = torch.arange(127)
    mantissa, exponent = (byte % 8).double(), byte // 8
    return torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * torch.exp2(exponent.double() - 7))


def exact_bytes(x: Tensor, codes: Tensor) -> Tensor:
    """The nearest e4m3 magnitude of each element with its code, ties to even; elements [n, 32], codes [n]."""
    scaled = x.double() * torch.exp2(127 - codes.double())[:, None]
    table = magnitudes()
    middles = (table[1:] + table[:-1]) / 2
    value = scaled.abs().nan_to_num(0)
    below = torch.searchsorted(middles, value)
    tie = value == middles[below.clamp(max=len(middles) - 1)]
    byte = torch.where(tie & (below % 2 == 1), below + 1, below) + 0x80 * scaled.signbit()
    return torch.where(x.isnan(), 0x7F, byte).to(torch.uint8)


def exact_value(byte: Tensor, code: Tensor) -> Tensor:
    """The value of a byte with a code, rounded once to bfloat16, in float64."""
    value = magnitudes()[(byte & 0x7F).clamp(max=126).long()] * torch.exp2(code.double() - 127)
    rounded = round_once(torch.where(byte >= 0x80, -value, value), torch.bfloat16).double()
    return torch.where((code == 255) | (byte & 0x7F == 0x7F), math.nan, rounded)


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


# --- the quantizer ----------------------------------------------------------------------------------------------------


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


# --- GEMMs ------------------------------------------------------------------------------------------------------------


def assert_gemm(found: Tensor, a: Tensor, i: GemmInputs) -> None:
    """Rows of experts are within the exact result +- the error bound of float32 sums, rounded; `a` holds bfloat16
    rows."""
    api, live, k = reference.mxfp8_moe, i.live(), i.case.k
    exact = i.run(api, a, out_dtype=torch.float64)[live]
    plain = replace(i, weight=(i.weight.view(torch.uint8) & 0x7F))
    loss = plain.run(api, a.abs(), out_dtype=torch.float64)[live].nan_to_num(0, 0, 0) * k * 2.0**-22 + k * 2.0**-149
    found = found[live]
    assert_close(found.isnan(), exact.isnan(), name="NaN")
    low, high = (round_once(end, found.dtype) for end in (exact - loss, exact + loss))
    wrong = ~((low <= found) & (found <= high) | exact.isnan())
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {found.numel()} are off, first {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("case", GEMMS, ids=str)
def test_case(case: GemmCase, device: torch.device) -> None:
    i = case.make(device, seed=1)
    given = [tensor.clone() for tensor in (i.x, i.weight.view(torch.uint8), i.weight_scale)]
    ours, theirs = i.quantize(mxfp8_moe), i.quantize(reference.mxfp8_moe)
    live = i.live()
    assert_bitwise_equal(ours.scales, theirs.scales, "scales")
    assert_bitwise_equal(ours.data[live], theirs.data[live], "data")
    rounded = mxfp8_moe.round(i.x)
    assert_bitwise_equal(rounded, reference.mxfp8_moe.round(i.x), "rounded rows")

    out = i.run(mxfp8_moe, rounded)
    assert out.dtype == case.out_dtype
    assert out.shape == (case.rows, case.n)
    assert_gemm(out, rounded, i)
    assert_close(i.run(mxfp8_moe, ours)[live], out[live], name="GEMM of e4m3 rows")
    if case.dtype == torch.bfloat16:
        assert_gemm(i.run(mxfp8_moe, i.x), i.x, i)
    for tensor, before in zip((i.x, i.weight.view(torch.uint8), i.weight_scale), given, strict=True):
        assert_bitwise_equal(tensor, before, "an input")


@pytest.mark.gpu
def test_stream_k_with_many_tiles(cuda: torch.device) -> None:
    """On Hopper the CTAs of a cluster divide the K of its tiles among them, and hand sums of parts over (stream-K)."""
    i = GemmCase((2, 1, 9, 3) * 4, 4096, 3072).make(cuda, seed=3)
    rounded = mxfp8_moe.round(i.x)
    assert_gemm(i.run(mxfp8_moe, rounded), rounded, i)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GEMMS, ids=str)
def test_portable_kernel(case: GemmCase, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable kernel, which other GPUs than Hopper run; e4m3 rows become bfloat16 in the order that it reads."""
    monkeypatch.setenv("ABIDING_PORTABLE", "1")
    i = case.make(cuda, seed=2)
    rounded, live = mxfp8_moe.round(i.x), i.live()
    out = i.run(mxfp8_moe, rounded)
    assert_gemm(out, rounded, i)
    assert_close(i.run(mxfp8_moe, i.quantize(mxfp8_moe))[live], out[live])


@pytest.mark.parametrize("case", [*REGULAR, *ODD], ids=str)
def test_outputs_are_written_where_they_belong(case: GemmCase, device: torch.device) -> None:
    i = case.make(device)
    live = i.live()
    steps = 16 // case.out_dtype.itemsize
    out = guarded((case.rows, case.n), case.out_dtype, device, strides=(case.n + 3 * steps, 1), offset_bytes=16)
    assert i.run(mxfp8_moe, i.x.bfloat16(), out=out.tensor) is out.tensor
    out.check()
    assert_bitwise_equal(out.tensor[live], i.run(mxfp8_moe, i.x.bfloat16())[live])
    untouched = out.tensor[~live].contiguous().view(torch.uint8)
    assert bool((untouched == 0xFF).all()), "rows of no expert were written"

    kept = guarded(i.x.shape, torch.bfloat16, device, strides=(case.k + 24, 1), offset_bytes=16)
    assert mxfp8_moe.round(i.x, out=kept.tensor) is kept.tensor
    kept.check()
    assert_bitwise_equal(kept.tensor, mxfp8_moe.round(i.x))

    data = guarded(i.x.shape, torch.float8_e4m3fn, device, strides=(case.k + 48, 1), offset_bytes=16)
    expected = i.quantize(mxfp8_moe)
    scales = guarded(expected.scales.shape, torch.uint8, device, offset_bytes=16)
    offsets = i.offs if i.expert_offsets is None else i.expert_offsets
    torch.ops.abiding.mxfp8_quantize(i.x, offsets, i.offs is not None, data=data.tensor, scales=scales.tensor)
    data.check()
    scales.check()
    assert_bitwise_equal(scales.tensor, expected.scales)
    assert_bitwise_equal(data.tensor[live], expected.data[live])
    assert bool((data.tensor[~live].view(torch.uint8) == 0xFF).all()), "rows of no expert were written"


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_that_float32_holds_are_exact(out_dtype: torch.dtype, device: torch.device) -> None:
    case = GemmCase((40, 0, 150), 160, 416, out_dtype=out_dtype)
    i = case.make(device)
    exponents = torch.randint(-2, 3, i.x.shape, device=device)
    x = torch.exp2(exponents.float()).copysign(i.x).bfloat16()
    signs = i.weight.view(torch.uint8) & 0x80
    i = replace(i, weight=(signs | ONE - 8 * torch.randint(0, 3, signs.shape, device=device)).to(torch.uint8))
    scale = mxfp8_moe.swizzle_scales(torch.randint(125, 130, i.codes.shape, dtype=torch.uint8, device=device))
    i = replace(i, weight_scale=scale)
    exact = round_once(i.run(reference.mxfp8_moe, x, out_dtype=torch.float64), out_dtype)
    assert bool((exact.abs() > 1).any())
    assert_close(i.run(mxfp8_moe, x), exact)
    assert_close(i.run(mxfp8_moe, replace(i, x=x).quantize(mxfp8_moe)), exact)


def test_rows_do_not_depend_on_their_neighbors(device: torch.device) -> None:
    """Each row gives the same bits alone and among other rows."""
    case = GemmCase((70, 1, 200, 0, 3), 96, 160)
    i = case.make(device)
    x = i.x
    together = i.run(mxfp8_moe, x)
    assert i.expert_offsets is not None
    edges = i.expert_offsets.tolist()
    for expert in range(len(case.sizes)):
        some = i.weight[expert : expert + 1], i.weight_scale[expert : expert + 1]
        for begin in range(edges[expert], edges[expert + 1], 37):
            for end in (begin + 1, min(begin + 20, edges[expert + 1])):
                alone = mxfp8_moe.grouped_mm(x[begin:end], *some)
                assert_bitwise_equal(alone, together[begin:end], f"rows {begin} to {end}")
    quantized = i.quantize(mxfp8_moe)
    one = mxfp8_moe.quantize(x[71:72])
    assert_bitwise_equal(one.data, quantized.data[71:72])


@pytest.mark.parametrize(
    "case",
    [GemmCase((1,), 64, 1024), GemmCase((2, 1, 4, 0, 3), 96, 2048), GemmCase((4, 1, 3), 256, 4096)],
    ids=str,
)
def test_rows_do_not_depend_on_what_their_neighbors_hold(case: GemmCase, device: torch.device) -> None:
    """Sizes whose K stream-K divides on Hopper: the order of a row's sum follows from the sizes of the call, and from
    nothing that is in other rows. Alone, a row may be summed in another order, within the same bound."""
    i = case.make(device)
    rounded = mxfp8_moe.round(i.x)
    together = i.run(mxfp8_moe, rounded)
    assert_bitwise_equal(i.run(mxfp8_moe, rounded), together, "the same call again")
    for row in range(case.rows):
        for fill in (0.0, math.nan, math.inf, 1e30):
            others = torch.full_like(rounded, fill)
            others[row] = rounded[row]
            found = i.run(mxfp8_moe, others)
            assert_bitwise_equal(found[row], together[row], f"row {row} among rows of {fill}")
    assert i.expert_offsets is not None
    for expert, (begin, end) in enumerate(itertools.pairwise(i.expert_offsets.tolist())):
        weight, scale = i.weight[expert : expert + 1], i.weight_scale[expert : expert + 1]
        for row in range(begin, end):
            x = rounded[row : row + 1]
            single = GemmInputs(GemmCase((1,), case.n, case.k, form="whole"), x, weight, scale, scale, None, None)
            assert_gemm(single.run(mxfp8_moe, x), x, single)


def raw(i: GemmInputs, device: torch.device) -> Tensor:
    """The two operators as vLLM calls them; experts are stored in reverse order, scale tiles in any."""
    case = i.case
    sizes = torch.tensor(case.sizes)
    padded = (sizes + 127) // 128 * 128
    starts = (sizes.cumsum(0) - sizes).int().to(device)
    scale_starts = (padded.flip(0).cumsum(0).flip(0) - padded).int().to(device)
    problems = torch.stack([sizes, torch.full_like(sizes, case.n), torch.full_like(sizes, case.k)], 1).int().to(device)
    data = guarded((case.rows, case.k), torch.float8_e4m3fn, device)
    scales = guarded((int(padded.sum()), case.k // 32), torch.uint8, device)
    out = guarded((case.rows, case.n), case.out_dtype, device)
    groups = (problems, starts, scale_starts)
    torch.ops.abiding.mxfp8_experts_quant(i.x, *groups, data.tensor, scales.tensor)
    plain_view = i.weight_scale.transpose(1, 2)
    torch.ops.abiding.cutlass_mxfp8_grouped_mm(
        data.tensor, i.weight.transpose(1, 2), scales.tensor, plain_view, out.tensor, *groups
    )
    for guard in (data, scales, out):
        guard.check()
    return out.tensor


@pytest.mark.parametrize("out_dtype", DTYPES_16_BIT, ids=str)
def test_raw_operators_and_both_forms_of_offsets_agree(out_dtype: torch.dtype, device: torch.device) -> None:
    i = GemmCase((5, 0, 200, 128), 128, 256, out_dtype=out_dtype).make(device)
    expected = i.run(mxfp8_moe, i.quantize(mxfp8_moe))
    assert_bitwise_equal(raw(i, device), expected)
    assert i.expert_offsets is not None
    ends = replace(i, expert_offsets=None, offs=i.expert_offsets[1:].clone())
    assert_bitwise_equal(ends.run(mxfp8_moe, ends.quantize(mxfp8_moe)), expected)
    assert_bitwise_equal(ends.quantize(mxfp8_moe).scales, i.quantize(mxfp8_moe).scales)
    e8m0 = replace(i, weight_scale=i.weight_scale.view(torch.float8_e8m0fnu), weight=i.weight.view(torch.uint8))
    data, scales = i.quantize(mxfp8_moe)
    assert_bitwise_equal(e8m0.run(mxfp8_moe, MXFP8(data, scales.view(torch.float8_e8m0fnu))), expected)
    apart = torch.cat([data.view(torch.uint8)] * 2, 1)[:, :256].view(torch.float8_e4m3fn)
    wide = torch.cat([i.weight.view(torch.uint8)] * 2, 2)[..., :256]
    assert_bitwise_equal(replace(i, weight=wide).run(mxfp8_moe, MXFP8(apart, scales)), expected)


def test_upstream_test(device: torch.device) -> None:
    """vLLM's own criterion: 1 - 2 xy / (x^2 + y^2) against unquantized GEMMs is under 0.001 for each expert."""
    for dtype in DTYPES_16_BIT:
        sizes = tuple(torch.randint(1, 200, (8,)).tolist())
        i = GemmCase(sizes, 384, 512, dtype=dtype, out_dtype=dtype).make(device)
        weight = torch.randn(8, 384, 512, device=device).to(dtype)
        data, scales = mxfp8_moe.quantize(weight.flatten(0, 1))
        i = replace(i, weight=data.view(8, 384, 512), weight_scale=scales.view(8, 384, 16))
        out = i.run(mxfp8_moe, i.quantize(mxfp8_moe))
        for rows, ours, w in zip(i.x.split(sizes), out.split(sizes), weight, strict=True):
            x, y = ours.double(), rows.double() @ w.double().T
            assert 1e-5 < float(1 - 2 * (x * y).sum() / (x * x + y * y).sum()) < 0.001


BAD = [[5, 3, 3, 8], [0, 5, 9, 8], [-1, 2, 4, 8], [0, 2, 2**31 - 1, 8], [-(2**31), 2**31 - 1, 0, 8], [8, 8, 0, 8]]


@pytest.mark.parametrize("edges", BAD, ids=str)
def test_offsets_that_lead_outside_are_empty(edges: list[int], device: torch.device) -> None:
    i = replace(GemmCase((2, 3, 3), 64, 96).make(device), expert_offsets=torch.tensor(edges).int().to(device))
    data = guarded((8, 96), torch.float8_e4m3fn, device)
    scales = guarded((256, 4), torch.uint8, device)
    out = guarded((8, 64), torch.bfloat16, device)
    torch.ops.abiding.mxfp8_quantize(i.x, i.expert_offsets, False, data=data.tensor, scales=scales.tensor)
    i.run(mxfp8_moe, i.x, out=out.tensor)
    for guard in (data, scales, out):
        guard.check()
    theirs = torch.full_like(out.tensor, math.nan)
    assert_close(out.tensor, i.run(reference.mxfp8_moe, i.x, out=theirs), ulps=1, atol=1e-3)
    expected = i.quantize(reference.mxfp8_moe).scales
    assert_bitwise_equal(scales.tensor, expected[:256])


def test_scales_outside_of_their_buffer(device: torch.device) -> None:
    """Rows of such an expert are not quantized, and are NaN in a GEMM."""
    i = GemmCase((3, 130, 4), 128, 128).make(device)
    problems = torch.tensor([[3, 128, 128], [130, 128, 128], [4, 128, 128]]).int().to(device)
    starts = torch.tensor([0, 3, 133]).int().to(device)
    for begins, held in (([0, 128, 384], (1, 1, 0)), ([64, 128, 0], (0, 1, 1)), ([-128, 256, 256], (0, 0, 1))):
        groups = (problems, starts, torch.tensor(begins).int().to(device))
        data = guarded((137, 128), torch.float8_e4m3fn, device)
        scales = guarded((384 + 5, 4), torch.uint8, device)
        torch.ops.abiding.mxfp8_experts_quant(i.x, *groups, data.tensor, scales.tensor)
        data.check()
        scales.check()
        kept = torch.tensor(held, device=device).bool().repeat_interleave(problems[:, 0])
        assert_bitwise_equal(data.tensor[kept], i.quantize(mxfp8_moe).data[kept])
        assert bool((data.tensor[~kept].view(torch.uint8) == 0xFF).all())
        data.tensor.zero_()
        out = torch.empty(137, 128, dtype=torch.bfloat16, device=device)
        torch.ops.abiding.cutlass_mxfp8_grouped_mm(
            data.tensor, i.weight.transpose(1, 2), scales.tensor, i.weight_scale, out, *groups
        )
        assert_bitwise_equal(out.isnan().all(1), ~kept)
        assert_bitwise_equal(out.isnan().any(1), ~kept)
    short = MXFP8(i.quantize(mxfp8_moe).data, i.quantize(mxfp8_moe).scales[:256])
    out = i.run(mxfp8_moe, short)
    assert out.isnan().any(1).tolist() == [False] * 3 + [True] * 134
    assert_bitwise_equal(out[:3], i.run(reference.mxfp8_moe, short)[:3].to(out.dtype))


# --- layers -----------------------------------------------------------------------------------------------------------


def unit_weights(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The identity matrix as MXFP8."""
    weight = torch.eye(rows, columns, device=device).mul(ONE).to(torch.uint8)[None]
    return weight, mxfp8_moe.swizzle_scales(torch.full((1, rows, columns // 32), 127, dtype=torch.uint8, device=device))


def activated(h: Tensor, activation: mxfp8_moe.Activation, **options: Any) -> Tensor:
    """The activation of the layer, between GEMMs with identity matrices."""
    if activation == "none" or len(h) == 0:
        return h[:, : h.size(1) // (1 if activation == "none" else 2)]
    width = h.size(1) // 2
    first, second = unit_weights(2 * width, 2 * width, h.device), unit_weights(2 * width, width, h.device)
    one = torch.ones(len(h), 1, device=h.device)
    ids = torch.zeros(len(h), 1, dtype=torch.int32, device=h.device)
    return mxfp8_moe.moe(h, *first, *second, ids, one, activation=activation, mode="w8a16", **options)[:, :width]


def composition(i: LayerInputs) -> Tensor:
    """The layer, composed of the group's functions and elementwise float32 operations of torch."""
    case, device = i.case, i.x.device
    ids = i.topk_ids.long()
    order = ids.flatten().argsort(stable=True)
    order = order[ids.flatten()[order] >= 0]
    # As many rows as the layer has room for: the cluster size of stream-K, and so the order of sums, depends on it.
    order = torch.nn.functional.pad(order, (0, ids.numel() - len(order)))
    counts = torch.bincount(ids[ids >= 0], minlength=case.experts)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    kept = mxfp8_moe.round if case.mode == "w8a8" else torch.clone
    rows = kept(i.x)[order // case.top_k]
    h = mxfp8_moe.grouped_mm(rows, i.w13, i.s13, offsets)
    h = kept(activated(h, case.activation).contiguous())
    down = mxfp8_moe.grouped_mm(h, i.w2, i.s2, offsets).float()
    row_of = torch.full((ids.numel(),), -1, device=device)
    present = int(counts.sum())
    row_of[order[:present]] = torch.arange(present, device=device)
    total = torch.zeros(i.x.shape, dtype=torch.float32, device=device)
    for j in range(case.top_k):
        row = row_of.view(ids.shape)[:, j]
        here = row >= 0
        total[here] = total[here] + i.topk_weights[here, j, None] * down[row[here]]
    return total.to(torch.bfloat16)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layer(case: LayerCase, device: torch.device) -> None:
    i = case.make(device, seed=2)
    out = i.run(mxfp8_moe)
    assert out.shape == i.x.shape
    assert_close(out, composition(i), name="composition")
    exact = reference.mxfp8_moe.layer(
        i.x, i.w13, i.s13, i.w2, i.s2, i.topk_ids, i.topk_weights, activation=case.activation, mode=case.mode
    )
    # A sum on the other side of a rounding boundary moves one bfloat16 result of GEMM1 by a step; in mode w8a8 that can
    # move an e4m3 activation, whose steps are 16 times as coarse. These are few among the many terms of a sum.
    spread = exact.nan_to_num().square().mean(1, keepdim=True).sqrt()
    assert_close(out.isnan(), exact.isnan(), name="NaN")
    off = ((out.double() - exact).abs() - 2.0**-8 * exact.abs()).nan_to_num(0) / spread.clamp(min=1e-30)
    assert case.tokens == 0 or float(off.max()) < 2.0**-5


SWIGLU: list[dict[str, Any]] = [
    {"activation": "silu"},
    {"activation": "silu", "swiglu_limit": 3.5},
    {"activation": "swiglu_oai"},
    {"activation": "swiglu_oai", "swiglu_limit": math.inf},
    {"activation": "swiglu_oai", "swiglu_alpha": 0.5, "swiglu_beta": -0.25, "swiglu_limit": 2.0},
    {"activation": "swiglu_oai", "swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": 10.0},
]


@pytest.mark.parametrize("options", SWIGLU, ids=str)
def test_activation(options: dict[str, Any], device: torch.device) -> None:
    gate = torch.cat([torch.randn(40, 64) * 4, torch.linspace(-120, 120, 64 * 8).view(8, 64)])
    up = torch.randn(48, 64) * 5
    gate[0, 0], up[1, 1], gate[2, 2] = math.nan, math.nan, -0.0
    h = torch.cat([gate, up], 1).bfloat16().to(device)
    # GEMM1 turns a NaN times the zeros of an identity matrix into a row of NaN: such rows only show that NaN survives.
    expected = reference.mxfp8_moe.activate(h.double(), **options)
    expected[:2] = math.nan
    # exp(-gate) is infinite from -gate = 88.7 on; there the result, less than 89 * 2^-128 * up, becomes 0.
    assert_close(activated(h, **options), expected, ulps=1, atol=2.0**-118)


def test_defaults_of_the_activation(device: torch.device) -> None:
    """The defaults are what their documentation says, bit for bit."""
    h = (torch.randn(40, 128) * 6).bfloat16().to(device)
    oai = activated(h, "swiglu_oai")
    assert_bitwise_equal(activated(h, "swiglu_oai", swiglu_alpha=1.702, swiglu_beta=1.0, swiglu_limit=7.0), oai)
    silu = activated(h, "silu")
    assert_bitwise_equal(activated(h, "silu", swiglu_limit=math.inf), silu)
    assert_bitwise_equal(activated(h, "silu", swiglu_limit=1e30), silu)
    assert not torch.equal(activated(h, "silu", swiglu_limit=7.0), silu)


@pytest.mark.parametrize("row", [0, 32], ids=["gate", "up"])
@pytest.mark.parametrize("options", [SWIGLU[0], SWIGLU[1], SWIGLU[2]], ids=str)
def test_a_nan_in_gate_or_up_alone_survives_the_activation(
    options: dict[str, Any], row: int, device: torch.device
) -> None:
    w13, s13 = unit_weights(64, 64, device)
    codes = mxfp8_moe.unswizzle_scales(s13, 64, 64)
    codes[0, row] = 255
    ids, one = torch.zeros(5, 1, dtype=torch.int64, device=device), torch.ones(5, 1, device=device)
    arguments = (w13, mxfp8_moe.swizzle_scales(codes), *unit_weights(64, 32, device), ids, one)
    x = torch.randn(5, 64, device=device).bfloat16()
    assert bool(mxfp8_moe.moe(x, *arguments, **options).isnan().all())


@pytest.mark.parametrize("case", [LAYERS[0], LAYERS[3], LAYERS[10]], ids=str)
def test_layer_memory(case: LayerCase, device: torch.device) -> None:
    """With a workspace and a strided output of the caller's: nothing outside of them is written, nothing in them is
    read."""
    i = case.make(device)
    expected = i.run(mxfp8_moe)
    size = mxfp8_moe.workspace_bytes(case.tokens, case.top_k, case.experts, case.hidden, case.intermediate)
    for fill in (0x00, 0xFF):
        space = guarded((size,), torch.uint8, device, fill=fill)
        out = guarded(i.x.shape, torch.bfloat16, device, strides=(case.hidden + 8, 1), offset_bytes=16)
        assert i.run(mxfp8_moe, workspace=space.tensor, out=out.tensor) is out.tensor
        space.check()
        out.check()
        assert_bitwise_equal(out.tensor, expected)


def test_tokens_do_not_depend_on_their_neighbors(device: torch.device) -> None:
    i = LayerCase(50, 64, 96, 8, 3).make(device)
    together = i.run(mxfp8_moe)
    for some in (slice(0, 1), slice(7, 9), slice(20, 50)):
        alone = replace(i, x=i.x[some], topk_ids=i.topk_ids[some], topk_weights=i.topk_weights[some])
        assert_bitwise_equal(alone.run(mxfp8_moe), together[some])


def test_experts_that_do_not_exist_add_nothing(device: torch.device) -> None:
    i = LayerCase(20, 64, 64, 4, 2).make(device)
    ids = i.topk_ids.clone()
    away = torch.rand(ids.shape, device=device) < 0.5
    expected = replace(i, topk_ids=ids.masked_fill(away, -1)).run(mxfp8_moe)
    for bad in (4, 5, 2**31, 2**62, -7, -(2**63)):
        assert_bitwise_equal(replace(i, topk_ids=ids.masked_fill(away, bad)).run(mxfp8_moe), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("tokens", [1, 20, 700])
def test_expert_map(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    """Ids through a map give the bits of the local ids that it leads to; ids outside of it are elsewhere."""
    case = LayerCase(tokens, 64, 64, 5, 4, index_dtype=dtype)
    i = case.make(device)
    wide = replace(case, experts=12)
    ids, _ = wide.route(torch.Generator(device).manual_seed(3))
    expert_map = torch.tensor([-1, 4, 0, -1, 2, -1, -1, 1, 3, -1, 7, -5], dtype=torch.int32, device=device)
    local = expert_map[ids.long()].to(dtype)
    local = torch.where(local < 5, local, -1)
    for bad in (12, -1, 2**31 - 1, -(2**31)):
        outside = torch.rand(ids.shape, device=device) < 0.1
        mapped = replace(i, topk_ids=ids.masked_fill(outside, bad)).run(mxfp8_moe, expert_map=expert_map)
        expected = replace(i, topk_ids=local.masked_fill(outside, -1))
        assert_bitwise_equal(mapped, expected.run(mxfp8_moe, global_experts=12))
        theirs = replace(i, topk_ids=ids.masked_fill(outside, bad)).run(reference.mxfp8_moe, expert_map=expert_map)
        assert_close(mapped, theirs, rtol=2.0**-6, atol=0.05 * float(theirs.float().std()) + 1e-6)


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_the_number_of_global_experts_only_hints(mode: mxfp8_moe.Mode, device: torch.device) -> None:
    """Whatever was hinted, whichever tile shape it makes: the sums differ only by their order."""
    i = LayerCase(90, 2048, 128, 4, 4, mode=mode).make(device)
    expected = i.run(mxfp8_moe)
    for experts in (4, 5, 32, 1024, 1 << 20):
        found = i.run(mxfp8_moe, global_experts=experts)
        if device.type == "cpu":
            assert_bitwise_equal(found, expected)
        assert_close(found, expected, rtol=2.0**-6, atol=0.05 * float(expected.float().std()))


@pytest.mark.parametrize("with_map", [False, True])
def test_a_rank_without_experts(with_map: bool, device: torch.device) -> None:
    i = LayerCase(7, 64, 96, 4, 2).make(device)
    none = replace(i, w13=i.w13[:0], s13=i.s13[:0], w2=i.w2[:0], s2=i.s2[:0])
    options = {"expert_map": torch.full((4,), -1, dtype=torch.int32, device=device)} if with_map else {}
    size = mxfp8_moe.workspace_bytes(7, 2, 0, 64, 96)
    space = guarded((size,), torch.uint8, device, fill=0xFF)
    out = guarded(i.x.shape, torch.bfloat16, device, strides=(72, 1))
    none.run(mxfp8_moe, workspace=space.tensor, out=out.tensor, **options)
    space.check()
    out.check()
    assert_bitwise_equal(out.tensor, torch.zeros_like(i.x))
    assert_bitwise_equal(none.run(mxfp8_moe, global_experts=4 if with_map else None), torch.zeros_like(i.x))
    assert_bitwise_equal(none.run(reference.mxfp8_moe, **options), torch.zeros_like(i.x))


def test_the_rows_of_a_rank_add_up_to_the_whole(device: torch.device) -> None:
    """Expert parallelism over 4 ranks: the sum of the ranks' results is the layer of all experts."""
    i = LayerCase(40, 64, 64, 8, 3).make(device)
    whole = reference.mxfp8_moe.layer(
        i.x, i.w13, i.s13, i.w2, i.s2, i.topk_ids, i.topk_weights, activation="silu", mode="w8a8"
    )
    total = torch.zeros_like(whole)
    for rank in range(4):
        mine = slice(2 * rank, 2 * rank + 2)
        expert_map = torch.full((8,), -1, dtype=torch.int32, device=device)
        expert_map[mine] = torch.arange(2, dtype=torch.int32, device=device)
        share = replace(i, w13=i.w13[mine], s13=i.s13[mine], w2=i.w2[mine], s2=i.s2[mine])
        total += share.run(mxfp8_moe, expert_map=expert_map).double()
    assert_close(total, whole, rtol=2.0**-6, atol=0.05 * float(whole.std()))


# --- dense layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (2, 0), (2, 3), (2, 3, 11)], ids=str)
def test_linear(shape: tuple[int, ...], mode: mxfp8_moe.Mode, device: torch.device) -> None:
    rows = math.prod(shape)
    i = GemmCase((rows,), 96, 160, form="whole").make(device)
    x, weight, scale = i.x.view(*shape, 160), i.weight[0], i.weight_scale[0]
    for out_dtype in (None, torch.float16, torch.float32):
        y = mxfp8_moe.linear(x, weight, scale, mode=mode, out_dtype=out_dtype)
        assert y.shape == (*shape, 96)
        assert y.dtype == (out_dtype or torch.bfloat16)
        a = mxfp8_moe.round(i.x) if mode == "w8a8" else i.x
        expected = mxfp8_moe.grouped_mm(a, i.weight, i.weight_scale, out_dtype=y.dtype)
        assert_bitwise_equal(y, expected.view(y.shape))
        theirs = reference.mxfp8_moe.linear(x, weight, scale, mode=mode, out_dtype=out_dtype)
        assert theirs.shape == y.shape
        assert theirs.dtype == y.dtype
        assert_close(y, theirs, ulps=1, atol=1e-3)
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


def test_shared_expert_and_quantized_activations_against_plain_ones(device: torch.device) -> None:
    """A shared expert is one more expert; w8a8 differs from w8a16 by the quantization of activations."""
    case = LayerCase(32, 256, 128, 5, 3)
    i = case.make(device)
    ids = torch.cat([i.topk_ids % 4, torch.full_like(i.topk_ids[:, :1], 4)], 1)
    weights = torch.cat([i.topk_weights, torch.ones_like(i.topk_weights[:, :1])], 1)
    i = replace(i, topk_ids=ids.contiguous(), topk_weights=weights)
    ids32 = replace(i, topk_ids=ids.int(), w13=i.w13.transpose(1, 2), w2=i.w2.view(torch.uint8).transpose(1, 2))
    assert_bitwise_equal(ids32.run(mxfp8_moe), i.run(mxfp8_moe))
    shared = replace(i, topk_ids=torch.where(ids == 4, 4, -1)).run(mxfp8_moe).double()
    routed = replace(i, topk_ids=torch.where(ids == 4, -1, ids)).run(mxfp8_moe).double()
    assert_close(i.run(mxfp8_moe), shared + routed, atol=0.02 * float(shared.std()), rtol=2.0**-6)

    arguments = (i.x, i.w13, i.s13, i.w2, i.s2, i.topk_ids, i.topk_weights)
    truth = reference.mxfp8_moe.layer(*arguments, activation="silu", mode="w8a16")
    errors = {mode: (i.run(mxfp8_moe, mode=mode).double() - truth).square().mean().sqrt() for mode in ("w8a8", "w8a16")}
    assert 0.01 < float(errors["w8a8"] / truth.std()) < 0.06
    assert float(errors["w8a16"]) < 0.2 * float(errors["w8a8"])


def test_a_layer_at_real_width(device: torch.device) -> None:
    """MiniMax-M3's hidden size, an eighth of its intermediate size, a few experts: the longest sums in practice."""
    case = LayerCase(6, 6144, 384, 3, 2, activation="swiglu_oai")
    i = case.make(device)
    assert_close(i.run(mxfp8_moe), composition(i))
    weight, scale, _ = expert_weights(1, 64, 6144, torch.Generator(device).manual_seed(0))
    gemm = GemmInputs(GemmCase((6,), 64, 6144, form="whole"), i.x, weight, scale, scale, None, None)
    assert_gemm(gemm.run(mxfp8_moe, i.x), i.x, gemm)
