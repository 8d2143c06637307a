"""Test cases of the all-reduce: `REGULAR[0].make(ranks=2)` creates every rank's message and the expected sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abiding.reference.all_reduce import sum_in_rank_order
from abiding.testing.cases import describe
from abiding.testing.guarded import GuardedTensor, guarded

Values = Literal["normal", "zero", "subnormal", "huge", "nan", "inf", "bits"]

_SPECIAL_VALUES: tuple[Values, ...] = ("zero", "subnormal", "huge", "nan", "inf", "bits")
_INTEGER = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class AllReduceCase:
    """The shape, dtype, layout and values of one call."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    order: tuple[int, ...] | None = None
    """Dimensions from the largest stride to the smallest. Default: contiguous."""
    offset: int = 0
    """Elements from a 64-byte boundary to the message."""
    out_offset: int = 0
    in_place: bool = False
    values: Values = "normal"

    def __str__(self) -> str:
        return describe(self)

    @property
    def bytes(self) -> int:
        """Size of the message."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        strides, step = [0] * len(self.shape), 1
        for dim in reversed(self.order or range(len(self.shape))):
            strides[dim], step = step, step * max(self.shape[dim], 1)
        return tuple(strides)

    def make(self, ranks: int, device: torch.device | str = "cpu", seed: int = 0) -> AllReduceInputs:
        """Random messages and output buffers of all ranks, between canaries, and the expected sum."""
        rng = torch.Generator(device).manual_seed(seed)

        def allocate(fill: Tensor | int, offset: int) -> GuardedTensor:
            return guarded(
                self.shape,
                self.dtype,
                device,
                fill=fill,
                strides=self.strides,
                offset_bytes=offset * self.dtype.itemsize,
                margin=512,
            )

        messages = [allocate(self._values(rng), self.offset) for _ in range(ranks)]
        outs = messages if self.in_place else [allocate(0xFF, self.out_offset) for _ in range(ranks)]
        expected = sum_in_rank_order([message.tensor for message in messages])
        return AllReduceInputs(self, messages, outs, expected)

    def _values(self, rng: torch.Generator) -> Tensor:
        shape, dtype, device = self.shape, self.dtype, rng.device
        x = torch.randn(shape, generator=rng, device=device).to(dtype)
        finite = torch.finfo(dtype)
        if self.values == "zero":
            return torch.zeros_like(x).copysign_(x)
        if self.values == "subnormal":
            bits = torch.randint(1 << 7, shape, generator=rng, device=device)
            return bits.to(_INTEGER[dtype.itemsize]).view(dtype).copysign_(x)
        if self.values == "huge":
            return (torch.rand(shape, generator=rng, device=device) * finite.max).to(dtype).copysign_(x)
        if self.values in ("nan", "inf"):
            special = torch.full_like(x, math.nan if self.values == "nan" else math.inf).copysign_(x)
            return torch.where(torch.rand(shape, generator=rng, device=device) < 0.2, special, x)
        if self.values == "bits":
            width = 8 * dtype.itemsize
            bits = torch.randint(-(1 << width - 1), 1 << width - 1, shape, generator=rng, device=device)
            # All ones is the word that the protocol cannot send unchanged: it would encode to "empty".
            bits = torch.where(torch.rand(shape, generator=rng, device=device) < 0.2, -1, bits)
            return bits.to(_INTEGER[dtype.itemsize]).view(dtype)
        return x


@dataclass(frozen=True)
class AllReduceInputs:
    """Every rank's message and output, and the expected sum."""

    case: AllReduceCase
    messages: list[GuardedTensor]
    outs: list[GuardedTensor]
    expected: Tensor

    def check(self) -> None:
        """Raise AssertionError if a byte around a message or an output has changed."""
        for guard in (*self.messages, *self.outs):
            guard.check()


def canonical(x: Tensor) -> Tensor:
    """`x` with every NaN replaced by the same one: the payload of a NaN is unspecified."""
    return torch.where(x.isnan(), torch.full_like(x, math.nan), x)


REGULAR = [
    AllReduceCase((count,), dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for count in (512, 5120, 65536, 524288)
]

ODD = [
    *(AllReduceCase((count,)) for count in (1, 2, 3, 7, 8, 9, 15, 1023, 65537)),
    *(AllReduceCase((count,), torch.float32) for count in (1, 3, 5, 4099)),
    AllReduceCase((3, 5, 7), torch.float16),
    AllReduceCase((1, 1, 9)),
    *(AllReduceCase((1000,), offset=offset, out_offset=out) for offset, out in ((1, 0), (0, 1), (3, 5), (8, 4))),
    AllReduceCase((77,), torch.float32, offset=1),
    AllReduceCase((4, 6, 10), order=(2, 0, 1)),
    AllReduceCase((4, 6, 10), torch.float32, order=(1, 2, 0), offset=3, out_offset=1),
    AllReduceCase((64, 1, 128), order=(2, 1, 0)),
    AllReduceCase((1000,), in_place=True),
    AllReduceCase((999,), torch.float16, offset=5, in_place=True),
    AllReduceCase((30, 70), torch.float32, order=(1, 0), in_place=True),
    AllReduceCase(((1 << 20) + 3,)),
    AllReduceCase((3 << 19,), torch.float32),
]

CORNER = [
    AllReduceCase((0,)),
    AllReduceCase((3, 0, 2), torch.float32),
    AllReduceCase((), torch.float32),
    *(
        AllReduceCase((1003,), dtype, values=values)
        for values in _SPECIAL_VALUES
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
]

PERFORMANCE = [AllReduceCase((1 << power,)) for power in (3, 9, 11, 13, 15, 16, 17, 18, 19, 20, 21)]
"""16 bytes, which shows the fixed cost, and 1 KiB to 4 MiB."""
