"""Small MXFP8 checkpoints with seeded weights, for tests and measurements inside transformers."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abiding.reference.mxfp8_moe import quantize_rows

CONFIGS: dict[str, dict[str, Any]] = {
    "minimax_m2": {
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
    },
    "minimax_m3_vl_text": {
        "hidden_size": 128,
        "intermediate_size": 64,
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "deepseek_v4": {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 128,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 4,
        "layer_types": ["sliding_attention"] * 2,
        "mlp_layer_types": ["moe"] * 2,
        "sliding_window": 64,
        "hc_mult": 2,
    },
}
"""Small configurations, by model type. All experts serve all tokens: with fewer, a rounding in the router that swaps
two experts moves logits by more than all arithmetic that is compared."""

_KEPT = ("embed", "lm_head", "norm", ".gate.", "shared_expert_gate", "hc_", "head.", "indexer", "compressor")


def config_of(model_type: str, **changes: Any) -> Any:
    """The small configuration of a model type."""
    ids = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return _transformers().AutoConfig.for_model(model_type, **ids | CONFIGS[model_type] | changes)


def write(
    folder: Path,
    config: Any,
    *,
    seed: int = 0,
    std: float = 0.05,
    shift: int = 0,
    block: tuple[int, int] = (1, 32),
    scale_fmt: str = "ue8m0",
    device: str | torch.device = "cpu",
) -> Path:
    """Write a checkpoint of a model of this configuration, quantized as MiniMax publishes them.

    Args:
        folder: where to write ``config.json`` and ``model.safetensors``; made if it does not exist.
        config: a configuration of transformers, of a causal language model.
        seed: of the weights.
        std: standard deviation of quantized weights.
        shift: added to the scale codes of experts, to spoil them.
        block: rows and columns that share a scale; rows > 1 take the largest scale of the MXFP8 blocks in a block.
        scale_fmt: "ue8m0" for one byte per scale, "float" for float32 that are no powers of two.
        device: where weights are made.
    """
    safetensors: Any = importlib.import_module("safetensors.torch")
    torch.manual_seed(seed)
    with torch.device(device):
        model = _transformers().AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * std)
    model.save_pretrained(folder, max_shard_size="1TB")
    path = folder / "model.safetensors"
    tensors = {}
    for name, weight in safetensors.load_file(path).items():
        is_kept = any(part in name for part in _KEPT)
        if weight.dim() < 2 or is_kept:
            tensors[name] = weight
            continue
        data, scale = (made.cpu() for made in _quantize(weight.flatten(0, -2).to(device), block, scale_fmt))
        if ".experts." in name and scale.dtype == torch.uint8:
            scale += shift
        tensors[name] = data.view(weight.shape)
        tensors[name + "_scale_inv"] = scale.unflatten(0, (*weight.shape[:-2], -1))
    safetensors.save_file(tensors, path, {"format": "pt"})
    description = json.loads((folder / "config.json").read_text())
    unquantized = {name for name in tensors if not name.endswith("_scale_inv") and f"{name}_scale_inv" not in tensors}
    description["quantization_config"] = {
        "quant_method": "mxfp8" if block == (1, 32) else "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "scale_fmt": scale_fmt,
        "ignored_layers": sorted(name.removesuffix(".weight") for name in unquantized),
    }
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def _quantize(weight: Tensor, block: tuple[int, int], scale_fmt: str) -> tuple[Tensor, Tensor]:
    if block == (1, 32):
        data, codes = quantize_rows(weight)
        return data.view(torch.float8_e4m3fn), codes
    rows, columns = block
    blocks = weight.float().unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = blocks.abs().amax((1, 3)) / 448
    if scale_fmt == "ue8m0":
        scale = scale.log2().ceil().exp2()
    data = (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return data, scale


def dequantized(model: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The same model without quantization: transformers' own layers on ``e4m3 * 2^(code - 127)``, in this dtype."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.quantization_config = None
    with torch.device(model.device):
        plain = _transformers().AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    stored = model.state_dict()
    weights = {}
    for name in plain.state_dict():
        weight, scale = stored[name], stored.get(f"{name}_scale_inv")
        weights[name] = (weight if scale is None else dequantized_weight(weight, scale)).to(dtype)
    plain.load_state_dict(weights, assign=True)
    return plain.eval()


def dequantized_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """``e4m3 * 2^(code - 127)`` in float64, for scales of blocks of any size; float32 scales are the numbers that they
    are."""
    scale = scale.double() if scale.dtype == torch.float32 else torch.exp2(scale.view(torch.uint8).double() - 127)
    for dim in (-2, -1):
        scale = scale.repeat_interleave(weight.size(dim) // scale.size(dim), dim)
    return weight.double() * scale


class Calls(TorchDispatchMode):
    """Counts the calls of Abiding's operators, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "abiding":
            self.of[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def layer_errors(model: Any, ids: Tensor) -> list[float]:
    """The relative error of each quantized experts module against a float64 layer on the same activations."""
    errors: list[float] = []

    def compare(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        x, topk_ids, topk_weights = args
        exact = torch.zeros_like(x, dtype=torch.float64)
        for expert in range(module.gate_up_proj.size(0)):
            token, j = (topk_ids == expert).nonzero(as_tuple=True)
            w13, w2 = (
                dequantized_weight(weight[expert], scale[expert])
                for weight, scale in (
                    (module.gate_up_proj, module.gate_up_proj_scale_inv),
                    (module.down_proj, module.down_proj_scale_inv),
                )
            )
            rows = module._apply_gate(x[token].double() @ w13.T) @ w2.T
            exact.index_add_(0, token, topk_weights[token, j, None].double() * rows)
        errors.append(relative_error(output, exact))

    modules = [module for module in model.modules() if hasattr(module, "gate_up_proj_scale_inv")]
    hooks = [module.register_forward_hook(compare) for module in modules]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return errors


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The root mean square of a difference, as a part of that of ``expected``."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def _transformers() -> Any:
    # Not a plain import, which type checkers cannot follow where transformers is not installed.
    return importlib.import_module("transformers")
