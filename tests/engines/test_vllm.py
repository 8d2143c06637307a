"""vLLM's real Python, oldest and newest release, on a pretended Hopper GPU: what our jobs rest on, and what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RELEASES: list[Path | None] = [*sorted((ROOT / "build" / "engines").glob("vllm-*[0-9]"))]
PREAMBLE = """
import importlib, inspect, logging, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from pretend import pretend
pretend(Path({release!r}))
import torch
from abiding import engines
from abiding.engines import vllm as ours
from abiding.engines.vllm import contract, moe, linear
contract.require_hopper = lambda: None  # no CUDA kernels are loaded where there is no GPU
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("vllm.abiding").addHandler(Lines())
logging.getLogger("vllm.abiding").setLevel(logging.INFO)

def register(choice):
    os.environ["ABIDING_VLLM"] = choice
    return {{name: status.state for name, status in ours.register().items()}}

oracle = importlib.import_module(moe.ORACLE)
kernels = importlib.import_module(linear.KERNELS)
from vllm.platforms import PlatformEnum
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
import vllm.model_executor.layers.fused_moe.config as configs

def config(activation=MoEActivation.SILU, **others):
    parallel = dict(tp_size=1, pcp_size=1, dp_size=1, ep_size=1, tp_rank=0, pcp_rank=0, dp_rank=0, ep_rank=0, sp_size=1,
                    use_ep=False, all2all_backend="allgather_reducescatter", enable_eplb=False)
    parallel |= {{name: others.pop(name) for name in list(others) if name in parallel}}
    fields = dict(num_experts=8, experts_per_token=2, hidden_dim=64, intermediate_size=64, num_local_experts=8,
                  num_logical_experts=8, activation=activation, device="cpu", in_dtype=torch.bfloat16,
                  routing_method=configs.RoutingMethodType.TopK,
                  moe_parallel_config=configs.FusedMoEParallelConfig(**parallel))
    return configs.FusedMoEConfig(**(fields | others))

def selected(**others):
    try:
        backend, experts = oracle.select_mxfp8_moe_backend(config(**others))
    except ValueError as error:
        return "none: " + str(error)
    return experts.__name__
"""


@pytest.fixture(params=RELEASES or [None], ids=lambda path: path.name if path else "none")
def scenario(request: pytest.FixtureRequest) -> Callable[..., str]:
    if os.environ.get("ABIDING_REQUIRE_ENGINES") != "1":
        pytest.skip("importing vLLM takes long; `make engines` unpacks it and runs these")
    if request.param is None:
        pytest.fail("no release of vLLM is unpacked under build/engines; tools/engines/fetch.py does that")

    def run(body: str) -> str:
        code = PREAMBLE.format(tests=str(Path(__file__).parent), release=str(request.param)) + body
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return done.stdout

    return run


@pytest.mark.timeout(300)
def test_contracts_selection_and_undo(scenario: Callable[..., str]) -> None:
    """One process for all, because importing vLLM takes most of the time."""
    scenario("""
stock = oracle._select_kernel_cls, oracle._SUPPORTED_BACKENDS, list(kernels._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CUDA])

# Drift: these raise an UnavailableError that names what has changed.
moe.MoeJob().contract()
linear.LinearJob().contract()

# Off is stock.
for choice in ("", "0"):
    assert set(register(choice).values()) == {"off"}
    assert (oracle._select_kernel_cls, oracle._SUPPORTED_BACKENDS) == stock[:2]
before = selected()
assert "Abiding" not in before, before

# All: two jobs now, three later; twice is once.
expected = {"moe": "active", "linear": "active", "qk_norm": "unavailable", "all_reduce": "unavailable",
            "prologue": "unavailable"}
assert register("all") == expected, (ours.ENGINE.status(), lines)
select = oracle._select_kernel_cls
count = len(lines)
assert register("all") == expected and oracle._select_kernel_cls is select
assert sum("is active" in line for line in lines[count:]) == 0, lines[count:]
assert any("qk_norm is left to vllm: not in this release" in line for line in lines), lines
possible = kernels._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CUDA]
assert [one.__name__ for one in possible][0] == "AbidingMxfp8LinearKernel"
assert possible[1:] == stock[2]

# What is taken, and what is refused so that vLLM's next backend serves it.
OURS = "AbidingMxfp8Experts"
assert selected() == OURS
oai = dict(swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0)
assert selected(activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE, **oai) == OURS
assert selected(swiglu_limit=10.0) == OURS
assert selected(tp_size=2) == selected(ep_size=2, use_ep=True, num_local_experts=4) == OURS
assert selected(dp_size=2, ep_size=2, use_ep=True) == OURS
for others in (
    dict(has_bias=True), dict(is_lora_enabled=True), dict(in_dtype=torch.float16), dict(hidden_dim=80),
    dict(intermediate_size=48), dict(experts_per_token=17), dict(num_local_experts=1025),
    dict(activation=MoEActivation.GELU), dict(activation=MoEActivation.SWIGLUOAI),
    dict(activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE), dict(activation=MoEActivation.RELU2_NO_MUL),
    dict(swiglu_limit=-1.0), dict(swiglu_alpha=0.0),
    dict(dp_size=2, ep_size=2, use_ep=True, all2all_backend="deepep_low_latency"),
    dict(dp_size=2, ep_size=2, use_ep=True, all2all_backend="deepep_high_throughput"),
    dict(moe_backend="marlin"), dict(moe_backend="triton"),
):
    assert selected(**others) != OURS, others
assert any("these experts are left to vLLM: kernel does not support biases" in line for line in lines), lines

# A wrong mode is said, and the job is left to vLLM.
register("0")
os.environ["ABIDING_VLLM_MOE_MODE"] = "w4a4"
assert register("moe")["moe"] == "unavailable" and "expected w8a16 or w8a8" in ours.ENGINE.status()["moe"].reason
assert selected() == before
os.environ["ABIDING_VLLM_MOE_MODE"] = "w8a8"
assert register("moe, linear")["moe"] == "active" and selected() == OURS
from abiding.engines.vllm.experts import AbidingMxfp8Experts
assert AbidingMxfp8Experts.mode == "w8a8" and not AbidingMxfp8Experts.__abstractmethods__
from abiding.engines.vllm.linear_kernel import AbidingMxfp8LinearKernel
assert not AbidingMxfp8LinearKernel.__abstractmethods__

# Compiled graphs of vLLM are not shared with those of stock.
import vllm.envs
assert linear.COMPILE_FACTOR in vllm.envs.compile_factors()

# Names that do not exist are said; nothing raises.
register("moe,tea")
assert any("there is no job 'tea'" in line for line in lines)

# Off again is stock again.
assert set(register("0").values()) == {"off"}
assert (oracle._select_kernel_cls, oracle._SUPPORTED_BACKENDS) == stock[:2]
assert kernels._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CUDA] == stock[2]
assert linear.COMPILE_FACTOR not in vllm.envs.compile_factors() and selected() == before

# Drift is named, and left to vLLM.
def _select_kernel_cls(backend, config, more): pass
oracle._select_kernel_cls = _select_kernel_cls
assert register("moe")["moe"] == "unavailable"
reason = ours.ENGINE.status()["moe"].reason
assert "oracle.mxfp8._select_kernel_cls takes (backend config more); expected (backend config)" in reason, reason
""")


@pytest.mark.timeout(300)
def test_layers_through_vllm(scenario: Callable[..., str]) -> None:
    """vLLM's own modular kernel and linear registry call ours, on the CPU; values are those of a direct call."""
    scenario("""
register("moe,linear")
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.oracle.fp8 import make_fp8_moe_quant_config
from abiding import mxfp8_moe
from abiding.engines.vllm.experts import AbidingMxfp8Experts

g = torch.Generator().manual_seed(3)
def weights(*shape):
    data = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
    return data, torch.randint(119, 123, (*shape[:-1], shape[-1] // 32), generator=g, dtype=torch.uint8)

E, H, I, T, K = 8, 256, 64, 13, 2
for activation, constants, given in (
    (MoEActivation.SILU, {}, {}),
    (MoEActivation.SILU, dict(swiglu_limit=0.5), dict(swiglu_limit=0.5)),
    (MoEActivation.SWIGLUOAI_UNINTERLEAVE, dict(swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0), None),
):
    given = constants if given is None else given
    w13, s13 = weights(E, 2 * I, H)
    w2, s2 = weights(E, H, I)
    plain = [mxfp8_moe.swizzle_scales(s) for s in (s13, s2)]
    parameters = [torch.nn.Parameter(s.clone(), requires_grad=False) for s in (s13, s2)]
    addresses = [p.data_ptr() for p in parameters]
    sizes = dict(num_experts=2 * E, num_local_experts=E, hidden_dim=H, intermediate_size=I)
    moe_config = config(activation=activation, **sizes, **constants)
    quant = make_fp8_moe_quant_config(
        oracle.Fp8MoeBackend.TRITON_MXFP8, *parameters, None, None, block_shape=[1, 32],
        swiglu_limit=constants.get("swiglu_limit"), gemm1_alpha=constants.get("swiglu_alpha"),
        gemm1_beta=constants.get("swiglu_beta"))
    experts = AbidingMxfp8Experts(moe_config=moe_config, quant_config=quant)
    assert parameters[0].data_ptr() == addresses[0]  # 128 rows and 8 codes: in place; no second copy in any case
    assert all(torch.equal(p.data, s) for p, s in zip(parameters, plain))
    assert experts.expects_unquantized_inputs

    x = torch.randn(T, H, generator=g).bfloat16()
    ids = torch.randint(0, 2 * E, (T, K), generator=g, dtype=torch.int32)
    ids[3] = -1
    router = torch.rand(T, K, generator=g)
    expert_map = torch.full((2 * E,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.arange(E, dtype=torch.int32)
    first, second, shape = experts.workspace_shapes(T, 2 * I, H, K, 2 * E, E, None, activation)
    out = torch.full(shape, 9.0, dtype=torch.bfloat16)
    space = torch.empty(second, dtype=torch.bfloat16)
    result = experts.apply(out, x, w13, w2, router, ids, activation, 2 * E, expert_map, None, None,
                           torch.empty(first), space, None, False)
    assert result is None
    local = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)])
    name = "silu" if activation is MoEActivation.SILU else "swiglu_oai"
    expected = mxfp8_moe.moe(x, w13, plain[0], w2, plain[1], local, router, activation=name, mode="w8a16", **given)
    assert torch.equal(out, expected)
    assert isinstance(experts.finalize_weight_and_reduce_impl(), mk.TopKWeightAndReduce)

# The linear kernel that vLLM chooses.
torch.set_default_dtype(torch.bfloat16)
for n in (96, 72):
    w, s = weights(n, H)
    told = "weight_shape" in inspect.signature(kernels.init_mxfp8_linear_kernel).parameters
    from abiding.engines.vllm.linear_kernel import AbidingMxfp8LinearKernel as Ours
    if told and n % 32:
        assert not Ours.can_implement(kernels.Mxfp8LinearLayerConfig(weight_shape=(n, H)))[0]
        continue
    Config = kernels.Mxfp8LinearLayerConfig
    kernel = Ours(Config(weight_shape=(n, H)) if told else Config())
    assert Ours.is_supported()[0] and not Ours.is_supported(100)[0] and Ours.is_supported(90)[0]
    layer = torch.nn.Module()
    layer.output_size_per_partition, layer.input_size_per_partition = n, H
    layer.weight = torch.nn.Parameter(w, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(s, requires_grad=False)
    kernel.process_weights_after_loading(layer)
    x = torch.randn(5, H, generator=g, dtype=torch.float32).bfloat16()
    bias = torch.randn(n, generator=g, dtype=torch.float32).bfloat16()
    exact = x.double() @ (w.double() * torch.exp2(s.double() - 127).repeat_interleave(32, 1)).T
    for b in (None, bias):
        out = kernel.apply_weights(layer, x, b)
        assert out.shape == (5, n) and out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), exact + (0 if b is None else b.double()), rtol=2e-2, atol=2e-2)
        # vLLM traces linear layers, with the number of tokens as a symbol.
        compiled = torch.compile(kernel.apply_weights, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(layer, x, b), out)
torch.set_default_dtype(torch.float16)
assert not Ours.can_implement(Config(weight_shape=(96, H)) if told else Config())[0]
""")
