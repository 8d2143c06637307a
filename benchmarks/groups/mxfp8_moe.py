"""Times of MXFP8 grouped GEMMs and MoE layers at the shapes of models, L2-cold: consecutive calls use distinct experts.

Peers are vLLM's Marlin kernels for MXFP8 weights (W8A16), from the library that holds its `_moe_C` operators;
Humming's, from the wheel of humming-kernels; DeepGEMM's for e4m3 rows, from a zip archive; and torch's grouped GEMM of
bfloat16 weights, which are twice as large. Only times are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from abiding import mxfp8_moe as api
from abiding.mxfp8_moe import MXFP8, Compute, Mode
from abiding.testing.cases.mxfp8_moe import PERFORMANCE, LayerCase, LayerInputs, rotated_ids
from abiding.testing.timing import Timing, call_us, graph_us, rotations
from benchmarks.base import Benchmark, Settings, say
from benchmarks.peers.deep_gemm import DeepGemm
from benchmarks.peers.humming import HummingLibrary
from benchmarks.peers.marlin import Marlin
from benchmarks.peers.mxfp8 import Gemm, LayerPeer, Library, Peer, Routed
from benchmarks.result_file import CaseResult, Param

Calls = list[Callable[[], object]]
Made = TypeVar("Made", Peer, LayerPeer)

LONG_US = 300.0
"""Calls with a larger roofline bound are timed with fewer repetitions."""

GEMM_OPS = {"grouped_mm", "grouped_mm_e4m3", "grouped_mm_fp8"}
QUANTIZERS = ("quantize", "quantize_rowwise", "round")
MODES: dict[str, Mode] = {"moe": "w8a8", "moe_w8a16": "w8a16", "moe_fp8": "fp8"}
"""The mode of a layer, by the operator's name in results."""
CPU_CASES = [LayerCase(tokens, 256, 128, 8, 2, name="small") for tokens in (1, 8)]
QUICK_TOKENS = (1, 32, 2048)


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time the chosen operators; GEMMs and layers go shape by shape, since the weights of one shape are gigabytes."""
    cases = PERFORMANCE if settings.device.type == "cuda" else CPU_CASES
    if settings.quick and settings.device.type == "cuda":
        cases = [case for case in PERFORMANCE if case.tokens in QUICK_TOKENS and case.routing == "uniform"]
    cases = [case for case in cases if settings.takes(case.tokens)]
    for op in QUANTIZERS:
        if op in settings.ops:
            for width in sorted({case.hidden for case in cases}):
                for tokens in sorted({case.tokens for case in cases if case.mode != "fp8"}):
                    yield _time_quantizer(op, tokens, width, settings)
    libraries = _libraries(settings) if settings.device.type == "cuda" else []
    for name in dict.fromkeys(case.name for case in cases):
        some = [case for case in cases if case.name == name]
        yield from _measure_shape(some, libraries, settings)


def target_us(case: CaseResult) -> float | None:
    """The target of a GEMM: a fraction of the roofline, plus 2.5 µs for the launch up to 2048 tokens; with e4m3 rows at
    most 10 % more than with bfloat16 rows. The target of a layer: at one token the bound and 12 µs; up to 256 tokens
    the larger of 0.95 of the best peer's time and bound / 0.95 + 6 µs; from 512 tokens on a fraction of that peer's.
    On FP8 tensor cores, fractions of the exact kernels' time: up to 512 tokens all of it for a GEMM, then 0.90, and no
    more than 1.05 of torch's row-wise scaled GEMM; for a layer from 512 tokens on 0.80, 0.68 and 0.70. The target of
    what only moves bytes: 0.90 of the bandwidth, and 2.5 µs."""
    bound_us = case.bound_us
    if case.op in (*QUANTIZERS, "rebase"):
        return bound_us / 0.9 + 2.5
    tokens = int(case.params["tokens"])
    if case.op in ("grouped_mm_fp8", "moe_fp8"):
        exact = float(case.params["exact_us"])
        if case.op == "moe_fp8":
            return exact * (1 if tokens < 512 else 0.80 if tokens < 2048 else 0.68 if tokens < 8192 else 0.70)
        return exact if tokens <= 512 else min(0.90 * exact, 1.05 * case.peers.get("fp8 row-wise", math.inf))
    if case.op == "grouped_mm":
        if tokens > 2048:
            rows_per_expert = tokens * int(case.params["top_k"]) / int(case.params["experts"])
            return bound_us / (0.82 if rows_per_expert >= 512 else 0.75)
        return bound_us / (0.95 if tokens <= 256 else 0.88) + 2.5
    if case.op == "grouped_mm_e4m3":
        return 1.1 * float(case.params["bfloat16_us"])
    if tokens == 1:
        return bound_us + 12
    if not case.peers:
        return None
    best = min(case.peers.values())
    if tokens <= 256:
        return max(0.95 * best, bound_us / 0.95 + 6)
    return best * (0.85 if tokens <= 512 else 0.70 if tokens <= 2048 else 0.65)


def row(case: CaseResult) -> str:
    """The parameters of a case other than that of the table's columns."""
    if case.op in QUANTIZERS:
        return f"{case.params['k']} columns"
    if case.op == "rebase":
        return str(case.params["shape"])
    parts = [case.params["shape"], case.params.get("gemm", ""), "zipf" if case.params["routing"] == "zipf" else ""]
    return " ".join(str(part) for part in parts if part)


BENCHMARK = Benchmark(
    "mxfp8_moe",
    (*MODES, "grouped_mm", "grouped_mm_e4m3", "grouped_mm_fp8", *QUANTIZERS, "rebase"),
    "tokens",
    measure,
    row,
    target_us,
    other_axes={"rebase": "k"},
)


# --- GEMMs ------------------------------------------------------------------------------------------------------------


def _measure_shape(cases: list[LayerCase], libraries: list[Library], settings: Settings) -> Iterator[CaseResult]:
    say(f"{cases[0].name}: making weights" + ", and compiling the peers' kernels" * bool(libraries))
    layer = replace(cases[0], tokens=0).make(settings.device)
    # Expert parallelism with real ids: layers alone, and ours alone, since the peers' calls take no ids of -1.
    real_ids = cases[0].global_experts is not None
    libraries = [] if real_ids else libraries
    gemms = (Gemm("GEMM1", layer.w13, layer.s13), Gemm("GEMM2", layer.w2, layer.s2))
    if "rebase" in settings.ops and not real_ids:  # before they are rebased in place
        for gemm in gemms:
            yield _time_rebase(cases[0], gemm, settings)
    for gemm in gemms:
        api.rebase(gemm.weight, gemm.scale, inplace=True)  # as compute="fp8" needs them; others read them as well
    for gemm in gemms:
        if GEMM_OPS & set(settings.ops) and not real_ids:
            peers = _gemm_peers(gemm, cases, libraries, settings)
            for op in sorted(GEMM_OPS & set(settings.ops)):
                for case in _of_op(op, cases):
                    if op == "grouped_mm" or case.routing == "uniform":
                        yield _time_gemm(op, case, gemm, peers.get(op, []), settings)
    modes = {op: mode for op, mode in MODES.items() if op in settings.ops}
    if modes:
        timed = cases if "moe_fp8" in modes else _of_op("moe", cases)
        layers = _working(libraries, lambda library: library.layers(*gemms, timed))
        for op, mode in modes.items():
            peers_of_op = layers
            if op == "moe_fp8":
                peers_of_op = [*layers, *_working(libraries, lambda library: library.layers_fp8(*gemms, cases))]
            for case in _of_op(op, cases):
                yield _time_layer(op, replace(case, mode=mode), layer, peers_of_op, settings)


def _of_op(op: str, cases: list[LayerCase]) -> list[LayerCase]:
    """The cases in which an operator is timed: those of mode "fp8" are for FP8 tensor cores alone."""
    return [case for case in cases if case.mode != "fp8" or op in ("grouped_mm_fp8", "moe_fp8")]


def _time_rebase(case: LayerCase, gemm: Gemm, settings: Settings) -> CaseResult:
    """Out of place: in place, a second call would find nothing to do. Weights and result exceed the L2 cache, or are as
    many as do."""
    device = settings.device
    moved = 2 * (gemm.weight.numel() + gemm.scale.numel())
    count = 1 if moved > 1 << 28 else rotations(moved, device)
    calls: Calls = []
    for _ in range(count):
        given = (gemm.weight, gemm.scale) if not calls else (gemm.weight.clone(), gemm.scale.clone())
        results = {"out": torch.empty_like(gemm.weight), "out_scales": torch.empty_like(gemm.scale)}
        report = {
            "counts": torch.empty(3, dtype=torch.int64, device=device),
            "errors": torch.empty(2, dtype=torch.float64, device=device),
        }
        calls.append(partial(torch.ops.abiding.mxfp8_rebase.default, *given, **results, **report))
    bound_us = settings.roofline.bound_us(moved)
    params: dict[str, Param] = {"shape": case.name, "experts": case.experts, "n": gemm.n, "k": gemm.k}
    return CaseResult.of("rebase", params, _time(calls, bound_us, device), {}, l2_warm=False, bound_us=bound_us)


def _routings(case: LayerCase, gemm: Gemm, device: torch.device) -> list[Routed]:
    """As many calls as make every call L2-cold, each with other experts."""
    rng = torch.Generator(device).manual_seed(case.tokens)
    ids = case.route(rng)[0]
    first = Routed.of(ids, case.experts, gemm.k)
    count = rotations(int(first.bytes(gemm)), device)
    rest = (rotated_ids(ids, case.experts, index, count) for index in range(1, count))
    return [first, *(Routed.of(some, case.experts, gemm.k) for some in rest)]


def _time_gemm(op: str, case: LayerCase, gemm: Gemm, peers: list[Peer], settings: Settings) -> CaseResult:
    device = settings.device
    routings = _routings(case, gemm, device)
    flops = 2.0 * len(routings[0].rows) * gemm.n * gemm.k
    bound_us = settings.roofline.bound_us(routings[0].bytes(gemm), flops / 2 if op == "grouped_mm_fp8" else flops)
    outs = [one.rows.new_empty(len(one.rows), gemm.n) for one in routings]

    def ours(op: str) -> Calls:
        calls: Calls = []
        for one, out in zip(routings, outs, strict=True):
            a: Tensor | MXFP8 = one.rows
            compute: Compute = "exact"
            if op == "grouped_mm_e4m3":
                a = api.quantize(one.rows, one.offsets)
            elif op == "grouped_mm_fp8":
                a, compute = api.quantize(one.rows, one.offsets, rowwise=True), "fp8"
            calls.append(partial(api.grouped_mm, a, gemm.weight, gemm.scale, one.offsets, compute=compute, out=out))
        return calls

    params = _params(case) | {"gemm": gemm.name, "n": gemm.n, "k": gemm.k}
    if op == "grouped_mm_fp8":
        rows = len(routings[0].rows)
        params["implementation"] = api.implementation(
            rows, case.experts, (gemm.n, gemm.k), compute="fp8", device=device
        )
    timing = _time(ours(op), bound_us, device)
    if op != "grouped_mm":
        other = {"grouped_mm_e4m3": "bfloat16_us", "grouped_mm_fp8": "exact_us"}[op]
        params[other] = round(_time(ours("grouped_mm"), bound_us, device).us, 3)
    theirs = {peer.name: _time([peer.call(one) for one in routings], bound_us, device) for peer in peers}
    return CaseResult.of(op, params, timing, theirs, l2_warm=False, bound_us=bound_us)


def _params(case: LayerCase) -> dict[str, Param]:
    return {
        "tokens": case.tokens,
        "shape": case.name,
        "experts": case.experts,
        "top_k": case.top_k,
        "routing": case.routing,
    }


def _time(calls: Calls, bound_us: float, device: torch.device) -> Timing:
    if device.type != "cuda" or bound_us < LONG_US:
        return call_us(calls, device)
    with torch.cuda.device(device):
        return graph_us(calls, replays=8, nodes=max(4, len(calls)))


# --- rows and layers --------------------------------------------------------------------------------------------------


def _time_quantizer(op: str, tokens: int, width: int, settings: Settings) -> CaseResult:
    device = settings.device
    written = width * 2 if op == "round" else width
    tiles = 0 if op == "round" else -(-tokens // 128) * 128 * (-(-width // 128) * 4)
    moved = tokens * (2 * width + written) + tiles
    inputs = [torch.randn(tokens, width, device=device).bfloat16() for _ in range(rotations(moved, device))]
    calls: Calls = []
    for x in inputs:
        if op == "round":
            calls.append(partial(api.round, x, out=torch.empty_like(x)))
        else:
            data, scales = api.quantize(x)
            call = torch.ops.abiding.mxfp8_quantize.default
            calls.append(partial(call, x, None, False, rowwise=op != "quantize", data=data, scales=scales))
    params: dict[str, Param] = {"tokens": tokens, "k": width}
    return CaseResult.of(
        op, params, call_us(calls, device), {}, l2_warm=False, bound_us=settings.roofline.bound_us(moved)
    )


@dataclass(frozen=True)
class LayerCalls:
    """Calls of a layer with distinct experts, so that each is L2-cold, and what one of them moves and computes."""

    sets: list[LayerInputs]
    calls: Calls
    bytes: float
    flops: float


def layer_calls(layer: LayerInputs, case: LayerCase, device: torch.device) -> LayerCalls:
    """Calls of `case` with the weights of `layer`."""
    rng = torch.Generator(device).manual_seed(case.tokens)
    ids, weights = case.route(rng)
    local = ids[ids >= 0]
    parameters = 3 * case.hidden * case.intermediate
    moved = len(local.unique()) * parameters * 33 / 32 + 4 * case.tokens * case.hidden
    count = rotations(int(moved), device)
    sets = [
        replace(
            layer,
            case=case,
            x=torch.randn(case.tokens, case.hidden, device=device).bfloat16(),
            topk_ids=rotated_ids(ids, case.experts, index, count),
            topk_weights=weights,
        )
        for index in range(count)
    ]
    size = api.workspace_bytes(case.tokens, case.top_k, case.experts, case.hidden, case.intermediate)
    space = torch.empty(size, dtype=torch.uint8, device=device)
    calls: Calls = [partial(one.run, api, workspace=space, out=torch.empty_like(one.x)) for one in sets]
    return LayerCalls(sets, calls, moved, 2.0 * len(local) * parameters)


def _time_layer(op: str, case: LayerCase, layer: LayerInputs, peers: list[LayerPeer], settings: Settings) -> CaseResult:
    device = settings.device
    ours = layer_calls(layer, case, device)
    bound_us = settings.roofline.bound_us(ours.bytes, ours.flops / 2 if op == "moe_fp8" else ours.flops)
    theirs = {peer.name: _time([peer.call(one) for one in ours.sets], bound_us, device) for peer in peers}
    params = _params(case) | {"mode": case.mode}
    timing = _time(ours.calls, bound_us, device)
    if op == "moe_fp8":
        shapes = ((layer.w13.size(1), layer.w13.size(2)), (layer.w2.size(1), layer.w2.size(2)))
        pairs = case.tokens * case.top_k
        params["implementation"] = api.implementation(pairs, case.experts, *shapes, compute="fp8", device=device)
        exact = layer_calls(layer, replace(case, mode="w8a8"), device)
        params["exact_us"] = round(_time(exact.calls, bound_us, device).us, 3)
    return CaseResult.of(op, params, timing, theirs, l2_warm=False, bound_us=bound_us)


# --- peers ------------------------------------------------------------------------------------------------------------


def _libraries(settings: Settings) -> list[Library]:
    loaders: dict[str, Callable[[Path], Library]] = {".so": Marlin, ".whl": HummingLibrary, ".zip": DeepGemm}
    found = []
    for path in settings.peers:
        say(f"Loading {path}")
        try:
            found.append(loaders[path.suffix](path))
        except Exception as error:  # a peer that fails to load must not keep ours from being timed
            say(f"{path} is skipped: {error!r}")
    return found


def _gemm_peers(
    gemm: Gemm, cases: list[LayerCase], libraries: list[Library], settings: Settings
) -> dict[str, list[Peer]]:
    """The peers of the chosen operators: torch's GEMMs first."""
    peers: dict[str, list[Peer]] = {}
    if "grouped_mm" in settings.ops:
        timed = _of_op("grouped_mm", cases)
        peers["grouped_mm"] = [*_bf16(gemm), *_working(libraries, lambda library: library.gemms(gemm, timed))]
    if "grouped_mm_fp8" in settings.ops:
        uniform = [case for case in cases if case.routing == "uniform"]
        made = _working(libraries, lambda library: library.gemms_fp8(gemm, uniform))
        peers["grouped_mm_fp8"] = [*_scaled(gemm), *made]
    return peers


def _working(libraries: list[Library], make: Callable[[Library], list[Made]]) -> list[Made]:
    """What `make` makes of each library; those that cannot are left out, since ours are to be timed all the same."""
    made: list[Made] = []
    for library in libraries:
        try:
            made += make(library)
        except Exception as error:
            say(f"{type(library).__name__} is skipped: {error!r}")
    return made


def _scaled(gemm: Gemm) -> list[Peer]:
    """torch's GEMM of e4m3 rows and weights with one scale per row, and sums that stay in the tensor core: less exact,
    and what such weights would run on if each row had one scale."""
    if gemm.weight.device.type != "cuda":
        return []
    weight = gemm.weight.view(torch.float8_e4m3fn).transpose(1, 2)
    scales = torch.ones(gemm.weight.size(0), gemm.n, device=gemm.weight.device)

    def call(routed: Routed) -> Callable[[], object]:
        rows = routed.rows.to(torch.float8_e4m3fn)
        ones = torch.ones(len(rows), device=rows.device)
        product = partial(torch._scaled_grouped_mm, rows, weight, ones, scales, offs=routed.offsets[1:])
        return partial(product, out_dtype=torch.bfloat16, use_fast_accum=True)

    return [Peer("fp8 row-wise", call)]


def _bf16(gemm: Gemm) -> list[Peer]:
    if gemm.weight.device.type != "cuda":
        return []
    experts = gemm.weight.size(0)
    weight = torch.empty(experts, gemm.k, gemm.n, dtype=torch.bfloat16, device=gemm.weight.device)
    for one in weight:
        one.normal_()

    def call(routed: Routed) -> Callable[[], object]:
        return partial(torch._grouped_mm, routed.rows, weight, offs=routed.offsets[1:])

    return [Peer("bf16", call)]
