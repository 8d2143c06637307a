"""What a library of MXFP8 kernels is asked for: GEMMs and layers, on our weights or its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from abiding.testing.cases.mxfp8_moe import LayerCase, LayerInputs


@dataclass(frozen=True)
class Gemm:
    """One of a layer's two GEMMs, with its weights."""

    name: str
    weight: Tensor
    scale: Tensor

    @property
    def n(self) -> int:
        return self.weight.size(1)

    @property
    def k(self) -> int:
        return self.weight.size(2)


@dataclass(frozen=True)
class Routed:
    """The rows of a call, sorted by expert, with the experts and the offsets."""

    ids: Tensor
    offsets: Tensor
    rows: Tensor

    @staticmethod
    def of(ids: Tensor, experts: int, k: int) -> Routed:
        counts = torch.bincount(ids.flatten(), minlength=experts)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        return Routed(ids, offsets, torch.randn(ids.numel(), k, device=ids.device).bfloat16())

    @property
    def active(self) -> int:
        return int((self.offsets.diff() > 0).sum())

    def bytes(self, gemm: Gemm) -> float:
        """Bytes of the roofline bound: weights and scales of the experts that have rows, rows in, rows out."""
        return self.active * gemm.n * gemm.k * 33 / 32 + len(self.rows) * (gemm.k + gemm.n) * 2


@dataclass(frozen=True)
class Peer:
    """Another implementation of a GEMM."""

    name: str
    call: Callable[[Routed], Callable[[], object]]


@dataclass(frozen=True)
class LayerPeer:
    """Another implementation of a layer."""

    name: str
    call: Callable[[LayerInputs], Callable[[], object]]


class Library(Protocol):
    """A library of peers for GEMMs and layers."""

    def gemms(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]: ...

    def layers(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]: ...

    def gemms_fp8(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]:
        """GEMMs of e4m3 rows on FP8 tensor cores."""
        ...

    def layers_fp8(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]:
        """Layers that quantize their rows for FP8 tensor cores."""
        ...
