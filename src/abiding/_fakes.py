"""Fake (meta) kernels: what torch.compile and FakeTensorMode run instead of an operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, ...] | str | None


def register_fake(name: str, result: Callable[..., Result]) -> None:
    """Register the fake kernel of ``abiding::<name>``; ``result`` creates the output.

    The fake also checks that all tensors are on one device. That matters outside of compilation too: a single meta
    tensor among the arguments dispatches a call to the fake.
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
    """The ``result`` of an operator that only writes to its arguments."""
