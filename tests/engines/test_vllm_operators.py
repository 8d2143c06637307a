"""vLLM's operator names on Abiding's kernels. A scenario has an interpreter of its own: registration is for good."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from abiding.engines.vllm import operators as vllm

Scenario = Callable[..., str]

QUANT = "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert"
BF16 = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert"
FP8 = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert"
TENSORS = "Tensor kv, Tensor! k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache"
QUANT_ARGUMENTS = f"Tensor q_in, {TENSORS}, int q_head_padded, float eps, int cache_block_size"
SWAPPED = QUANT_ARGUMENTS.replace("slot_mapping, Tensor position_ids", "position_ids, Tensor slot_mapping")
LATER = "bool apply_q_norm=True, bool kv_mxfp8=False, bool apply_q_rope=True, bool is_q_interleaved=False"

PRELUDE = f"""
import gc, torch
from torch._subclasses.fake_tensor import FakeTensorMode
import abiding
from abiding.engines.vllm import operators as vllm
from abiding.testing.cases.mla_prologue import PrologueCase
from abiding.testing.comparison import assert_bitwise_equal

QUANT, BF16, FP8 = "{QUANT}", "{BF16}", "{FP8}"
NAMES = [alias.name for alias in vllm.ALIASES]
DEVICES = "CPU, CUDA" if abiding.has_cuda_kernels() else "CPU"
REGISTERED, IMPLEMENTED = "registered: " + DEVICES, "implemented: " + DEVICES
ALL_REGISTERED = {{alias.name: REGISTERED + " (in no vLLM since 0.26)" * alias.gone for alias in vllm.ALIASES}}
assert NAMES[:3] == ["_C::" + name for name in (QUANT, BF16, FP8)]
case = PrologueCase(5, 3, 8, block_size=4, skipped=0.2)

def op(name, namespace="_C"):
    return getattr(getattr(torch.ops, namespace), name)

def quant_insert(op, **options):
    inputs = case.make("cpu", seed=7)
    out = op(inputs.q, inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin, 8, 1e-6, 4, **options)
    inputs.check()
    return out, inputs.guard.storage

def assert_serves_quant_insert(**options):
    ours, theirs = quant_insert(op(QUANT), **options), quant_insert(op(QUANT, "abiding"))
    assert_bitwise_equal(ours[0], theirs[0], "q")
    assert_bitwise_equal(ours[1], theirs[1], "cache")

def fake_call(name=QUANT):
    inputs = case.make("cpu", seed=7)
    args = (inputs.q, inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin)
    with FakeTensorMode() as mode:
        return op(name)(*(mode.from_tensor(arg) for arg in args), 8, 1e-6, 4)

def vllm_registers_fake(calls):
    @torch.library.register_fake("_C::" + QUANT)
    def fake(q_in, kv, k_cache, slot_mapping, position_ids, cos_sin_cache, q_head_padded, eps, cache_block_size, *more):
        calls.append(q_in.shape)
        return q_in.new_empty(q_in.shape[0], q_head_padded, q_in.shape[2])
"""


@pytest.fixture
def scenario(python: Callable[..., subprocess.CompletedProcess[str]]) -> Scenario:
    return lambda code, **options: python(PRELUDE + code, **options).stdout


def test_missing_operators_are_registered(scenario: Scenario) -> None:
    scenario("""
assert set(vllm.install()) == set(NAMES)
assert vllm.install() == ALL_REGISTERED, vllm.install()
gc.collect()
assert_serves_quant_insert()
assert str(op(QUANT).default._schema) == str(op(QUANT, "abiding").default._schema).replace("abiding::", "_C::")
for name in (BF16, FP8):
    assert str(op(name).default._schema) == str(op(name, "abiding").default._schema).replace("abiding::", "_C::")

def siblings(namespace):
    inputs = case.make("cpu", seed=3)
    rest = (inputs.slots, inputs.positions, inputs.cos_sin)
    one = torch.full((1,), 0.5)
    cache8 = torch.zeros(8, 4, 512, dtype=torch.uint8)
    q8 = torch.zeros(inputs.q.shape, dtype=torch.float8_e4m3fn)
    assert op(FP8, namespace)(inputs.q, inputs.kv, q8, cache8, *rest, one, one, 1e-6, 4) is None
    cache16 = torch.zeros(8, 4, 512, dtype=torch.bfloat16)
    assert op(BF16, namespace)(inputs.q, inputs.kv, cache16, *rest, 1e-6, 4) is None
    return cache8, q8, cache16, inputs.q
for ours, theirs in zip(siblings("_C"), siblings("abiding")):
    assert ours.view(torch.uint8).any()
    assert_bitwise_equal(ours, theirs)
""")


def test_engine_code_compiles(scenario: Scenario) -> None:
    scenario("""
vllm.install()
def engine(*args):
    return op(QUANT)(*args) * 2
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
""")


def test_vllm_registers_its_fake_afterwards(scenario: Scenario) -> None:
    scenario("""
vllm.install()
calls = []
assert hasattr(torch.ops._C, QUANT)
vllm_registers_fake(calls)
assert_serves_quant_insert()
assert fake_call().shape == (5, 8, 512) and calls
compiled = torch.compile(lambda *args: op(QUANT)(*args), fullgraph=True, backend="aot_eager")
assert_bitwise_equal(quant_insert(compiled)[1], quant_insert(op(QUANT, "abiding"))[1])
""")


@pytest.mark.parametrize("later", ["", f", {LATER}"], ids=["nine arguments", "thirteen arguments"])
def test_schema_and_fake_without_a_kernel(scenario: Scenario, later: str) -> None:
    scenario(f"""
theirs = torch.library.Library("_C", "FRAGMENT")
theirs.define(QUANT + "({QUANT_ARGUMENTS}{later}) -> Tensor")
calls = []
vllm_registers_fake(calls)
report = vllm.install()
assert report["_C::" + QUANT] == IMPLEMENTED, report
assert report["_C::" + BF16] == report["_C::" + FP8] == REGISTERED, report
assert_serves_quant_insert()
assert fake_call().shape == (5, 8, 512) and calls
""")


def test_flags_of_later_releases(scenario: Scenario) -> None:
    scenario(f"""
theirs = torch.library.Library("_C", "FRAGMENT")
theirs.define(QUANT + "({QUANT_ARGUMENTS}, {LATER}) -> Tensor")
theirs.define(BF16 + "(Tensor! q, {TENSORS}, float eps, int cache_block_size, bool apply_q_norm=True) -> ()")
assert vllm.install()["_C::" + BF16] == IMPLEMENTED
assert_serves_quant_insert(apply_q_norm=True, kv_mxfp8=False, apply_q_rope=True, is_q_interleaved=False)
for norm, rope in ((False, True), (True, False), (False, False)):
    out, cache = quant_insert(op(QUANT), apply_q_norm=norm, apply_q_rope=rope)
    inputs = case.make("cpu", seed=7)
    assert_bitwise_equal(out, inputs.run(abiding.mla_prologue, apply_q_norm=norm, apply_q_rope=rope))
    assert_bitwise_equal(cache, inputs.guard.storage)
inputs = case.make("cpu", seed=7)
before = inputs.guard.storage.clone()
rows = (inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin)
calls = [
    (lambda: op(QUANT)(inputs.q, *rows, 8, 1e-6, 4, True, True), "kv_mxfp8 is True; expected False"),
    (lambda: op(QUANT)(inputs.q, *rows, 8, 1e-6, 4, is_q_interleaved=True), "is_q_interleaved is True; expected False"),
    (lambda: op(BF16)(inputs.q, *rows, 1e-6, 4, apply_q_norm=False), "apply_q_norm is False; expected True"),
]
for call, message in calls:
    try:
        call()
    except RuntimeError as error:
        assert message in str(error) and "_C::" in str(error), error
    else:
        raise AssertionError(message)
assert_bitwise_equal(inputs.guard.storage, before)
""")


def test_existing_kernels_are_kept(scenario: Scenario) -> None:
    scenario(f"""
theirs = torch.library.Library("_C", "FRAGMENT")
schema = QUANT + "({QUANT_ARGUMENTS}, {LATER}) -> Tensor"
theirs.define(schema)
mine = lambda q_in, *rest: torch.full_like(q_in, 42)
theirs.impl(QUANT, mine, "CPU")
theirs.impl(QUANT, mine, "CUDA")
theirs.define(BF16 + "(Tensor! q, {TENSORS}, float eps, int cache_block_size) -> ()")
def mine_in_place(q, *rest):
    q.fill_(42)
theirs.impl(BF16, mine_in_place, "CompositeExplicitAutograd")
report = vllm.install()
assert report["_C::" + QUANT].startswith("kept: ") and report["_C::" + BF16].startswith("kept: "), report
out, cache = quant_insert(op(QUANT))
assert (out == 42).all() and (cache == quant_insert(lambda q, *rest: q)[1]).all()
inputs = case.make("cpu")
op(BF16)(inputs.q, inputs.kv, inputs.kv, inputs.slots, inputs.positions, inputs.cos_sin, 1e-6, 4)
assert (inputs.q == 42).all()
assert vllm.install() == report
""")


@pytest.mark.parametrize("theirs", ["CPU", "CUDA"])
def test_only_missing_devices_are_filled(scenario: Scenario, theirs: str) -> None:
    scenario(f"""
library = torch.library.Library("_C", "FRAGMENT")
library.define(QUANT + "({QUANT_ARGUMENTS}) -> Tensor")
library.impl(QUANT, lambda q_in, *rest: torch.full_like(q_in, 42), "{theirs}")
kernel_before = torch._C._dispatch_dump_table("_C::" + QUANT)
others = [device for device in DEVICES.split(", ") if device != "{theirs}"] or ["nothing"]
assert vllm.install()["_C::" + QUANT] == "implemented: " + others[0] + "; kept: {theirs}"
row = lambda table, key: [line for line in table.splitlines() if line.startswith(key + ":")]
assert row(kernel_before, "{theirs}") == row(torch._C._dispatch_dump_table("_C::" + QUANT), "{theirs}") != []
if "{theirs}" == "CPU":
    assert (quant_insert(op(QUANT))[0] == 42).all()
else:
    assert_serves_quant_insert()
""")


@pytest.mark.parametrize(
    ("schema", "difference"),
    [
        (f"(Tensor! q, {TENSORS}, float eps, int cache_block_size) -> ()", "argument 0 is Tensor! q, not Tensor q_in"),
        (
            f"({SWAPPED}) -> Tensor",
            "argument 3 is Tensor position_ids, not Tensor slot_mapping",
        ),
        (
            f"({QUANT_ARGUMENTS.replace('Tensor!', 'Tensor')}) -> Tensor",
            "argument 2 is Tensor k_cache, not Tensor! k_cache",
        ),
        (f"({QUANT_ARGUMENTS.replace('float eps', 'int eps')}) -> Tensor", "argument 7 is int eps, not float eps"),
        (f"({QUANT_ARGUMENTS.replace('int cache_block_size', '*, int cache_block_size')}) -> Tensor", "keyword only"),
        (f"({QUANT_ARGUMENTS.removesuffix(', int cache_block_size')}) -> Tensor", "argument 8 is missing"),
        (f"({QUANT_ARGUMENTS}) -> Tensor[]", "returns"),
        (f"({QUANT_ARGUMENTS}) -> ()", "returns"),
        (f"({QUANT_ARGUMENTS}) -> (Tensor, Tensor)", "returns"),
        (f"({QUANT_ARGUMENTS}, bool apply_q_norm) -> Tensor", "bool apply_q_norm is not an optional flag"),
        (f"({QUANT_ARGUMENTS}, Tensor? scale=None) -> Tensor", "scale is not an optional flag"),
        (f"({QUANT_ARGUMENTS}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS.replace('Tensor!', 'Tensor(a!)')}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS.replace('int q_head_padded', 'SymInt q_head_padded')}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS}, {LATER}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS}, *, {LATER}) -> Tensor", None),
    ],
)
def test_schema_comparison(schema: str, difference: str | None) -> None:
    expected = torch._C.parse_schema(vllm.ALIASES[0].schema)
    found = vllm._difference(torch._C.parse_schema(f"_C::{QUANT}{schema}"), expected)
    assert found == difference if difference is None else difference in (found or "")


def test_an_incompatible_operator_is_left_alone(scenario: Scenario) -> None:
    scenario(f"""
library = torch.library.Library("_C", "FRAGMENT")
library.define(QUANT + "(Tensor! q, {TENSORS}, float eps, int cache_block_size) -> ()")
table = torch._C._dispatch_dump_table("_C::" + QUANT)
report = vllm.install()
status = report["_C::" + QUANT]
assert status.startswith("left alone: argument 0 is Tensor! q, not Tensor q_in") and "slot_mapping" in status, status
assert torch._C._dispatch_dump_table("_C::" + QUANT) == table
assert report["_C::" + BF16] == report["_C::" + FP8] == REGISTERED, report
""")


def test_an_installed_vllm_goes_first(scenario: Scenario, tmp_path: Path) -> None:
    """Its binary defines the names, which fails if somebody has done so before."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_C.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    (package / "_C_stable_libtorch.py").write_text(f"""
import torch
library = torch.library.Library("_C", "FRAGMENT")
library.define("{QUANT}({QUANT_ARGUMENTS}, {LATER}) -> Tensor")
library.impl("{QUANT}", lambda q_in, *rest: q_in, "CUDA")
""")
    scenario(
        """
import importlib
report = vllm.install()
assert report == ALL_REGISTERED | {NAMES[0]: "implemented: CPU; kept: CUDA"}, report
assert_serves_quant_insert()
importlib.import_module("vllm._C_stable_libtorch")
""",
        first=package.parent,
    )


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "AttributeError", "ValueError"])
def test_a_vllm_that_cannot_load_is_tolerated(scenario: Scenario, tmp_path: Path, error: str) -> None:
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {error}('torch is too new')")
    scenario(
        "assert vllm.install() == ALL_REGISTERED\nassert_serves_quant_insert()",
        first=package.parent,
    )


def test_wrong_arguments_raise_and_write_nothing(scenario: Scenario) -> None:
    scenario("""
vllm.install()
inputs = case.make("cpu", seed=7)
before = inputs.guard.storage.clone()
for wrong in (inputs.kv.float(), inputs.kv[:, :256], inputs.kv[:3], inputs.kv.to("meta")):
    try:
        op(QUANT)(inputs.q, wrong, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin, 8, 1e-6, 4)
    except RuntimeError as error:
        assert QUANT in str(error) and "kv" in str(error) and "expected" in str(error), error
    else:
        raise AssertionError(f"kv {wrong.shape} {wrong.dtype} {wrong.device} was accepted")
assert_bitwise_equal(inputs.guard.storage, before)
""")


COLLECTIVES = """
ops, ranks, most = torch.ops._C_custom_ar, 2, 1 << 16

def drive():
    meta = [torch.ops.abiding_custom_ar.allocate_shared_memory_and_handle(ops.meta_size() + most)[0] for _ in "ab"]
    handles = [ops.init_custom_ar(meta, torch.empty(8, dtype=torch.uint8), rank, True) for rank in range(ranks)]
    for fa in handles:
        ops.register_buffer(fa, meta)
        assert ops.get_graph_buffer_ipc_meta(fa) == ([], [])
        ops.register_graph_buffers(fa, [[], []], [[], []])
    xs, outs = [torch.full((5,), rank + 1.0) for rank in range(ranks)], [torch.zeros(5) for _ in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(lambda rank: ops.all_reduce(handles[rank], xs[rank], outs[rank], 0, 0), range(ranks)))
    for fa, address, out in zip(handles, meta, outs):
        assert_bitwise_equal(out, torch.full((5,), 3.0))
        ops.dispose(fa)
        ops.free_shared_buffer(address)
"""


def test_the_custom_all_reduce_is_served(scenario: Scenario) -> None:
    scenario(f"""
from concurrent.futures import ThreadPoolExecutor
{COLLECTIVES}
vllm.install()
for alias in vllm.ALIASES:
    if alias.name.startswith("_C_custom_ar::"):
        name = alias.name.partition("::")[2]
        assert str(op(name, "_C_custom_ar").default._schema) == str(
            op(name, "abiding_custom_ar").default._schema).replace("abiding_custom_ar::", "_C_custom_ar::"), name
drive()
_, handle = torch.ops.abiding_custom_ar.allocate_shared_memory_and_handle(64)
assert ops.open_mem_handle(handle) > 0
try:
    ops.dispose(123)
except RuntimeError as error:
    assert "expected the handle of a communicator that is open" in str(error), error
""")


@pytest.mark.parametrize("key", ["CUDA", "CompositeExplicitAutograd"])
def test_a_custom_all_reduce_is_served_whole_or_not_at_all(scenario: Scenario, key: str) -> None:
    """A handle that one library gives out means nothing to the other."""
    scenario(f"""
theirs = torch.library.Library("_C_custom_ar", "FRAGMENT")
theirs.define("meta_size() -> int")
theirs.define("dispose(int fa) -> ()")
theirs.impl("dispose", lambda fa: None, "{key}")
report = vllm.install()
own = {{name: what for name, what in report.items() if name.startswith("_C_custom_ar::")}}
assert len(own) == 10
assert set(own.values()) == {{"kept: _C_custom_ar::dispose has kernels of its own, and shares handles with it"}}, own
assert not hasattr(torch.ops._C_custom_ar, "init_custom_ar")
assert report[NAMES[0]] == REGISTERED
""")


def test_a_custom_all_reduce_with_schemas_alone_is_filled(scenario: Scenario) -> None:
    scenario(f"""
from concurrent.futures import ThreadPoolExecutor
{COLLECTIVES}
theirs = torch.library.Library("_C_custom_ar", "FRAGMENT")
for alias in vllm.ALIASES[5:9]:
    theirs.define(alias.schema.partition("::")[2])
report = vllm.install()
assert [report[alias.name] for alias in vllm.ALIASES[5:9]] == [IMPLEMENTED] * 4, report
drive()
""")


def test_minimax_reduce_rms_is_served_and_compiles(scenario: Scenario) -> None:
    scenario("""
vllm.install()
def call(rows, wq, wk, table):
    q, k = torch.ops._C.minimax_allreduce_rms_qk(rows, wq, wk, table, 32, 8, 0, 1, 1e-6)
    return q, k, torch.ops._C.minimax_allreduce_rms(rows[:, :32].contiguous(), wq, table, 0, 1, 1e-6)
slots, counters = torch.full((3 * 4096,), -0.0), torch.zeros(3, dtype=torch.int32)
sizes = torch.tensor([0, 16384])
table = torch.tensor([0, 0, slots.data_ptr(), counters.data_ptr(), sizes.data_ptr()])
rows, wq, wk = torch.randn(5, 48), torch.randn(32), torch.randn(8)
q, k, single = call(rows, wq, wk, table)
for out, x, w in ((q, rows[:, :32], wq), (k, rows[:, 32:40], wk), (single, rows[:, :32], wq)):
    torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, x.shape[1:], w, 1e-6))
compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
for actual, expected in zip(compiled(rows, wq, wk, table), (q, k, single)):
    assert_bitwise_equal(actual, expected)
""")


def test_mxfp8_experts_are_served_and_compile(scenario: Scenario) -> None:
    """As vLLM's own test calls them, with scales of either dtype."""
    scenario("""
from abiding import mxfp8_moe, reference
from abiding.testing.cases.mxfp8_moe import GemmCase
report = vllm.install()
for name in ("mxfp8_experts_quant", "cutlass_mxfp8_grouped_mm"):
    assert report["_C::" + name] == REGISTERED + " (in no vLLM since 0.26)"
    assert str(op(name).default._schema) == str(op(name, "abiding").default._schema).replace("abiding::", "_C::")
i = GemmCase((5, 0, 130), 128, 256).make()
sizes = i.expert_offsets.diff()
problems = torch.stack([sizes, torch.full_like(sizes, 128), torch.full_like(sizes, 256)], 1)
starts, tiles = i.expert_offsets[:-1].clone(), (sizes + 127) // 128 * 128
groups = (problems, starts, (tiles.cumsum(0) - tiles).int())

def call(x, weight, scales, out, data, codes):
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
""")


def test_the_former_name_is_the_same_module() -> None:
    import abiding.compat.vllm as former

    assert former is vllm
