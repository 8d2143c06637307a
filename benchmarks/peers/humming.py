"""Humming's kernels (PyPI humming-kernels) as a peer: MXFP8 weights and bfloat16 activations, compiled at run time by
nvcc, which must be on the machine; nothing is downloaded.

Tiles are chosen by Humming's heuristics for each number of rows, as vLLM does. Its GEMM comes in two kinds: `indexed`
gathers a token's row for each of its experts, `grouped` takes rows in the order of their experts, as ours does.

Beside mode "fp8" stand its two ways to multiply e4m3 rows (`FORMATS`): rows with one scale each, of tokens and of
weights, as rebased weights are; and rows with a scale per 128, of weights with one float32 scale per 128 x 128.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abiding import mxfp8_moe as api
from abiding.testing.cases.mxfp8_moe import LayerCase, LayerInputs
from benchmarks.peers.archive import unpacked
from benchmarks.peers.mxfp8 import Gemm, LayerPeer, Peer, Routed

KINDS = {"humming": "grouped_contiguous", "humming_indexed": "indexed"}
"""Humming's names of the two kinds, by the peer names that results use."""

FORMATS: dict[str, dict[str, Any]] = {
    "humming_fp8_token": {"input_quant_mode": "dynamic_token"},
    "humming_fp8_block": {"input_quant_mode": "dynamic_group", "input_scale_group_size": 128},
}
"""How rows are quantized to e4m3, as arguments of Humming's input schema, by the peer names that results use."""
_SILU = "a / (1.f + __expf(-a)) * b"  # of a gate and an up element, as Humming's kernel has them

_PADDING = {"pad_n_to_multiple": 256, "pad_k_to_multiple": 128}  # as vLLM pads; our shapes need none


class Humming:
    """The imported package."""

    def __init__(self, path: Path) -> None:
        """Import it from a wheel, or from an unpacked wheel."""
        temporary = Path(tempfile.gettempdir())
        if path.suffix == ".whl":
            path = unpacked(path)
        for tool in path.glob("humming/_native/*/*"):
            tool.chmod(0o755)  # unpacking drops the executable bit, and one of these is its compiler
        sys.path.insert(0, str(path))
        os.environ.setdefault("HUMMING_CACHE_DIR", str(temporary / "humming-cache"))
        os.environ.setdefault("HUMMING_TMP_DIR", str(temporary / "humming-tmp"))
        os.environ.setdefault("HUMMING_COMPILER", "nvcc")
        os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"  # compile nothing at import
        self.ops = importlib.import_module("humming.ops")
        self.kernel = importlib.import_module("humming.kernel.humming").HummingKernel
        self.schema = importlib.import_module("humming.schema")
        self.modelopt = importlib.import_module("humming.schema.modelopt")
        self.fp8 = importlib.import_module("humming.schema.fp8")
        self.forward = importlib.import_module("humming.forward")
        self.transform = importlib.import_module("humming.transform")
        self.tune = importlib.import_module("humming.tune")
        del os.environ["HUMMING_DISABLE_PARALLEL_BUILD"]  # it would also limit compilation to one thread
        importlib.import_module("humming.ops.utils").init_humming_launcher()

    def weights(self, weight: Tensor, codes: Tensor, stacks: list[int], rows: str | None = None) -> HummingWeights:
        """Weights [E, N, K] e4m3 and plain codes [E, N, K / 32] in Humming's layout; `stacks` are the parts of N.
        `rows` is one of `FORMATS`, or None for bfloat16 rows. "humming_fp8_token" takes the first code of a weight row
        for all of it, and "humming_fp8_block" has scales of its own."""
        experts, n, k = weight.shape
        plain = weight.view(torch.float8_e4m3fn)
        given = {"a_dtype": "float8e4m3", "input_scale_dtype": "float32"} | FORMATS[rows] if rows else {}
        if rows == "humming_fp8_token":
            schema = self.schema.HummingWeightSchema(b_dtype="float8e4m3")
            scales = torch.exp2(codes[..., :1].float() - 127).bfloat16()
            tensors = {"weight": plain.view(torch.int32), "weight_scale": scales}
        else:
            source, named = self.modelopt.ModeloptMxfp8WeightSchema(), {"weight_scale": codes}
            if rows == "humming_fp8_block":
                source = self.fp8.Fp8WeightSchema(weight_block_size=(128, 128))
                blocks = (experts, -(-n // 128), -(-k // 128))
                named = {source.weight_scale_key: torch.full(blocks, 0.01, device=weight.device)}
            schema, tensors = source.convert_humming(
                tensors={"weight": plain, **named},
                shape_n_stacks=stacks,
                shape_k_stacks=[k],
                param_dtype=torch.bfloat16,
                num_experts=experts,
                device=weight.device,
            )
        config, prepared = self.transform.prepare_and_transform_humming_tensors(
            tensors=tensors,
            shape_n=n,
            shape_k=k,
            weight_schema=schema,
            input_schema=self.schema.HummingInputSchema(**given),
            num_experts=experts,
            torch_dtype=torch.bfloat16,
            device=weight.device,
            **_PADDING,
        )
        locks = torch.zeros(1 << 15, dtype=torch.int32, device=weight.device)
        return HummingWeights(self, config, prepared, locks, n)


@dataclass(frozen=True)
class HummingWeights:
    """The weights and the configuration of a GEMM."""

    humming: Humming
    config: Any
    tensors: dict[str, Tensor]
    locks: Tensor
    n: int

    def compile(self, rows: Iterable[int]) -> None:
        """Compile the kernels for these numbers of rows, in parallel."""
        jobs = {(kind, self._tuning(kind, count)) for kind in KINDS.values() for count in rows}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: self._kernel(*job), jobs))

    def quantize(self, x: Tensor, activation: str | None = None) -> QuantizedRows:
        """Rows of `x` as these weights take them; `activation` of their gate and up halves comes first."""
        options = {"activation_type": "binary_split", "activation_impl": activation} if activation else {}
        call = partial(self.humming.forward.may_process_input, self.config, inputs=x, **options)
        rows, of_groups, of_tokens = call()
        again = partial(call, outputs=rows, group_scales=of_groups, token_scales=of_tokens)
        return QuantizedRows(rows, of_tokens if of_groups is None else of_groups, again)

    def call(
        self, kind: str, a: Tensor, ids: Tensor, top_k: int, out: Tensor, scales: Tensor | None = None
    ) -> Callable[[], object]:
        """A call of a kind (a value of `KINDS`). Rows of `a` are tokens or, with kind "grouped_contiguous", pairs of a
        token and an expert in the order of their experts; `out` has one row per pair. e4m3 rows have `scales`."""
        pairs, experts = ids.flatten().long(), self.tensors["weight"].size(0)
        tuning = self._tuning(kind, len(pairs))
        counts = torch.bincount(pairs, minlength=experts)
        if kind == "indexed":
            tile_rows = json.loads(tuning)["block_shape"][0]
            routing = _sorted_pairs(pairs, counts, tile_rows) | {"top_k": top_k}
        else:
            routing = {"expert_layout": torch.cat([counts.new_zeros(1), counts.cumsum(0)])}
        arguments = {
            "configs": self._kernel(kind, tuning),
            "inputs": a,
            "input_scale": scales,
            "weight": self.tensors["weight"],
            "weight_scale": self.tensors["weight_scale"],
            "weight_scale_2": self.tensors.get("weight_scale_2"),
            "outputs": out,
            "locks": self.locks,
            "valid_shape_m": len(pairs),
        }
        return lambda: self.humming.ops.launch_kernel(**arguments, **routing)

    def _tuning(self, kind: str, rows: int) -> str:
        return json.dumps(self.humming.tune.get_heuristics_config(self.config, shape_m=rows, gemm_type=kind))

    def _kernel(self, kind: str, tuning: str) -> Any:
        compute = json.dumps({"gemm_type": kind})
        return self.humming.kernel.prepare_kernels(self.config.to_str(), compute, tuning, device=0)


@dataclass(frozen=True)
class QuantizedRows:
    """Rows with their scales, and the call that writes both again."""

    rows: Tensor
    scales: Tensor
    run: Callable[[], object]


def _sorted_pairs(pairs: Tensor, counts: Tensor, tile_rows: int) -> dict[str, Any]:
    """Pairs sorted by expert, each expert's padded to whole tiles with an id that no pair has."""
    order = pairs.argsort(stable=True)
    tiles = (counts + tile_rows - 1) // tile_rows
    total = int(tiles.sum()) * tile_rows
    first = (tiles.cumsum(0) - tiles) * tile_rows
    within = torch.arange(len(pairs), device=pairs.device) - (counts.cumsum(0) - counts)[pairs[order]]
    sorted_pairs = torch.full((total,), len(pairs), dtype=torch.int32, device=pairs.device)
    sorted_pairs[first[pairs[order]] + within] = order.int()
    experts = torch.arange(len(counts), device=pairs.device).repeat_interleave(tiles)
    return {
        "sorted_ids": sorted_pairs,
        "expert_ids": experts.int(),
        "num_tokens_padded": torch.tensor([total], dtype=torch.int32, device=pairs.device),
    }


class HummingLibrary:
    """Humming's kernels, on our weights in Humming's layout."""

    def __init__(self, wheel: Path) -> None:
        self.humming = Humming(wheel)

    def weights(self, gemm: Gemm, cases: list[LayerCase], rows: str | None = None) -> HummingWeights:
        codes = api.unswizzle_scales(gemm.scale, gemm.n, gemm.k)
        stacks = [gemm.n // 2] * 2 if gemm.name == "GEMM1" else [gemm.n]
        weights = self.humming.weights(gemm.weight, codes, stacks, rows)
        weights.compile(case.tokens * case.top_k for case in cases)
        return weights

    def gemms(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]:
        weights = self.weights(gemm, cases)

        def call(kind: str, routed: Routed) -> Callable[[], object]:
            out = routed.rows.new_empty(len(routed.rows), gemm.n)
            if kind == "indexed" and gemm.name == "GEMM1":
                top_k = routed.ids.size(1)
                return weights.call(kind, routed.rows[: len(routed.rows) // top_k], routed.ids, top_k, out)
            return weights.call(kind, routed.rows, routed.ids, 1, out)

        return [Peer(name, partial(call, kind)) for name, kind in KINDS.items()]

    def layers(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]:
        """Two indexed GEMMs, the activation and the weighted sum in torch's own operations."""
        first, second = self.weights(up, cases), self.weights(down, cases)

        def call(i: LayerInputs) -> Callable[[], object]:
            tokens, top_k = i.topk_ids.shape
            gate_up, activated = i.x.new_empty(tokens * top_k, up.n), i.x.new_empty(tokens * top_k, down.k)
            result = i.x.new_empty(tokens * top_k, down.n)
            gate, up_rows = gate_up.chunk(2, 1)
            multiply_up = first.call("indexed", i.x, i.topk_ids, top_k, gate_up)
            multiply_down = second.call("indexed", activated, i.topk_ids, 1, result)

            def run() -> None:
                multiply_up()
                torch.mul(torch.nn.functional.silu(gate), up_rows, out=activated)
                multiply_down()
                torch.sum(result.view(tokens, top_k, down.n) * i.topk_weights[..., None].bfloat16(), 1)

            return run

        return [LayerPeer("humming", call)]

    def gemms_fp8(self, gemm: Gemm, cases: list[LayerCase]) -> list[Peer]:
        """Grouped GEMMs of rows that are quantized before, as ours."""
        return [Peer(name, partial(_call_fp8, self.weights(gemm, cases, name))) for name in FORMATS]

    def layers_fp8(self, up: Gemm, down: Gemm, cases: list[LayerCase]) -> list[LayerPeer]:
        """Humming's quantizer, which also computes the activation, and two indexed GEMMs; the weighted sum in torch's
        own operations."""
        weights = ((name, self.weights(up, cases, name), self.weights(down, cases, name)) for name in FORMATS)
        return [LayerPeer(name, partial(_layer_fp8, first, second)) for name, first, second in weights]


def _call_fp8(weights: HummingWeights, routed: Routed) -> Callable[[], object]:
    out = routed.rows.new_empty(len(routed.rows), weights.n)
    a = weights.quantize(routed.rows)
    return weights.call(KINDS["humming"], a.rows, routed.ids, 1, out, a.scales)


def _layer_fp8(first: HummingWeights, second: HummingWeights, i: LayerInputs) -> Callable[[], object]:
    tokens, top_k = i.topk_ids.shape
    gate_up, result = (i.x.new_empty(tokens * top_k, weights.n) for weights in (first, second))
    rows, activated = first.quantize(i.x), second.quantize(gate_up, _SILU)
    multiply_up = first.call("indexed", rows.rows, i.topk_ids, top_k, gate_up, rows.scales)
    multiply_down = second.call("indexed", activated.rows, i.topk_ids, 1, result, activated.scales)

    def run() -> None:
        rows.run()
        multiply_up()
        activated.run()
        multiply_down()
        torch.sum(result.view(tokens, top_k, second.n) * i.topk_weights[..., None].bfloat16(), 1)

    return run
