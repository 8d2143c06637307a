"""The expert class that vLLM's modular MoE kernel calls. Imports vLLM: load it through :class:`MoeJob` only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.model_executor.layers.quantization.utils.quant_utils import kMxfp8Dynamic, kMxfp8Static
from vllm.platforms import current_platform

from abiding import mxfp8_moe
from abiding.mxfp8_moe import Activation, Mode

ACTIVATIONS: dict[MoEActivation, Activation] = {
    MoEActivation.SILU: "silu",
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: "swiglu_oai",
}
MAX_TOP_K, MAX_EXPERTS = 16, 1024

_workspace_bytes = cache(mxfp8_moe.workspace_bytes)


class AbidingMxfp8Experts(mk.FusedMoEExpertsModular):
    """MXFP8 experts on :func:`abiding.mxfp8_moe.moe`: one call per layer, weights where vLLM loaded them."""

    mode: ClassVar[Mode] = "w8a16"

    def __init__(self, moe_config: Any, quant_config: Any, **others: Any) -> None:
        super().__init__(moe_config, quant_config, **others)
        # vLLM makes experts once per load, when the loaded weights are in place and before it captures graphs.
        for scale in (self.w1_scale, self.w2_scale):
            _swizzle_in_place(scale)
        self._constants = swiglu_constants(moe_config, quant_config)
        self._layer_mode: Mode | None = None if self.mode == "fp8" else self.mode

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def is_supported_config(
        cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
    ) -> tuple[bool, str | None]:
        supported, reason = mk.FusedMoEExpertsModular.is_supported_config(
            cls, moe_config, weight_key, activation_key, activation_format
        )
        reason = reason if not supported else unsupported(moe_config)
        return reason is None, reason

    @staticmethod
    def _supports_current_device() -> bool:
        capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
        return capability is not None and capability.major == 9

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return (weight_key, activation_key) == (kMxfp8Static, kMxfp8Dynamic)

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        # Other all-to-all kernels rearrange tokens and ids; they are vLLM's until somebody has tried them.
        return not moe_parallel_config.use_all2all_kernels or moe_parallel_config.use_ag_rs_all2all_kernels

    @staticmethod
    def _supports_shape(hidden_dim: int) -> bool:
        return hidden_dim % mxfp8_moe.BLOCK == 0

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(
        self,
        M: int,  # noqa: N803  (the base class's names)
        N: int,  # noqa: N803
        K: int,  # noqa: N803
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        # Sizes are in elements of the output, bfloat16. The first workspace shares memory with the output, so all is
        # taken from the second.
        size = _workspace_bytes(M, topk, local_num_experts, K, N // 2)
        return (0,), (-(-size // 2),), (M, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        mode = self._layer_mode or self._rebase(w1, w2)
        if apply_router_weight_on_input:  # vLLM has multiplied the rows already
            topk_weights = torch.ones_like(topk_weights)
        mxfp8_moe.moe(
            hidden_states,
            w1,
            self.w1_scale,
            w2,
            self.w2_scale,
            topk_ids,
            topk_weights,
            activation=ACTIVATIONS[activation],
            mode=mode,
            expert_map=expert_map,
            global_experts=global_num_experts,
            **self._constants,
            workspace=workspace2.view(torch.uint8),
            out=output,
        )

    def _rebase(self, w13: Tensor, w2: Tensor) -> Mode:
        """Rebase the weights of this layer in place, and return the mode that they allow.

        vLLM hands the weights over with a call only. The first one is its profiling run, which belongs to the load and
        comes before graphs are captured.
        """
        if w13.is_cuda and torch.cuda.is_current_stream_capturing():
            _log_once("abiding: the first call of experts is captured in a graph, too late to rebase; they run in w8a8")
            return "w8a8"
        reports = [
            mxfp8_moe.rebase(weight, scale, inplace=True)[2]
            for weight, scale in ((w13, self.w1_scale.data), (w2, self.w2_scale.data))
        ]
        left = sum(int(report.left) for report in reports)
        self._layer_mode = "w8a8" if left else "fp8"
        _log(
            f"abiding: rebased experts for fp8: {sum(int(report.changed) for report in reports)} of "
            f"{w13.numel() + w2.numel()} elements changed, relative rms {max(float(r.rms) for r in reports):.1e}, "
            f"of the worst row {max(float(r.worst_rms) for r in reports):.1e}"
            + (f"; {left} rows cannot be rebased, so this layer runs in w8a8" if left else ""),
            warn=left > 0,
        )
        return self._layer_mode


def unsupported(config: Any) -> str | None:
    """What of a configuration the kernels do not have, as vLLM words such reasons; None if they have all."""
    intermediate = config.intermediate_size_per_partition
    limit, alpha = config.swiglu_limit, config.swiglu_alpha
    for is_refused, what in (
        (config.in_dtype != torch.bfloat16, f"{config.in_dtype} activations"),
        (config.has_bias, "biases"),
        (config.is_lora_enabled, "LoRA"),
        (intermediate % mxfp8_moe.BLOCK != 0, f"an intermediate size of {intermediate}"),
        (config.experts_per_token > MAX_TOP_K, f"{config.experts_per_token} experts per token"),
        (config.num_local_experts > MAX_EXPERTS, f"{config.num_local_experts} local experts"),
        (limit is not None and limit <= 0, f"a SwiGLU limit of {limit}"),
        (alpha is not None and alpha <= 0, f"a SwiGLU alpha of {alpha}"),
        (config.activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE and limit is None, "SwiGLU-OAI without a limit"),
    ):
        if is_refused:
            return f"kernel does not support {what}"
    return None


def swiglu_constants(moe_config: Any, quant_config: Any) -> dict[str, float]:
    """The constants of the activation, as keywords of :func:`abiding.mxfp8_moe.moe`.

    vLLM's own kernels take those of the quantization configuration first, then those of the layer's, and compute plain
    SiLU where neither has any.
    """

    def value(name: str) -> float | None:
        of_weights: float | None = getattr(quant_config, f"gemm1_{'clamp_limit' if name == 'limit' else name}")
        of_layer: float | None = getattr(moe_config, f"swiglu_{name}")
        return of_layer if of_weights is None else of_weights

    limit, alpha, beta = value("limit"), value("alpha"), value("beta")
    constants = {} if limit is None else {"swiglu_limit": float(limit)}
    if ACTIVATIONS[moe_config.activation] == "swiglu_oai":
        constants["swiglu_alpha"] = 1.0 if alpha is None else float(alpha)
        constants["swiglu_beta"] = 0.0 if beta is None else float(beta)
    return constants


def preferring_ours(stock: Callable[[Any, Any], Any], ours: Any) -> Callable[[Any, Any], Any]:
    """vLLM's ``_select_kernel_cls``, answering for the backend ``ours`` where the user has left the choice to vLLM."""

    def select(backend: Any, config: Any) -> Any:
        if backend is not ours or config.moe_backend != "auto":
            return stock(backend, config)
        batched = config.moe_parallel_config.use_batched_activation_format
        formats = mk.FusedMoEActivationFormat
        supported, reason = AbidingMxfp8Experts.is_supported_config(
            AbidingMxfp8Experts,
            config,
            kMxfp8Static,
            kMxfp8Dynamic,
            formats.BatchedExperts if batched else formats.Standard,
        )
        if not supported:
            _log_once(f"abiding: these experts are left to vLLM: {reason}")
            raise ValueError(reason)  # vLLM takes the next backend
        return AbidingMxfp8Experts

    return select


def _log(line: str, *, warn: bool) -> None:
    from abiding.engines.vllm import ENGINE

    (ENGINE.log.warning if warn else ENGINE.log.info)(line)


@cache
def _log_once(line: str) -> None:
    _log(line, warn=True)


def _swizzle_in_place(scale: Tensor) -> None:
    """Turn a parameter of plain scales into one of scales in tiles: no second copy stays."""
    tiles = mxfp8_moe.swizzle_scales(scale.data)
    if tiles.shape == scale.shape:
        scale.data.copy_(tiles)
    else:
        scale.data = tiles
