"""Small MXFP8 checkpoints with seeded weights, for tests and measurements inside transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abiding.reference.mxfp8_moe import quantize_rows

_KEPT = ("embed", "lm_head", "norm", ".gate.", "shared_expert_gate", "hc_", "head.", "indexer", "compressor")


def write(
    folder: Path,
    config: Any,
    *,
    seed: int = 0,
    std: float = 0.05,
    shift: int = 0,
    block: tuple[int, int] = (1, 32),
    scale_fmt: str = "ue8m0",
    kept: Callable[[str], bool] | None = None,
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
        kept: which other weights are left unquantized, by name.
    """
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * std)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = {}
    for name, weight in load_file(path).items():
        if weight.dim() != 2 or not name.endswith(".weight") or any(part in name for part in _KEPT):
            tensors[name] = weight
        elif kept is not None and kept(name):
            tensors[name] = weight
        else:
            data, scale = _quantize(weight, block, scale_fmt)
            if ".experts." in name and scale.dtype == torch.uint8:
                scale += shift
            tensors[name] = data
            tensors[name.removesuffix(".weight") + ".weight_scale_inv"] = scale
    save_file(tensors, path, {"format": "pt"})
    description = json.loads((folder / "config.json").read_text())
    unquantized = {name.removesuffix(".weight") for name in tensors if name + "_scale_inv" not in tensors}
    description["quantization_config"] = {
        "quant_method": "mxfp8" if block == (1, 32) else "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "scale_fmt": scale_fmt,
        "ignored_layers": sorted(name for name in unquantized if not name.endswith("_scale_inv")),
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
