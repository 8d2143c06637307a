"""Tensors between canaries, which detect writes outside of a tensor and into the gaps between its strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

POISON = 0xFF
"""A fill byte that reads as NaN in every float format and as -1 in every signed integer."""

CANARY = 0xA5


@dataclass(frozen=True)
class GuardedTensor:
    """`tensor` is a view of `storage` from byte `start` on; all other bytes of `storage` are canaries."""

    tensor: Tensor
    storage: Tensor
    start: int
    name: str = "tensor"

    def check(self) -> None:
        """Raise AssertionError if a canary has changed. The message gives the offset of the first from the tensor's
        first byte."""
        outside = self.storage.clone()
        _bytes_of(self.tensor, outside, self.start).fill_(CANARY)
        changed = outside != CANARY
        if bool(changed.any()):
            first = int(changed.to(torch.uint8).argmax())
            raise AssertionError(
                f"{self.name}: {int(changed.sum())} bytes outside of the tensor were written; the first is at byte "
                f"offset {first - self.start}: 0x{int(outside[first]):02x} instead of the canary 0x{CANARY:02x}"
            )

    def clone(self) -> GuardedTensor:
        """A copy of the storage, canaries included."""
        storage = self.storage.clone()
        tensor = storage.view(self.tensor.dtype).as_strided(
            self.tensor.shape, self.tensor.stride(), self.start // self.tensor.element_size()
        )
        return GuardedTensor(tensor, storage, self.start, self.name)


def guarded(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    fill: int | Tensor = POISON,
    offset_bytes: int = 0,
    strides: Sequence[int] | None = None,
    margin: int = 4096,
    name: str = "tensor",
) -> GuardedTensor:
    """A guarded tensor filled with `fill`, a byte to repeat or a tensor's values.

    `strides` (in elements, contiguous by default) may leave gaps, which are guarded too. The data starts
    `offset_bytes`, a multiple of the element size, after a boundary of at least 64 bytes, and has at least `margin`
    bytes of canaries on either side.
    """
    meta = torch.empty(shape, dtype=dtype, device="meta")
    steps = tuple(meta.stride() if strides is None else strides)
    size = meta.element_size()
    if offset_bytes % size:
        raise ValueError(f"offset_bytes {offset_bytes}; expected a multiple of {dtype}'s size, {size}")
    margin = -(-margin // 512) * 512
    start = margin + offset_bytes
    span = size * (1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))) if meta.numel() else 0
    storage = torch.full((-(-(start + span + margin) // 8) * 8,), CANARY, dtype=torch.uint8, device=device)
    tensor = storage.view(dtype).as_strided(tuple(shape), steps, start // size)
    if isinstance(fill, Tensor):
        tensor.copy_(fill)
    else:
        _bytes_of(tensor, storage, start).fill_(fill)
    return GuardedTensor(tensor, storage, start, name)


def _bytes_of(tensor: Tensor, storage: Tensor, start: int) -> Tensor:
    size = tensor.element_size()
    return storage.as_strided((*tensor.shape, size), (*(size * step for step in tensor.stride()), 1), start)
