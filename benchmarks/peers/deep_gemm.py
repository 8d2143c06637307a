"""DeepGEMM's grouped GEMM of e4m3 rows with a scale per 128 and e4m3 weights with a scale per 128 x 128, both float32.

It comes as a zip archive of the Python package `deep_gemm`, which vLLM's wheel has as `vllm/third_party/deep_gemm` and
which needs nothing else of vLLM. nvcc compiles a kernel when it is first called, in about five seconds; the headers are
in the package.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from abiding.testing.cases.mxfp8_moe import LayerCase
from benchmarks.peers.archive import unpacked
from benchmarks.peers.mxfp8 import Gemm, LayerPeer, Peer, Routed

BLOCK = 128
"""Elements that share a scale: of a row, and of weights in either direction."""
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class AlignedRows:
    """Quantized rows in DeepGEMM's layout: those of each expert begin at a multiple of the alignment."""

    data: Tensor
    """e4m3 [total, K]."""
    scales: Tensor
    """float32 [total, K / 128]; neighbors in memory are those of consecutive rows, as TMA reads them."""
    ends: Tensor
    """int32 [experts]: the place behind each expert's last row."""
    places: Tensor
    """Where each of the given rows is."""

    @staticmethod
    def of(rows: Tensor, offsets: Tensor, alignment: int) -> AlignedRows:
        """Quantize rows that are sorted by expert. There is room for any counts of the experts, as a caller needs who
        does not know them on the host; so calls with as many rows run the same kernel."""
        counts = offsets.diff().long()
        sizes = (counts + alignment - 1) // alignment * alignment
        starts = sizes.cumsum(0) - sizes
        places = torch.arange(len(rows), device=rows.device) + (starts - offsets[:-1]).repeat_interleave(counts)
        most = len(rows) + min(len(rows), len(counts)) * (alignment - 1)
        total, k = most // alignment * alignment, rows.size(1)

        blocks = rows.float().unflatten(1, (-1, BLOCK))
        scales = blocks.abs().amax(2).clamp(min=1e-4) / _E4M3_MAX
        quantized = (blocks / scales[..., None]).flatten(1).to(torch.float8_e4m3fn)
        data = torch.zeros(total, k, dtype=torch.uint8, device=rows.device)
        data[places] = quantized.view(torch.uint8)
        aligned_scales = torch.zeros(k // BLOCK, total, device=rows.device).t()
        aligned_scales[places] = scales
        return AlignedRows(data.view(torch.float8_e4m3fn), aligned_scales, (starts + counts).int(), places)


class DeepGemm:
    """The package, on our weights with scales of its own."""

    def __init__(self, archive: Path) -> None:
        sys.path.insert(0, str(unpacked(archive)))
        os.environ.setdefault("DG_JIT_CACHE_DIR", str(Path(tempfile.gettempdir()) / "deep-gemm-cache"))
        self.kernels = importlib.import_module("deep_gemm")
        self.kernels.set_pdl(True)  # as vLLM does on Hopper

    def gemms(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]:
        return []

    def layers(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]:
        return []

    def gemms_fp8(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]:
        """Grouped GEMMs of rows that are quantized and aligned before, called as vLLM does on Hopper: the kernel takes
        the experts' ends (`use_psum_layout`) rather than the expert of each row."""
        experts, n, k = gemm.weight.shape
        scales = torch.full((experts, -(-n // BLOCK), -(-k // BLOCK)), 0.01, device=gemm.weight.device)
        return [Peer("deep_gemm", partial(self._call, gemm.weight.view(torch.float8_e4m3fn), scales))]

    def layers_fp8(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]:
        """None: on Hopper DeepGEMM has no kernels for what is around the GEMMs. vLLM's are Triton kernels of its own,
        and torch's operations in their place would make a layer that nobody runs."""
        return []

    def _call(self, weight: Tensor, scales: Tensor, routed: Routed) -> Callable[[], object]:
        alignment = self.kernels.get_m_alignment_for_contiguous_layout()
        rows = AlignedRows.of(routed.rows, routed.offsets, alignment)
        out = routed.rows.new_empty(len(rows.data), weight.size(1))
        product = partial(self.kernels.m_grouped_fp8_gemm_nt_contiguous, (rows.data, rows.scales), (weight, scales))
        return partial(product, out, rows.ends, use_psum_layout=True)
