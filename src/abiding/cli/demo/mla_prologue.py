"""DeepSeek V4's MLA prologue: a decode and a prefill batch, their KV cache read back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from abiding import mla_prologue as face
from abiding.cli.demo.section import Row, Say, Section
from abiding.reference import mla_prologue as reference
from abiding.testing import (
    Roofline,
    assert_bitwise_equal,
    assert_close,
    call_us,
    max_error,
    max_ulps,
    rotations,
    round_once,
)
from abiding.testing.cases.mla_prologue import PrologueCase, PrologueInputs

CASES = [
    PrologueCase(128, 64, kind="decode", skipped=0.05, max_position=65536),
    PrologueCase(128, 128, kind="decode", skipped=0.05, max_position=65536),
    PrologueCase(512, 64, kind="prefill", skipped=0.05, max_position=65536),
    PrologueCase(512, 128, kind="prefill", skipped=0.05, max_position=65536),
]

Q_ULPS = 1
ROPE_NOISE = 2.0**-20
"""RoPE may cancel to almost nothing; there float32 arithmetic on values of a few units leaves up to this much."""

E4M3_STEP = 1 / 16
"""No value is off by more than this share of its block's largest: half a step where e4m3's steps are widest."""

_CHUNK = 64
"""Tokens whose reference is held in memory at a time."""


def rows(device: torch.device, say: Say) -> Iterator[Row]:
    """Run, check and time each case."""
    roofline = None
    if device.type == "cuda":
        say("Measuring what the GPU can do")
        roofline = Roofline.measure(device)
    for case in CASES:
        name = f"{case.kind}, {case.heads} heads"
        say(f"{name}: running")
        inputs = case.make(device)
        expected = inputs.clone()
        out = inputs.run(face)
        faults: list[str] = []

        say(f"{name}: computing the reference of Q")
        error, ulps = _q_error(inputs, out)
        if ulps > Q_ULPS:
            faults.append(f"Q is {ulps} ulps off; expected at most {Q_ULPS}")

        say(f"{name}: computing the reference of the cache")
        rows_of_kv = (expected.kv, expected.cache, expected.slots, expected.positions, expected.cos_sin)
        reference.insert_kv(*rows_of_kv, block_size=case.block_size)
        cache_faults = _faults(partial(assert_bitwise_equal, inputs.cache, expected.cache, "cache"), inputs.check)
        faults += cache_faults

        say(f"{name}: reading the cache back")
        off = _read_back_error(inputs, faults)

        say(f"{name}: timing")
        us = _time(case, inputs, device)
        yield Row(
            {
                "case": name,
                "q": "x".join(map(str, inputs.q.shape)),
                "cache": f"{inputs.cache.shape[0]} pages of {case.block_size}",
                "skipped": str(int((inputs.slots < 0).sum())),
                "Q max error": f"{error:.2g} = {ulps} ulp{'s' * (ulps != 1)}",
                "cache bytes": "differ" if cache_faults else "equal",
                "read-back error": f"{off:.2%} of block",
                "time": f"{us:.1f} us",
                "speed": _speed(case, us, roofline),
            },
            faults,
        )


def _q_error(inputs: PrologueInputs, out: Tensor) -> tuple[float, int]:
    """Largest difference from the float64 reference; in representable steps, the largest of those above the noise."""
    error, ulps = 0.0, 0
    for start in range(0, inputs.case.tokens, _CHUNK):
        some = slice(start, start + _CHUNK)
        exact = reference.qnorm_rope(inputs.q[some], inputs.positions[some], inputs.cos_sin, eps=inputs.case.eps)
        error = max(error, max_error(out[some], exact))
        off = out[some] != round_once(exact, out.dtype)
        ours, exact = out[some][off], exact[off]
        audible = ~((ours.double() - exact).abs() <= ROPE_NOISE)
        ulps = max(ulps, max_ulps(ours[audible], exact[audible]))
    return error, ulps


def _read_back_error(inputs: PrologueInputs, faults: list[str]) -> float:
    """Largest error of what `gather_kv` returns, as a share of the largest magnitude of its block of 64."""
    read = face.gather_kv(inputs.cache, inputs.slots, block_size=inputs.case.block_size)
    present = inputs.slots >= 0
    exact = reference.rotate(inputs.kv.double(), inputs.positions, inputs.cos_sin)[present]
    kept, rope = read[present], exact[:, face.NOPE_DIM :]
    blocks = exact[:, : face.NOPE_DIM].reshape(-1, reference.QUANT_BLOCK)
    error = (kept[:, : face.NOPE_DIM].double().reshape_as(blocks) - blocks).abs()
    share = float((error / blocks.abs().amax(-1, keepdim=True)).max())
    if not share <= E4M3_STEP:
        faults.append(f"read-back is off by {share:.2%} of a block's largest value; expected at most {E4M3_STEP:.2%}")
    faults += _faults(
        partial(assert_close, kept[:, face.NOPE_DIM :], rope, ulps=1, atol=ROPE_NOISE, name="read-back RoPE values"),
        partial(assert_bitwise_equal, read[~present], torch.zeros_like(read[~present]), "read-back of skipped slots"),
    )
    return share


def _time(case: PrologueCase, inputs: PrologueInputs, device: torch.device) -> float:
    sets = [inputs]
    if device.type == "cuda":
        sets += [case.make(device, seed, guards=False) for seed in range(1, rotations(case.bytes, device))]
    outs = [one.q.new_empty(case.tokens, case.live_heads, face.HEAD_DIM) for one in sets]
    return call_us([partial(one.run, face, out=out) for one, out in zip(sets, outs, strict=True)], device).us


def _speed(case: PrologueCase, us: float, roofline: Roofline | None) -> str:
    return (
        f"{case.bytes / us / 1e3:.1f} GB/s"
        if roofline is None
        else f"{roofline.bound_us(case.bytes) / us:.0%} of roofline"
    )


def _faults(*checks: Callable[[], None]) -> list[str]:
    found = []
    for check in checks:
        try:
            check()
        except AssertionError as error:
            found.append(str(error))
    return found


SECTION = Section("DeepSeek V4 MLA prologue: abiding.mla_prologue.qnorm_rope_kv_insert, gather_kv", rows)
