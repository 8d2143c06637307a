"""vLLM's Marlin kernels, from the library that holds the operators `_moe_C`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from abiding.testing.cases.mxfp8_moe import LayerCase, LayerInputs
from benchmarks.peers.mxfp8 import Gemm, LayerPeer, Peer, Routed


@dataclass(frozen=True)
class Sorted:
    """Pairs of a token and an expert, sorted by expert, each expert's padded to whole tiles, as Marlin takes them."""

    tile_rows: int
    pairs: Tensor
    experts: Tensor
    total: Tensor

    @staticmethod
    def like(ids: Tensor, experts: int) -> Sorted:
        rows = ids.numel()
        tile_rows = next((size for size in (8, 16, 32, 48, 64) if rows / experts / size < 0.9), 64)
        most = rows + experts * (tile_rows - 1)
        sizes = (most, -(-most // tile_rows), 1)
        pairs, tile_experts, total = (ids.new_empty(size, dtype=torch.int32) for size in sizes)
        return Sorted(tile_rows, pairs, tile_experts, total)

    def fill(self, ids: Tensor, experts: int) -> None:
        torch.ops._moe_C.moe_align_block_size(ids, experts, self.tile_rows, self.pairs, self.experts, self.total, None)


class Marlin:
    """The library, on random bits as weights."""

    E4M3 = 2814749767172868
    """vLLM's id of the scalar type float8_e4m3fn."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library.resolve()))
        if not hasattr(torch.ops._moe_C, "moe_wna16_marlin_gemm"):
            raise ValueError("it has no moe_wna16_marlin_gemm")
        device = torch.device("cuda", torch.cuda.current_device())
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.workspace = torch.zeros(4 * sms, dtype=torch.int32, device=device)

    def weights(self, gemm: Gemm) -> tuple[Tensor, Tensor]:
        experts, n, k = gemm.weight.shape
        device = gemm.weight.device
        bits = torch.randint(0, 2**31 - 1, (experts, k // 16, n * 4), dtype=torch.int32, device=device) & 0x37373737
        scales = torch.full((experts, k // 32, n), 120, dtype=torch.uint8, device=device)
        return bits, scales.view(torch.float8_e8m0fnu)

    def gemm(
        self,
        a: Tensor,
        out: Tensor,
        weights: tuple[Tensor, Tensor],
        pairs: Sorted,
        topk_weights: Tensor,
        top_k: int,
        weigh: bool,
    ) -> None:
        rows, k = a.shape
        torch.ops._moe_C.moe_wna16_marlin_gemm(
            *(a, out, weights[0], None, weights[1], None, None, None, self.workspace, pairs.pairs, pairs.experts),
            *(pairs.total, topk_weights, pairs.tile_rows, top_k, weigh, self.E4M3, rows, out.size(1), k),
            *(False, True, False, -1, -1, -1),
        )

    def gemms(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]:
        weights = self.weights(gemm)
        experts = gemm.weight.size(0)

        def call(routed: Routed) -> Callable[[], object]:
            ids = routed.ids.int()
            pairs = Sorted.like(ids, experts)
            pairs.fill(ids, experts)
            # GEMM1 reads rows of tokens, GEMM2 rows of pairs.
            top_k = ids.size(1) if gemm.name == "GEMM1" else 1
            a = routed.rows[: ids.numel() // top_k]
            out = a.new_empty(ids.numel(), gemm.n)
            ones = torch.ones(ids.shape, device=ids.device)
            return lambda: self.gemm(a, out, weights, pairs, ones, top_k, False)

        return [Peer("marlin", call)]

    def layers(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]:
        """Sorting, two GEMMs, the activation in torch's own operations, the top-k sum."""
        first, second = self.weights(up), self.weights(down)
        experts = up.weight.size(0)

        def call(i: LayerInputs) -> Callable[[], object]:
            ids = i.topk_ids.int()
            pairs = Sorted.like(ids, experts)
            tokens, top_k = ids.shape
            gate_up = i.x.new_empty(ids.numel(), up.n)
            result = i.x.new_empty(ids.numel(), down.n)
            out = torch.empty_like(i.x)

            def run() -> None:
                pairs.fill(ids, experts)
                self.gemm(i.x, gate_up, first, pairs, i.topk_weights, top_k, False)
                gate, up_rows = gate_up.chunk(2, 1)
                self.gemm(torch.nn.functional.silu(gate) * up_rows, result, second, pairs, i.topk_weights, 1, True)
                torch.ops._moe_C.moe_sum(result.view(tokens, top_k, down.n), out)

            return run

        return [LayerPeer("marlin", call)]

    def gemms_fp8(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]:
        return []

    def layers_fp8(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]:
        return []
