"""Grouped GEMMs: within the error bound of float32 sums, and what their results do not depend on."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from mxfp8_rules import DTYPES_16_BIT, ONE, assert_gemm, behind_k
from torch import Tensor

from abiding import mxfp8_moe, reference
from abiding.mxfp8_moe import MXFP8
from abiding.testing.cases.mxfp8_moe import (
    CORNER,
    ODD,
    REGULAR,
    TILES,
    GemmCase,
    GemmInputs,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close, round_once
from abiding.testing.guarded import guarded

GEMMS = [*REGULAR, *ODD, *TILES, *CORNER]


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
    monkeypatch.setenv("ABIDING_GROUPED_MM", "portable")
    i = case.make(cuda, seed=2)
    rounded, live = mxfp8_moe.round(i.x), i.live()
    out = i.run(mxfp8_moe, rounded)
    assert_gemm(out, rounded, i)
    assert_close(i.run(mxfp8_moe, i.quantize(mxfp8_moe))[live], out[live])


@pytest.mark.parametrize("case", [*REGULAR, *ODD, *TILES], ids=str)
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


@pytest.mark.parametrize("k", [32, 160, 448])
@pytest.mark.parametrize("rows", [(1, 2), (9, 6), (25, 14), (60, 30), (120, 110), (300, 9)], ids=str)
def test_codes_behind_k_do_not_count(rows: tuple[int, ...], k: int, device: torch.device) -> None:
    i = GemmCase(rows, 160, k).make(device)
    x, quantized = i.x.bfloat16(), i.quantize(mxfp8_moe)
    given: tuple[Tensor | MXFP8, ...] = (x, quantized)
    expected = [i.run(mxfp8_moe, a) for a in given]
    for scales, n in ((i.weight_scale, 160), (quantized.scales, len(quantized.scales))):
        flat, at = behind_k(scales, n, k)
        flat[..., at] = 255
    for a, out in zip(given, expected, strict=True):
        assert_bitwise_equal(i.run(mxfp8_moe, a), out)


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
