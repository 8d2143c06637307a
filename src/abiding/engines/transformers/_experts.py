"""The experts implementation "abiding" in transformers' registries."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from abiding import mxfp8_moe
from abiding.engines._jobs import Job, UnavailableError
from abiding.engines.transformers import _format
from abiding.engines.transformers._format import UnsupportedError

IMPLEMENTATION = "abiding"
_FALLBACK = "grouped_mm"  # what transformers takes where a model does not choose
_TENSORS = ("gate_up_proj", "gate_up_proj_scale_inv", "down_proj", "down_proj_scale_inv")
_MAX_TOP_K = 16
_MAX_EXPERTS = 1024
_ARGUMENTS = ("self", "hidden_states", "top_k_index", "top_k_weights")


class _Layer(NamedTuple):
    s13: Tensor
    s2: Tensor
    gate: dict[str, Any]  # arguments of mxfp8_moe.moe


class Experts(Job):
    name = "experts"
    mode: mxfp8_moe.Mode = "w8a16"

    def check(self) -> None:
        for registry in _registries():
            if not isinstance(getattr(type(registry), "_global_mapping", None), dict):
                raise UnavailableError(f"{type(registry).__name__} has no _global_mapping")
            name = type(registry).__name__
            _format.check_parameters(getattr(registry, "register", None), f"{name}.register", ("key", "value"))
            if _FALLBACK not in registry:
                raise UnavailableError(f"{name} has no {_FALLBACK!r}, which serves as the fallback")
            _format.check_parameters(registry[_FALLBACK], f"{name}'s {_FALLBACK}", _ARGUMENTS)
            if IMPLEMENTATION in registry:
                raise UnavailableError(f"{name} has an {IMPLEMENTATION!r} already")
        experts = _format.library_module("integrations.finegrained_fp8").FP8Experts
        gate = getattr(experts, "_apply_gate", None)
        _format.check_parameters(gate, "FP8Experts._apply_gate", ("self", "gate_up"))
        _format.check_parameters(experts, "FP8Experts", ("config", "block_size", "activation_scheme"))

    def take(self) -> str:
        fp8, unquantized = _registries()
        fp8.register(IMPLEMENTATION, self._forward)
        unquantized.register(IMPLEMENTATION, _unquantized_forward)
        return 'MXFP8 experts run in Abiding where a model has experts_implementation="abiding"'

    def release(self) -> None:
        for registry, ours in zip(_registries(), (self._forward, _unquantized_forward), strict=True):
            if registry.get(IMPLEMENTATION) == ours:
                del type(registry)._global_mapping[IMPLEMENTATION]

    def _forward(self, module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        known = _format.prepared(module, _TENSORS, lambda: _prepare(module))
        reason = known.reason or _format.refuse_call(hidden_states)
        if reason is None and (hidden_states.dim() != 2 or top_k_index.size(-1) > _MAX_TOP_K):
            reason = f"activations are {list(hidden_states.shape)}, experts per token {top_k_index.size(-1)}"
            reason += f"; expected 2 dimensions, and at most {_MAX_TOP_K}"
        if reason is not None:
            _format.log_once("experts are", reason)
            fp8, _ = _registries()
            result: Tensor = fp8[_FALLBACK](module, hidden_states, top_k_index, top_k_weights)
            return result
        layer: _Layer = known.layer
        return mxfp8_moe.moe(
            _format.aligned_rows(hidden_states),
            module.gate_up_proj,
            layer.s13,
            module.down_proj,
            layer.s2,
            top_k_index,
            top_k_weights.float(),
            mode=self.mode,
            **layer.gate,
        )


def _unquantized_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    # Valid names are those of both registries, and each layer looks in its own: without this entry, a model with some
    # or all experts unquantized would fail on the name "abiding".
    _format.log_once("experts are", f"a {type(module).__name__} is not quantized to FP8")
    _, unquantized = _registries()
    result: Tensor = unquantized[_FALLBACK](module, hidden_states, top_k_index, top_k_weights)
    return result


def _registries() -> tuple[Any, Any]:
    """Transformers' registries of experts implementations, for FP8 and for unquantized experts."""
    fp8 = _format.library_module("integrations.finegrained_fp8")
    moe = _format.library_module("integrations.moe")
    for module, name in ((fp8, "ALL_FP8_EXPERTS_FUNCTIONS"), (moe, "ALL_EXPERTS_FUNCTIONS"), (fp8, "FP8Experts")):
        if not hasattr(module, name):
            raise UnavailableError(f"{module.__name__} has no {name}")
    return fp8.ALL_FP8_EXPERTS_FUNCTIONS, moe.ALL_EXPERTS_FUNCTIONS


def _prepare(module: Any) -> _Layer:
    for name, expected in (
        ("has_gate", True),
        ("has_bias", False),
        ("is_transposed", False),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
        ("activation_scheme", "dynamic"),
    ):
        if getattr(module, name, expected) != expected:
            raise UnsupportedError(f"{name} is {getattr(module, name)!r}; expected {expected!r}")
    if module.gate_up_proj.size(0) > _MAX_EXPERTS:
        raise UnsupportedError(f"there are {module.gate_up_proj.size(0)} experts; expected at most {_MAX_EXPERTS}")
    layer = _Layer(
        _format.scale_tiles(module.gate_up_proj, module.gate_up_proj_scale_inv, module.block_size),
        _format.scale_tiles(module.down_proj, module.down_proj_scale_inv, module.block_size),
        _gate(module),
    )
    _format.align(module.gate_up_proj)
    _format.align(module.down_proj)
    return layer


def _gate(module: Any) -> dict[str, Any]:
    """The arguments of ``moe`` for the module's gate.

    The attributes of a module are only a guess: releases add more of them. What decides is that the module's own gate
    has the same values.
    """
    alpha, limit = getattr(module, "swiglu_alpha", None), getattr(module, "swiglu_limit", None)
    limit = math.inf if limit is None else float(limit)
    beta = 0.0 if alpha is None else 1.0
    if alpha is None:
        arguments = {"activation": "silu", "swiglu_limit": limit}
    else:
        arguments = {"activation": "swiglu_oai", "swiglu_alpha": alpha, "swiglu_beta": beta, "swiglu_limit": limit}

    values = torch.linspace(-24, 24, 97, dtype=torch.float64, device="cpu")
    gate, up = values.repeat(97), values.repeat_interleave(97)
    theirs = module._apply_gate(torch.cat((gate, up))[None])[0]
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    ours = gate * torch.sigmoid((alpha or 1.0) * gate) * (up + beta)
    if not torch.allclose(theirs.double(), ours, rtol=1e-5, atol=1e-5):
        raise UnsupportedError(f"{type(module).__name__}'s gate is neither silu nor a swiglu of alpha, beta and limit")
    return arguments
