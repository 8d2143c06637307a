"""What the layers of a transformers model hold, in the form that Abiding's kernels take."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import abiding
from abiding import mxfp8_moe
from abiding.engines._jobs import UnavailableError

_log = logging.getLogger("transformers.abiding")
_logged: set[str] = set()


class UnsupportedError(Exception):
    """Abiding cannot compute a layer; the message says why."""


class Prepared:
    """What the first use of a layer found: ``reason`` if Abiding cannot compute it, else its scales in tiles.

    The plain scales stay in the model, so that it can be saved, moved, and computed by transformers again. Tiles are
    1/32 of the bytes of the weights, and the weights themselves are read where they are.
    """

    def __init__(self, module: torch.nn.Module, names: Sequence[str], make: Callable[[], Any]) -> None:
        self.layer: Any = None
        self.reason: str | None = None
        try:
            self.layer = make()
        except UnsupportedError as error:
            self.reason = str(error)
        except Exception as error:  # a layer that is not as expected must still run in transformers
            self.reason = f"{type(error).__name__}: {error}"
        self.sources = [(name, getattr(module, name, None)) for name in names]
        self.states = [_state(tensor) for _, tensor in self.sources]

    def fits(self, module: torch.nn.Module) -> bool:
        """Whether the module's tensors are those that were prepared: not replaced, moved or written to since."""
        return all(
            getattr(module, name, None) is tensor and _state(tensor) == state
            for (name, tensor), state in zip(self.sources, self.states, strict=True)
        )


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    # Moving a module to another device replaces the memory of its parameters; load_state_dict writes to them in place.
    return None if tensor is None else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)


def prepared(module: torch.nn.Module, names: Sequence[str], make: Callable[[], Any]) -> Prepared:
    """The module's :class:`Prepared`, made at its first use, and again once one of its named tensors has changed."""
    known: Prepared | None = module.__dict__.get("_abiding")
    if known is None or not (torch.compiler.is_compiling() or known.fits(module)):
        known = _prepare_outside_of_graphs(module, names, make)
    return known


def _prepare(module: torch.nn.Module, names: Sequence[str], make: Callable[[], Any]) -> Prepared:
    with torch.no_grad():
        found = Prepared(module, names, make)
    module.__dict__["_abiding"] = found  # not through nn.Module, which would take tensors for parameters or buffers
    return found


_prepare_outside_of_graphs: Callable[..., Prepared] = torch.compiler.disable(_prepare)


def align(weight: Tensor) -> None:
    """Move a weight to aligned memory if it needs to: one that is a part of a mapped file may lie at any address."""
    if weight.is_contiguous() and weight.data_ptr() % 16 == 0:
        return
    weight.data = weight.data.clone(memory_format=torch.contiguous_format)


def scale_tiles(weight: Tensor, scale: Tensor, block: Sequence[int] | None) -> Tensor:
    """The scales of weights [..., N, K] in tiles, from one UE8M0 scale per block of N by K elements.

    A block of more rows, or of more multiples of 32 columns, is many MX blocks that share a scale: 128 x 128, as
    DeepSeek has it, fits as well as MXFP8's 1 x 32.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise UnsupportedError(f"weights are {weight.dtype}; expected torch.float8_e4m3fn")
    if type(weight.data) is not Tensor:
        raise UnsupportedError(f"weights are a {type(weight.data).__name__}; expected a plain tensor")
    if weight.device.type == "cuda" and not abiding.has_cuda_kernels():
        raise UnsupportedError(f"there are no CUDA kernels: {abiding.cuda_unavailable_reason()}")
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise UnsupportedError("the GPU has a compute capability below 8.0")
    if weight.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"weights are on {weight.device.type}; expected cpu or cuda")
    if block is None:
        raise UnsupportedError("weights have one scale per tensor; expected blocks of 32 columns")
    (n, k), (rows, columns) = weight.shape[-2:], block
    if n % 32 or k % 32:
        raise UnsupportedError(f"weights are {n} x {k}; expected multiples of 32")
    if columns % mxfp8_moe.BLOCK:
        raise UnsupportedError(f"scale blocks are {rows} x {columns}; expected multiples of {mxfp8_moe.BLOCK} columns")
    expected = (*weight.shape[:-2], -(-n // rows), -(-k // columns))
    if tuple(scale.shape) != expected:
        raise UnsupportedError(f"scales have shape {list(scale.shape)}; expected {list(expected)}")
    codes = _codes(scale)
    if rows > 1:
        codes = codes.repeat_interleave(rows, -2)[..., :n, :]
    if columns > mxfp8_moe.BLOCK:
        codes = codes.repeat_interleave(columns // mxfp8_moe.BLOCK, -1)[..., : k // mxfp8_moe.BLOCK]
    return mxfp8_moe.swizzle_scales(codes)


def _codes(scale: Tensor) -> Tensor:
    """UE8M0 codes: the bytes themselves, or the exponents of float32 scales that are powers of two."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return scale.view(torch.uint8)
    if scale.dtype != torch.float32:
        raise UnsupportedError(f"scales are {scale.dtype}; expected UE8M0")
    bits = scale.view(torch.int32)
    exponents = bits >> 23
    if bool(((bits & 0x7FFFFF) != 0).logical_or((exponents <= 0) | (exponents == 255)).any()):
        raise UnsupportedError("scales are float32 numbers; expected powers of two")
    return exponents.to(torch.uint8)


def refuse_call(x: Tensor) -> str | None:
    """Why a call on these activations is not one for Abiding, or None."""
    if x.dtype != torch.bfloat16:
        return f"activations are {x.dtype}; expected torch.bfloat16"
    if torch.is_grad_enabled() and x.requires_grad:
        return "activations require a gradient, which the kernels do not have; call the model under torch.no_grad()"
    return None


def aligned_rows(x: Tensor) -> Tensor:
    """Activations as [rows, K], with the strides and the alignment that the kernels need."""
    rows = x.reshape(-1, x.size(-1))
    strides_fit = rows.stride(1) == 1 and rows.stride(0) >= rows.size(1) and rows.stride(0) % 8 == 0
    # Under torch.compile a tensor does not tell its offset, and the compiler aligns what it allocates.
    if strides_fit and (torch.compiler.is_compiling() or rows.storage_offset() % 8 == 0):
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def log_once(what: str, reason: str) -> None:
    """Say, once per reason, that a kind of layer is left to transformers."""
    if torch.compiler.is_compiling():
        return
    line = f"abiding: {what} left to transformers: {reason}"
    if line not in _logged:
        _logged.add(line)
        _log.warning(line)


def library_module(name: str) -> ModuleType:
    """A module of transformers."""
    try:
        importlib.import_module("transformers")
    except ImportError as error:
        raise UnavailableError(f"transformers does not import: {error}", "pip install 'transformers>=5.17'") from None
    try:
        return importlib.import_module(f"transformers.{name}")
    except ImportError as error:
        raise UnavailableError(f"there is no transformers.{name}: {error}", _RELEASES) from None


_RELEASES = "use a release of transformers that docs/engines_transformers.md names"


def check_parameters(function: Any, where: str, first: Sequence[str]) -> None:
    """Raise an UnavailableError unless this is a function whose first parameters have these names."""
    if not callable(function):
        raise UnavailableError(f"transformers has no {where}", _RELEASES)
    found = list(inspect.signature(function).parameters)
    if found[: len(first)] != list(first):
        raise UnavailableError(f"{where} takes {found}; expected {list(first)}", _RELEASES)
