"""Scenarios of vLLM's operator names on Abiding's kernels, each for a process of its own: registration is for good.

python vllm_operators.py SCENARIO [ARGUMENT ...]
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from calls.collectives import minimax_tables
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm_schemas import BF16, FP8, LATER, QUANT, QUANT_ARGUMENTS, TENSORS

import abiding
from abiding import mxfp8_moe
from abiding.engines.vllm import operators as vllm
from abiding.testing.cases.mla_prologue import PrologueCase
from abiding.testing.cases.mxfp8_moe import GemmCase
from abiding.testing.comparison import assert_bitwise_equal

NAMES = [alias.name for alias in vllm.ALIASES]
DEVICES = "CPU, CUDA" if abiding.has_cuda_kernels() else "CPU"
REGISTERED, IMPLEMENTED = f"registered: {DEVICES}", f"implemented: {DEVICES}"
ALL_REGISTERED = {alias.name: REGISTERED + " (in no vLLM since 0.26)" * alias.gone for alias in vllm.ALIASES}

case = PrologueCase(5, 3, 8, block_size=4, skipped=0.2)


def op(name: str, namespace: str = "_C") -> Any:
    return getattr(getattr(torch.ops, namespace), name)


def library(namespace: str = "_C") -> torch.library.Library:
    """One of vLLM's own, as the scenario has it."""
    return torch.library.Library(namespace, "FRAGMENT")


def schema_text(name: str, namespace: str) -> str:
    return str(op(name, namespace).default._schema).partition("::")[2]


def quant_insert(op: Callable[..., Tensor], **options: bool) -> tuple[Tensor, Tensor]:
    inputs = case.make("cpu", seed=7)
    out = op(inputs.q, inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin, 8, 1e-6, 4, **options)
    inputs.check()
    return out, inputs.storage


def assert_serves_quant_insert(**options: bool) -> None:
    ours, theirs = quant_insert(op(QUANT), **options), quant_insert(op(QUANT, "abiding"))
    assert_bitwise_equal(ours[0], theirs[0], "q")
    assert_bitwise_equal(ours[1], theirs[1], "cache")


def fake_call(name: str = QUANT) -> Tensor:
    inputs = case.make("cpu", seed=7)
    args = (inputs.q, inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin)
    with FakeTensorMode() as mode:
        result: Tensor = op(name)(*(mode.from_tensor(arg) for arg in args), 8, 1e-6, 4)
    return result


def vllm_registers_fake(calls: list[torch.Size]) -> None:
    def fake(
        q_in: Tensor,
        kv: Tensor,
        k_cache: Tensor,
        slot_mapping: Tensor,
        position_ids: Tensor,
        cos_sin_cache: Tensor,
        q_head_padded: int,
        eps: float,
        cache_block_size: int,
        *more: bool,
    ) -> Tensor:
        calls.append(q_in.shape)
        return q_in.new_empty(q_in.shape[0], q_head_padded, q_in.shape[2])

    torch.library.register_fake(f"_C::{QUANT}", fake)


# --- the prologue -----------------------------------------------------------------------------------------------------


def missing_operators_are_registered() -> None:
    assert NAMES[:3] == [f"_C::{name}" for name in (QUANT, BF16, FP8)]
    assert set(vllm.install()) == set(NAMES)
    assert vllm.install() == ALL_REGISTERED, vllm.install()
    gc.collect()
    assert_serves_quant_insert()
    for name in (QUANT, BF16, FP8):
        assert schema_text(name, "_C") == schema_text(name, "abiding")

    def siblings(namespace: str) -> tuple[Tensor, ...]:
        inputs = case.make("cpu", seed=3)
        rest = (inputs.slots, inputs.positions, inputs.cos_sin)
        one = torch.full((1,), 0.5)
        cache8 = torch.zeros(8, 4, 512, dtype=torch.uint8)
        q8 = torch.zeros(inputs.q.shape, dtype=torch.float8_e4m3fn)
        assert op(FP8, namespace)(inputs.q, inputs.kv, q8, cache8, *rest, one, one, 1e-6, 4) is None
        cache16 = torch.zeros(8, 4, 512, dtype=torch.bfloat16)
        assert op(BF16, namespace)(inputs.q, inputs.kv, cache16, *rest, 1e-6, 4) is None
        return cache8, q8, cache16, inputs.q

    for ours, theirs in zip(siblings("_C"), siblings("abiding"), strict=True):
        assert ours.view(torch.uint8).any()
        assert_bitwise_equal(ours, theirs)


def engine_code_compiles() -> None:
    vllm.install()

    def engine(*args: Any) -> Tensor:
        doubled: Tensor = op(QUANT)(*args) * 2
        return doubled

    compiled = torch.compile(engine, fullgraph=True, backend="aot_eager")
    out, cache = quant_insert(compiled)
    expected, expected_cache = quant_insert(op(QUANT, "abiding"))
    assert_bitwise_equal(out, expected * 2)
    assert_bitwise_equal(cache, expected_cache)
    assert fake_call().shape == (5, 8, 512)

    inputs = case.make("cpu", seed=7)
    arguments = (inputs.q, inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin)
    torch.library.opcheck(op(QUANT).default, (*arguments, 8, 1e-6, 4))
    cache16 = torch.zeros(8, 4, 512, dtype=torch.bfloat16)
    torch.library.opcheck(op(BF16).default, (inputs.q, inputs.kv, cache16, *arguments[3:], 1e-6, 4))
    q8, cache8 = torch.zeros(inputs.q.shape, dtype=torch.uint8), torch.zeros(8, 4, 512, dtype=torch.uint8)
    one = torch.ones(1)
    torch.library.opcheck(op(FP8).default, (inputs.q, inputs.kv, q8, cache8, *arguments[3:], one, one, 1e-6, 4))


def vllm_registers_its_fake_afterwards() -> None:
    vllm.install()
    calls: list[torch.Size] = []
    assert hasattr(torch.ops._C, QUANT)
    vllm_registers_fake(calls)
    assert_serves_quant_insert()
    assert fake_call().shape == (5, 8, 512)
    assert calls
    compiled = torch.compile(lambda *args: op(QUANT)(*args), fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(quant_insert(compiled)[1], quant_insert(op(QUANT, "abiding"))[1])


def schema_and_fake_without_a_kernel(later: str) -> None:
    theirs = library()
    theirs.define(f"{QUANT}({QUANT_ARGUMENTS}{later}) -> Tensor")
    calls: list[torch.Size] = []
    vllm_registers_fake(calls)
    report = vllm.install()
    assert report[f"_C::{QUANT}"] == IMPLEMENTED, report
    assert report[f"_C::{BF16}"] == report[f"_C::{FP8}"] == REGISTERED, report
    assert_serves_quant_insert()
    assert fake_call().shape == (5, 8, 512)
    assert calls


def flags_of_later_releases() -> None:
    theirs = library()
    theirs.define(f"{QUANT}({QUANT_ARGUMENTS}, {LATER}) -> Tensor")
    theirs.define(f"{BF16}(Tensor! q, {TENSORS}, float eps, int cache_block_size, bool apply_q_norm=True) -> ()")
    assert vllm.install()[f"_C::{BF16}"] == IMPLEMENTED
    assert_serves_quant_insert(apply_q_norm=True, kv_mxfp8=False, apply_q_rope=True, is_q_interleaved=False)
    for norm, rope in ((False, True), (True, False), (False, False)):
        out, cache = quant_insert(op(QUANT), apply_q_norm=norm, apply_q_rope=rope)
        inputs = case.make("cpu", seed=7)
        assert_bitwise_equal(out, inputs.run(abiding.mla_prologue, apply_q_norm=norm, apply_q_rope=rope))
        assert_bitwise_equal(cache, inputs.storage)
    inputs = case.make("cpu", seed=7)
    before = inputs.storage.clone()
    rows = (inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: op(QUANT)(inputs.q, *rows, 8, 1e-6, 4, True, True), "kv_mxfp8 is True; expected False"),
        (
            lambda: op(QUANT)(inputs.q, *rows, 8, 1e-6, 4, is_q_interleaved=True),
            "is_q_interleaved is True; expected False",
        ),
        (lambda: op(BF16)(inputs.q, *rows, 1e-6, 4, apply_q_norm=False), "apply_q_norm is False; expected True"),
    ]
    for call, message in calls:
        with pytest.raises(RuntimeError, match=rf"_C::(.|\n)*{message}"):
            call()
    assert_bitwise_equal(inputs.storage, before)


def existing_kernels_are_kept() -> None:
    theirs = library()
    theirs.define(f"{QUANT}({QUANT_ARGUMENTS}, {LATER}) -> Tensor")

    def mine(q_in: Tensor, *rest: Any) -> Tensor:
        return torch.full_like(q_in, 42)

    def mine_in_place(q: Tensor, *rest: Any) -> None:
        q.fill_(42)

    theirs.impl(QUANT, mine, "CPU")
    theirs.impl(QUANT, mine, "CUDA")
    theirs.define(f"{BF16}(Tensor! q, {TENSORS}, float eps, int cache_block_size) -> ()")
    theirs.impl(BF16, mine_in_place, "CompositeExplicitAutograd")
    report = vllm.install()
    assert report[f"_C::{QUANT}"].startswith("kept: "), report
    assert report[f"_C::{BF16}"].startswith("kept: "), report
    out, cache = quant_insert(op(QUANT))
    assert (out == 42).all()
    assert (cache == quant_insert(lambda q, *rest: q)[1]).all()
    inputs = case.make("cpu")
    op(BF16)(inputs.q, inputs.kv, inputs.kv, inputs.slots, inputs.positions, inputs.cos_sin, 1e-6, 4)
    assert (inputs.q == 42).all()
    assert vllm.install() == report


def only_missing_devices_are_filled(device: str) -> None:
    theirs = library()
    theirs.define(f"{QUANT}({QUANT_ARGUMENTS}) -> Tensor")
    theirs.impl(QUANT, lambda q_in, *rest: torch.full_like(q_in, 42), device)
    before = torch._C._dispatch_dump_table(f"_C::{QUANT}")
    others = [one for one in DEVICES.split(", ") if one != device] or ["nothing"]
    assert vllm.install()[f"_C::{QUANT}"] == f"implemented: {others[0]}; kept: {device}"

    def row(table: str) -> list[str]:
        return [line for line in table.splitlines() if line.startswith(f"{device}:")]

    assert row(before) == row(torch._C._dispatch_dump_table(f"_C::{QUANT}")) != []
    if device == "CPU":
        assert (quant_insert(op(QUANT))[0] == 42).all()
    else:
        assert_serves_quant_insert()


def an_incompatible_operator_is_left_alone() -> None:
    theirs = library()
    theirs.define(f"{QUANT}(Tensor! q, {TENSORS}, float eps, int cache_block_size) -> ()")
    table = torch._C._dispatch_dump_table(f"_C::{QUANT}")
    report = vllm.install()
    status = report[f"_C::{QUANT}"]
    assert status.startswith("left alone: argument 0 is Tensor! q, not Tensor q_in"), status
    assert "slot_mapping" in status, status
    assert torch._C._dispatch_dump_table(f"_C::{QUANT}") == table
    assert report[f"_C::{BF16}"] == report[f"_C::{FP8}"] == REGISTERED, report


def an_installed_vllm_goes_first() -> None:
    report = vllm.install()
    assert report == ALL_REGISTERED | {NAMES[0]: "implemented: CPU; kept: CUDA"}, report
    assert_serves_quant_insert()
    importlib.import_module("vllm._C_stable_libtorch")


def a_vllm_that_cannot_load_is_tolerated() -> None:
    assert vllm.install() == ALL_REGISTERED
    assert_serves_quant_insert()


def wrong_arguments_raise_and_write_nothing() -> None:
    vllm.install()
    inputs = case.make("cpu", seed=7)
    before = inputs.storage.clone()
    for wrong in (inputs.kv.float(), inputs.kv[:, :256], inputs.kv[:3], inputs.kv.to("meta")):
        with pytest.raises(RuntimeError, match=rf"{QUANT}.*\bkv\b.*expected"):
            op(QUANT)(inputs.q, wrong, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin, 8, 1e-6, 4)
    assert_bitwise_equal(inputs.storage, before)


# --- collectives ------------------------------------------------------------------------------------------------------


def drive_the_custom_all_reduce() -> None:
    ops, ranks, most = torch.ops._C_custom_ar, 2, 1 << 16
    allocate = torch.ops.abiding_custom_ar.allocate_shared_memory_and_handle
    meta = [allocate(ops.meta_size() + most)[0] for _ in range(ranks)]
    handles = [ops.init_custom_ar(meta, torch.empty(8, dtype=torch.uint8), rank, True) for rank in range(ranks)]
    for fa in handles:
        ops.register_buffer(fa, meta)
        assert ops.get_graph_buffer_ipc_meta(fa) == ([], [])
        ops.register_graph_buffers(fa, [[], []], [[], []])
    xs, outs = [torch.full((5,), rank + 1.0) for rank in range(ranks)], [torch.zeros(5) for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(lambda rank: ops.all_reduce(handles[rank], xs[rank], outs[rank], 0, 0), range(ranks)))
    for fa, address, out in zip(handles, meta, outs, strict=True):
        assert_bitwise_equal(out, torch.full((5,), 3.0))
        ops.dispose(fa)
        ops.free_shared_buffer(address)


def the_custom_all_reduce_is_served() -> None:
    vllm.install()
    for alias in vllm.ALIASES:
        if alias.name.startswith("_C_custom_ar::"):
            name = alias.name.partition("::")[2]
            assert schema_text(name, "_C_custom_ar") == schema_text(name, "abiding_custom_ar"), name
    drive_the_custom_all_reduce()
    _, handle = torch.ops.abiding_custom_ar.allocate_shared_memory_and_handle(64)
    assert torch.ops._C_custom_ar.open_mem_handle(handle) > 0
    with pytest.raises(RuntimeError, match="expected the handle of a communicator that is open"):
        torch.ops._C_custom_ar.dispose(123)


def a_custom_all_reduce_is_served_whole_or_not_at_all(key: str) -> None:
    theirs = library("_C_custom_ar")
    theirs.define("meta_size() -> int")
    theirs.define("dispose(int fa) -> ()")
    theirs.impl("dispose", lambda fa: None, key)
    report = vllm.install()
    own = {name: what for name, what in report.items() if name.startswith("_C_custom_ar::")}
    assert len(own) == 10
    assert set(own.values()) == {"kept: _C_custom_ar::dispose has kernels of its own, and shares handles with it"}, own
    assert not hasattr(torch.ops._C_custom_ar, "init_custom_ar")
    assert report[NAMES[0]] == REGISTERED


def a_custom_all_reduce_with_schemas_alone_is_filled() -> None:
    theirs = library("_C_custom_ar")
    for alias in vllm.ALIASES[5:9]:
        theirs.define(alias.schema.partition("::")[2])
    report = vllm.install()
    assert [report[alias.name] for alias in vllm.ALIASES[5:9]] == [IMPLEMENTED] * 4, report
    drive_the_custom_all_reduce()


def minimax_reduce_rms_is_served_and_compiles() -> None:
    vllm.install()

    def call(rows: Tensor, wq: Tensor, wk: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        q, k = torch.ops._C.minimax_allreduce_rms_qk(rows, wq, wk, table, 32, 8, 0, 1, 1e-6)
        return q, k, torch.ops._C.minimax_allreduce_rms(rows[:, :32].contiguous(), wq, table, 0, 1, 1e-6)

    with minimax_tables(1) as (table,):
        rows, wq, wk = torch.randn(5, 48), torch.randn(32), torch.randn(8)
        q, k, single = call(rows, wq, wk, table)
        for out, x, w in ((q, rows[:, :32], wq), (k, rows[:, 32:40], wk), (single, rows[:, :32], wq)):
            torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, x.shape[1:], w, 1e-6))
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for actual, expected in zip(compiled(rows, wq, wk, table), (q, k, single), strict=True):
            assert_bitwise_equal(actual, expected)


# --- experts ----------------------------------------------------------------------------------------------------------


def mxfp8_experts_are_served_and_compile() -> None:
    report = vllm.install()
    for name in ("mxfp8_experts_quant", "cutlass_mxfp8_grouped_mm"):
        assert report[f"_C::{name}"] == f"{REGISTERED} (in no vLLM since 0.26)"
        assert schema_text(name, "_C") == schema_text(name, "abiding")
    i = GemmCase((5, 0, 130), 128, 256).make()
    assert i.expert_offsets is not None
    sizes = i.expert_offsets.diff()
    problems = torch.stack([sizes, torch.full_like(sizes, 128), torch.full_like(sizes, 256)], 1)
    starts, tiles = i.expert_offsets[:-1].clone(), (sizes + 127) // 128 * 128
    groups = (problems, starts, (tiles.cumsum(0) - tiles).int())

    def call(x: Tensor, weight: Tensor, scales: Tensor, out: Tensor, data: Tensor, codes: Tensor) -> None:
        op("mxfp8_experts_quant")(x, *groups, data, codes)
        op("cutlass_mxfp8_grouped_mm")(data, weight.transpose(1, 2), codes, scales.transpose(1, 2), out, *groups)

    expected = i.run(mxfp8_moe, i.quantize(mxfp8_moe))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for run in (call, compiled):
        for dtype in (torch.uint8, torch.float8_e8m0fnu):
            out = torch.zeros(135, 128, dtype=torch.bfloat16)
            codes = torch.zeros(384, 8, dtype=torch.uint8).view(dtype)
            scales = i.weight_scale.view(dtype)
            run(i.x, i.weight, scales, out, torch.zeros(135, 256, dtype=torch.float8_e4m3fn), codes)
            assert_bitwise_equal(out, expected)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
