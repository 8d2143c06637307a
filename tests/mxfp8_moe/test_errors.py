"""Refused arguments: error types and messages; nothing is written after an error, and never outside of the tensors."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding import mxfp8_moe
from abiding.mxfp8_moe import MXFP8
from abiding.testing.cases.mxfp8_moe import GemmCase, LayerCase
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.guarded import GuardedTensor, guarded

QUANT, RAW_MM = "mxfp8_experts_quant", "cutlass_mxfp8_grouped_mm"
QUANTIZE, ROUND, MM, MOE = "mxfp8_quantize", "mxfp8_round", "mxfp8_grouped_mm", "mxfp8_moe"
MM_BF16 = "mxfp8_grouped_mm of bfloat16"
MOE_MAPPED = "mxfp8_moe with an expert_map"

GEMM = GemmCase((3, 0, 5), 64, 96)
LAYER = LayerCase(6, 64, 96, 4, 2)
WRITTEN = {"quant_output", "scale_factor", "out", "data", "scales", "workspace"}


# --- well-formed calls ------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """One call of a raw operator: its arguments by name, and the guards of their memory."""

    op: str
    args: dict[str, Any]
    guards: dict[str, GuardedTensor]
    before: dict[str, Tensor] = field(default_factory=dict)

    def raw(self) -> None:
        getattr(torch.ops.abiding, self.op.partition(" ")[0]).default(**self.args)

    def public(self) -> Any:
        a = dict(self.args)
        if self.op == QUANTIZE:
            return mxfp8_moe.quantize(a["input"], a["offsets"])
        if self.op == ROUND:
            return mxfp8_moe.round(a["input"], out=a["out"])
        if self.op in (MOE, MOE_MAPPED):
            a.update(activation="silu", mode="w8a8")
            del a["w8a8"]
            return mxfp8_moe.moe(**a)
        rows = a["a"] if self.op == MM_BF16 else MXFP8(a["a"], a["a_scales"])
        return mxfp8_moe.grouped_mm(rows, a["weight"], a["weight_scales"], a["offsets"], out=a["out"])

    def remember(self) -> Call:
        self.before = {name: guard.storage.clone() for name, guard in self.guards.items()}
        return self

    def assert_untouched(self, names: set[str] | None = None) -> None:
        for name in self.guards if names is None else names:
            assert_bitwise_equal(self.guards[name].storage, self.before[name], name)

    def check(self) -> None:
        for guard in self.guards.values():
            guard.check()


def well_formed(op: str, device: torch.device | str = "cpu", rng: random.Random | None = None) -> Call:
    """An accepted call; with `rng` its sizes, strides and dtypes vary."""
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
    seed = rng.randrange(1 << 30)
    if op in (MOE, MOE_MAPPED):
        moe = LAYER
        if vary:
            top_k = pick(1, 2, 4)
            moe = LayerCase(pick(6, 0, 1, 9), pick(64, 32, 96), pick(96, 32), 4, top_k, elsewhere=pick(0.0, 0.5))
        layer = moe.make(device, seed)
        size = mxfp8_moe.workspace_bytes(moe.tokens, moe.top_k, moe.experts, moe.hidden, moe.intermediate)
        guards = {"x": keep(layer.x), "w13": keep(layer.w13), "s13": keep(layer.s13, True), "w2": keep(layer.w2)}
        guards["s2"] = keep(layer.s2, True)
        guards["topk_ids"] = keep(layer.topk_ids.to(pick(torch.int64, torch.int32)), True)
        guards |= {"topk_weights": keep(layer.topk_weights), "workspace": poison(size, dtype=torch.uint8, dense=True)}
        guards["out"] = poison(moe.tokens, moe.hidden, dtype=torch.bfloat16)
        scalars = {"activation": 0, "w8a8": pick(True, False)}
        if op == MOE_MAPPED:
            guards["expert_map"] = keep(torch.tensor([2, -1, 0, 3], dtype=torch.int32, device=device), True)
            scalars["global_experts"] = pick(None, 4)
    else:
        case = GEMM
        if vary:
            rows = tuple(rng.choice([0, 1, 4]) for _ in range(rng.choice([1, 3])))
            case = GemmCase(rows, pick(64, 32, 160), pick(96, 32, 128), dtype=pick(torch.bfloat16, torch.float16))
        i = case.make(device, seed)
        assert i.expert_offsets is not None
        q = i.quantize(mxfp8_moe)
        e4m3 = pick(torch.float8_e4m3fn, torch.uint8)
        if op in (QUANTIZE, ROUND, QUANT):
            guards["input"] = keep(i.x)
        else:
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
            scalars = {"ends": False}
        elif op == QUANT:
            guards |= groups
            guards["quant_output"] = poison(*i.x.shape, dtype=e4m3)
            guards["scale_factor"] = poison(*q.scales.shape, dtype=torch.uint8, dense=True)
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
            scalars = {"ends": False}
    args = {**{name: guard.tensor for name, guard in guards.items()}, **scalars}
    if op == MM_BF16:
        args["a_scales"] = None
    if op == RAW_MM:
        args["b"] = args["b"].transpose(1, 2)
    return Call(op, args, guards)


# --- refused arguments ------------------------------------------------------------------------------------------------

Spoil = Callable[[Any], Any]
"""Takes the value of an argument, and returns a value that must be refused."""


def dtype(other: torch.dtype) -> Spoil:
    return lambda x: x.view(other) if other.itemsize == x.element_size() else x.float().to(other)


def resized(dim: int, by: int) -> Spoil:
    def spoil(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] += by
        return x.new_zeros(shape)

    return spoil


def strided(*strides: int) -> Spoil:
    def spoil(x: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
        return x.new_zeros(span).as_strided(x.shape, strides)

    return spoil


def misaligned(by: int) -> Spoil:
    return lambda x: guarded(x.shape, x.dtype, x.device, strides=x.stride(), offset_bytes=by).tensor


def transposed(spoil: Spoil) -> Spoil:
    return lambda x: spoil(x.transpose(1, 2)).transpose(-2, -1)


def rows(k: int, step: int, *dtypes: torch.dtype) -> dict[str, Spoil]:
    """Values that must be refused for an [M, k] with row strides in multiples of `step` elements."""
    return {
        **{str(one): dtype(one) for one in dtypes},
        "rank 1": lambda x: x.flatten(),
        "rank 3": lambda x: x[None],
        "16 columns more": resized(1, 16),
        "32 columns less": resized(1, -32),
        "no columns": resized(1, -k),
        "last stride 2": strided(2 * k, 2),
        "odd rows": strided(k + step // 2, 1),
        "misaligned": misaligned(8),
        "meta": lambda x: x.to("meta"),
    }


def written(k: int, step: int, *dtypes: torch.dtype) -> dict[str, Spoil]:
    return {
        **rows(k, step, *dtypes),
        "fewer rows": resized(0, -1),
        "more rows": resized(0, 1),
        "expanded": strided(0, 1),
        "overlapping": strided(16, 1),
    }


SCALES: dict[str, Spoil] = {
    "int8": dtype(torch.int8),
    "bfloat16": dtype(torch.bfloat16),
    "gaps": lambda x: torch.cat([x, x], -1)[..., : x.size(-1)],
    "expanded": lambda x: x.flatten()[:1].expand(x.shape),
    "misaligned": misaligned(8),
    "meta": lambda x: x.to("meta"),
}
WEIGHT_SCALES: dict[str, Spoil] = {**SCALES, "less": resized(-1, -4), "more": resized(0, 1), "none": lambda x: x[:0]}
OFFSETS: dict[str, Spoil] = {
    "int64": dtype(torch.int64),
    "float32": dtype(torch.float32),
    "rank 2": lambda x: x[None],
    "gaps": strided(2),
    "empty": lambda x: x[:0],
    "too many": lambda x: x.new_zeros(1026),
    "meta": lambda x: x.to("meta"),
}
PROBLEM_OFFSETS: dict[str, Spoil] = {**OFFSETS, "one less": resized(0, -1), "one more": resized(0, 1)}
PROBLEMS: dict[str, Spoil] = {
    "int64": dtype(torch.int64),
    "rank 1": lambda x: x.flatten(),
    "2 columns": resized(1, -1),
    "transposed": strided(1, 3),
    "empty": lambda x: x[:0],
    "too many": lambda x: x.new_zeros(1025, 3),
    "meta": lambda x: x.to("meta"),
}
WEIGHT: dict[str, Spoil] = {
    "int8": dtype(torch.int8),
    "e5m2": dtype(torch.float8_e5m2),
    "bfloat16": dtype(torch.bfloat16),
    "rank 2": lambda x: x[0],
    "one expert less": resized(0, -1),
    "one expert more": resized(0, 1),
    "16 rows more": resized(1, 16),
    "32 rows more": resized(1, 32),
    "no rows": lambda x: x[:, :0],
    "32 columns more": resized(2, 32),
    "16 columns less": resized(2, -16),
    "last stride 2": lambda x: torch.stack([x.view(torch.uint8)] * 2, -1)[..., 0].view(x.dtype),
    "odd rows": lambda x: torch.nn.functional.pad(x.view(torch.uint8), (0, 8))[..., : x.size(2)].view(x.dtype),
    "odd experts": strided(GEMM.n * GEMM.k + 8, GEMM.k, 1),
    "misaligned": misaligned(8),
    "meta": lambda x: x.to("meta"),
}
LAYER_WEIGHT = {name: spoil for name, spoil in WEIGHT.items() if name != "odd experts"}
OTHER_DTYPES = (torch.float32, torch.int16, torch.float64)
MM_GROUPS = {"problem_sizes": PROBLEMS, "expert_offsets": PROBLEM_OFFSETS, "blockscale_offsets": PROBLEM_OFFSETS}
MM_OUT = written(GEMM.n, 8, torch.float64, torch.int16)
MM_REST = {"weight": WEIGHT, "weight_scales": WEIGHT_SCALES, "offsets": {**OFFSETS, "one more": resized(0, 1)}}
E4M3 = (torch.int8, torch.float8_e5m2, torch.bfloat16)


def overlapping(call: Call) -> Tensor:
    """An output in the memory of the input."""
    source: Tensor = call.args["input" if call.op in (ROUND, QUANT) else "x" if call.op == MOE else "a"]
    shape, kind = call.args["out"].shape, call.args["out"].dtype
    return source.flatten().view(torch.uint8).repeat(4)[: shape[0] * shape[1] * kind.itemsize].view(kind).view(shape)


SPOILS: dict[str, dict[str, dict[str, Spoil]]] = {
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
    ROUND: {"input": rows(GEMM.k, 8, *OTHER_DTYPES), "out": written(GEMM.k, 8, torch.float16, *OTHER_DTYPES)},
    MM: {"a": rows(GEMM.k, 16, *E4M3), "a_scales": SCALES, **MM_REST, "out": MM_OUT},
    MM_BF16: {"a": rows(GEMM.k, 8, torch.float16, *OTHER_DTYPES), **MM_REST, "out": MM_OUT},
    RAW_MM: {
        "a": rows(GEMM.k, 16, *E4M3),
        "b": {name: transposed(spoil) for name, spoil in WEIGHT.items()},
        "sfa": SCALES,
        "sfb": WEIGHT_SCALES,
        "out": {**MM_OUT, "float32": dtype(torch.float32)},
        **MM_GROUPS,
    },
    MOE: {
        "x": rows(LAYER.hidden, 8, torch.float16, *OTHER_DTYPES),
        "w13": LAYER_WEIGHT,
        "s13": WEIGHT_SCALES,
        "w2": LAYER_WEIGHT,
        "s2": WEIGHT_SCALES,
        "topk_ids": {
            "int16": dtype(torch.int16),
            "float64": dtype(torch.float64),
            "rank 1": lambda x: x.flatten(),
            "gaps": strided(4, 2),
            "row more": resized(0, 1),
            "none": lambda x: x[:, :0],
            "one more": resized(1, 1),
            "17": lambda x: x.new_zeros(len(x), 17),
            "meta": lambda x: x.to("meta"),
        },
        "topk_weights": {
            "bfloat16": dtype(torch.bfloat16),
            "float64": dtype(torch.float64),
            "rank 3": lambda x: x[None],
            "gaps": strided(4, 2),
            "row less": resized(0, -1),
            "one more": resized(1, 1),
            "meta": lambda x: x.to("meta"),
        },
        "workspace": {
            "int32": lambda x: x.view(torch.int32),
            "rank 2": lambda x: x[None],
            "gaps": strided(2),
            "a byte less": lambda x: x[:-1],
            "empty": lambda x: x[:0],
            "misaligned": misaligned(8),
            "meta": lambda x: x.to("meta"),
        },
        "out": written(LAYER.hidden, 8, torch.float16, *OTHER_DTYPES),
        "activation": {"-1": lambda _: -1, "3": lambda _: 3, "huge": lambda _: 1 << 62},
    },
    MOE_MAPPED: {
        "expert_map": {
            "int64": dtype(torch.int64),
            "float32": dtype(torch.float32),
            "rank 2": lambda x: x[None],
            "gaps": strided(2),
            "empty": lambda x: x[:0],
            "too many": lambda x: x.new_zeros((1 << 20) + 1),
            "meta": lambda x: x.to("meta"),
        },
    },
}


def every_spoil(raw: bool) -> Iterator[Any]:
    for op, arguments in SPOILS.items():
        for name, spoils in arguments.items():
            if not raw and (op in (QUANT, RAW_MM) or name in ("data", "scales", "activation")):
                continue
            for what, spoil in spoils.items():
                if not raw and (op, name, what) == (QUANTIZE, "input", "32 columns less"):
                    continue  # accepted, with a smaller result
                yield pytest.param(op, name, spoil, id=f"{op}-{name}-{what}")


@pytest.mark.parametrize("op", SPOILS)
def test_the_call_that_gets_spoiled_is_accepted(op: str, device: torch.device) -> None:
    call = well_formed(op, device).remember()
    call.raw()
    call.check()
    call.assert_untouched(set(call.guards) - WRITTEN)
    for name in WRITTEN & set(call.guards):
        assert not torch.equal(call.guards[name].storage, call.before[name]), name
    if op not in (QUANT, RAW_MM):
        call.public()


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


@pytest.mark.parametrize(("op", "name", "spoil"), list(every_spoil(raw=True)))
def test_operator_refuses(op: str, name: str, spoil: Spoil, device: torch.device) -> None:
    call = well_formed(op, device).remember()
    call.args[name] = spoil(call.args[name])
    with pytest.raises(RuntimeError) as caught:
        call.raw()
    first = next((line for line in str(caught.value).splitlines() if line.startswith("abiding::")), "")
    assert re.match(rf"abiding::{op.partition(' ')[0]}: .+; expected .+", first), caught.value
    named = set(re.findall(r"\w+", first))
    assert blamed(op, name) & named, first
    if "has dtype" in first or "misaligned" in first:
        assert name in named, first
    call.assert_untouched()


PUBLIC_NAMES = {"input": "x", "offsets": "expert_offsets", "a_scales": "scales", "weight_scales": "weight_scale"}


@pytest.mark.parametrize(("op", "name", "spoil"), list(every_spoil(raw=False)))
def test_public_function_refuses(op: str, name: str, spoil: Spoil) -> None:
    call = well_formed(op).remember()
    before = call.args[name]
    call.args[name] = spoil(before)
    with pytest.raises(TypeError if before.dtype != call.args[name].dtype else ValueError) as caught:
        call.public()
    text = str(caught.value)
    assert "expected" in text
    assert len(text.splitlines()) == 1, text
    named = set(re.findall(r"\w+", text))
    assert {PUBLIC_NAMES.get(one, one) for one in blamed(op, name)} & named, text
    call.assert_untouched()


@pytest.mark.parametrize("op", [ROUND, MM_BF16, MOE])
def test_an_output_in_the_input_is_refused(op: str, device: torch.device) -> None:
    call = well_formed(op, device).remember()
    name = {ROUND: "input", MOE: "x"}.get(op, "a")
    memory = torch.zeros(4096, dtype=torch.bfloat16, device=device)
    for shift in (0, 8, 64):
        for key, at in ((name, 0), ("out", shift)):
            call.args[key] = memory[at:].as_strided(call.args[key].shape, (call.args[key].size(1), 1), at)
        with pytest.raises(RuntimeError, match=f"out overlaps {name}; expected memory of its own"):
            call.raw()
    both = torch.zeros(8, 256, dtype=torch.bfloat16, device=device)  # columns of one buffer, side by side
    for key, at in ((name, 128), ("out", 0)):
        rows, columns = call.args[key].shape
        call.args[key] = both[:rows, at : at + columns]
    call.raw()


def test_public_function_refuses_contradictions() -> None:
    i = GEMM.make()
    assert i.expert_offsets is not None
    with pytest.raises(ValueError, match="both given"):
        mxfp8_moe.quantize(i.x, i.expert_offsets, offs=i.expert_offsets)
    with pytest.raises(ValueError, match=r"weight has shape \[3, 64, 96\]; expected size 1 in dimension 0"):
        mxfp8_moe.grouped_mm(i.x, i.weight, i.weight_scale)
    with pytest.raises(ValueError, match="offs has shape"):
        mxfp8_moe.grouped_mm(i.x, i.weight, i.weight_scale, offs=torch.zeros(0, dtype=torch.int32))
    with pytest.raises(TypeError, match="out_dtype"):
        mxfp8_moe.grouped_mm(i.x, i.weight, i.weight_scale, i.expert_offsets, out_dtype=torch.float64)
    with pytest.raises(TypeError, match="expert_offsets"):
        mxfp8_moe.grouped_mm(i.x, i.weight, i.weight_scale, i.expert_offsets.long())
    layer = LAYER.make()
    for option in ({"activation": "gelu"}, {"mode": "w4a4"}):
        with pytest.raises(ValueError, match=r"gelu.*expected one of silu|w4a4.*expected w8a8"):
            layer.run(mxfp8_moe, **option)
    for wrong in (None, 3, [1.0]):
        for name in ("a", "weight", "weight_scale"):
            arguments: dict[str, Any] = {"a": i.x, "weight": i.weight, "weight_scale": i.weight_scale, name: wrong}
            with pytest.raises(TypeError, match=rf"\b{name} is (a|undefined)"):
                mxfp8_moe.grouped_mm(**arguments, expert_offsets=i.expert_offsets)
    with pytest.raises(TypeError, match="uint8 or float8_e8m0fnu"):
        mxfp8_moe.swizzle_scales(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        mxfp8_moe.swizzle_scales(torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected \[..., 128, 4\] for 100 rows of 128"):
        mxfp8_moe.unswizzle_scales(torch.zeros(256, 4, dtype=torch.uint8), 100, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_experts": 3}, r"global_experts is 3; expected 4, the experts of w13, to 1048576"),
        ({"global_experts": -1}, r"global_experts is -1; expected 4"),
        ({"global_experts": 1 << 62}, r"global_experts is 4611686018427387904; expected 4"),
        (
            {"global_experts": 9, "expert_map": torch.zeros(8, dtype=torch.int32)},
            r"global_experts is 9; expected 8, the length of expert_map, or None",
        ),
        ({"expert_map": torch.zeros(8)}, r"expert_map has dtype float32; expected dtype int32"),
        ({"swiglu_limit": 0.0}, r"swiglu_limit is 0; expected a positive number"),
        ({"swiglu_limit": -7.0, "activation": "swiglu_oai"}, r"swiglu_limit is -7; expected a positive number"),
        ({"swiglu_limit": math.nan}, r"swiglu_limit is -?nan; expected a positive number"),
        ({"swiglu_limit": 7.0, "activation": "none"}, r"swiglu_limit is 7; expected None where the activation is none"),
        (
            {"swiglu_alpha": 1.0},
            r"swiglu_alpha is 1; expected the default 1.702 where the activation is not swiglu_oai",
        ),
        ({"swiglu_beta": 0.0}, r"swiglu_beta is 0; expected the default 1 where the activation is not swiglu_oai"),
        ({"swiglu_alpha": 0.0, "activation": "swiglu_oai"}, r"swiglu_alpha is 0; expected a positive, finite number"),
        ({"swiglu_alpha": 1e39, "activation": "swiglu_oai"}, r"swiglu_alpha is 1e\+39; expected a positive, finite"),
        ({"swiglu_beta": math.inf, "activation": "swiglu_oai"}, r"swiglu_beta is inf; expected a finite number"),
    ],
    ids=str,
)
def test_options_of_a_layer_are_checked(options: dict[str, Any], message: str) -> None:
    i = replace(LAYER, activation=options.get("activation", "silu")).make()
    with pytest.raises((TypeError, ValueError), match=f"^moe: {message}"):
        i.run(mxfp8_moe, **options)


def test_rows_must_stay_aligned() -> None:
    x = torch.zeros(4, 97, dtype=torch.bfloat16)[:, :96]
    message = r"x has strides \[97, 1\]; expected multiples of 8 elements, so that rows stay aligned"
    with pytest.raises(ValueError, match=f"^round: {message}$"):
        mxfp8_moe.round(x)


def test_linear_refuses() -> None:
    i = GemmCase((6,), 64, 96, form="whole").make()
    x, weight, scale = i.x, i.weight[0], i.weight_scale
    out = torch.zeros(2, 3, 64, dtype=torch.bfloat16)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": x[:, :64]}, r"x has shape \[6, 64\]; expected \[..., K\] with K = 96"),
        ({"x": x[0, 0]}, r"x has shape \[\]; expected \[..., K\]"),
        ({"x": x.half(), "mode": "w8a8"}, r"x has dtype torch.float16; expected bfloat16"),
        ({"x": [1.0]}, r"x is a list; expected a Tensor"),
        ({"weight": i.weight}, r"weight has shape \[1, 64, 96\]; expected \[N, K\]"),
        ({"weight": weight[:40]}, r"weight has shape \[1, 40, 96\]; expected .* multiples of 32"),
        ({"x": x[:, :48], "weight": weight[:, :48]}, r"x has shape \[6, 48\]; expected rows of a multiple of 32"),
        ({"weight": weight.float()}, r"weight has dtype float32; expected dtype float8_e4m3fn or uint8"),
        ({"scale": scale[:, :64]}, r"scale has shape \[1, 64, 4\]; expected 1 x 128 x 4 bytes"),
        ({"scale": scale.int()}, r"scale has dtype int32; expected dtype uint8"),
        ({"mode": "w4a4"}, r"mode is 'w4a4'; expected w8a8 or w8a16"),
        ({"out_dtype": torch.float64}, r"out_dtype is torch.float64; expected bfloat16, float16 or float32"),
        ({"out": out}, r"out has shape \[2, 3, 64\]; expected \[6, 64\]"),
        ({"x": x.view(2, 3, 96), "out": out.transpose(0, 1).contiguous().transpose(0, 1)}, r"out has strides"),
        ({"out": torch.zeros(6, 64, dtype=torch.float64)}, r"out has dtype float64; expected dtype"),
        ({"bias": torch.zeros(64)}, r".*bias"),
    ]
    for change, message in wrong:
        with pytest.raises((TypeError, ValueError), match=rf"linear(: |\(\)){message}"):
            mxfp8_moe.linear(**({"x": x, "weight": weight, "scale": scale} | change))


@pytest.mark.parametrize("argument", range(5))
def test_sizes_of_a_workspace_are_checked(argument: int) -> None:
    good = [8, 2, 4, 64, 96]
    assert mxfp8_moe.workspace_bytes(8, 2, 0, 64, 96) <= mxfp8_moe.workspace_bytes(*good)
    assert mxfp8_moe.workspace_bytes(*good) % 256 == 0
    bad = {0: [-1, 1 << 31, (1 << 63) - 1], 1: [0, 17, -1], 2: [1025, -1]}.get(argument, [0, 48, -32, 1 << 25])
    name = ("tokens", "top_k", "experts", "hidden", "intermediate")[argument]
    for value in bad:
        sizes = [value if index == argument else size for index, size in enumerate(good)]
        with pytest.raises(ValueError, match=rf"workspace_bytes: {name} is {value}.*; expected"):
            mxfp8_moe.workspace_bytes(*sizes)


# --- index values out of range ----------------------------------------------------------------------------------------


def test_checked_indices_raise(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [
        *((op, "offsets", 1, value, 9) for op in (QUANTIZE, MM, MM_BF16) for value in (-1, 9, 2**31 - 1)),
        *((op, "expert_offsets", 2, value, 9) for op in (QUANT, RAW_MM) for value in (-5, 9)),
        *((op, "blockscale_offsets", 0, value, 385) for op in (QUANT, RAW_MM) for value in (-128, 385)),
        *((op, "topk_ids", 3, value, 4) for op in (MOE, MOE_MAPPED) for value in (4, 2**40)),
        *((MOE_MAPPED, "expert_map", 2, value, 4) for value in (4, 2**31 - 1)),
    ]
    for op, name, at, value, bound in bad:
        call = well_formed(op, device)
        call.args[name].view(-1)[at] = value
        call.remember()
        monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
        with pytest.raises(RuntimeError, match=rf"{name}\[{at}\] is {value}; expected .*less than {bound}"):
            call.raw()
        call.assert_untouched()
        monkeypatch.setenv("ABIDING_CHECK_INDICES", "0")
        call.raw()
        call.check()


@pytest.mark.parametrize("op", SPOILS)
def test_checked_indices_accept_valid_values(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
    call = well_formed(op, device)
    if op == MOE:
        call.args["topk_ids"].view(-1)[:2] = torch.tensor([-1, -(1 << 63)])
    call.raw()
    call.check()


# --- fuzz -------------------------------------------------------------------------------------------------------------


def random_view(x: Tensor, rng: random.Random) -> Tensor:
    kinds = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    changes: list[Callable[[], Tensor]] = [
        lambda: x[:0],
        lambda: x[1:],
        lambda: x[::2],
        lambda: x[..., :-1],
        lambda: x[..., ::2],
        lambda: x[..., 32:],
        lambda: x.unsqueeze(0),
        lambda: x.flatten(),
        lambda: x.transpose(0, -1),
        lambda: x[:1].expand_as(x),
        lambda: x.new_zeros(()),
        lambda: x.new_zeros((*x.shape, 0)),
        lambda: torch.cat([x, x]),
        lambda: torch.cat([x, x], -1),
        lambda: x.view(rng.choice(kinds)),
        lambda: x.to("meta"),
    ]
    try:
        return rng.choice(changes)()
    except (RuntimeError, IndexError):
        return x


INDICES = {"offsets", "expert_offsets", "problem_sizes", "blockscale_offsets", "topk_ids", "expert_map"}


@pytest.mark.parametrize("op", SPOILS)
def test_fuzz(op: str) -> None:
    """Many calls, half of them spoiled: no crash, every error is ours, no byte outside of a tensor changes."""
    rng = random.Random(op)
    refused = 0
    for step in range(600):
        call = well_formed(op, rng=rng)
        spoiled = step % 2 == 1
        if spoiled:
            tensors = [name for name, value in call.args.items() if isinstance(value, Tensor)]
            for name in rng.sample(tensors, rng.choice([1, 1, 2])):
                call.args[name] = random_view(call.args[name], rng)
        elif rng.random() < 0.3:  # random bits in the indices
            for name in INDICES & set(call.args):
                index = call.args[name].view(-1)
                if len(index):
                    index[rng.randrange(len(index))] = rng.choice([-1, -(1 << 31), (1 << 31) - 1, 1, 5, 128, 1 << 30])
        call.remember()
        try:
            call.raw()
        except (RuntimeError, NotImplementedError) as error:
            refused += 1
            text = str(error)
            if not spoiled or not re.search(r"abiding::\w+: .+; expected .+|Could not run 'abiding::", text):
                pytest.fail(f"step {step}: {text}")
            call.assert_untouched()
            continue
        call.check()
        call.assert_untouched(set(call.guards) - WRITTEN)
    assert 120 < refused < 300
