"""The group as a set of PyTorch operators: schemas, fakes, torch.compile, CUDA graphs, streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from mxfp8_rules import offsets_of, tensors_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from abiding import mxfp8_moe
from abiding.testing.cases.mxfp8_moe import GemmCase, LayerCase
from abiding.testing.comparison import assert_bitwise_equal

GROUPS = "Tensor problem_sizes, Tensor expert_offsets, Tensor blockscale_offsets"
SCHEMAS = {
    "mxfp8_experts_quant": f"(Tensor input, {GROUPS}, Tensor! quant_output, Tensor! scale_factor) -> ()",
    "cutlass_mxfp8_grouped_mm": f"(Tensor a, Tensor b, Tensor sfa, Tensor sfb, Tensor! out, {GROUPS}) -> ()",
    "mxfp8_quantize": (
        "(Tensor input, Tensor? offsets, bool ends, *, bool rowwise=False, Tensor! data, Tensor! scales) -> ()"
    ),
    "mxfp8_rebase": (
        "(Tensor weight, Tensor weight_scales, *, Tensor! out, Tensor! out_scales, Tensor! counts, "
        "Tensor! errors) -> ()"
    ),
    "mxfp8_round": "(Tensor input, *, Tensor! out) -> ()",
    "mxfp8_grouped_mm": (
        "(Tensor a, Tensor? a_scales, Tensor weight, Tensor weight_scales, Tensor? offsets, bool ends, *, "
        "int compute=0, Tensor! out) -> ()"
    ),
    "mxfp8_moe": (
        "(Tensor x, Tensor w13, Tensor s13, Tensor w2, Tensor s2, Tensor topk_ids, Tensor topk_weights, "
        "int activation, bool w8a8, Tensor(a!)? workspace, *, Tensor? expert_map=None, int? global_experts=None, "
        "float swiglu_alpha=1.702, float swiglu_beta=1., float? swiglu_limit=None, int compute=0, "
        "Tensor(b!) out) -> ()"
    ),
    "mxfp8_implementation": "(Tensor like, int rows, int experts, int[] n, int[] k, int compute) -> str",
    "mxfp8_moe_workspace_bytes": "(int tokens, int top_k, int experts, int hidden, int intermediate) -> int",
}
KERNELS = [name for name in SCHEMAS if name not in ("mxfp8_moe_workspace_bytes", "mxfp8_implementation")]

GEMM = GemmCase((3, 0, 5), 64, 96)
LAYER = LayerCase(6, 64, 96, 4, 2, elsewhere=0.2)


def operator(name: str) -> Any:
    return getattr(torch.ops.abiding, name).default


def arguments(name: str, device: torch.device, rows: int = 8) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an accepted call of a raw operator; uint8 in place of e4m3, since opcheck cannot subtract 8-bit
    floats."""
    if name == "mxfp8_moe":
        layer = replace(LAYER, tokens=rows).make(device)
        space = torch.zeros(1 << 16, dtype=torch.uint8, device=device)
        x, *weights, ids, topk_weights = tensors_of(layer)
        weights = [w.view(torch.uint8) if w.element_size() == 1 else w for w in weights]
        return [x, *weights, ids, topk_weights, 1, True, space], {"out": torch.zeros_like(x)}
    i = (GEMM if rows else replace(GEMM, sizes=(0, 0, 0))).make(device)
    data, scales = i.quantize(mxfp8_moe)
    data, weight = data.view(torch.uint8), i.weight.view(torch.uint8)
    offsets = offsets_of(i)
    sizes = offsets.diff()
    problems = torch.stack([sizes, torch.full_like(sizes, 64), torch.full_like(sizes, 96)], 1)
    tiles = (sizes + 127) // 128 * 128
    groups = [problems, offsets[:-1].clone(), (tiles.cumsum(0) - tiles).int()]
    out = torch.zeros(len(data), 64, dtype=torch.bfloat16, device=device)
    found: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "mxfp8_experts_quant": ([i.x, *groups, torch.zeros_like(data), torch.full_like(scales, 3)], {}),
        "cutlass_mxfp8_grouped_mm": (
            [data, weight.transpose(1, 2), scales, i.weight_scale, out, *groups],
            {},
        ),
        "mxfp8_quantize": (
            [i.x, offsets, False],
            {"data": torch.zeros_like(data), "scales": torch.full_like(scales, 3)},
        ),
        "mxfp8_rebase": (
            [weight, i.weight_scale],
            {
                "out": torch.zeros_like(weight),
                "out_scales": torch.full_like(i.weight_scale, 3),
                "counts": torch.full((3,), 7, dtype=torch.int64, device=device),
                "errors": torch.full((2,), 7, dtype=torch.float64, device=device),
            },
        ),
        "mxfp8_round": ([i.x], {"out": torch.zeros_like(i.x)}),
        "mxfp8_grouped_mm": ([data, scales, weight, i.weight_scale, offsets, False], {"out": out}),
    }
    return found[name]


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    expected = torch._C.parse_schema(f"abiding::{name}{SCHEMAS[name]}")
    found = operator(name)._schema
    assert str(found) == str(expected)
    for ours, theirs in zip(found.arguments, expected.arguments, strict=True):
        assert (ours.alias_info is not None and ours.alias_info.is_write) == (theirs.alias_info is not None)


@pytest.mark.parametrize("rows", [8, 0])
@pytest.mark.parametrize("name", KERNELS)
def test_opcheck(name: str, rows: int, device: torch.device) -> None:
    args, kwargs = arguments(name, device, rows)
    torch.library.opcheck(operator(name), tuple(args), kwargs)


def test_opcheck_without_the_optional_arguments(device: torch.device) -> None:
    args, kwargs = arguments("mxfp8_moe", device)
    torch.library.opcheck(operator("mxfp8_moe"), (*args[:-1], None), kwargs)
    expert_map = torch.tensor([1, -1, 0, 3, 2], dtype=torch.int32, device=device)
    options = {"expert_map": expert_map, "global_experts": 5, "swiglu_beta": 0.5, "swiglu_limit": 2.0}
    torch.library.opcheck(operator("mxfp8_moe"), tuple(args), kwargs | options)
    torch.library.opcheck(operator("mxfp8_moe"), tuple(args), kwargs | {"compute": 1})
    args, kwargs = arguments("mxfp8_grouped_mm", device)
    x = GEMM.make(device).x
    one = (x, None, args[2][:1], args[3][:1].contiguous(), None, False)
    torch.library.opcheck(operator("mxfp8_grouped_mm"), one, kwargs)
    torch.library.opcheck(operator("mxfp8_grouped_mm"), tuple(args), kwargs | {"compute": 1})
    args, kwargs = arguments("mxfp8_quantize", device)
    torch.library.opcheck(operator("mxfp8_quantize"), (args[0], None, False), kwargs)
    torch.library.opcheck(operator("mxfp8_quantize"), tuple(args), kwargs | {"rowwise": True})


@pytest.mark.parametrize("name", KERNELS)
def test_only_what_the_schema_says_is_written(name: str, device: torch.device) -> None:
    args, kwargs = arguments(name, device)
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    operator(name)(*args, **kwargs)
    for argument, old, new in zip(operator(name)._schema.arguments, before, args, strict=False):
        if not isinstance(new, Tensor):
            continue
        if argument.alias_info is None:
            assert_bitwise_equal(new, old, argument.name)
        else:
            assert not torch.equal(new, old), f"{argument.name} was not written"


@pytest.mark.parametrize("rows", [8, 0])
def test_fake_results_look_like_real_ones(rows: int, device: torch.device) -> None:
    def looks(x: Tensor) -> tuple[Any, ...]:
        return x.shape, x.stride(), x.dtype, x.device, x.storage_offset()

    gemm = (GEMM if rows else replace(GEMM, sizes=(0, 0, 0))).make(device)
    layer = replace(LAYER, tokens=rows).make(device)
    tensors = [gemm.x, gemm.weight, gemm.weight_scale, offsets_of(gemm), *tensors_of(layer)]

    def calls(*t: Tensor) -> list[Any]:
        api = mxfp8_moe
        a = api.quantize(t[0], t[3])
        results = [*a, *api.quantize(t[0]), api.round(t[0]), api.grouped_mm(a, *t[1:4], out_dtype=torch.float16)]
        results += [api.grouped_mm(t[0], t[1].transpose(1, 2), t[2], offs=t[3][1:]), api.moe(*t[4:])]
        for weight, inplace in ((t[1], False), (t[1].transpose(1, 2), False), (t[1], True)):
            *rebased, report = api.rebase(weight, t[2], inplace=inplace)
            results += [*rebased, *report]
        wide = api.quantize(t[0], t[3], rowwise=True)
        results += [*wide, api.grouped_mm(wide, *t[1:4], compute="fp8"), api.moe(*t[4:], mode="fp8")]
        results += [api.grouped_mm(t[0], *t[1:4], compute="fp8"), api.linear(t[0], t[1][0], t[2][0], mode="fp8")]
        results += [api.linear(t[0], t[1][0], t[2][0]), api.linear(t[0].view(2, -1, 96), t[1][0], t[2][0], mode="w8a8")]
        return [looks(x) for x in [*results, api.swizzle_scales(t[1].view(torch.uint8)[..., :3])]]

    real = calls(*tensors)
    with FakeTensorMode() as mode:
        assert calls(*(mode.from_tensor(tensor) for tensor in tensors)) == real
    on_meta = calls(*(tensor.to("meta") for tensor in tensors))
    assert [look[:3] for look in on_meta] == [look[:3] for look in real]


# --- torch.compile ----------------------------------------------------------------------------------------------------

Step = Callable[..., Any]


def gemm_step(x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor) -> Tensor:
    """W8A8, W8A16 and FP8 GEMMs among ordinary operations."""
    a = mxfp8_moe.quantize(x * 2, offsets)
    exact = mxfp8_moe.grouped_mm(a, weight, weight_scale, offsets) * 2
    weight, weight_scale, _ = mxfp8_moe.rebase(weight, weight_scale)
    fp8 = mxfp8_moe.grouped_mm(x + 1, weight, weight_scale, offsets, compute="fp8")
    return torch.stack([exact, fp8, mxfp8_moe.grouped_mm(mxfp8_moe.round(x), weight, weight_scale, offsets)])


def layer_step(i: tuple[Tensor, ...]) -> Tensor:
    x, *rest = i
    w13, s13, w2, s2, *routing = rest
    (w13, s13, _), (w2, s2, _) = mxfp8_moe.rebase(w13, s13), mxfp8_moe.rebase(w2, s2)
    fp8 = mxfp8_moe.moe(x, w13, s13, w2, s2, *routing, mode="fp8")
    first = mxfp8_moe.moe(x * 0.5, *rest, activation="swiglu_oai", swiglu_limit=3.0, global_experts=9)
    expert_map = torch.tensor([3, -1, 1], dtype=torch.int32, device=x.device)
    last = mxfp8_moe.moe(first + x, *rest, mode="w8a16", expert_map=expert_map, out=torch.empty_like(first))
    return torch.stack([fp8, last])


def linear_step(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    exact = mxfp8_moe.linear(x * 2, weight, scale, out_dtype=torch.float32)
    return exact + mxfp8_moe.linear(x[0], weight, scale, mode="w8a8")


def rebase_step(weight: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """Apart, and in place."""
    data, codes, report = mxfp8_moe.rebase(weight, scales)
    held, kept = weight.clone(), scales.clone()
    *_, same = mxfp8_moe.rebase(held, kept, inplace=True)
    return data, codes, *report, held, kept, *same


def assert_compiles(compiled: Callable[[Step], Step], rows: int, device: torch.device) -> None:
    gemm = replace(GEMM, sizes=(rows, 0, 2)).make(device, rows)
    given = (gemm.x, gemm.weight, gemm.weight_scale, offsets_of(gemm))
    assert_bitwise_equal(compiled(gemm_step)(*given), gemm_step(*given))
    layer = tensors_of(replace(LAYER, tokens=rows).make(device, rows))
    assert_bitwise_equal(compiled(layer_step)(layer), layer_step(layer))


def test_compile(device: torch.device) -> None:
    torch._dynamo.reset()
    assert_compiles(partial(torch.compile, fullgraph=True, backend="aot_eager"), 5, device)


def test_rebase_compiles(device: torch.device) -> None:
    torch._dynamo.reset()
    i = GEMM.make(device)
    given = i.weight.view(torch.uint8), i.weight_scale
    expected = rebase_step(*given)
    compiled = torch.compile(rebase_step, fullgraph=True, backend="aot_eager")
    for found, wanted in zip(compiled(*given), expected, strict=True):
        assert_bitwise_equal(found, wanted)


def test_linear_compiles(device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_step, fullgraph=True, dynamic=True, backend=counter)
    i = GemmCase((24,), 64, 96, form="whole").make(device)
    for rows in (3, 5, 12):
        given = i.x[: 2 * rows].view(2, rows, 96), i.weight[0], i.weight_scale
        assert_bitwise_equal(compiled(*given), linear_step(*given))
    assert counter.frame_count == 1, "another number of rows compiles again"


def test_compile_with_dynamic_shapes(device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = {
        step: torch.compile(step, fullgraph=True, dynamic=True, backend=counter) for step in (gemm_step, layer_step)
    }
    compilations = []
    for rows in (5, 7, 19):
        assert_compiles(compiled.__getitem__, rows, device)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3, "another number of rows compiles again"


@pytest.mark.usefixtures("inductor")
def test_compile_with_inductor(device: torch.device) -> None:
    torch._dynamo.reset()
    assert_compiles(partial(torch.compile, fullgraph=True), 5, device)


def test_inference_mode(device: torch.device) -> None:
    i = LAYER.make(device)
    expected = i.run(mxfp8_moe)
    with torch.inference_mode():
        assert_bitwise_equal(LAYER.make(device).run(mxfp8_moe), expected)
        gemm = GEMM.make(device)
        gemm.run(mxfp8_moe, gemm.quantize(mxfp8_moe))


# --- the GPU ----------------------------------------------------------------------------------------------------------
