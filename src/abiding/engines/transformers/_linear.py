"""The FP8 linear layers of transformers: ``FP8Linear``, and the ``FP8GroupedLinear`` of DeepSeek V4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from abiding import mxfp8_moe
from abiding.engines._jobs import Job, UnavailableError
from abiding.engines.transformers import _format
from abiding.engines.transformers._format import UnsupportedError

_TENSORS = ("weight", "weight_scale_inv")


class Linear(Job):
    name = "linear"
    mode: mxfp8_moe.Mode = "w8a16"

    def __init__(self) -> None:
        self._replaced: list[tuple[Any, Callable[..., Tensor], Callable[..., Tensor]]] = []  # class, original, ours

    def check(self) -> None:
        fp8 = _format.library_module("integrations.finegrained_fp8")
        for name, argument in (("FP8Linear", "input"), ("FP8GroupedLinear", "x")):
            cls = getattr(fp8, name, None)
            if cls is None or "forward" not in vars(cls):
                raise UnavailableError(f"{fp8.__name__} has no {name} with a forward of its own")
            _format.check_parameters(cls.forward, f"{name}.forward", ("self", argument))
            if cls.forward.__module__ != fp8.__name__:
                raise UnavailableError(f"{name}.forward is replaced already, by {cls.forward.__module__}")

    def take(self) -> str:
        fp8 = _format.library_module("integrations.finegrained_fp8")
        for cls, replace in ((fp8.FP8Linear, self._linear), (fp8.FP8GroupedLinear, self._grouped)):
            original, ours = cls.forward, replace(cls.forward)
            cls.forward = ours
            self._replaced.append((cls, original, ours))
        return "MXFP8 linear layers run in Abiding"

    def release(self) -> None:
        replaced, self._replaced = self._replaced, []
        for cls, original, ours in replaced:
            if cls.forward is not ours:
                raise RuntimeError(f"{cls.__name__}.forward has been replaced again, by {cls.forward.__module__}")
            cls.forward = original

    def _linear(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(module: Any, input: Tensor) -> Tensor:
            tiles = _tiles(module, input, groups=1)
            if tiles is None:
                return original(module, input)
            out = mxfp8_moe.linear(_format.aligned_rows(input), module.weight, tiles, mode=self.mode)
            return _with_bias(out.view(*input.shape[:-1], out.size(1)), module.bias)

        return forward

    def _grouped(self, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(module: Any, x: Tensor) -> Tensor:
            tiles = _tiles(module, x, groups=module.n_groups)
            if tiles is None:
                return original(module, x)
            groups, k = x.shape[-2:]
            rows = _format.aligned_rows(x.movedim(-2, 0))
            tokens = rows.size(0) // groups
            ends = torch.arange(1, groups + 1, device=x.device, dtype=torch.int32) * tokens
            rows = mxfp8_moe.round(rows) if self.mode == "w8a8" else rows
            out = mxfp8_moe.grouped_mm(rows, module.weight.view(groups, -1, k), tiles, offs=ends)
            out = out.view(groups, *x.shape[:-2], out.size(1)).movedim(0, -2)
            return _with_bias(out, None if module.bias is None else module.bias.view(groups, -1))

        return forward


def _with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def _tiles(module: Any, x: Tensor, groups: int) -> Tensor | None:
    """The module's scales in tiles; None, and a log line, if the call is left to transformers."""
    if module.weight.element_size() > 1:
        return None  # dequantized: a plain linear layer
    known = _format.prepared(module, _TENSORS, lambda: _prepare(module, groups))
    reason = known.reason or _format.refuse_call(x)
    if reason is not None:
        _format.log_once("linear layers are", reason)
        return None
    tiles: Tensor = known.layer
    return tiles


def _prepare(module: Any, groups: int) -> Tensor:
    if module.activation_scheme != "dynamic":
        raise UnsupportedError(f"activation_scheme is {module.activation_scheme!r}; expected 'dynamic'")
    weight, scale, block = module.weight, module.weight_scale_inv, module.block_size
    if weight.size(0) % groups or (groups > 1 and block is not None and weight.size(0) // groups % block[0]):
        raise UnsupportedError(f"{groups} groups of {weight.size(0)} rows share scale blocks")
    if scale.dim() == 2:
        scale = scale.unflatten(0, (groups, -1))
    tiles = _format.scale_tiles(weight.unflatten(0, (groups, -1)), scale, block)
    _format.align(weight)
    return tiles
