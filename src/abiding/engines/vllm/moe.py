"""The job "moe": MXFP8 experts, whatever quantization method loaded them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from abiding.engines._jobs import Job, UnavailableError
from abiding.engines.vllm import contract
from abiding.mxfp8_moe import Mode

ORACLE = "vllm.model_executor.layers.fused_moe.oracle.mxfp8"
MODULAR_KERNEL = "vllm.model_executor.layers.fused_moe.modular_kernel"
MODE_VARIABLE = "ABIDING_VLLM_MOE_MODE"
MODES: tuple[Mode, ...] = ("w8a16", "w8a8", "fp8")

# FusedMoEExperts as :mod:`abiding.engines.vllm.experts` implements it.
EXPERTS_METHODS = (
    "activation_format _supports_current_device _supports_no_act_and_mul _supports_quant_scheme _supports_activation "
    "_supports_parallel_config finalize_weight_and_reduce_impl workspace_shapes apply"
)
WORKSPACE_PARAMETERS = "M N K topk global_num_experts local_num_experts expert_tokens_meta activation"
APPLY_PARAMETERS = (
    "output hidden_states w1 w2 topk_weights topk_ids activation global_num_experts expert_map a1q_scale a2_scale "
    "workspace13 workspace2 expert_tokens_meta apply_router_weight_on_input"
)
SUPPORTED_PARAMETERS = "cls moe_config weight_key activation_key activation_format"


class MoeJob(Job):
    """Puts an expert class of ours first where vLLM chooses its MXFP8 backend.

    All MXFP8 quantization methods choose through ``select_mxfp8_moe_backend``, which asks ``_select_kernel_cls`` for
    one backend after the other and takes the next one after a ValueError. There is no official way in, so that function
    is wrapped. Our class answers for the backend TRITON_MXFP8, because vLLM leaves the weights of that one as they were
    loaded; a user who asks for "triton" by name gets vLLM's own.
    """

    name = "moe"

    def __init__(self) -> None:
        self._stock: tuple[Callable[..., Any], Any] | None = None

    def check(self) -> None:
        mode()
        contract.require_hopper()
        self.contract()

    def contract(self) -> None:
        """The part of :meth:`check` that needs no GPU."""
        oracle, kernel = contract.load(ORACLE), contract.load(MODULAR_KERNEL)
        contract.require_parameters(oracle, "select_mxfp8_moe_backend", "config")
        contract.require_parameters(oracle, "_select_kernel_cls", "backend config")
        backends = contract.require_attribute(oracle, "_SUPPORTED_BACKENDS")
        backend = contract.require_attribute(contract.require_attribute(oracle, "Fp8MoeBackend"), "TRITON_MXFP8")
        if not isinstance(backends, tuple):
            raise UnavailableError(f"{ORACLE}._SUPPORTED_BACKENDS is a {type(backends).__name__}; expected a tuple")
        experts = contract.require_attribute(kernel, "FusedMoEExpertsModular")
        contract.require_abstract(experts, EXPERTS_METHODS)
        contract.require_parameters(experts, "__init__", "moe_config quant_config", more=True)
        contract.require_parameters(experts, "is_supported_config", SUPPORTED_PARAMETERS)
        contract.require_parameters(experts, "workspace_shapes", WORKSPACE_PARAMETERS)
        contract.require_parameters(experts, "apply", APPLY_PARAMETERS)
        _require_weights_as_loaded(backend)
        contract.load("abiding.engines.vllm.experts")

    def take(self) -> str:
        from abiding.engines.vllm import experts

        oracle: Any = contract.load(ORACLE)
        if self._stock is None:
            self._stock = oracle._select_kernel_cls, oracle._SUPPORTED_BACKENDS
            ours = oracle.Fp8MoeBackend.TRITON_MXFP8
            oracle._select_kernel_cls = experts.preferring_ours(oracle._select_kernel_cls, ours)
            oracle._SUPPORTED_BACKENDS = (ours, *(one for one in oracle._SUPPORTED_BACKENDS if one is not ours))
        experts.AbidingMxfp8Experts.mode = mode()
        return f"MXFP8 experts run on abiding.mxfp8_moe, {mode()}"

    def release(self) -> None:
        if self._stock is not None:
            oracle: Any = contract.load(ORACLE)
            oracle._select_kernel_cls, oracle._SUPPORTED_BACKENDS = self._stock
            self._stock = None


def mode() -> Mode:
    """What ``ABIDING_VLLM_MOE_MODE`` says; "w8a16" by default, which is what vLLM's Marlin and Humming compute."""
    chosen = os.environ.get(MODE_VARIABLE, "w8a16")
    if chosen not in MODES:
        raise UnavailableError(f"{MODE_VARIABLE} is {chosen!r}; expected {' or '.join(MODES)}", f"set {MODE_VARIABLE}")
    return chosen


def _require_weights_as_loaded(backend: Any) -> None:
    """vLLM must hand over the weights of ``backend`` as the checkpoint has them."""
    fp8 = contract.load("vllm.model_executor.layers.fused_moe.oracle.fp8")
    names = "fp8_backend layer w13 w2 w13_scale w2_scale w13_input_scale w2_input_scale"
    convert = contract.require_parameters(fp8, "convert_to_fp8_moe_kernel_format", names)
    weights = tuple(object() for _ in range(4))
    if convert(backend, object(), *weights, None, None) != weights:
        raise UnavailableError(f"vLLM changes the layout of the weights of {backend} at load")
