"""MXFP8 mixture of experts: an MoE layer with the width of MiniMax-M3's, in each mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from abiding import mxfp8_moe as api
from abiding.cli.demo.section import Row, Say, Section
from abiding.reference import mxfp8_moe as reference
from abiding.testing import Roofline, assert_bitwise_equal, call_us
from abiding.testing.cases.mxfp8_moe import LayerCase, LayerInputs

CASES = [LayerCase(8, 6144, 3072, 4, 4, activation="swiglu_oai")]
MODES: tuple[api.Mode, ...] = ("w8a8", "w8a16", "fp8")

ROUNDING = 2.0**-8
"""Half a step of bfloat16, relative: the last rounding of a layer, and what remains of those before it."""
ALLOWED = {"w8a8": ROUNDING, "w8a16": ROUNDING, "fp8": 2 * ROUNDING}
"""By mode. FP8 tensor cores add in fewer bits, which moves some activations across a boundary of their rounding."""


def rows(device: torch.device, say: Say) -> Iterator[Row]:
    """Run, check and time each case in each mode."""
    roofline = None
    if device.type == "cuda":
        say("Measuring what the GPU can do")
        roofline = Roofline.measure(device)
    for case in CASES:
        say("MXFP8: making a layer's weights")
        layer = case.make(device)
        exact, layers = {}, {}
        for mode in MODES:
            say(f"MXFP8 {mode}: computing the float64 reference")
            layers[mode] = replace(_rebased(layer) if mode == "fp8" else layer, case=replace(case, mode=mode))
            exact[mode] = _reference(layers[mode])
        for mode, one in layers.items():
            say(f"MXFP8 {mode}: running")
            out = one.run(api)
            error, faults = _distance(out, exact[mode]), _quantizer_faults(one.x)
            if not error <= ALLOWED[mode]:
                faults.append(f"the layer is {error:.2%} off; expected at most {ALLOWED[mode]:.2%}")
            say(f"MXFP8 {mode}: timing")
            us = call_us([partial(one.run, api, out=torch.empty_like(out))], device).us
            yield Row(
                {
                    "case": mode,
                    "tokens": f"{case.tokens} of {case.hidden}, top {case.top_k} of {case.experts}",
                    "weights": f"{_parameters(case) / 1e6:.0f} M",
                    "bytes": "differ" if len(faults) > (error > ALLOWED[mode]) else "equal",
                    "error": f"{error:.3%}",
                    "error against w8a16": f"{_distance(out, exact['w8a16']):.2%}",
                    "time": f"{us / 1e3:.2f} ms",
                    "speed": _speed(one, us, roofline),
                },
                faults,
            )


def _reference(one: LayerInputs) -> Tensor:
    case = one.case
    arguments = (one.x, one.w13, one.s13, one.w2, one.s2, one.topk_ids, one.topk_weights)
    return reference.layer(*arguments, activation=case.activation, mode=case.mode)


def _rebased(layer: LayerInputs) -> LayerInputs:
    """The layer with weights as mode fp8 takes them."""
    (w13, s13, _), (w2, s2, _) = api.rebase(layer.w13, layer.s13), api.rebase(layer.w2, layer.s2)
    return replace(layer, w13=w13, s13=s13, w2=w2, s2=s2)


def _distance(out: Tensor, exact: Tensor) -> float:
    """The root mean square of the difference, relative to that of the exact result."""
    return float((out.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def _quantizer_faults(x: Tensor) -> list[str]:
    """Bytes and codes of activations are a format: they must equal the reference's."""
    try:
        for rowwise in (False, True):
            pairs = zip(api.quantize(x, rowwise=rowwise), reference.quantize(x, rowwise=rowwise), strict=True)
            for found, expected in pairs:
                assert_bitwise_equal(found, expected, "quantized activations")
        assert_bitwise_equal(api.round(x), reference.round(x), "rounded activations")
    except AssertionError as error:
        return [str(error)]
    return []


def _parameters(case: LayerCase) -> int:
    return 3 * case.experts * case.hidden * case.intermediate


def _speed(one: LayerInputs, us: float, roofline: Roofline | None) -> str:
    case = one.case
    active = int(one.topk_ids.unique().numel())
    moved = active / case.experts * _parameters(case) * 33 / 32 + 4 * case.tokens * case.hidden
    if roofline is None:
        return f"{moved / us / 1e3:.1f} GB/s"
    return f"{roofline.bound_us(moved) / us:.0%} of roofline"


SECTION = Section("MXFP8 mixture of experts: abiding.mxfp8_moe.moe, quantize, round, rebase", rows)
