"""Well-formed calls of the MXFP8 operators, and the values of their arguments that must be refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from abiding import mxfp8_moe
from abiding.mxfp8_moe import MXFP8
from abiding.testing.cases.mxfp8_moe import GemmCase, LayerCase
from abiding.testing.guarded import GuardedTensor, guarded
from calls import DEEPER, FLAT, META, Call, Spoil, Spoils, changed, grown, misaligned, other_dtype, scalar, strided

QUANT, RAW_MM = "mxfp8_experts_quant", "cutlass_mxfp8_grouped_mm"
QUANTIZE, ROUND, MM, MOE = "mxfp8_quantize", "mxfp8_round", "mxfp8_grouped_mm", "mxfp8_moe"
REBASE = "mxfp8_rebase"
MM_BF16 = "mxfp8_grouped_mm of bfloat16"
SIZES = "mxfp8_moe_workspace_bytes"
IMPLEMENTATION = "mxfp8_implementation"
MOE_MAPPED = "mxfp8_moe with an expert_map"

GEMM = GemmCase((3, 0, 5), 64, 96)
LAYER = LayerCase(6, 64, 96, 4, 2)
WRITTEN = {"quant_output", "scale_factor", "out", "data", "scales", "workspace", "out_scales", "counts", "errors"}

PUBLIC_NAMES = {"input": "x", "offsets": "expert_offsets", "a_scales": "scales", "weight_scales": "weight_scale"}
PUBLIC_FUNCTIONS: dict[str, Callable[..., Any]] = {
    QUANTIZE: mxfp8_moe.quantize,
    REBASE: mxfp8_moe.rebase,
    ROUND: mxfp8_moe.round,
    MM: mxfp8_moe.grouped_mm,
    MM_BF16: mxfp8_moe.grouped_mm,
    MOE: mxfp8_moe.moe,
    MOE_MAPPED: mxfp8_moe.moe,
}


# --- well-formed calls ------------------------------------------------------------------------------------------------


def public(call: Call) -> Any:
    a = dict(call.args)
    if call.op == QUANTIZE:
        return mxfp8_moe.quantize(a["input"], a["offsets"], rowwise=a["rowwise"])
    if call.op == REBASE:
        return mxfp8_moe.rebase(a["weight"], a["weight_scales"])
    if call.op == ROUND:
        return mxfp8_moe.round(a["input"], out=a["out"])
    if call.op in (MOE, MOE_MAPPED):
        a.update(activation="silu", mode="w8a8")
        del a["w8a8"], a["compute"]
        return mxfp8_moe.moe(**a)
    rows = a["a"] if call.op == MM_BF16 else MXFP8(a["a"], a["a_scales"])
    return mxfp8_moe.grouped_mm(rows, a["weight"], a["weight_scales"], a["offsets"], out=a["out"])


made: Callable[..., Any] = cache(lambda case, device: case.make(device))
"""Inputs of a case, which are copied before any call may write to them."""


def well_formed(op: str, device: torch.device | str = "cpu", rng: random.Random | None = None) -> Call:
    """An accepted call; with `rng` its sizes, strides and dtypes vary."""
    if op == SIZES:
        return Call(op, {"tokens": 6, "top_k": 2, "experts": 4, "hidden": 64, "intermediate": 96}, {})
    if op == IMPLEMENTATION:
        like = torch.empty(0, device=device)
        return Call(op, {"like": like, "rows": 8, "experts": 3, "n": [96, 64], "k": [64, 96], "compute": 1}, {})
    vary = rng is not None
    rng = rng or random.Random(0)

    def pick(plain: Any, *others: Any) -> Any:
        return rng.choice([plain, *others]) if vary else plain

    def keep(x: Tensor, dense: bool = False) -> GuardedTensor:
        size = x.element_size()
        strides = list(x.stride())
        if not dense and x.dim() > 1 and x.is_contiguous():
            strides = [1]
            for length in reversed(x.shape[1:]):
                strides.insert(0, length * strides[0] + pick(0, 0, 16 // size))
        return guarded(
            x.shape, x.dtype, device, fill=x, strides=strides, offset_bytes=pick(0, 16, max(16, size)), margin=512
        )

    def poison(*shape: int, dtype: torch.dtype, dense: bool = False) -> GuardedTensor:
        return keep(torch.full(shape, 0xFF, dtype=torch.uint8, device=device).to(dtype), dense)

    guards: dict[str, GuardedTensor] = {}
    scalars: dict[str, Any] = {}
    if op in (MOE, MOE_MAPPED):
        moe = LAYER
        if vary:
            top_k = pick(1, 2, 4)
            moe = LayerCase(pick(6, 0, 1, 9), pick(64, 32, 96), pick(96, 32), 4, top_k, elsewhere=pick(0.0, 0.5))
        layer = made(moe, device)
        size = mxfp8_moe.workspace_bytes(moe.tokens, moe.top_k, moe.experts, moe.hidden, moe.intermediate)
        guards = {"x": keep(layer.x), "w13": keep(layer.w13), "s13": keep(layer.s13, True), "w2": keep(layer.w2)}
        guards["s2"] = keep(layer.s2, True)
        guards["topk_ids"] = keep(layer.topk_ids.to(pick(torch.int64, torch.int32)), True)
        guards |= {"topk_weights": keep(layer.topk_weights), "workspace": poison(size, dtype=torch.uint8, dense=True)}
        guards["out"] = poison(moe.tokens, moe.hidden, dtype=torch.bfloat16)
        scalars = {"activation": 0, "w8a8": pick(True, False)}
        scalars["compute"] = pick(0, 1) if scalars["w8a8"] else 0
        if op == MOE_MAPPED:
            guards["expert_map"] = keep(torch.tensor([2, -1, 0, 3], dtype=torch.int32, device=device), True)
            scalars["global_experts"] = pick(None, 4)
    else:
        case = GEMM
        if vary:
            rows = tuple(rng.choice([0, 1, 4]) for _ in range(rng.choice([1, 3])))
            case = GemmCase(rows, pick(64, 32, 160), pick(96, 32, 128), dtype=pick(torch.bfloat16, torch.float16))
        i = made(case, device)
        assert i.expert_offsets is not None
        q = i.quantize(mxfp8_moe)
        e4m3 = pick(torch.float8_e4m3fn, torch.uint8)
        if op in (QUANTIZE, ROUND, QUANT):
            guards["input"] = keep(i.x)
        elif op != REBASE:
            guards["a"] = keep(i.x.bfloat16() if op == MM_BF16 else q.data.view(e4m3))
        sizes = torch.tensor(case.sizes)
        starts = (sizes.cumsum(0) - sizes).int().to(device)
        tiles = (sizes + 127) // 128 * 128
        problems = torch.stack([sizes, torch.full_like(sizes, case.n), torch.full_like(sizes, case.k)], 1)
        groups = {"problem_sizes": keep(problems.int().to(device), True), "expert_offsets": keep(starts, True)}
        groups["blockscale_offsets"] = keep((tiles.cumsum(0) - tiles).int().to(device), True)
        if op == QUANTIZE:
            guards["offsets"] = keep(i.expert_offsets, True)
            guards["data"] = poison(*i.x.shape, dtype=e4m3)
            guards["scales"] = poison(*q.scales.shape, dtype=torch.uint8, dense=True)
            scalars = {"ends": False, "rowwise": pick(False, True)}
        elif op == QUANT:
            guards |= groups
            guards["quant_output"] = poison(*i.x.shape, dtype=e4m3)
            guards["scale_factor"] = poison(*q.scales.shape, dtype=torch.uint8, dense=True)
        elif op == REBASE:
            guards |= {"weight": keep(i.weight.view(e4m3)), "weight_scales": keep(i.weight_scale, True)}
            guards["out"] = poison(*i.weight.shape, dtype=e4m3)
            guards["out_scales"] = poison(*i.weight_scale.shape, dtype=torch.uint8, dense=True)
            guards["counts"] = poison(3, dtype=torch.int64, dense=True)
            guards["errors"] = poison(2, dtype=torch.float64, dense=True)
        elif op == ROUND:
            guards["out"] = poison(*i.x.shape, dtype=torch.bfloat16)
        elif op == RAW_MM:
            weight = keep(i.weight.view(e4m3))
            guards |= {"b": weight, "sfa": keep(q.scales, True), "sfb": keep(i.weight_scale, True)}
            guards["out"] = poison(case.rows, case.n, dtype=pick(torch.bfloat16, torch.float16))
            guards |= groups
        else:
            if op == MM:
                guards["a_scales"] = keep(q.scales, True)
            guards |= {"weight": keep(i.weight.view(e4m3)), "weight_scales": keep(i.weight_scale, True)}
            guards["offsets"] = keep(i.expert_offsets, True)
            guards["out"] = poison(case.rows, case.n, dtype=pick(torch.bfloat16, torch.float16, torch.float32))
            scalars = {"ends": False, "compute": pick(0, 1) if op == MM else 0}
    args = {**{name: guard.tensor for name, guard in guards.items()}, **scalars}
    if op == MM_BF16:
        args["a_scales"] = None
    if op == RAW_MM:
        args["b"] = args["b"].transpose(1, 2)
    return Call(op, args, guards)


# --- refused arguments ------------------------------------------------------------------------------------------------


def transposed(spoil: Spoil) -> Spoil:
    """The spoil of the weight by rows, for an argument that is its transposed view."""

    def spoil_view(call: Call, name: str) -> Any:
        return spoil(replace(call, args=call.args | {name: call.args[name].transpose(1, 2)}), name).transpose(-2, -1)

    return spoil_view


def rows(k: int, step: int, *dtypes: torch.dtype) -> dict[str, Spoil]:
    """Values that must be refused for an [M, k] with row strides in multiples of `step` elements."""
    return {
        **{str(one): other_dtype(one) for one in dtypes},
        "rank 1": FLAT,
        "rank 3": DEEPER,
        "16 columns more": grown(1, 16),
        "32 columns less": grown(1, -32),
        "no columns": grown(1, -k),
        "last stride 2": strided(2 * k, 2),
        "odd rows": strided(k + step // 2, 1),
        "meta": META,
    }


def written(k: int, step: int, *dtypes: torch.dtype) -> dict[str, Spoil]:
    return {
        **rows(k, step, *dtypes),
        "fewer rows": grown(0, -1),
        "more rows": grown(0, 1),
        "expanded": strided(0, 1),
        "overlapping": strided(16, 1),
    }


SCALES: dict[str, Spoil] = {
    "int8": other_dtype(torch.int8),
    "bfloat16": other_dtype(torch.bfloat16),
    "gaps": changed(lambda x: torch.cat([x, x], -1)[..., : x.size(-1)]),
    "expanded": changed(lambda x: x.flatten()[:1].expand(x.shape)),
    "meta": META,
}
WEIGHT_SCALES: dict[str, Spoil] = {
    **SCALES,
    "less": grown(-1, -4),
    "more": grown(0, 1),
    "none": changed(lambda x: x[:0]),
}
OFFSETS: dict[str, Spoil] = {
    "int64": other_dtype(torch.int64),
    "float32": other_dtype(torch.float32),
    "rank 2": DEEPER,
    "gaps": strided(2),
    "empty": changed(lambda x: x[:0]),
    "too many": changed(lambda x: x.new_zeros(1026)),
    "meta": META,
}
PROBLEM_OFFSETS: dict[str, Spoil] = {**OFFSETS, "one less": grown(0, -1), "one more": grown(0, 1)}
PROBLEMS: dict[str, Spoil] = {
    "int64": other_dtype(torch.int64),
    "rank 1": FLAT,
    "2 columns": grown(1, -1),
    "transposed": strided(1, 3),
    "empty": changed(lambda x: x[:0]),
    "too many": changed(lambda x: x.new_zeros(1025, 3)),
    "meta": META,
}
WEIGHT: dict[str, Spoil] = {
    "int8": other_dtype(torch.int8),
    "e5m2": other_dtype(torch.float8_e5m2),
    "bfloat16": other_dtype(torch.bfloat16),
    "rank 2": changed(lambda x: x[0]),
    "one expert less": grown(0, -1),
    "one expert more": grown(0, 1),
    "16 rows more": grown(1, 16),
    "32 rows more": grown(1, 32),
    "no rows": changed(lambda x: x[:, :0]),
    "32 columns more": grown(2, 32),
    "16 columns less": grown(2, -16),
    "last stride 2": changed(lambda x: torch.stack([x.view(torch.uint8)] * 2, -1)[..., 0].view(x.dtype)),
    "odd rows": changed(lambda x: torch.nn.functional.pad(x.view(torch.uint8), (0, 8))[..., : x.size(2)].view(x.dtype)),
    "odd experts": strided(GEMM.n * GEMM.k + 8, GEMM.k, 1),
    "meta": META,
}
LAYER_WEIGHT = {name: spoil for name, spoil in WEIGHT.items() if name != "odd experts"}
OTHER_DTYPES = (torch.float32, torch.int16, torch.float64)
MM_GROUPS = {"problem_sizes": PROBLEMS, "expert_offsets": PROBLEM_OFFSETS, "blockscale_offsets": PROBLEM_OFFSETS}
MM_OUT = written(GEMM.n, 8, torch.float64, torch.int16)
MM_REST = {"weight": WEIGHT, "weight_scales": WEIGHT_SCALES, "offsets": {**OFFSETS, "one more": grown(0, 1)}}
E4M3 = (torch.int8, torch.float8_e5m2, torch.bfloat16)


COMPUTE = {"-1": scalar(-1), "2": scalar(2), "huge": scalar(1 << 62)}


def needs_scales(call: Call, name: str) -> None:
    call.args["compute"] = 1


def w8a16_with_fp8(call: Call, name: str) -> bool:
    call.args["compute"] = 1
    return False


REPORT: dict[str, Spoil] = {
    "rank 0": changed(lambda x: x[0]),
    "rank 2": DEEPER,
    "one more": grown(0, 1),
    "one less": grown(0, -1),
    "gaps": strided(2),
    "meta": META,
}

SPOILS: Spoils = {
    QUANTIZE: {
        "input": rows(GEMM.k, 8, *OTHER_DTYPES),
        "offsets": OFFSETS,
        "data": written(GEMM.k, 16, *E4M3),
        "scales": SCALES,
    },
    QUANT: {
        "input": rows(GEMM.k, 8, *OTHER_DTYPES),
        **MM_GROUPS,
        "quant_output": written(GEMM.k, 16, *E4M3),
        "scale_factor": SCALES,
    },
    REBASE: {
        "weight": WEIGHT,
        "weight_scales": WEIGHT_SCALES,
        "out": {**WEIGHT, "expanded": strided(0, GEMM.k, 1), "overlapping": strided(GEMM.n * GEMM.k, 16, 1)},
        "out_scales": WEIGHT_SCALES,
        "counts": {**REPORT, "int32": other_dtype(torch.int32), "float64": changed(lambda x: x.double())},
        "errors": {**REPORT, "float32": other_dtype(torch.float32), "int64": other_dtype(torch.int64)},
    },
    ROUND: {"input": rows(GEMM.k, 8, *OTHER_DTYPES), "out": written(GEMM.k, 8, torch.float16, *OTHER_DTYPES)},
    MM: {"a": rows(GEMM.k, 16, *E4M3), "a_scales": SCALES, **MM_REST, "out": MM_OUT, "compute": COMPUTE},
    MM_BF16: {
        "a": rows(GEMM.k, 8, torch.float16, *OTHER_DTYPES),
        **MM_REST,
        "out": MM_OUT,
        "a_scales": {"none with fp8": needs_scales},
    },
    RAW_MM: {
        "a": rows(GEMM.k, 16, *E4M3),
        "b": {name: transposed(spoil) for name, spoil in WEIGHT.items()},
        "sfa": SCALES,
        "sfb": WEIGHT_SCALES,
        "out": {**MM_OUT, "float32": other_dtype(torch.float32)},
        **MM_GROUPS,
    },
    MOE: {
        "x": rows(LAYER.hidden, 8, torch.float16, *OTHER_DTYPES),
        "w13": LAYER_WEIGHT,
        "s13": WEIGHT_SCALES,
        "w2": LAYER_WEIGHT,
        "s2": WEIGHT_SCALES,
        "topk_ids": {
            "int16": other_dtype(torch.int16),
            "float64": other_dtype(torch.float64),
            "rank 1": FLAT,
            "gaps": strided(4, 2),
            "row more": grown(0, 1),
            "none": changed(lambda x: x[:, :0]),
            "one more": grown(1, 1),
            "17": changed(lambda x: x.new_zeros(len(x), 17)),
            "meta": META,
        },
        "topk_weights": {
            "bfloat16": other_dtype(torch.bfloat16),
            "float64": other_dtype(torch.float64),
            "rank 3": DEEPER,
            "gaps": strided(4, 2),
            "row less": grown(0, -1),
            "one more": grown(1, 1),
            "meta": META,
        },
        "workspace": {
            "int32": changed(lambda x: x.view(torch.int32)),
            "rank 2": DEEPER,
            "gaps": strided(2),
            "a byte less": changed(lambda x: x[:-1]),
            "empty": changed(lambda x: x[:0]),
            "misaligned": misaligned(8),
            "meta": META,
        },
        "out": written(LAYER.hidden, 8, torch.float16, *OTHER_DTYPES),
        "activation": {"-1": scalar(-1), "3": scalar(3), "huge": scalar(1 << 62)},
        "compute": COMPUTE,
        "w8a8": {"false with fp8": w8a16_with_fp8},
    },
    MOE_MAPPED: {
        "expert_map": {
            "int64": other_dtype(torch.int64),
            "float32": other_dtype(torch.float32),
            "rank 2": DEEPER,
            "gaps": strided(2),
            "empty": changed(lambda x: x[:0]),
            "too many": changed(lambda x: x.new_zeros((1 << 20) + 1)),
            "meta": META,
        },
    },
}


def blamed(op: str, name: str) -> set[str]:
    """Arguments that an error may name: sizes that must match, and for devices the first argument."""
    together = {
        "a",
        "input",
        "x",
        "out",
        "data",
        "quant_output",
        "weight",
        "b",
        "w13",
        "w2",
        "offsets",
        "problem_sizes",
    }
    together |= {"weight_scales", "sfb", "s13", "s2", "topk_ids", "expert_offsets", "blockscale_offsets"}
    return together | {name} if name in together else {name}
