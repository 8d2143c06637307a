"""The job "linear": dense MXFP8 layers, through vLLM's official registry of linear kernels."""

from __future__ import annotations

import os
from typing import Any

from abiding.engines._jobs import Job, UnavailableError
from abiding.engines.vllm import contract

KERNELS = "vllm.model_executor.kernels.linear"
ENVIRONMENT = "vllm.envs"
METHODS = "is_supported can_implement process_weights_after_loading apply_weights"
COMPILE_FACTOR = "ABIDING_VLLM_LINEAR"


class LinearJob(Job):
    """Registers a kernel class of ours for MXFP8 and moves it to the front; vLLM asks the classes in order."""

    name = "linear"

    def check(self) -> None:
        contract.require_hopper()
        self.contract()

    def contract(self) -> None:
        """The part of :meth:`check` that needs no GPU."""
        kernels = contract.load(KERNELS)
        contract.require_parameters(kernels, "register_linear_kernel", "kernel_class platform kernel_type")
        base = contract.require_attribute(kernels, "Mxfp8LinearKernel")
        contract.require_abstract(base, METHODS)
        contract.require_parameters(base, "__init__", "c")
        contract.require_parameters(base, "is_supported", "compute_capability")
        contract.require_parameters(base, "can_implement", "c")
        contract.require_parameters(base, "process_weights_after_loading", "layer")
        contract.require_parameters(base, "apply_weights", "layer x bias")
        contract.require_attribute(contract.load(ENVIRONMENT), "environment_variables")
        _possible(kernels)
        contract.load("abiding.engines.vllm.linear_kernel")

    def take(self) -> str:
        from abiding.engines.vllm.linear_kernel import AbidingMxfp8LinearKernel

        kernels = contract.load(KERNELS)
        possible = _possible(kernels)
        if AbidingMxfp8LinearKernel not in possible:
            kernels.register_linear_kernel(AbidingMxfp8LinearKernel, _cuda(), "mxfp8")
            possible.remove(AbidingMxfp8LinearKernel)
            possible.insert(0, AbidingMxfp8LinearKernel)
        # vLLM reuses compiled graphs of earlier processes, in which the kernels of the linear layers are fixed. All the
        # variables in this table are part of the key, so that a graph is reused with the kernels it was compiled for.
        contract.load(ENVIRONMENT).environment_variables[COMPILE_FACTOR] = _compile_factor
        return "dense MXFP8 layers run on abiding.mxfp8_moe.linear, w8a16"

    def release(self) -> None:
        from abiding.engines.vllm.linear_kernel import AbidingMxfp8LinearKernel

        _possible(contract.load(KERNELS)).remove(AbidingMxfp8LinearKernel)
        contract.load(ENVIRONMENT).environment_variables.pop(COMPILE_FACTOR, None)


def _compile_factor() -> str:
    import abiding

    return f"abiding {abiding.__version__}, {os.environ.get('ABIDING_VLLM', '')}"


def _cuda() -> Any:
    return contract.load("vllm.platforms").PlatformEnum.CUDA


def _possible(kernels: Any) -> list[type]:
    """vLLM's list of MXFP8 kernels for CUDA, in the order in which it asks them."""
    table = contract.require_attribute(kernels, "_POSSIBLE_MXFP8_KERNELS")
    possible = table.get(_cuda())
    if not isinstance(possible, list):
        raise UnavailableError(f"{KERNELS}._POSSIBLE_MXFP8_KERNELS has no list for CUDA")
    return possible
