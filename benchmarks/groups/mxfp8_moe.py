"""Times of MXFP8 grouped GEMMs and MoE layers at the shapes of models, L2-cold: consecutive calls use distinct experts.

Peers are vLLM's Marlin kernels for MXFP8 weights (W8A16), from the library that holds its `_moe_C` operators;
Humming's, from the wheel of humming-kernels; and torch's grouped GEMM of bfloat16 weights, which are twice as large.
Only times are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from abiding import mxfp8_moe as api
from abiding.mxfp8_moe import Mode
from abiding.testing.cases.mxfp8_moe import PERFORMANCE, LayerCase, LayerInputs, rotated_ids
from abiding.testing.timing import Timing, call_us, graph_us, rotations
from benchmarks.base import Benchmark, Settings, say
from benchmarks.peers.humming import HummingLibrary
from benchmarks.peers.marlin import Marlin
from benchmarks.peers.mxfp8 import Gemm, LayerPeer, Library, Peer, Routed
from benchmarks.result_file import CaseResult, Param

Calls = list[Callable[[], object]]

LONG_US = 300.0
"""Calls with a larger roofline bound are timed with fewer repetitions."""

MODES: dict[str, Mode] = {"moe": "w8a8", "moe_w8a16": "w8a16"}
"""The mode of a layer, by the operator's name in results."""
CPU_CASES = [LayerCase(tokens, 256, 128, 8, 2, name="small") for tokens in (1, 8)]
QUICK_TOKENS = (1, 32, 2048)


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time the chosen operators; GEMMs and layers go shape by shape, since the weights of one shape are gigabytes."""
    cases = PERFORMANCE if settings.device.type == "cuda" else CPU_CASES
    if settings.quick and settings.device.type == "cuda":
        cases = [case for case in PERFORMANCE if case.tokens in QUICK_TOKENS and case.routing == "uniform"]
    for op in ("quantize", "round"):
        if op in settings.ops:
            for width in sorted({case.hidden for case in cases}):
                for tokens in sorted({case.tokens for case in cases}):
                    yield _time_quantizer(op, tokens, width, settings)
    libraries = _libraries(settings) if settings.device.type == "cuda" else []
    for name in dict.fromkeys(case.name for case in cases):
        some = [case for case in cases if case.name == name]
        yield from _measure_shape(some, libraries, settings)


def target_us(case: CaseResult) -> float | None:
    """The target of a GEMM: a fraction of the roofline, plus 2.5 µs for the launch up to 2048 tokens; with e4m3 rows at
    most 10 % more than with bfloat16 rows. The target of a layer: at one token the bound and 12 µs; up to 256 tokens
    the larger of 0.95 of the best peer's time and bound / 0.95 + 6 µs; from 512 tokens on a fraction of that peer's."""
    tokens, bound_us = int(case.params["tokens"]), case.bound_us
    if case.op == "grouped_mm":
        if tokens > 2048:
            rows_per_expert = tokens * int(case.params["top_k"]) / int(case.params["experts"])
            return bound_us / (0.82 if rows_per_expert >= 512 else 0.75)
        return bound_us / (0.95 if tokens <= 256 else 0.88) + 2.5
    if case.op == "grouped_mm_e4m3":
        return 1.1 * float(case.params["bfloat16_us"])
    if case.op in ("quantize", "round"):
        return bound_us / 0.9 + 2.5
    if tokens == 1:
        return bound_us + 12
    if not case.peers:
        return None
    best = min(case.peers.values())
    if tokens <= 256:
        return max(0.95 * best, bound_us / 0.95 + 6)
    return best * (0.85 if tokens <= 512 else 0.70 if tokens <= 2048 else 0.65)


def row(case: CaseResult) -> str:
    """The parameters of a case other than the number of tokens."""
    if case.op in ("quantize", "round"):
        return f"{case.params['k']} columns"
    parts = [case.params["shape"], case.params.get("gemm", ""), "zipf" if case.params["routing"] == "zipf" else ""]
    return " ".join(str(part) for part in parts if part)


BENCHMARK = Benchmark(
    "mxfp8_moe", (*MODES, "grouped_mm", "grouped_mm_e4m3", "quantize", "round"), "tokens", measure, row, target_us
)


# --- GEMMs ------------------------------------------------------------------------------------------------------------


def _measure_shape(cases: list[LayerCase], libraries: list[Library], settings: Settings) -> Iterator[CaseResult]:
    say(f"{cases[0].name}: making weights" + ", and compiling the peers' kernels" * bool(libraries))
    layer = replace(cases[0], tokens=0).make(settings.device)
    # Expert parallelism with real ids: layers alone, and ours alone, since the peers' calls take no ids of -1.
    real_ids = cases[0].global_experts is not None
    libraries = [] if real_ids else libraries
    gemms = (Gemm("GEMM1", layer.w13, layer.s13), Gemm("GEMM2", layer.w2, layer.s2))
    for gemm in gemms:
        if {"grouped_mm", "grouped_mm_e4m3"} & set(settings.ops) and not real_ids:
            peers = [*_bf16(gemm), *(peer for library in libraries for peer in library.gemms(gemm, cases))]
            for op in ("grouped_mm", "grouped_mm_e4m3"):
                for case in cases:
                    if op in settings.ops and (op == "grouped_mm" or case.routing == "uniform"):
                        yield _time_gemm(op, case, gemm, peers, settings)
    modes = {op: mode for op, mode in MODES.items() if op in settings.ops}
    if modes:
        layers = [library.layer(*gemms, cases) for library in libraries]
        for op, mode in modes.items():
            for case in cases:
                yield _time_layer(op, replace(case, mode=mode), layer, layers, settings)


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
    bound_us = settings.roofline.bound_us(routings[0].bytes(gemm), flops)
    outs = [one.rows.new_empty(len(one.rows), gemm.n) for one in routings]

    def ours(quantized: bool) -> Calls:
        calls: Calls = []
        for one, out in zip(routings, outs, strict=True):
            a = api.quantize(one.rows, one.offsets) if quantized else one.rows
            calls.append(partial(api.grouped_mm, a, gemm.weight, gemm.scale, one.offsets, out=out))
        return calls

    params = _params(case) | {"gemm": gemm.name, "n": gemm.n, "k": gemm.k}
    timing = _time(ours(op == "grouped_mm_e4m3"), bound_us, device)
    if op == "grouped_mm_e4m3":
        params["bfloat16_us"] = round(_time(ours(False), bound_us, device).us, 3)
        return CaseResult.of(op, params, timing, {}, l2_warm=False, bound_us=bound_us)
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
            calls.append(partial(call, x, None, False, data=data, scales=scales))
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
    bound_us = settings.roofline.bound_us(ours.bytes, ours.flops)
    theirs = {peer.name: _time([peer.call(one) for one in ours.sets], bound_us, device) for peer in peers}
    params = _params(case) | {"mode": case.mode}
    timing = _time(ours.calls, bound_us, device)
    return CaseResult.of(op, params, timing, theirs, l2_warm=False, bound_us=bound_us)


# --- peers ------------------------------------------------------------------------------------------------------------


def _libraries(settings: Settings) -> list[Library]:
    loaders: dict[str, Callable[[Path], Library]] = {".so": Marlin, ".whl": HummingLibrary}
    found = []
    for path in settings.peers:
        say(f"Loading {path}")
        try:
            found.append(loaders[path.suffix](path))
        except Exception as error:  # a peer that fails to load must not keep ours from being timed
            say(f"{path} is skipped: {error!r}")
    return found


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
