"""Abiding inside transformers: whole models from checkpoints, and what is left to transformers."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import abiding.reference.mxfp8_moe as reference
from benchmarks.engines import mxfp8_checkpoint
from benchmarks.engines.mxfp8_checkpoint import Calls, layer_errors, relative_error

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

from abiding.engines import transformers as engine  # noqa: E402  (after the skip)

fp8: Any = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="this transformers has no FP8")

MODELS = ("minimax_m2", "minimax_m3_vl_text", "deepseek_v4")


pytestmark = pytest.mark.usefixtures("registered")


@pytest.fixture
def load(tmp_path: Path, device: torch.device) -> Callable[..., Any]:
    def load(model_type: str = "minimax_m2", implementation: str = "abiding", **options: Any) -> Any:
        changes = options.pop("changes", {})
        if model_type == "deepseek_v4":
            options.setdefault("block", (128, 128))
        folder = mxfp8_checkpoint.write(
            tmp_path / "model", mxfp8_checkpoint.config_of(model_type, **changes), **options
        )
        return from_folder(folder, device, implementation)

    return load


def from_folder(folder: Path, device: torch.device, implementation: str = "abiding") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation=implementation
    )
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # in 5.17 DeepSeek V4's are float32, which its lm_head fails on
            module.bfloat16()
    return model.to(device).eval()


def ids_for(model: Any, tokens: int = 24) -> Tensor:
    return torch.randint(3, 256, (2, tokens), generator=torch.Generator().manual_seed(7)).to(model.device)


def kinds(model: Any) -> tuple[int, int]:
    """How many experts modules and how many FP8 linear layers a model has."""
    modules = list(model.modules())
    return sum(isinstance(m, fp8.FP8Experts) for m in modules), sum(isinstance(m, fp8.FP8Linear) for m in modules)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_generates_through_abiding(model_type: str, load: Callable[..., Any]) -> None:
    """A checkpoint of 2 or 3 layers, loaded by transformers; the operators are counted, and logits are held against the
    same model in float64, where transformers' own bfloat16 layers are as far away."""
    model = load(model_type)
    ids = ids_for(model)
    experts, linears = kinds(model)
    assert experts == 2
    assert linears >= 8
    calls = Calls()
    with calls, torch.no_grad():
        logits = model(ids).logits
    assert calls.of == {"mxfp8_moe": experts, "mxfp8_grouped_mm": linears}

    exact, plain = (mxfp8_checkpoint.dequantized(model, dtype) for dtype in (torch.float64, torch.bfloat16))
    with torch.no_grad():
        expected = exact(ids).logits
        theirs = relative_error(plain(ids).logits, expected)
    assert relative_error(logits, expected) < 1.25 * theirs + 1e-3
    assert max(layer_errors(model, ids)) < 0.005  # five roundings to bfloat16, of 0.17 % each, make 0.38 %

    calls = Calls()
    with calls:
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4)
    assert tokens.shape == (2, ids.size(1) + 4)
    assert calls.of == {"mxfp8_moe": 4 * experts, "mxfp8_grouped_mm": 4 * linears}


def test_w8a8_quantizes_activations(load: Callable[..., Any]) -> None:
    model = load()
    ids = ids_for(model)
    engine.register(mode="w8a8")
    calls = Calls()
    with calls, torch.no_grad():
        model(ids)
    experts, linears = kinds(model)
    assert calls.of == {"mxfp8_moe": experts, "mxfp8_grouped_mm": linears, "mxfp8_round": linears}
    errors = layer_errors(model, ids)
    assert min(errors) > 0.01
    assert max(errors) < 0.06
    assert engine.register(mode="w4a4")["experts"].state == "active"  # type: ignore[arg-type]
    assert layer_errors(model, ids) == errors


def test_spoilt_scales_are_caught(load: Callable[..., Any], tmp_path: Path, device: torch.device) -> None:
    """The comparison sees a scale that is one step off; and a scale that changes in place is noticed."""
    model = load()
    ids = ids_for(model)
    exact = mxfp8_checkpoint.dequantized(model)
    with torch.no_grad():
        expected, right = exact(ids).logits, model(ids).logits
        scale = next(m for m in model.modules() if isinstance(m, fp8.FP8Experts)).down_proj_scale_inv
        scale.view(torch.uint8).add_(1)
        spoilt = model(ids).logits
        scale.view(torch.uint8).sub_(1)
        assert torch.equal(model(ids).logits, right)
    assert relative_error(spoilt, expected) > 10 * relative_error(right, expected)
    spoilt_folder = mxfp8_checkpoint.write(tmp_path / "spoilt", mxfp8_checkpoint.config_of("minimax_m2"), shift=1)
    with torch.no_grad():
        logits = from_folder(spoilt_folder, device)(ids).logits
    assert relative_error(logits, expected) > 10 * relative_error(right, expected)


def test_no_second_copy_of_the_weights(load: Callable[..., Any], device: torch.device) -> None:
    """After load and use, what is alive beyond parameters and buffers is the scales in tiles."""
    torch.ones(64, 64, device=device, dtype=torch.bfloat16).mm(torch.ones(64, 64, device=device, dtype=torch.bfloat16))
    gc.collect()
    before = live_bytes(device)  # with the workspace that cuBLAS takes at its first call
    model = load(changes={"hidden_size": 512, "intermediate_size": 256, "vocab_size": 64})
    with torch.no_grad():
        for _ in range(2):
            model(ids_for(model) % 64)
    gc.collect()
    held = sum(allocated(t) for t in (*model.parameters(), *model.buffers()))
    scales = sum(allocated(t) for name, t in model.named_parameters() if name.endswith("_scale_inv"))
    extra = live_bytes(device) - before - held
    assert scales <= extra < 1.1 * scales  # these sizes need no padding
    assert scales < held / 20


def allocated(tensor: Tensor) -> int:
    unit = 512 if tensor.is_cuda else 1  # of torch's allocator
    return -(-tensor.numel() * tensor.element_size() // unit) * unit


def live_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def test_a_model_may_move_and_change(load: Callable[..., Any]) -> None:
    """Scales in tiles follow parameters that are replaced or written to; the checkpoint that is saved is the one that
    was loaded."""
    model = load()
    ids = ids_for(model)
    with torch.no_grad():
        first = model(ids).logits
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for module in model.modules():
            if isinstance(module, fp8.FP8Experts):
                scale = module.down_proj_scale_inv
                other = (scale.view(torch.uint8) + 1).view(scale.dtype)
                module.down_proj_scale_inv = torch.nn.Parameter(other, requires_grad=False)
        assert not torch.equal(model(ids).logits, first)
        model.load_state_dict(state, strict=True)
        assert torch.equal(model(ids).logits, first)
        model.load_state_dict(state, strict=True, assign=True)
        assert torch.equal(model(ids).logits, first)
    assert not any("abiding" in name for name in model.state_dict())


def test_experts_that_are_not_quantized_run_in_transformers(
    device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    config = mxfp8_checkpoint.config_of("minimax_m2")
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, experts_implementation="abiding"
    ).to(device)
    ids = ids_for(model)
    calls = Calls()
    with calls, torch.no_grad(), caplog.at_level(logging.WARNING):
        mine = model(ids).logits
        model.set_experts_implementation("grouped_mm")
        assert torch.equal(model(ids).logits, mine)
    assert not calls.of
    assert [record.message for record in caplog.records if "abiding" in record.name] == [
        "abiding: experts are left to transformers: a MiniMaxM2Experts is not quantized to FP8"
    ]


def kernel_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives transformers, in place of the kernel that it downloads, its meaning in plain PyTorch."""

    def matmul(x: Tensor, weight: Tensor, scale: Tensor, block: Any, dtype: Any, **_: Any) -> Tensor:
        return (x.double() @ mxfp8_checkpoint.dequantized_weight(weight, scale).T).to(dtype)

    def grouped(x: Tensor, weight: Tensor, scale: Tensor, *, offsets: Tensor, **_: Any) -> Tensor:
        out = x.new_zeros(x.size(0), weight.size(1))
        begin = 0
        for e, end in enumerate(offsets.tolist()):
            out[begin:end] = matmul(x[begin:end], weight[e], scale[e], None, x.dtype)
            begin = end
        return out

    kernel = fp8.FineGrainedFP8(matmul=matmul, batched_matmul=grouped, grouped_matmul=grouped)
    monkeypatch.setattr(fp8, "load_finegrained_fp8_kernel", lambda: kernel)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block": (64, 64), "scale_fmt": "float"}, "scales are float32 numbers; expected powers of two"),
        ({"block": (16, 16)}, "scale blocks are 16 x 16; expected multiples of 32 columns"),
        ({"changes": {"hidden_act": "gelu"}}, "gate is neither silu nor a swiglu of alpha, beta and limit"),
    ],
)
def test_what_does_not_fit_falls_back(
    options: dict[str, Any],
    reason: str,
    load: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Such a layer gives what transformers gives without Abiding, bit for bit, and one log line says why."""
    kernel_in_torch(monkeypatch)
    model = load(**options)
    ids = ids_for(model)
    calls = Calls()
    with calls, torch.no_grad(), caplog.at_level(logging.WARNING):
        mine, _ = model(ids).logits, model(ids).logits
    assert not calls.of["mxfp8_moe"]
    lines = [record.message for record in caplog.records if "experts are left to transformers" in record.message]
    assert len(lines) == 1
    assert reason in lines[0]
    if not calls.of:
        engine.unregister()
        model.set_experts_implementation("grouped_mm")
        with torch.no_grad():
            assert torch.equal(model(ids).logits, mine)
        engine.register()


def test_calls_that_do_not_fit_fall_back(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A gradient, or activations in another dtype."""
    kernel_in_torch(monkeypatch)
    model = load()
    experts = next(m for m in model.modules() if isinstance(m, fp8.FP8Experts))
    x = torch.randn(3, experts.hidden_dim, device=model.device)
    ids, weights = torch.zeros(3, 1, dtype=torch.int64, device=x.device), torch.ones(3, 1, device=x.device)
    calls = Calls()
    with calls, caplog.at_level(logging.WARNING):
        experts(x, ids, weights)
        experts(x.bfloat16().requires_grad_(), ids, weights)
        assert not calls.of
        with torch.no_grad():
            experts(x.bfloat16().requires_grad_(), ids, weights)
    assert calls.of == {"mxfp8_moe": 1}
    text = "\n".join(record.message for record in caplog.records)
    assert "activations are torch.float32" in text
    assert "activations require a gradient" in text


def test_experts_of_other_ranks_add_nothing(load: Callable[..., Any]) -> None:
    """Under expert parallelism, transformers gives them the id behind the last."""
    experts = next(m for m in load().modules() if isinstance(m, fp8.FP8Experts))
    x = torch.randn(3, experts.hidden_dim, device=experts.down_proj.device, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 4], [4, 4], [2, 1]], device=x.device)
    weights = torch.rand(3, 2, device=x.device, dtype=torch.bfloat16)
    with torch.no_grad():
        out = experts(x, ids, weights)
        assert torch.equal(out[:1], experts(x[:1], ids[:1, :1], weights[:1, :1]))
        assert not out[1].any()
        assert out[2].any()


def test_linear_layers_with_bias_and_of_any_stride(device: torch.device) -> None:
    """Also the grouped ones, and without a token."""
    torch.manual_seed(1)
    for groups, block in ((1, (1, 32)), (3, (1, 32)), (3, (64, 64))):
        make = {"block_size": block, "scale_fmt": "ue8m0", "has_bias": True}
        module = (
            fp8.FP8Linear(128, 192, **make) if groups == 1 else fp8.FP8GroupedLinear(128, 192, groups, **make)
        ).to(device)
        data, codes = reference.quantize_rows(torch.randn(192, 128))
        with torch.no_grad():
            module.weight.copy_(data.view(torch.float8_e4m3fn))
            module.weight_scale_inv.view(torch.uint8).copy_(codes[:: block[0], :: block[1] // 32])
            module.bias.copy_(torch.randn(192))
        module.bias.data = module.bias.data.bfloat16()
        # As in a mapped checkpoint, where the kernels could not read it.
        bytes_before = torch.empty(8, device=device, dtype=torch.uint8)
        memory = torch.cat((bytes_before, module.weight.data.view(torch.uint8).flatten()))
        module.weight.data = memory[8:].view(torch.float8_e4m3fn).view(192, 128)
        weight = mxfp8_checkpoint.dequantized_weight(module.weight, module.weight_scale_inv)
        for shape in ((5, 2), (0, 2), (1, 1)):
            wide = torch.randn(*shape, groups, 132, device=device, dtype=torch.bfloat16)
            x = wide[..., 3:131] if groups > 1 else wide[..., 0, 3:131]
            with torch.no_grad():
                out = module(x)
            rows = x.double() if groups > 1 else x.double().unsqueeze(-2)
            exact = torch.einsum("...gk,gnk->...gn", rows, weight.view(groups, -1, 128))
            exact = (exact + module.bias.double().view(groups, -1)).view(out.shape)
            assert out.dtype == torch.bfloat16
            assert out.shape == exact.shape
            assert out.numel() == 0 or relative_error(out, exact) < 0.005


def test_compiles(load: Callable[..., Any]) -> None:
    """After a first call, which prepares scales, a layer compiles as a whole."""
    model = load()
    layer = next(m for m in model.modules() if isinstance(m, fp8.FP8Experts))
    x = torch.randn(4, layer.hidden_dim, device=model.device, dtype=torch.bfloat16)
    ids = torch.arange(8, device=x.device).view(4, 2) % 4
    weights = torch.rand(4, 2, device=x.device)
    with torch.no_grad():
        expected = layer(x, ids, weights)
        compiled: Callable[..., Tensor] = torch.compile(layer.forward, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, ids, weights), expected)
