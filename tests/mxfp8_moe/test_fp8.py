"""GEMMs as FP8 tensor cores compute them: one scale per row, of tokens and of weights."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mxfp8_rules import ONE, behind_k
from torch import Tensor

from abiding import mxfp8_moe, reference
from abiding.mxfp8_moe import MXFP8
from abiding.testing.cases.mxfp8_moe import CORNER, ODD, REGULAR, TILES, GemmCase, GemmInputs
from abiding.testing.comparison import assert_bitwise_equal, assert_close, round_once
from abiding.testing.guarded import guarded


def implementation(case: GemmCase, device: torch.device) -> str:
    return mxfp8_moe.implementation(case.rows, len(case.sizes), (case.n, case.k), compute="fp8", device=device)


def multiplies_fp8(case: GemmCase, device: torch.device) -> bool:
    """Whether the call runs where tensor cores add FP8; elsewhere products of the same operands are exact."""
    return implementation(case, device).endswith("fp8")


def run(i: GemmInputs, a: MXFP8 | Tensor, **options: object) -> Tensor:
    return i.run(mxfp8_moe, a, compute="fp8", **options)


def assert_fp8_gemm(found: Tensor, a: MXFP8, i: GemmInputs) -> None:
    """Rows are within the reference +- what their sums may lose, rounded.

    float32 sums lose up to k * 2^-22 of the sum of magnitudes, as in `assert_gemm`. Hopper's FP8 tensor cores align 32
    products and the accumulator to the largest of them and keep 13 bits below its first, so that each of the four
    instructions of 128 of K may lose 33 * 2^-13 of the largest.
    """
    api, live = reference.mxfp8_moe, i.live()
    compute = "fp8" if multiplies_fp8(i.case, found.device) else "exact"
    expected = i.run(api, a, compute=compute, out_dtype=torch.float64)[live]
    plain = replace(i, weight=i.weight.view(torch.uint8) & 0x7F)
    magnitudes = MXFP8((a.data.view(torch.uint8) & 0x7F).view(a.data.dtype), a.scales)
    sums = plain.run(api, magnitudes, compute=compute, out_dtype=torch.float64)[live].nan_to_num(0, math.inf)
    lossy = compute == "fp8" and found.device.type == "cuda"
    loss = sums * (i.case.k * 2.0**-22 + (2.0**-6 if lossy else 0)) + i.case.k * 2.0**-149
    loss = torch.where(expected.isfinite(), loss, 0)
    found = found[live]
    assert_close(found.isnan(), expected.isnan(), name="NaN")
    low, high = (round_once(end, found.dtype) for end in (expected - loss, expected + loss))
    wrong = ~((low <= found) & (found <= high) | expected.isnan())
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {found.numel()} are off, first {wrong.nonzero()[0].tolist()}"


@pytest.mark.parametrize("case", [*REGULAR, *ODD, *TILES, *CORNER], ids=str)
def test_case(case: GemmCase, device: torch.device) -> None:
    i = case.make(device, seed=1).rebased()
    live = i.live()
    a, theirs = i.quantize(mxfp8_moe, rowwise=True), i.quantize(reference.mxfp8_moe, rowwise=True)
    assert_bitwise_equal(a.scales, theirs.scales, "scales")
    assert_bitwise_equal(a.data[live], theirs.data[live], "data")
    out = run(i, a)
    assert out.dtype == case.out_dtype
    assert_fp8_gemm(out, a, i)
    if case.dtype == torch.bfloat16:
        assert_close(run(i, i.x)[live], out[live], name="bfloat16 rows")


@pytest.mark.parametrize("k", [160, 4096, 16384])
def test_error(k: int, device: torch.device) -> None:
    """Against the exact product of the same operands, before the last rounding: 3e-4, root mean square."""
    i = GemmCase((40, 300), 256, k, out_dtype=torch.float32).make(device).rebased()
    x = i.x.clone()
    x[:, ::37] *= 50
    for rows in (i.x, x):
        a = replace(i, x=rows).quantize(mxfp8_moe, rowwise=True)
        exact = i.run(reference.mxfp8_moe, a, out_dtype=torch.float64)
        error = (run(i, a).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert float(error) < 3e-4


def test_sums_that_float32_holds_are_exact(device: torch.device) -> None:
    """Small powers of two, whose sums any accumulator holds; every scale of rows and of weights is another."""
    case = GemmCase((40, 0, 150), 160, 416, out_dtype=torch.float32)
    i = case.make(device)
    codes = torch.randint(125, 130, (len(case.sizes), case.n, 1), device=device).expand(-1, -1, 13)
    signs = i.weight.view(torch.uint8) & 0x80
    i = replace(
        i,
        weight=signs | ONE - 8 * torch.randint(0, 2, signs.shape, dtype=torch.uint8, device=device),
        weight_scale=mxfp8_moe.swizzle_scales(codes.to(torch.uint8)),
        x=torch.exp2(torch.randint(0, 2, i.x.shape, device=device).float()).copysign(i.x).bfloat16(),
    )
    scale = torch.exp2(torch.randint(-2, 3, (len(i.x), 1), device=device).float())
    a = replace(i, x=(i.x * scale).bfloat16()).quantize(mxfp8_moe, rowwise=True)
    exact = i.run(reference.mxfp8_moe, a, out_dtype=torch.float64)
    assert bool((exact.abs() > 64).any())
    assert_close(run(i, a), exact)


@pytest.mark.parametrize("k", [96, 160, 320])
def test_codes_that_differ_are_nan(k: int, device: torch.device) -> None:
    """Rows and weight rows whose codes differ, and nothing else; exact products take them as they are."""
    case = GemmCase((20, 40), 96, k)
    i = case.make(device).rebased()
    a = i.quantize(mxfp8_moe, rowwise=True)
    plain = mxfp8_moe.unswizzle_scales(a.scales, len(a.scales), k)
    spoiled, weight_codes = plain.clone(), i.codes.clone()
    spoiled[3, 1] += 1  # of the first expert's
    spoiled[128 + 7, -2 if k % 128 > 32 else 0] ^= 2  # of the second's
    weight_codes[1, 40, k // 32 // 4 * 4 - (k < 128) - 1] -= 1
    bad_rows = torch.zeros(60, dtype=torch.bool, device=device)
    bad_rows[[3, 27]] = True
    a = MXFP8(a.data, mxfp8_moe.swizzle_scales(spoiled))
    i = replace(i, weight_scale=mxfp8_moe.swizzle_scales(weight_codes))
    for scales, n in ((a.scales, spoiled.size(0)), (i.weight_scale, 96)):
        flat, at = behind_k(scales, n, k)
        flat[..., at] = torch.randint(256, at.shape, dtype=torch.uint8, device=device)
    out = run(i, a)
    expected = bad_rows[:, None].expand(60, 96).clone()
    expected[20:, 40] = True
    expected &= multiplies_fp8(case, device)
    assert_bitwise_equal(out.isnan(), expected)
    assert_fp8_gemm(out, a, i)


def test_scales_outside_of_their_buffer(device: torch.device) -> None:
    i = GemmCase((3, 130, 4), 128, 128).make(device).rebased()
    a = i.quantize(mxfp8_moe, rowwise=True)
    out = run(i, MXFP8(a.data, a.scales[:256]))
    assert out.isnan().any(1).tolist() == [False] * 3 + [True] * 134
    assert out.isnan().all(1).tolist() == [False] * 3 + [True] * 134


@pytest.mark.parametrize("case", [*REGULAR, *ODD[:12], *TILES], ids=str)
def test_memory(case: GemmCase, device: torch.device) -> None:
    """Strided rows, weights and outputs among canaries: only rows of experts are written."""
    i = case.make(device).rebased()
    a, live = i.quantize(mxfp8_moe, rowwise=True), i.live()
    expected = run(i, a)
    steps = 16 // case.out_dtype.itemsize
    out = guarded((case.rows, case.n), case.out_dtype, device, strides=(case.n + 3 * steps, 1), offset_bytes=16)
    data = guarded(a.data.shape, torch.uint8, device, fill=a.data.view(torch.uint8), strides=(case.k + 48, 1))
    data.tensor[~live] = 0x7F
    assert run(i, MXFP8(data.tensor, a.scales), out=out.tensor) is out.tensor
    for guard in (out, data):
        guard.check()
    assert_bitwise_equal(out.tensor[live], expected[live])
    assert bool((out.tensor[~live].contiguous().view(torch.uint8) == 0xFF).all()), "rows of no expert were written"


def test_rows_do_not_depend_on_their_neighbors(device: torch.device) -> None:
    """Where one implementation serves all: a row's bits are its own, and the same call gives the same bits."""
    case = GemmCase((170, 1, 300, 0, 3), 96, 416)
    i = case.make(device).rebased()
    a = i.quantize(mxfp8_moe, rowwise=True)
    together = run(i, a)
    assert_bitwise_equal(run(i, a), together, "the same call again")
    for fill in (0x00, 0x7E, 0x7F):
        others = a.data.view(torch.uint8).clone()
        others[1:] = fill
        others[470] = a.data.view(torch.uint8)[470]
        found = run(i, MXFP8(others, a.scales))
        assert_bitwise_equal(found[[0, 470]], together[[0, 470]], f"among rows of 0x{fill:02x}")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38], ids=str)
def test_special_activations(value: float, device: torch.device) -> None:
    """NaN stays NaN, infinities are no finite numbers; only their own row has them."""
    i = GemmCase((9,), 64, 160, form="whole").make(device).rebased()
    clean = run(i, i.x)
    x = i.x.clone()
    x[4, 50] = value
    out = run(replace(i, x=x), x)
    assert_bitwise_equal(out[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])
    if value == 3e38:
        assert bool(out[4].isfinite().any())
    else:
        assert not out[4].isfinite().any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["portable", "sm90", "sm90_fp8"])
def test_pinned(name: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """ABIDING_GROUPED_MM names the implementation; the products are the same within their bounds."""
    monkeypatch.setenv("ABIDING_GROUPED_MM", name)
    case = GemmCase((300, 40), 256, 416)
    if name != "portable" and torch.cuda.get_device_capability(cuda) != (9, 0):
        with pytest.raises(ValueError, match=f"ABIDING_GROUPED_MM is {name}, which does not support this device"):
            implementation(case, cuda)
        return
    assert implementation(case, cuda) == name
    i = case.make(cuda).rebased()
    a = i.quantize(mxfp8_moe, rowwise=True)
    assert_fp8_gemm(run(i, a), a, i)
    monkeypatch.setenv("ABIDING_GROUPED_MM", "sm7")
    with pytest.raises(ValueError, match=r"grouped_mm: ABIDING_GROUPED_MM is sm7; expected .*\bportable\b"):
        run(i, a)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [GemmCase((5, 0, 70), 128, 256), GemmCase((600, 0, 700), 256, 2080)], ids=str)
def test_cpu_and_cuda_agree(case: GemmCase, cuda: torch.device) -> None:
    """Codes and bytes are equal; sums differ by what the tensor cores' accumulator loses."""
    here = replace(case, out_dtype=torch.float32).make("cpu").rebased()
    moved = {name: getattr(here, name).to(cuda) for name in ("x", "weight", "weight_scale", "codes", "expert_offsets")}
    there: GemmInputs = replace(here, **moved)
    ours, theirs = here.quantize(mxfp8_moe, rowwise=True), there.quantize(mxfp8_moe, rowwise=True)
    for one, other in zip(ours, theirs, strict=True):
        assert_bitwise_equal(other.view(torch.uint8).cpu(), one.view(torch.uint8))
    cpu, gpu = run(here, ours).double(), run(there, theirs).cpu().double()
    assert float((gpu - cpu).square().mean().sqrt()) < 3e-4 * float(cpu.square().mean().sqrt())
