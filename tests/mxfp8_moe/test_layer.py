"""Whole layers, as compositions of the functions of their steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from mxfp8_rules import ONE, assert_gemm
from torch import Tensor

from abiding import mxfp8_moe, reference
from abiding.testing.cases.mxfp8_moe import (
    LAYERS,
    GemmCase,
    GemmInputs,
    LayerCase,
    LayerInputs,
    expert_weights,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import guarded

FP8_LAYERS = [case for case in LAYERS if case.mode == "fp8"]


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

    def product(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        if case.mode == "fp8":
            a = mxfp8_moe.quantize(rows, offsets, rowwise=True)
            return mxfp8_moe.grouped_mm(a, weight, scales, offsets, compute="fp8")
        return mxfp8_moe.grouped_mm(mxfp8_moe.round(rows) if case.mode == "w8a8" else rows, weight, scales, offsets)

    h = product(i.x[order // case.top_k], i.w13, i.s13)
    down = product(activated(h, case.activation).contiguous(), i.w2, i.s2).float()
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
    if case.mode == "fp8" and device.type == "cuda":  # sums in fewer bits move more of them, the largest too
        assert float(off.square().mean().nan_to_num().sqrt()) < 2.0**-6
    else:
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


@pytest.mark.parametrize("case", [LAYERS[0], LAYERS[3], LAYERS[10], *FP8_LAYERS], ids=str)
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


@pytest.mark.parametrize("mode", ["w8a8", "fp8"])
def test_tokens_do_not_depend_on_their_neighbors(mode: mxfp8_moe.Mode, device: torch.device) -> None:
    i = LayerCase(50, 64, 96, 8, 3, mode=mode).make(device)
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


@pytest.mark.parametrize("mode", ["w8a8", "w8a16", "fp8"])
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
