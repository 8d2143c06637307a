"""A vLLM plugin for comparisons without a checkpoint: ``load_format="seeded"``.

The values depend on each parameter's name alone, so that engines which repack weights afterwards start from the same
ones. vLLM's own ``load_format="dummy"`` leaves scales uninitialized and weights near zero. With ``SEEDED_SPOIL=1`` each
expert gets its neighbor's scales: a comparison that does not notice this notices nothing.
"""

from __future__ import annotations

import os
import zlib

import torch

STEP = 1 << 26  # elements drawn at a time


def fill(name: str, tensor: torch.Tensor) -> None:
    """Fill a parameter by its kind: scale codes 2^-8 to 2^-5, e4m3 elements, norm weights of one, small others."""
    generator = torch.Generator(device=tensor.device).manual_seed(zlib.crc32(name.encode()))
    flat = tensor.view(-1)
    for part in flat.split(STEP):
        if tensor.dtype == torch.uint8:
            part.copy_(torch.randint(119, 123, part.shape, generator=generator, device=part.device))
        elif "norm" in name:
            part.fill_(1)
        else:
            values = torch.randn(part.shape, generator=generator, device=part.device, dtype=torch.float32)
            part.copy_(values if tensor.dtype == torch.float8_e4m3fn else values * 0.02)


def register() -> None:
    """The entry point: define the load format, and spoil our experts where that is asked for."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("seeded")
    class SeededLoader(BaseModelLoader):  # type: ignore[misc]  # vLLM is not installed where types are checked
        def download_model(self, model_config: object) -> None:
            pass

        def load_weights(self, model: torch.nn.Module, model_config: object) -> None:
            for name, parameter in model.named_parameters():
                fill(name, parameter.data)

    if os.environ.get("SEEDED_SPOIL") == "1":
        from abiding import mxfp8_moe

        swizzle = mxfp8_moe.swizzle_scales
        mxfp8_moe.swizzle_scales = lambda scales: swizzle(scales).roll(1, 0)
