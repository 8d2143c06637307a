"""The kernel class that vLLM's linear layers call. Imports vLLM: load it through :class:`LinearJob` only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import Mxfp8LinearKernel
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from abiding import mxfp8_moe


class AbidingMxfp8LinearKernel(Mxfp8LinearKernel):
    """A dense MXFP8 layer on :func:`abiding.mxfp8_moe.linear`: activations stay bfloat16, as with vLLM's Marlin."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        if compute_capability is None:
            found = current_platform.get_device_capability() if current_platform.is_cuda() else None
            compute_capability = None if found is None else found.to_int()
        is_hopper = compute_capability is not None and compute_capability // 10 == 9
        return is_hopper, None if is_hopper else "Abiding's MXFP8 kernels are for Hopper (9.0)"

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        # vLLM makes layers with the model's dtype as torch's default.
        if (dtype := torch.get_default_dtype()) != torch.bfloat16:
            return False, f"Abiding's MXFP8 kernels take bfloat16, and the model is {dtype}"
        n, k = getattr(c, "weight_shape", (mxfp8_moe.BLOCK, mxfp8_moe.BLOCK))  # vLLM 0.26 does not tell the shape
        if n % mxfp8_moe.BLOCK or k % mxfp8_moe.BLOCK:
            return False, f"Abiding's MXFP8 kernels take multiples of {mxfp8_moe.BLOCK}, not N = {n} and K = {k}"
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put scales into tiles, and fill up N to a multiple of 32 with zeros where vLLM did not tell it before."""
        weight = layer.weight.data
        n, k = weight.shape
        scale = layer.weight_scale.data[:n, : k // mxfp8_moe.BLOCK]
        if missing := -n % mxfp8_moe.BLOCK:
            weight = torch.cat((weight.view(torch.uint8), weight.new_zeros((missing, k), dtype=torch.uint8)))
            weight = weight.view(layer.weight.dtype)
            scale = torch.cat((scale, scale.new_zeros((missing, scale.size(1)))))
        replace_parameter(layer, "weight", weight.contiguous())
        replace_parameter(layer, "weight_scale", mxfp8_moe.swizzle_scales(scale))

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out = mxfp8_moe.linear(x, layer.weight, layer.weight_scale)
        n = layer.output_size_per_partition
        if out.size(-1) != n:
            out = out[..., :n]
        return out if bias is None else out + bias
