"""The prologue's rules that decide bits, written a second time, in rational numbers and by torch's own float8 casts: so
reference and kernel cannot be wrong together. With them, how to hold Q against the exact values."""

from __future__ import annotations

import math
from fractions import Fraction
from types import ModuleType

import pytest
import torch
from torch import Tensor

from abiding import mla_prologue, reference
from abiding.testing.cases.mla_prologue import (
    PrologueInputs,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close, ulp_distance

DTYPES_16_BIT = (torch.bfloat16, torch.float16)
APIS = pytest.mark.parametrize("api", [mla_prologue, reference.mla_prologue], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", DTYPES_16_BIT, ids=["bfloat16", "float16"])


def assert_query(actual: Tensor, inputs: PrologueInputs, **options: bool) -> None:
    """Unpadded heads are within 1 ulp of the exact value, and nearly all equal it, rounded once."""
    case, heads = inputs.case, inputs.case.heads
    exact = reference.mla_prologue.qnorm_rope(inputs.q, inputs.positions, inputs.cos_sin, eps=case.eps, **options)
    before = reference.mla_prologue.qnorm_rope(
        inputs.q, inputs.positions, inputs.cos_sin, eps=case.eps, **{**options, "apply_q_rope": False}
    )
    live = actual[:, :heads]
    # The error of a float32 rotation is relative to its input pair, also where the two terms cancel.
    pair = before.unflatten(-1, (-1, 2)).abs().sum(-1, keepdim=True).expand(-1, -1, -1, 2).flatten(-2)
    cancelled = (live.double() - exact).abs() <= 2.0**-23 * pair
    assert_close(torch.where(cancelled, exact.to(live.dtype), live), exact, ulps=1, name="q")
    off = int((ulp_distance(live, exact) > 0).sum())
    if case.values == "subnormal":
        return  # few mantissa bits make ties, which an error in the last place of the norm breaks either way
    assert off <= 2 + live.numel() / 2000, f"{off} of {live.numel()} Q values are not the exact ones rounded once"


def assert_padding(actual: Tensor, heads: int) -> None:
    assert_bitwise_equal(actual[:, heads:], torch.zeros_like(actual[:, heads:]), "padding heads")


def unrotated(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Slots 0.., positions, and a table of zero angles."""
    table = torch.cat([torch.ones(1, 32), torch.zeros(1, 32)], dim=1).to(device)
    return torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device), table


def insert_unrotated(api: ModuleType, kv: Tensor, block_size: int = 1) -> tuple[Tensor, Tensor]:
    """The e4m3 bytes [T, 448] and scale codes [T, 8] of rows inserted with zero angles."""
    slots, positions, table = unrotated(len(kv), kv.device)
    pages = -(-len(kv) // block_size)
    cache = torch.full((pages, block_size * 584), 0xEE, dtype=torch.uint8, device=kv.device)
    api.insert_kv(kv, cache, slots, positions, table, block_size=block_size)
    data = cache[:, : block_size * 576].reshape(pages * block_size, 576)[: len(kv), :448]
    return data, cache[:, block_size * 576 :].reshape(pages * block_size, 8)[: len(kv)]


def rows_of_blocks(blocks: Tensor) -> Tensor:
    """Quantization blocks [n, 64] as KV rows [ceil(n / 7), 512], padded with zeros."""
    rows = -(-len(blocks) // 7)
    kv = torch.zeros(rows, 512, dtype=blocks.dtype, device=blocks.device)
    padded = torch.zeros(rows * 7, 64, dtype=blocks.dtype, device=blocks.device)
    padded[: len(blocks)] = blocks
    kv[:, :448] = padded.reshape(rows, 448)
    return kv


def every(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns of a 16-bit float."""
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


def e4m3_by_torch(x: Tensor) -> Tensor:
    """torch's cast of float32 to e4m3, with saturation, and NaN as 0x7F."""
    bytes_ = x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view(torch.uint8)
    return bytes_.masked_fill(x.isnan(), 0x7F)


def exact_exponent(amax: float) -> int:
    """The smallest e with max(amax, 1e-4) <= 448 * 2^e, in rational numbers."""
    wanted = max(Fraction(amax), Fraction(1, 10_000)) / 448
    e = wanted.numerator.bit_length() - wanted.denominator.bit_length() - 1
    while Fraction(2) ** e < wanted:
        e += 1
    return e


def nearest(exact: Fraction, dtype: torch.dtype) -> float:
    """The representable value nearest to a rational number; ties go to even."""
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[dtype]
    guess = int(torch.tensor(float(abs(exact)), dtype=torch.float64).to(dtype).view(bits))
    candidates = torch.tensor([max(guess - 1, 0), guess, guess + 1]).to(bits)
    values = [float(value) for value in candidates.view(dtype)]
    best = min(range(3), key=lambda i: (abs(Fraction(values[i]) - abs(exact)), int(candidates[i]) & 1))
    return math.copysign(values[best], exact)
