"""Calls with random changes of their arguments: an operator may accept or refuse them, but must survive."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from calls import Call, collectives, mla_prologue, mxfp8_moe

MOST, LEAST = (1 << 63) - 1, -(1 << 63)
DTYPES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32),
)
FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e300, float("nan"), float("inf"), float("-inf"), 1.0)
NO_TENSORS: tuple[Any, ...] = (None, 3, 1.5, "x", [])
NO_NUMBERS = (None, "1", [1], 1j)


WELL_FORMED: dict[str, dict[str, Callable[..., Call]]] = {
    "collectives": dict.fromkeys(collectives.OPERATORS, collectives.well_formed),
    "life": dict.fromkeys(collectives.LIFE_OPERATORS, collectives.of_a_life),
    "mla_prologue": dict.fromkeys(mla_prologue.SPOILS, mla_prologue.well_formed),
    "mxfp8_moe": dict.fromkeys([*mxfp8_moe.SPOILS, mxfp8_moe.SIZES, mxfp8_moe.IMPLEMENTATION], mxfp8_moe.well_formed),
}
"""By group and operator, what makes an accepted call."""


SPOILED_FROM_ONE = {"mla_prologue": 4, "mxfp8_moe": 4}
"""By group, how many malformed calls are made from a well-formed one, which takes longer to make than the call."""


@lru_cache(maxsize=1)
def base(group: str, op: str, seed: int) -> Call:
    """An accepted call. Once it was made, it is to be forgotten: it has written to its tensors."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for every kind of device
    return WELL_FORMED[group][op](op, rng=random.Random(f"{op} {seed}"))


def malformed(group: str, op: str, seed: int) -> Call:
    """A call with some arguments changed to other values, accepted or not."""
    number = SPOILED_FROM_ONE.get(group)
    if number is None:  # what refused calls give back is their own
        base.cache_clear()
    call = base(group, op, seed // (number or 1))
    call = replace(call, args=dict(call.args), before={})
    rng = random.Random(f"{op} {seed} spoiled")
    names = list(call.args)
    for name in rng.sample(names, min(rng.choice([1, 1, 2, 4]), len(names))):
        call.args[name] = _spoiled(call, name, rng)
    return call


def _spoiled(call: Call, name: str, rng: random.Random) -> Any:
    value = call.args[name]
    if rng.random() < 0.02:
        return rng.choice(NO_TENSORS if isinstance(value, Tensor) else NO_NUMBERS)
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return rng.choice(FLOATS)
    if isinstance(value, int):
        return rng.choice([number for number in numbers(value, call) if number not in call.costly.get(name, ())])
    if isinstance(value, list):
        return _list(value, call, rng)
    return None if value is None else view(value, call, rng)


def numbers(value: int, call: Call) -> list[int]:
    near = [0, -1, 1, 2, value + 1, value - 1, -value, 64, 4096]
    far = [1 << bit for bit in (20, 31, 32, 40, 47, 54, 62)] + [MOST, LEAST]
    return [number for number in (*near, *far, *call.strangers) if LEAST <= number <= MOST]


def _list(value: list[Any], call: Call, rng: random.Random) -> list[Any]:
    """Another list of numbers, or of lists of numbers."""

    def element(old: Any) -> Any:
        return _list(old, call, rng) if isinstance(old, list) else rng.choice(numbers(old, call))

    changes: list[Callable[[], list[Any]]] = [
        lambda: value[:-1],
        lambda: value + value[:1],
        lambda: value[:0],
        lambda: value * 9,
        lambda: value[::-1],
        lambda: value[:1] * len(value),
        lambda: [element(old) for old in value],
        lambda: [element(old) if rng.random() < 0.5 else old for old in value],
    ]
    return rng.choice(changes)()


def view(x: Tensor, call: Call, rng: random.Random) -> Tensor:
    """Another tensor in the place of one: other sizes, strides, dtype, device, layout, memory or values."""
    others = [other for other in call.args.values() if isinstance(other, Tensor)]

    def view_as(dtype: torch.dtype) -> Tensor:
        return x.view(dtype) if x.is_contiguous() and x.dim() and x.shape[-1] % dtype.itemsize == 0 else x.to(dtype)

    def over(other: Tensor) -> Tensor:
        """A tensor like x over the memory of another argument, some bytes further."""
        memory = other.flatten().view(torch.uint8)
        start = rng.choice([0, x.element_size(), 16, 64])
        needed = x.numel() * x.element_size()
        return memory[start : start + needed].view(x.dtype).view(x.shape)

    def without_memory() -> Tensor:
        gone = torch.cat([x, x])[rng.choice([0, len(x)]) :][: len(x)]
        gone.untyped_storage().resize_(0)
        return gone

    def wild_integers() -> Tensor:
        info = torch.iinfo(x.dtype)
        choices = [info.min, info.max, -1, 0, 1, 5, 128, 1 << 30, *call.strangers]
        choices = [choice for choice in choices if info.min <= choice <= info.max]
        changed = x.flatten().clone()
        for at in rng.sample(range(x.numel()), min(rng.choice([1, 1, 16]), x.numel())):
            changed[at] = rng.choice(choices)
        return changed.view(x.shape)

    changes: list[Callable[[], Tensor]] = [
        lambda: x[:0],
        lambda: x[: x.shape[0] // 2],
        lambda: x[1:],
        lambda: x[::2],
        lambda: x[..., :-1],
        lambda: x[..., ::2],
        lambda: x[..., 1:],
        lambda: x[..., 32:],
        lambda: x.unsqueeze(0),
        lambda: x.unsqueeze(-1),
        lambda: x.flatten(),
        lambda: x.transpose(0, -1),
        lambda: x.flip(0),
        lambda: x[:1].expand_as(x),
        lambda: x.new_zeros(()),
        lambda: x.new_zeros(0),
        lambda: x.new_zeros((*x.shape, 0)),
        lambda: x.new_zeros((1,) * 64),
        lambda: torch.cat([x, x]),
        lambda: torch.cat([x, x], -1),
        lambda: view_as(rng.choice(DTYPES)),
        lambda: x.to(torch.complex64) if x.is_floating_point() and x.element_size() > 1 else x.to(torch.int16),
        lambda: x.to("meta"),
        lambda: x.as_strided(x.shape, [0] * x.dim(), x.storage_offset()),
        lambda: x.new_zeros(1).as_strided([MOST // 2, 1, 1][: max(x.dim(), 1)], [0] * max(x.dim(), 1)),
        lambda: x.to_sparse(),
        lambda: x.float().to_mkldnn(),
        lambda: torch._neg_view(x),
        lambda: x.to(torch.complex64).conj(),
        lambda: x.clone().requires_grad_(),
        lambda: rng.choice(others),
        lambda: over(rng.choice(others)),
        without_memory,
        wild_integers,
        wild_integers,
    ]
    try:
        return rng.choice(changes)()
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return x[:0] if x.dim() else x.new_zeros(3)
