"""What the jobs ask of vLLM: each question raises an :class:`UnavailableError` that names what has changed.

Signatures are compared, not version numbers: a release that renamed nothing is served on the day it comes out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from types import ModuleType
from typing import Any

import abiding
from abiding.engines._jobs import UnavailableError

_REMEDY = "use a vLLM that docs/engines_vllm.md lists, or a newer abiding"


def require_hopper() -> None:
    """Raise unless Abiding's CUDA kernels are loaded and vLLM runs on Hopper GPUs."""
    if (reason := abiding.cuda_unavailable_reason()) is not None:
        raise UnavailableError(
            reason, "a GPU needs a wheel of abiding with CUDA, a torch for CUDA 13 and a driver >= 580"
        )
    platform = load("vllm.platforms").current_platform
    capability = platform.get_device_capability() if platform.is_cuda() else None
    if capability is None or capability.major != 9:
        found = f"compute capability {capability.major}.{capability.minor}" if capability else type(platform).__name__
        raise UnavailableError(f"this is {found}, and the MXFP8 kernels are for Hopper (9.0)", "nothing to do")


def load(name: str) -> ModuleType:
    """Import a module of vLLM."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "vllm":
            raise UnavailableError("vLLM is not installed", "pip install vllm") from error
        raise UnavailableError(f"{_release()} cannot import {name}: {error}", _REMEDY) from error
    except Exception as error:  # an installed vLLM may raise anything: its binaries need a certain torch and CUDA
        raise UnavailableError(
            f"{_release()} cannot import {name}: {type(error).__name__}: {error}", _REMEDY
        ) from error


def require_attribute(owner: Any, name: str) -> Any:
    """The attribute ``name`` of a module or class."""
    if not hasattr(owner, name):
        raise UnavailableError(f"{_release()} has no {_name(owner)}.{name}", _REMEDY)
    return getattr(owner, name)


def require_parameters(owner: Any, name: str, expected: str, *, more: bool = False) -> Any:
    """The function ``name`` of a module or class, whose parameters must have these names in this order.

    Args:
        owner: a module or class.
        name: of a function in it.
        expected: the names, separated by spaces, without ``self`` and ``cls``.
        more: whether further parameters with a default are fine.
    """
    function = require_attribute(owner, name)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise UnavailableError(f"{_release()}: {_name(owner)}.{name} has no signature ({error})", _REMEDY) from error
    if inspect.isclass(owner) and parameters and parameters[0].name == "self":
        parameters = parameters[1:]
    wanted = expected.split()
    rest = parameters[len(wanted) :]
    optional = all(one.default is not one.empty for one in rest)
    if [one.name for one in parameters[: len(wanted)]] != wanted or (rest and not (more and optional)):
        found = " ".join(one.name for one in parameters)
        raise UnavailableError(
            f"{_release()}: {_name(owner)}.{name} takes ({found}); expected ({expected}{' ...' if more else ''})",
            _REMEDY,
        )
    return function


def require_abstract(owner: type, expected: str) -> None:
    """The abstract methods of a class must be among these, so that a subclass which defines all of them is whole."""
    added = sorted(getattr(owner, "__abstractmethods__", frozenset()) - set(expected.split()))
    if added:
        raise UnavailableError(f"{_release()}: {_name(owner)} asks for {', '.join(added)} too", _REMEDY)


def _name(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"


def _release() -> str:
    try:
        return f"vLLM {importlib.metadata.version('vllm')}"
    except importlib.metadata.PackageNotFoundError:
        return "vLLM"
