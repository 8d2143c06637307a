"""Every tensor argument of every operator as a lazily negated and as a conjugated view: each call must be refused.

    python lazy_views.py raw | aliases | public

Where a call is not refused, torch's own fallback may break this process in any later call: that is why it is a process,
and why it goes on with calls that are accepted. Prints the number of refusals.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from abiding import Communicator, mla_prologue, mxfp8_moe, reduce_rms
from abiding.engines.vllm import operators as vllm
from abiding.testing.cases.mxfp8_moe import GemmCase, LayerCase

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negated": torch._neg_view,
    "conjugated": lambda x: x.to(torch.complex64).conj(),
}
METHODS = {"negated": r"\.resolve_neg\(\)", "conjugated": r"\.resolve_conj\(\)"}


def operators(namespace: str) -> Iterator[torch._ops.OpOverload]:
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith(namespace):
            packet, _, overload = name.partition("::")[2].partition(".")
            yield getattr(getattr(getattr(torch.ops, name.partition("::")[0]), packet), overload or "default")


def any_value(kind: str) -> Any:
    """A value that an argument of this type takes; whether the operator would accept it does not matter."""
    if "Tensor" in kind:
        return torch.zeros(4, 64)
    return [0] if "List" in kind else {"int": 1, "float": 1.0, "bool": True}[kind.removeprefix("Optional[").strip("]")]


def pattern_of(name: str, view: str) -> str:
    return rf"\b{name} is a lazily {view} view; expected .*{METHODS[view]}"


def raw_operators(namespace: str) -> int:
    count = 0
    for op in operators(namespace):
        arguments = {argument.name: any_value(str(argument.type)) for argument in op._schema.arguments}
        written = {argument.name for argument in op._schema.arguments if argument.is_write}
        for name, value in arguments.items():
            for view, make in VIEWS.items():
                if not isinstance(value, Tensor):
                    continue
                spoiled = arguments | {name: make(value)}
                with pytest.raises(RuntimeError, match=f"abiding::.*: {pattern_of(name, view)}"):
                    op(**spoiled)
                assert not any(spoiled[one].any() for one in written), f"{op} wrote before it refused {name}"
                count += 1
    return count


def aliases() -> int:
    report = vllm.install()
    assert all(done.startswith("registered") for done in report.values()), report
    return raw_operators("_C::") + raw_operators("_C_custom_ar::")


def public_calls() -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """Calls of the public functions that are accepted as they are. The names of tensors are those of their errors."""
    table = torch.cat([torch.ones(8, 32), torch.zeros(8, 32)], 1)
    rows = {"slots": torch.arange(4), "positions": torch.arange(4), "cos_sin": table}
    q, kv = torch.randn(4, 2, 512).bfloat16(), torch.randn(4, 512).bfloat16()
    pages = torch.zeros(2, mla_prologue.page_bytes(4), dtype=torch.uint8)
    inserted = {"kv": kv, "cache": pages, **rows}
    yield mla_prologue.qnorm_rope_kv_insert, {"q": q, **inserted, "block_size": 4, "out": torch.zeros_like(q)}
    yield mla_prologue.insert_kv, {**inserted, "block_size": 4}
    yield mla_prologue.gather_kv, {"cache": pages, "slots": rows["slots"], "block_size": 4}
    full = {"q": q.clone(), "kv": kv, "cache": torch.zeros(2, 4, 512).bfloat16(), **rows}
    yield mla_prologue.qnorm_rope_full_cache_bf16_insert, full
    scales = {"kv_scale": torch.ones(1), "q_scale_inv": torch.ones(1)}
    out = torch.zeros(4, 2, 512).to(torch.float8_e4m3fn)
    full = {**full, "cache": torch.zeros(2, 4, 512, dtype=torch.uint8), **scales, "out": out}
    yield mla_prologue.qnorm_rope_full_cache_fp8_insert, full

    gemm = GemmCase((3, 0, 5), 64, 96).make()
    data, codes = gemm.quantize(mxfp8_moe)
    weights = {"weight": gemm.weight.view(torch.uint8), "weight_scale": gemm.weight_scale}
    offsets, out = {"expert_offsets": gemm.expert_offsets}, torch.zeros(8, 64)
    yield mxfp8_moe.quantize, {"x": gemm.x, **offsets}
    yield mxfp8_moe.rebase, {"weight": weights["weight"].clone(), "scales": gemm.weight_scale.clone(), "inplace": True}
    yield mxfp8_moe.round, {"x": gemm.x, "out": torch.zeros_like(gemm.x)}
    yield mxfp8_moe.grouped_mm, {"a": gemm.x, **weights, **offsets, "out": out}
    yield quantized_mm, {"a": data.view(torch.uint8), "scales": codes, **weights, **offsets, "out": out}
    one = {"weight": weights["weight"][0], "scale": gemm.weight_scale[0]}
    yield mxfp8_moe.linear, {"x": gemm.x, **one, "out": torch.zeros(8, 64).bfloat16()}
    layer = LayerCase(6, 64, 96, 4, 2).make()
    experts = {"w13": layer.w13.view(torch.uint8), "s13": layer.s13, "w2": layer.w2.view(torch.uint8), "s2": layer.s2}
    routing = {"topk_ids": layer.topk_ids, "topk_weights": layer.topk_weights}
    size = mxfp8_moe.workspace_bytes(6, 2, 4, 64, 96)
    own = {"workspace": torch.zeros(size, dtype=torch.uint8), "out": torch.zeros_like(layer.x)}
    expert_map = torch.arange(4, dtype=torch.int32)
    yield mxfp8_moe.moe, {"x": layer.x, **experts, **routing, **own, "expert_map": expert_map}

    x, weight = torch.randn(4, 8), torch.ones(8)
    for comm in communicators:
        yield comm.all_reduce, {"x": x, "out": torch.zeros_like(x)}
        yield partial(reduce_rms.rms_norm, comm=comm), {"x": x, "weight": weight}
        yield partial(reduce_rms.qk_norm, comm=comm), {"qkv": x, "wq": weight[:4], "wk": weight[:2]}


def quantized_mm(a: Tensor, scales: Tensor, **rest: Any) -> Tensor:
    return mxfp8_moe.grouped_mm(mxfp8_moe.MXFP8(a, scales), **rest)


communicators: list[Communicator] = []


def public_functions() -> int:
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    # Two routes: over peer memory, and through torch.distributed.
    communicators.extend([Communicator(device="cpu"), Communicator(device="cpu")])
    communicators[1]._set_peer_memory(None, "torch.distributed is to serve this one")
    return sum(refuses(*call) for call in public_calls())


def refuses(function: Callable[..., Any], arguments: dict[str, Any]) -> int:
    function(**arguments)
    count = 0
    for name in [name for name, value in arguments.items() if isinstance(value, Tensor)]:
        before = {one: value.clone() for one, value in arguments.items() if isinstance(value, Tensor)}
        for view, make in VIEWS.items():
            # Where Python looks at the dtype first, complex numbers are refused for that.
            pattern = pattern_of(name, view) + (rf"|\b{name} .*dtype.*; expected" if view == "conjugated" else "")
            with pytest.raises((TypeError, ValueError), match=pattern):
                function(**arguments | {name: make(arguments[name])})
            count += 1
        for one, value in before.items():
            assert torch.equal(arguments[one].view(torch.uint8), value.view(torch.uint8)), f"{one}, refusing {name}"
    return count


def use_what_was_left() -> None:
    """Calls that are accepted, among freed tensors: a process that a fallback has broken dies here at the latest."""
    for _ in range(50):
        x = torch.randn(16, 64).bfloat16()
        out = mxfp8_moe.round(x)
        torch.ops.abiding.mxfp8_round(x, out=out)
        assert not mxfp8_moe.quantize(out).scales.is_neg()
        del x, out
        gc.collect()


if __name__ == "__main__":
    programs: dict[str, Callable[[], int]] = {
        "raw": partial(raw_operators, "abiding"),
        "aliases": aliases,
        "public": public_functions,
    }
    gc.freeze()  # all of torch, which every collection below would walk through
    refusals = programs[sys.argv[1]]()
    use_what_was_left()
    print(refusals)
