"""The rules of MXFP8 that decide bits, written a second time, and the error bound of a GEMM.

Rational numbers and a table of the 127 magnitudes of e4m3: so reference and kernel cannot be wrong together.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from abiding import mxfp8_moe, reference
from abiding.testing.cases.mxfp8_moe import GemmInputs, LayerInputs
from abiding.testing.comparison import assert_close, round_once

DTYPES_16_BIT = (torch.bfloat16, torch.float16)
APIS = pytest.mark.parametrize("api", [mxfp8_moe, reference.mxfp8_moe], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", DTYPES_16_BIT, ids=["bfloat16", "float16"])

ONE = 0x38  # 1.0 in e4m3


def behind_k(scales: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """Scales in tiles of [..., n, k / 32] as bytes in a row, and where among them the codes behind the end of K are,
    which do not count."""
    columns = -(-k // 128) * 4
    at = reference.mxfp8_moe.scale_offset(n, columns, columns)[:, k // 32 :]
    return scales.flatten(-2), at.to(scales.device)


def exact_code(amax: float) -> int:
    """The smallest code with amax <= 448 * 2^(code - 127), in rational numbers; infinity is above all of them."""
    if math.isinf(amax):
        return 254
    wanted = Fraction(amax) / 448
    code = max(wanted.numerator.bit_length() - wanted.denominator.bit_length() + 126, 0) if wanted else 0
    while Fraction(2) ** (code - 127) < wanted:
        code += 1
    return code


def magnitudes() -> Tensor:
    """The values of the bytes 0 to 0x7E."""
    byte = torch.arange(127)
    mantissa, exponent = (byte % 8).double(), byte // 8
    return torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * torch.exp2(exponent.double() - 7))


def exact_bytes(x: Tensor, codes: Tensor) -> Tensor:
    """The nearest e4m3 magnitude of each element with its code, ties to even; elements [n, 32], codes [n]."""
    scaled = x.double() * torch.exp2(127 - codes.double())[:, None]
    table = magnitudes()
    middles = (table[1:] + table[:-1]) / 2
    value = scaled.abs().nan_to_num(0)
    below = torch.searchsorted(middles, value)
    tie = value == middles[below.clamp(max=len(middles) - 1)]
    byte = torch.where(tie & (below % 2 == 1), below + 1, below) + 0x80 * scaled.signbit()
    return torch.where(x.isnan(), 0x7F, byte).to(torch.uint8)


def exact_value(byte: Tensor, code: Tensor) -> Tensor:
    """The value of a byte with a code, rounded once to bfloat16, in float64."""
    value = magnitudes()[(byte & 0x7F).clamp(max=126).long()] * torch.exp2(code.double() - 127)
    rounded = round_once(torch.where(byte >= 0x80, -value, value), torch.bfloat16).double()
    return torch.where((code == 255) | (byte & 0x7F == 0x7F), math.nan, rounded)


def assert_gemm(found: Tensor, a: Tensor, i: GemmInputs) -> None:
    """Rows of experts are within the exact result +- the error bound of float32 sums, rounded; `a` holds bfloat16
    rows."""
    api, live, k = reference.mxfp8_moe, i.live(), i.case.k
    exact = i.run(api, a, out_dtype=torch.float64)[live]
    plain = replace(i, weight=(i.weight.view(torch.uint8) & 0x7F))
    loss = plain.run(api, a.abs(), out_dtype=torch.float64)[live].nan_to_num(0, 0, 0) * k * 2.0**-22 + k * 2.0**-149
    found = found[live]
    assert_close(found.isnan(), exact.isnan(), name="NaN")
    low, high = (round_once(end, found.dtype) for end in (exact - loss, exact + loss))
    wrong = ~((low <= found) & (found <= high) | exact.isnan())
    assert not bool(wrong.any()), f"{int(wrong.sum())} of {found.numel()} are off, first {wrong.nonzero()[0].tolist()}"


def offsets_of(i: GemmInputs) -> Tensor:
    assert i.expert_offsets is not None
    return i.expert_offsets


def tensors_of(i: LayerInputs) -> tuple[Tensor, ...]:
    return i.x, i.w13, i.s13, i.w2, i.s2, i.topk_ids, i.topk_weights
