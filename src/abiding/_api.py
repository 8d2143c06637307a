"""What the functions of the public API share: argument checks, and the translation of operator errors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abiding._library import require_cuda_kernels


def call(function: str, names: Mapping[str, str], op: torch._ops.OpOverload, *args: object, **kwargs: object) -> Any:
    """Run an operator and return its result; argument errors become TypeError or ValueError.

    Args:
        function: name of the public function, for error messages.
        names: maps the operator's argument names to the function's where they differ.
        op: the operator; its arguments follow.
    """
    if isinstance(args[0], Tensor) and args[0].is_cuda:
        require_cuda_kernels()
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        raise translated(error, function, names) from None


def translated(error: RuntimeError, function: str, names: Mapping[str, str]) -> Exception:
    """Translate an operator's argument error to a TypeError, a ValueError, or an OutOfMemoryError for a result that no
    memory is left for; other errors are returned unchanged."""
    text = next((line for line in str(error).splitlines() if line.startswith("abiding::")), "")
    if match := re.match(r"abiding::\w+: (?P<complaint>\w+.*; expected .*)", text):
        # "a" names an argument at the start, and after "as" and "overlaps"; elsewhere it is the article.
        words = r"(?!a\b)\w+|^a\b|(?<=\bas )a\b|(?<=\boverlaps )a\b"
        complaint = re.sub(words, lambda word: names.get(word[0], word[0]), match["complaint"])
        if " there is no memory for " in text:
            return torch.OutOfMemoryError(f"{function}: {complaint}")
        return (TypeError if re.search(r" has dtype | is undefined;", text) else ValueError)(f"{function}: {complaint}")
    mismatch = r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'"
    if match := re.search(mismatch, str(error)):
        expected, argument, found = match.groups()
        return TypeError(f"{function}: {names.get(argument, argument)} is a {found}; expected a {expected}")
    return error


def check_tensor(function: str, name: str, tensor: object) -> Tensor:
    """Return the argument; TypeError unless it is a tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {name} is a {type(tensor).__name__}; expected a Tensor")
    return tensor


def check_shape(function: str, name: str, tensor: object, shape: tuple[int | str, ...]) -> None:
    """Raise unless the argument is a tensor of this shape; a dimension given by name may have any size."""
    sizes = check_tensor(function, name, tensor).shape
    if len(sizes) == len(shape):
        for want, size in zip(shape, sizes, strict=True):  # no generator: the host has a few microseconds per call
            if not isinstance(want, str) and want != size:
                break
        else:
            return
    raise ValueError(f"{function}: {name} has shape {list(sizes)}; expected [{', '.join(map(str, shape))}]")


def check_dtype(function: str, name: str, tensor: Tensor, accepted: Sequence[torch.dtype], like: str = "") -> None:
    """Raise TypeError unless the dtype is accepted, or is that of the argument ``like``, in the operators' words."""
    if tensor.dtype not in accepted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in accepted)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(
            f"{function}: {name} has dtype {found}; expected dtype {names}" + (f" as {like}" if like else "")
        )


def check_device(function: str, name: str, tensor: Tensor, other: Tensor, like: str) -> None:
    """Raise ValueError unless the tensor is on the device of the argument ``like``, in the operators' words."""
    if tensor.device != other.device:
        raise ValueError(f"{function}: {name} is on {tensor.device}; expected device {other.device} as {like}")


def check_holds_its_values(function: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the argument is a tensor, ValueError for a lazily negated or conjugated view, as the
    operators do."""
    if check_tensor(function, name, tensor).is_neg() or tensor.is_conj():
        kind, method = ("negated", "neg") if tensor.is_neg() else ("conjugated", "conj")
        raise ValueError(
            f"{function}: {name} is a lazily {kind} view; expected a tensor that holds its values, "
            f"as .resolve_{method}() makes it"
        )
