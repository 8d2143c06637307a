"""Fake kernels: what torch.compile and fake tensors run in an operator's place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...] | None


def register_fake(name: str, result: Callable[..., Result]) -> None:
    """Register the fake of ``abiding::<name>``: all tensors must be on one device, and ``result`` makes the output.

    The device check matters outside of compilation too: a meta tensor among others sends a call to the fake.
    """
    packet, _, overload = name.partition(".")
    arguments = getattr(getattr(torch.ops.abiding, packet), overload or "default")._schema.arguments

    def fake(*args: object, **kwargs: object) -> Result:
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        first = next(iter(tensors))
        for key, value in tensors.items():
            if value.device != tensors[first].device:
                raise RuntimeError(
                    f"abiding::{packet}: {key} is on {value.device}; expected device {tensors[first].device} as {first}"
                )
        return result(*args, **kwargs)

    torch.library.register_fake(f"abiding::{name}", fake)


def writes_in_place(*args: object, **kwargs: object) -> None:
    """The result of an operator that only writes to its arguments."""
