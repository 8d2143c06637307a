"""The prologue as a set of PyTorch operators: schemas, fakes, torch.compile, CUDA graphs, streams, devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import abiding
from abiding import mla_prologue
from abiding.testing.cases.mla_prologue import PrologueCase, PrologueInputs
from abiding.testing.comparison import assert_bitwise_equal

ROWS = "Tensor kv, Tensor! k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache"
SCHEMAS = {
    "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert": (
        f"(Tensor q_in, {ROWS}, int q_head_padded, float eps, int cache_block_size) -> Tensor"
    ),
    "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out": (
        f"(Tensor q_in, {ROWS}, float eps, int cache_block_size, "
        "bool apply_q_norm, bool apply_q_rope, bool zero_padding, *, Tensor! out) -> ()"
    ),
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert": (
        f"(Tensor! q, {ROWS}, float eps, int cache_block_size) -> ()"
    ),
    "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert": (
        f"(Tensor q, {ROWS.replace('kv,', 'kv, Tensor! q_fp8,')}, Tensor fp8_scale, Tensor q_fp8_scale_inv, "
        "float eps, int cache_block_size) -> ()"
    ),
    "fused_deepseek_v4_kv_rope_quant_insert": f"({ROWS}, int cache_block_size) -> ()",
    "deepseek_v4_gather_kv": "(Tensor k_cache, Tensor slot_mapping, int cache_block_size, *, Tensor! out) -> ()",
}

Step = Callable[..., tuple[Tensor, ...]]

CASE = PrologueCase(6, 3, 5, block_size=4, skipped=0.2)
BLOCK_SIZE = CASE.block_size


def operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.abiding, packet), overload or "default")


def arguments(
    name: str, device: torch.device | str, case: PrologueCase = CASE, seed: int = 0
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of an accepted call of a raw operator."""
    i = case.make(device, seed)
    rows = [i.kv, i.cache, i.slots, i.positions, i.cos_sin]
    full = torch.zeros(i.cache.shape[0], case.block_size, 512, dtype=torch.uint8, device=device)
    if name.endswith("bf16_insert"):
        return [i.q, i.kv, full.to(torch.bfloat16), *rows[2:], 1e-6, case.block_size], {}
    if name.endswith("fp8_insert"):
        one = torch.ones(1, device=device)
        # uint8 in place of e4m3: opcheck cannot subtract 8-bit floats.
        return [
            i.q,
            i.kv,
            torch.zeros(i.q.shape, dtype=torch.uint8, device=device),
            full,
            *rows[2:],
            one,
            one.clone(),
            1e-6,
            case.block_size,
        ], {}
    if name.endswith("gather_kv"):
        mla_prologue.insert_kv(*rows, block_size=case.block_size)
        out = torch.zeros(len(i.slots), 512, dtype=case.dtype, device=device)
        return [i.cache, i.slots, case.block_size], {"out": out}
    if name.endswith("_kv_rope_quant_insert") and "qnorm" not in name:
        return [*rows, case.block_size], {}
    if name.endswith(".out"):
        out = torch.zeros(case.tokens, case.out_heads, 512, dtype=case.dtype, device=device)
        return [i.q, *rows, 1e-6, case.block_size, True, True, True], {"out": out}
    return [i.q, *rows, case.out_heads, 1e-6, case.block_size], {}


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    expected = torch._C.parse_schema(f"abiding::{name}{SCHEMAS[name]}")
    found = operator(name)._schema
    assert str(found) == str(expected)
    for ours, theirs in zip(found.arguments, expected.arguments, strict=True):
        assert (ours.alias_info is not None and ours.alias_info.is_write) == (theirs.alias_info is not None)
        assert ours.has_default_value() == theirs.has_default_value() is False


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str, device: torch.device) -> None:
    args, kwargs = arguments(name, device)
    torch.library.opcheck(operator(name), tuple(args), kwargs)


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck_of_an_empty_batch(name: str, device: torch.device) -> None:
    args, kwargs = arguments(name, device, replace(CASE, tokens=0))
    torch.library.opcheck(operator(name), tuple(args), kwargs)


@pytest.mark.parametrize("name", SCHEMAS)
def test_only_what_the_schema_says_is_written(name: str, device: torch.device) -> None:
    args, kwargs = arguments(name, device)
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    operator(name)(*args, **kwargs)
    schema = operator(name)._schema
    for argument, old, new in zip(schema.arguments, before, args, strict=False):
        if not isinstance(new, Tensor):
            continue
        if argument.alias_info is None:
            assert_bitwise_equal(new, old, argument.name)
        else:
            assert not torch.equal(new.view(torch.uint8), old.view(torch.uint8)), f"{argument.name} was not written"


@pytest.mark.parametrize(
    "case", [CASE, replace(CASE, tokens=0), replace(CASE, heads=0), replace(CASE, dtype=torch.float16)], ids=str
)
def test_fake_results_look_like_real_ones(case: PrologueCase, device: torch.device) -> None:
    def looks(out: Tensor) -> tuple[Any, ...]:
        return out.shape, out.stride(), out.dtype, out.device, out.requires_grad, out.storage_offset()

    i = case.make(device)
    tensors = (i.q, i.kv, i.cache, i.slots, i.positions, i.cos_sin)
    one = torch.ones(1, device=device)
    full = torch.zeros(i.cache.shape[0], BLOCK_SIZE, 512, dtype=torch.uint8, device=device)

    def calls(
        q: Tensor,
        kv: Tensor,
        cache: Tensor,
        slots: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        full: Tensor,
        one: Tensor,
    ) -> list[Any]:
        rows = (kv, cache, slots, positions, cos_sin)
        rest = (slots, positions, cos_sin)
        api = mla_prologue
        results = [
            torch.ops.abiding.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(q, *rows, 5, 1e-6, BLOCK_SIZE),
            api.qnorm_rope_kv_insert(q, *rows, block_size=BLOCK_SIZE),
            api.qnorm_rope_kv_insert(q, *rows, block_size=BLOCK_SIZE, padded_heads=64, apply_q_norm=False),
            api.gather_kv(cache, slots, block_size=BLOCK_SIZE, dtype=torch.float16),
            api.qnorm_rope_full_cache_fp8_insert(q, kv, full, *rest, kv_scale=one, q_scale_inv=one),
        ]
        api.insert_kv(*rows, block_size=BLOCK_SIZE)
        if q.dtype == torch.bfloat16:
            api.qnorm_rope_full_cache_bf16_insert(q, kv, full.to(torch.bfloat16), *rest)
        return [looks(result) for result in results]

    real = calls(*tensors, full, one)
    with FakeTensorMode() as mode:
        fake = calls(*(mode.from_tensor(tensor) for tensor in (*tensors, full, one)))
    assert fake == real
    on_meta = calls(*(tensor.to("meta") for tensor in (*tensors, full, one)))
    assert [look[:3] for look in on_meta] == [look[:3] for look in real]


# --- torch.compile ----------------------------------------------------------------------------------------------------


def decode_step(
    q: Tensor, kv: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The group's functions as a model would call them, among ordinary operations."""
    out = mla_prologue.qnorm_rope_kv_insert(
        q * 2, kv, cache, slots, positions, cos_sin, block_size=BLOCK_SIZE, padded_heads=q.shape[1] + 2
    )
    mla_prologue.insert_kv(kv * 0.5, cache, slots, positions, cos_sin, block_size=BLOCK_SIZE)
    return out + 1, mla_prologue.gather_kv(cache, slots, block_size=BLOCK_SIZE) * 2


def siblings(
    q: Tensor, kv: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor
) -> tuple[Tensor, ...]:
    full = torch.zeros(cache.shape[0], BLOCK_SIZE, 512, dtype=torch.uint8, device=q.device)
    one = torch.ones(1, device=q.device)
    q8 = mla_prologue.qnorm_rope_full_cache_fp8_insert(
        q, kv, full, slots, positions, cos_sin, kv_scale=one, q_scale_inv=one
    )
    rows = full.to(torch.bfloat16)
    own = q.clone()
    mla_prologue.qnorm_rope_full_cache_bf16_insert(own, kv, rows, slots, positions, cos_sin)
    mla_prologue.qnorm_rope_kv_insert(q, kv, cache, slots, positions, cos_sin, block_size=BLOCK_SIZE, out=own)
    return q8.view(torch.uint8), full, rows, own


def assert_compiles(step: Step, compiled: Step, case: PrologueCase, device: torch.device, seed: int = 0) -> None:
    ours, theirs = case.make(device, seed), case.make(device, seed)

    def run(function: Step, i: PrologueInputs) -> tuple[Tensor, ...]:
        return function(i.q, i.kv, i.cache, i.slots, i.positions, i.cos_sin)

    for index, (actual, expected) in enumerate(zip(run(compiled, ours), run(step, theirs), strict=True)):
        assert_bitwise_equal(actual, expected, f"result {index}")
    ours.check()
    assert_bitwise_equal(ours.storage, theirs.storage, "cache")


@pytest.mark.parametrize("step", [decode_step, siblings])
def test_compile(step: Step, device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        assert_compiles(step, compiled, CASE, device, seed)


@pytest.mark.parametrize("step", [decode_step, siblings])
def test_compile_with_dynamic_shapes(step: Step, device: torch.device) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (6, 7, 19):  # 11 heads: torch.compile would guard sizes that are equal by chance as one
        assert_compiles(step, compiled, replace(CASE, tokens=tokens, heads=11), device)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 3, "another number of tokens compiles again"


@pytest.mark.usefixtures("inductor")
def test_compile_with_inductor(device: torch.device) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(decode_step, fullgraph=True)
    assert_compiles(decode_step, compiled, CASE, device)


def test_export(device: torch.device) -> None:
    """An exported graph contains the operators under their own names."""

    class Module(torch.nn.Module):
        def forward(
            self, q: Tensor, kv: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor
        ) -> Tensor:
            return mla_prologue.qnorm_rope_kv_insert(q, kv, cache, slots, positions, cos_sin, block_size=BLOCK_SIZE)

    ours, theirs = CASE.make(device), CASE.make(device)
    inputs = (ours.q, ours.kv, ours.cache.clone(), ours.slots, ours.positions, ours.cos_sin)
    exported = torch.export.export(Module(), inputs, strict=False)
    assert "abiding.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert" in exported.graph_module.code
    out = exported.module()(*inputs)
    assert_bitwise_equal(out, theirs.run(mla_prologue, padded_heads=None))


# --- the GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1100])
def test_cuda_graph_with_changing_contents(tokens: int, cuda: torch.device) -> None:
    """One capture, replayed on other rows, slots and positions, some of them out of range."""
    case = replace(CASE, tokens=tokens, block_size=64, padded_heads=8, skipped=0.1, wild=0.1)
    static = case.make(cuda, 0)
    full = torch.zeros(static.cache.shape[0], 64, 512, dtype=torch.uint8, device=cuda)
    rows = full.to(torch.bfloat16)
    one = torch.ones(1, device=cuda)

    def step(i: PrologueInputs, full: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        rest = (i.slots, i.positions, i.cos_sin)
        out = i.run(mla_prologue)
        q8 = mla_prologue.qnorm_rope_full_cache_fp8_insert(i.q, i.kv, full, *rest, kv_scale=one, q_scale_inv=one)
        own = i.q.clone()
        mla_prologue.qnorm_rope_full_cache_bf16_insert(own, i.kv, rows, *rest)
        return out, q8.view(torch.uint8), own, mla_prologue.gather_kv(i.cache, i.slots, block_size=64)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(static, full, rows)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(static, full, rows)
    for seed in range(1, 4):
        fresh = case.make(cuda, seed)
        for name in ("q", "kv", "slots", "positions", "cache"):
            getattr(static, name).copy_(getattr(fresh, name))
        full.zero_()
        rows.zero_()
        graph.replay()
        expected_full, expected_rows = torch.zeros_like(full), torch.zeros_like(rows)
        for index, (actual, wanted) in enumerate(zip(results, step(fresh, expected_full, expected_rows), strict=True)):
            assert_bitwise_equal(actual, wanted, f"replay {seed}, result {index}")
        assert_bitwise_equal(static.cache, fresh.cache, f"replay {seed}: cache")
        assert_bitwise_equal(full, expected_full, f"replay {seed}: e4m3 cache")
        assert_bitwise_equal(rows, expected_rows, f"replay {seed}: bfloat16 cache")
        static.check()


@pytest.mark.gpu
def test_checked_indices_do_not_disturb_a_capture(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
    inputs = CASE.make(cuda)
    inputs.run(mla_prologue)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = inputs.run(mla_prologue)
    inputs.slots.fill_(1 << 40)
    graph.replay()
    assert not bool(out.isnan().any())


@pytest.mark.gpu
def test_work_is_queued_on_the_current_stream(cuda: torch.device) -> None:
    """Inputs that are written late on a side stream are read correctly without synchronizing with the default
    stream."""
    case = replace(CASE, tokens=64, heads=16, padded_heads=None, block_size=64)
    expected, late = case.make(cuda), case.make(cuda)
    wanted = expected.run(mla_prologue)
    q, kv = late.q.clone(), late.kv.clone()
    late.q.zero_()
    late.kv.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.q.copy_(q)
        late.kv.copy_(kv)
        out = late.run(mla_prologue)
        gathered = mla_prologue.gather_kv(late.cache, late.slots, block_size=64)
    assert not stream.query(), "the call did not wait for the stream"
    stream.synchronize()
    assert_bitwise_equal(out, wanted, "q")
    assert_bitwise_equal(late.cache, expected.cache, "cache")
    assert_bitwise_equal(gathered, mla_prologue.gather_kv(expected.cache, expected.slots, block_size=64), "gather_kv")


@pytest.mark.gpu
def test_tensors_choose_the_device(two_gpus: tuple[torch.device, torch.device]) -> None:
    first, second = two_gpus
    expected = CASE.make(first).run(mla_prologue)
    with torch.cuda.device(first):
        inputs = CASE.make("cpu")
        there = {
            name: getattr(inputs, name).to(second) for name in ("q", "kv", "cache", "slots", "positions", "cos_sin")
        }
        out = replace(inputs, **there).run(mla_prologue)
        assert torch.cuda.current_device() == first.index
    assert out.device == second
    assert out.shape == expected.shape
    assert_bitwise_equal(
        out.cpu(), replace(inputs, **{k: v.to(first) for k, v in there.items()}).run(mla_prologue).cpu()
    )
    mixed = {**{k: v.to(first) for k, v in there.items()}, "kv": there["kv"]}
    with pytest.raises(ValueError, match=r"cuda:1.*expected device cuda:0"):
        replace(inputs, **mixed).run(mla_prologue)


@pytest.mark.gpu
def test_mixed_devices_are_refused(cuda: torch.device) -> None:
    for name in ("q", "kv", "cache", "slots", "positions", "cos_sin"):
        inputs = CASE.make(cuda)
        with pytest.raises(ValueError, match="expected device"):
            replace(inputs, **{name: getattr(inputs, name).cpu()}).run(mla_prologue)


def test_without_cuda_kernels_the_reason_is_said(device: torch.device) -> None:
    reason = abiding.cuda_unavailable_reason()
    assert (reason is None) == abiding.has_cuda_kernels()
    if device.type == "cuda":
        assert reason is None
    else:
        assert reason is None or len(reason.splitlines()) == 1
