"""Refused arguments: error types and messages; nothing is written after an error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from calls import Spoil, assert_function_refuses, assert_operator_refuses, every, refusal
from calls.mxfp8_moe import (
    GEMM,
    LAYER,
    MM,
    MM_BF16,
    MOE,
    MOE_MAPPED,
    PUBLIC_FUNCTIONS,
    PUBLIC_NAMES,
    QUANT,
    QUANTIZE,
    RAW_MM,
    REBASE,
    ROUND,
    SPOILS,
    WRITTEN,
    blamed,
    public,
    well_formed,
)

from abiding import mxfp8_moe
from abiding.testing.cases.mxfp8_moe import GemmCase


@pytest.mark.parametrize("op", SPOILS)
def test_the_call_that_gets_spoiled_is_accepted(op: str, device: torch.device) -> None:
    call = well_formed(op, device).remember()
    call.raw()
    call.check()
    call.assert_untouched(set(call.guards) - WRITTEN)
    for name in WRITTEN & set(call.guards):
        assert not torch.equal(call.guards[name].storage, call.before[name]), name
    if op not in (QUANT, RAW_MM):
        public(call)


@pytest.mark.parametrize(("op", "name", "spoil"), list(every(SPOILS)))
def test_operator_refuses(op: str, name: str, spoil: Spoil, device: torch.device) -> None:
    assert_operator_refuses(well_formed(op, device), name, spoil, blamed(op, name))


def spoils_of_public_functions() -> Iterator[Any]:
    for parameters in every(SPOILS):
        op, name, _ = parameters.values
        # Other sizes are accepted, with a result of such a size.
        accepted = {
            f"{QUANTIZE}-input-32 columns less",
            *(f"{REBASE}-weight-32 {of} more" for of in ("rows", "columns")),
        }
        written = WRITTEN - {"workspace"} if op == REBASE else {"data", "scales"}
        numbers = {"activation", "compute", "w8a8", "a_scales"} if op != MM else {"compute"}
        if op in PUBLIC_FUNCTIONS and name not in written | numbers and parameters.id not in accepted:
            yield parameters


@pytest.mark.parametrize(("op", "name", "spoil"), list(spoils_of_public_functions()))
def test_public_function_refuses(op: str, name: str, spoil: Spoil) -> None:
    names = {PUBLIC_NAMES.get(one, one) for one in blamed(op, name)} | ({"scales"} if op == REBASE else set())
    assert_function_refuses(well_formed(op), name, spoil, PUBLIC_FUNCTIONS[op], public, names)


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


def test_a_rebase_is_in_place_or_apart(device: torch.device) -> None:
    call = well_formed(REBASE, device).remember()
    memory = torch.zeros(1 << 16, dtype=torch.uint8, device=device)
    for name, given, shift in (("out", "weight", 16), ("out", "weight", 64), ("out_scales", "weight_scales", 512)):
        spoiled = dict(call.args)
        for key, at in ((given, 0), (name, shift)):
            x = call.args[key]
            spoiled[key] = memory[at : at + x.numel()].view(x.shape)
        with pytest.raises(RuntimeError, match=f"{name} overlaps {given}; expected that tensor itself, or memory of"):
            torch.ops.abiding.mxfp8_rebase(**spoiled)
        spoiled[name] = spoiled[given]
        torch.ops.abiding.mxfp8_rebase(**spoiled)


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
    with pytest.raises(ValueError, match="grouped_mm: compute is 'fp4'; expected exact or fp8"):
        mxfp8_moe.grouped_mm(i.x, i.weight, i.weight_scale, i.expert_offsets, compute="fp4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"grouped_mm: a has dtype torch.float16; expected bfloat16, or MXFP8"):
        mxfp8_moe.grouped_mm(i.x.half(), i.weight, i.weight_scale, i.expert_offsets, compute="fp8")
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 2, (64, 96)), "rows is -1; expected fewer than 2"),
        ((1 << 31, 2, (64, 96)), "rows is 2147483648; expected fewer than 2"),
        ((4, 0, (64, 96)), "experts is 0; expected 1 to 1024"),
        ((4, 1025, (64, 96)), "experts is 1025; expected 1 to 1024"),
        ((4, 2), "n and k have 0 and 0 numbers; expected one of each per GEMM"),
        ((4, 2, (64, 96), (48, 96)), "n is 48; expected a multiple of 32"),
        ((4, 2, (64, 0)), "k is 0; expected a multiple of 32"),
    ],
    ids=str,
)
def test_sizes_of_an_implementation_are_checked(arguments: tuple[Any, ...], message: str) -> None:
    assert mxfp8_moe.implementation(4, 2, (64, 96), device="cpu") == "cpu"
    assert mxfp8_moe.implementation(4, 2, (64, 96), (96, 32), compute="fp8", device="cpu") == "cpu_fp8"
    with pytest.raises(ValueError, match=f"^implementation: {message}"):
        mxfp8_moe.implementation(*arguments, device="cpu")
    with pytest.raises(ValueError, match=r"^implementation: compute is 'fp4'; expected exact or fp8"):
        mxfp8_moe.implementation(4, 2, (64, 96), compute="fp4", device="cpu")  # type: ignore[arg-type]


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


@pytest.mark.parametrize("name", ["x", "s2", "topk_ids", "topk_weights", "expert_map", "out"])
def test_a_workspace_has_memory_of_its_own(name: str) -> None:
    """It is written while the others are in use: an output over the routes that it holds led rows to any address."""
    call = well_formed(MOE_MAPPED)
    tensor, workspace = call.args[name], call.args["workspace"]
    inside = workspace[512:][: tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
    call.args[name] = inside.copy_(tensor)
    refusal(call.raw, RuntimeError, rf"mxfp8_moe: workspace overlaps {name}; expected memory of its own")
