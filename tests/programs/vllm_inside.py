"""vLLM's real Python on a pretended Hopper GPU: what Abiding's jobs rest on, and what they do in it.

python vllm_inside.py FOLDER_OF_A_RELEASE SCENARIO
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from pretend import pretend
from torch import Tensor

from abiding import mxfp8_moe
from abiding.engines import vllm as ours
from abiding.engines.vllm import contract, linear, moe

pretend(Path(sys.argv[1]))
contract.require_hopper = lambda: None  # no CUDA kernels are loaded where there is no GPU
lines: list[str] = []


class Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        lines.append(record.getMessage())


logging.getLogger("vllm.abiding").addHandler(Lines())
logging.getLogger("vllm.abiding").setLevel(logging.INFO)

oracle: Any = importlib.import_module(moe.ORACLE)
kernels: Any = importlib.import_module(linear.KERNELS)
configs: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.config")
modular_kernel: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.modular_kernel")
MoEActivation: Any = importlib.import_module("vllm.model_executor.layers.fused_moe.activation").MoEActivation
PlatformEnum: Any = importlib.import_module("vllm.platforms").PlatformEnum


def register(choice: str) -> dict[str, str]:
    os.environ["ABIDING_VLLM"] = choice
    return {name: status.state for name, status in ours.register().items()}


def config(activation: Any = MoEActivation.SILU, **others: Any) -> Any:
    parallel = {
        "tp_size": 1,
        "pcp_size": 1,
        "dp_size": 1,
        "ep_size": 1,
        "tp_rank": 0,
        "pcp_rank": 0,
        "dp_rank": 0,
        "ep_rank": 0,
        "sp_size": 1,
        "use_ep": False,
        "all2all_backend": "allgather_reducescatter",
        "enable_eplb": False,
    }
    parallel |= {name: others.pop(name) for name in list(others) if name in parallel}
    fields = {
        "num_experts": 8,
        "experts_per_token": 2,
        "hidden_dim": 64,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_logical_experts": 8,
        "activation": activation,
        "device": "cpu",
        "in_dtype": torch.bfloat16,
        "routing_method": configs.RoutingMethodType.TopK,
        "moe_parallel_config": configs.FusedMoEParallelConfig(**parallel),
    }
    return configs.FusedMoEConfig(**(fields | others))


def selected(**others: Any) -> str:
    try:
        _backend, experts = oracle.select_mxfp8_moe_backend(config(**others))
    except ValueError as error:
        return "none: " + str(error)
    name: str = experts.__name__
    return name


def contracts_selection_and_undo() -> None:
    stock = (
        oracle._select_kernel_cls,
        oracle._SUPPORTED_BACKENDS,
        list(kernels._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CUDA]),
    )

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
    expected = {
        "moe": "active",
        "linear": "active",
        "qk_norm": "unavailable",
        "all_reduce": "unavailable",
        "prologue": "unavailable",
    }
    assert register("all") == expected, (ours.ENGINE.status(), lines)
    select = oracle._select_kernel_cls
    count = len(lines)
    assert register("all") == expected
    assert oracle._select_kernel_cls is select
    assert sum("is active" in line for line in lines[count:]) == 0, lines[count:]
    assert any("qk_norm is left to vllm: not in this release" in line for line in lines), lines
    possible = kernels._POSSIBLE_MXFP8_KERNELS[PlatformEnum.CUDA]
    assert next(one.__name__ for one in possible) == "AbidingMxfp8LinearKernel"
    assert possible[1:] == stock[2]

    # What is taken, and what is refused so that vLLM's next backend serves it.
    name = "AbidingMxfp8Experts"
    assert selected() == name
    oai = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}
    assert selected(activation=MoEActivation.SWIGLUOAI_UNINTERLEAVE, **oai) == name
    assert selected(swiglu_limit=10.0) == name
    assert selected(tp_size=2) == selected(ep_size=2, use_ep=True, num_local_experts=4) == name
    assert selected(dp_size=2, ep_size=2, use_ep=True) == name
    for others in (
        {"has_bias": True},
        {"is_lora_enabled": True},
        {"in_dtype": torch.float16},
        {"hidden_dim": 80},
        {"intermediate_size": 48},
        {"experts_per_token": 17},
        {"num_local_experts": 1025},
        {"activation": MoEActivation.GELU},
        {"activation": MoEActivation.SWIGLUOAI},
        {"activation": MoEActivation.SWIGLUOAI_UNINTERLEAVE},
        {"activation": MoEActivation.RELU2_NO_MUL},
        {"swiglu_limit": -1.0},
        {"swiglu_alpha": 0.0},
        {"dp_size": 2, "ep_size": 2, "use_ep": True, "all2all_backend": "deepep_low_latency"},
        {"dp_size": 2, "ep_size": 2, "use_ep": True, "all2all_backend": "deepep_high_throughput"},
        {"moe_backend": "marlin"},
        {"moe_backend": "triton"},
    ):
        assert selected(**others) != name, others
    assert any("these experts are left to vLLM: kernel does not support biases" in line for line in lines), lines

    # A wrong mode is said, and the job is left to vLLM.
    register("0")
    os.environ["ABIDING_VLLM_MOE_MODE"] = "w4a4"
    assert register("moe")["moe"] == "unavailable"
    assert "expected w8a16 or w8a8 or fp8" in ours.ENGINE.status()["moe"].reason
    assert selected() == before
    os.environ["ABIDING_VLLM_MOE_MODE"] = "w8a8"
    assert register("moe, linear")["moe"] == "active"
    assert selected() == name
    from abiding.engines.vllm.experts import AbidingMxfp8Experts

    assert AbidingMxfp8Experts.mode == "w8a8"
    assert not AbidingMxfp8Experts.__abstractmethods__
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
    assert linear.COMPILE_FACTOR not in vllm.envs.compile_factors()
    assert selected() == before

    # Drift is named, and left to vLLM.

    def _select_kernel_cls(backend: Any, config: Any, more: Any) -> None:
        pass

    oracle._select_kernel_cls = _select_kernel_cls
    assert register("moe")["moe"] == "unavailable"
    reason = ours.ENGINE.status()["moe"].reason
    assert "oracle.mxfp8._select_kernel_cls takes (backend config more); expected (backend config)" in reason, reason


def layers_through_vllm() -> None:
    register("moe,linear")
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import make_fp8_moe_quant_config

    from abiding.engines.vllm.experts import AbidingMxfp8Experts

    g = torch.Generator().manual_seed(3)

    def weights(*shape: int) -> tuple[Tensor, Tensor]:
        data = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
        return data, torch.randint(119, 123, (*shape[:-1], shape[-1] // 32), generator=g, dtype=torch.uint8)

    num_experts, hidden, inter, tokens, top_k = 8, 256, 64, 13, 2
    cases: tuple[tuple[Any, dict[str, Any], Any], ...] = (
        (MoEActivation.SILU, {}, {}),
        (MoEActivation.SILU, {"swiglu_limit": 0.5}, {"swiglu_limit": 0.5}),
        (MoEActivation.SWIGLUOAI_UNINTERLEAVE, {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0}, None),
    )
    # Modes that are asked for, and what a layer runs in: with a scale that cannot be rebased, not "fp8".
    modes: tuple[tuple[Any, Any], ...] = (("w8a16", "w8a16"), ("w8a8", "w8a8"), ("fp8", "fp8"), ("fp8", "w8a8"))
    for (activation, constants, given), (mode, runs_in) in itertools.product(cases, modes):
        AbidingMxfp8Experts.mode = mode
        given = constants if given is None else given
        w13, s13 = weights(num_experts, 2 * inter, hidden)
        w2, s2 = weights(num_experts, hidden, inter)
        if mode != runs_in:
            s13[1, 5, 2] = 90
        plain = [mxfp8_moe.swizzle_scales(s) for s in (s13, s2)]
        parameters = [torch.nn.Parameter(s.clone(), requires_grad=False) for s in (s13, s2)]
        addresses = [p.data_ptr() for p in parameters]
        sizes = {
            "num_experts": 2 * num_experts,
            "num_local_experts": num_experts,
            "hidden_dim": hidden,
            "intermediate_size": inter,
        }
        moe_config = config(activation=activation, **sizes, **constants)
        quant = make_fp8_moe_quant_config(
            oracle.Fp8MoeBackend.TRITON_MXFP8,
            *parameters,
            None,
            None,
            block_shape=[1, 32],
            swiglu_limit=constants.get("swiglu_limit"),
            gemm1_alpha=constants.get("swiglu_alpha"),
            gemm1_beta=constants.get("swiglu_beta"),
        )
        experts: Any = AbidingMxfp8Experts(moe_config=moe_config, quant_config=quant)
        assert parameters[0].data_ptr() == addresses[0]  # 128 rows and 8 codes: in place; no second copy in any case
        assert all(torch.equal(p.data, s) for p, s in zip(parameters, plain, strict=True))
        assert experts.expects_unquantized_inputs

        loaded = [(w13.clone(), plain[0]), (w2.clone(), plain[1])]
        if mode == "fp8":
            loaded = [mxfp8_moe.rebase(*pair)[:2] for pair in loaded]
        lines.clear()
        x = torch.randn(tokens, hidden, generator=g).bfloat16()
        ids = torch.randint(0, 2 * num_experts, (tokens, top_k), generator=g, dtype=torch.int32)
        ids[3] = -1
        router = torch.rand(tokens, top_k, generator=g)
        expert_map = torch.full((2 * num_experts,), -1, dtype=torch.int32)
        expert_map[1::2] = torch.arange(num_experts, dtype=torch.int32)
        first, second, shape = experts.workspace_shapes(
            tokens, 2 * inter, hidden, top_k, 2 * num_experts, num_experts, None, activation
        )
        out = torch.full(shape, 9.0, dtype=torch.bfloat16)
        space = torch.empty(second, dtype=torch.bfloat16)
        result = experts.apply(
            out,
            x,
            w13,
            w2,
            router,
            ids,
            activation,
            2 * num_experts,
            expert_map,
            None,
            None,
            torch.empty(first),
            space,
            None,
            False,
        )
        assert result is None
        local = torch.where(ids < 0, -1, expert_map[ids.clamp(min=0)])
        name: Any = "silu" if activation is MoEActivation.SILU else "swiglu_oai"
        expected = mxfp8_moe.moe(x, *loaded[0], *loaded[1], local, router, activation=name, mode=runs_in, **given)
        assert torch.equal(out, expected)
        found = ((w13, parameters[0].data), (w2, parameters[1].data))  # in place, where vLLM loaded them
        for (w, s), (new, codes) in zip(found, loaded, strict=True):
            assert torch.equal(w.view(torch.uint8), new.view(torch.uint8))
            assert torch.equal(s, codes)
        if mode == "fp8":
            assert not torch.equal(parameters[0].data, plain[0])
            end = "1 rows cannot be rebased, so this layer runs in w8a8" if runs_in == "w8a8" else ""
            assert [line for line in lines if "rebased experts for fp8" in line and line.endswith(end)], lines
        else:
            assert not lines, lines
        assert isinstance(experts.finalize_weight_and_reduce_impl(), modular_kernel.TopKWeightAndReduce)

    # The linear kernel that vLLM chooses.
    torch.set_default_dtype(torch.bfloat16)
    for n in (96, 72):
        w, s = weights(n, hidden)
        told = "weight_shape" in inspect.signature(kernels.init_mxfp8_linear_kernel).parameters
        from abiding.engines.vllm.linear_kernel import AbidingMxfp8LinearKernel as Ours

        if told and n % 32:
            assert not Ours.can_implement(kernels.Mxfp8LinearLayerConfig(weight_shape=(n, hidden)))[0]
            continue
        make_config = kernels.Mxfp8LinearLayerConfig
        kernel = Ours(make_config(weight_shape=(n, hidden)) if told else make_config())
        assert Ours.is_supported()[0]
        assert not Ours.is_supported(100)[0]
        assert Ours.is_supported(90)[0]
        layer: Any = torch.nn.Module()
        layer.output_size_per_partition, layer.input_size_per_partition = n, hidden
        layer.weight = torch.nn.Parameter(w, requires_grad=False)
        layer.weight_scale = torch.nn.Parameter(s, requires_grad=False)
        kernel.process_weights_after_loading(layer)
        x = torch.randn(5, hidden, generator=g, dtype=torch.float32).bfloat16()
        bias = torch.randn(n, generator=g, dtype=torch.float32).bfloat16()
        exact = x.double() @ (w.double() * torch.exp2(s.double() - 127).repeat_interleave(32, 1)).T
        for b in (None, bias):
            out = kernel.apply_weights(layer, x, b)
            assert out.shape == (5, n)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out.double(), exact + (0 if b is None else b.double()), rtol=2e-2, atol=2e-2)
            # vLLM traces linear layers, with the number of tokens as a symbol.
            compiled = torch.compile(kernel.apply_weights, fullgraph=True, dynamic=True, backend="aot_eager")
            assert torch.equal(compiled(layer, x, b), out)
    torch.set_default_dtype(torch.float16)
    assert not Ours.can_implement(make_config(weight_shape=(96, hidden)) if told else make_config())[0]


def every_quantization_method() -> None:
    """All of vLLM's methods that load MXFP8 experts choose our class: each is constructed."""
    register("moe")
    given: dict[str, Any] = {
        "moe": config(),
        "moe_config": config(),
        "layer": types.SimpleNamespace(moe_config=config()),
        "quant_config": types.SimpleNamespace(is_checkpoint_mxfp8_serialized=True),
    }
    release, found = Path(sys.argv[1]), []
    for path in sorted((release / "vllm" / "model_executor" / "layers" / "quantization").rglob("*.py")):
        if "select_mxfp8_moe_backend(" not in path.read_text():
            continue
        module = importlib.import_module(".".join(path.relative_to(release).with_suffix("").parts))
        classes = [one for one in vars(module).values() if inspect.isclass(one) and one.__module__ == module.__name__]
        method: Any = next(one for one in classes if "select_mxfp8_moe_backend(" in inspect.getsource(one))
        names = list(inspect.signature(method.__init__).parameters)[1:]
        keys = ("weight_quant_key", "kMxfp8Static"), ("activation_quant_key", "kMxfp8Dynamic")
        given |= {name: getattr(module, key, None) for name, key in keys}
        assert method(**{name: given.get(name) for name in names}).experts_cls.__name__ == "AbidingMxfp8Experts", path
        found.append(method.__name__)
    assert len(found) >= 3, found


if __name__ == "__main__":
    globals()[sys.argv[2]]()
