"""What the prologue computes: against its reference byte for byte, and both against rules written a second time here.

The second writing uses rational numbers and torch's own float8 casts, so that reference and kernel cannot be wrong
together.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding import mla_prologue, reference
from abiding.testing.cases.mla_prologue import (
    CORNER,
    ODD,
    REGULAR,
    PrologueCase,
    PrologueInputs,
    Values,
    finite_magnitudes,
)
from abiding.testing.comparison import assert_bitwise_equal, assert_close, ulp_distance
from abiding.testing.guarded import guarded

DTYPES_16_BIT = (torch.bfloat16, torch.float16)
APIS = pytest.mark.parametrize("api", [mla_prologue, reference.mla_prologue], ids=["kernel", "reference"])
DTYPES = pytest.mark.parametrize("dtype", DTYPES_16_BIT, ids=["bfloat16", "float16"])


# --- helpers ----------------------------------------------------------------------------------------------------------


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


# --- every case against the reference ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*REGULAR, *ODD, *CORNER], ids=str)
def test_case(case: PrologueCase, device: torch.device) -> None:
    ours = case.make(device, seed=1)
    given = [tensor.clone() for tensor in (ours.q, ours.kv, ours.slots, ours.positions, ours.cos_sin)]
    theirs, kv_only = ours.clone(), ours.clone()
    out = ours.run(mla_prologue)
    expected = theirs.run(reference.mla_prologue)
    assert out.shape == expected.shape == (case.tokens, case.out_heads, 512)
    assert out.dtype == case.dtype

    ours.check()
    assert_bitwise_equal(ours.storage, theirs.storage, "cache, with what lies around it")
    assert_query(out, ours)
    assert_padding(out, case.heads)
    for name, before in zip(("q", "kv", "slots", "positions", "cos_sin"), given, strict=True):
        assert_bitwise_equal(getattr(ours, name), before, f"{name}, which is not to be written,")

    rows = (kv_only.kv, kv_only.cache, kv_only.slots, kv_only.positions, kv_only.cos_sin)
    mla_prologue.insert_kv(*rows, block_size=case.block_size)
    assert_bitwise_equal(kv_only.storage, theirs.storage, "insert_kv: cache, with what lies around it")
    read: dict[str, Any] = {"block_size": case.block_size, "dtype": case.dtype}
    gathered = mla_prologue.gather_kv(ours.cache, ours.slots, **read)
    assert_close(gathered, reference.mla_prologue.gather_kv(ours.cache, ours.slots, **read), name="gather_kv")


@pytest.mark.parametrize(
    "options",
    [{}, {"apply_q_norm": False}, {"apply_q_rope": False}, {"apply_q_norm": False, "apply_q_rope": False}],
    ids=str,
)
@pytest.mark.parametrize("values", ["normal", "nan", "inf", "huge"])
@DTYPES
def test_query_options(options: dict[str, bool], values: Values, dtype: torch.dtype, device: torch.device) -> None:
    case = PrologueCase(17, 3, 5, values=values, dtype=dtype, wild=0.3)
    ours, theirs = case.make(device), case.make(device)
    out = ours.run(mla_prologue, **options)
    theirs.run(reference.mla_prologue, **options)
    assert_bitwise_equal(ours.storage, theirs.storage, "cache")
    assert_query(out, ours, **options)
    assert_padding(out, 3)
    if options.get("apply_q_rope", True):
        lost = (ours.positions < 0) | (ours.positions >= case.max_position)
        assert bool(lost.any())
        assert bool(out[lost, :3].isnan().all())
    elif not options.get("apply_q_norm", True):
        assert_close(out[:, :3], ours.q, name="q, which nothing changes,")


@pytest.mark.parametrize("tokens", [1, 2, 31, 64, 257])
def test_plain_operator_agrees_with_the_public_api(tokens: int, device: torch.device) -> None:
    case = PrologueCase(tokens, 3, 5, skipped=0.1, wild=0.1)
    ours, theirs = case.make(device), case.make(device)
    out = torch.ops.abiding.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(
        ours.q, ours.kv, ours.cache, ours.slots, ours.positions, ours.cos_sin, 5, 1e-6, case.block_size
    )
    assert_bitwise_equal(out, theirs.run(mla_prologue), "q")
    assert_bitwise_equal(ours.storage, theirs.storage, "cache")


def test_cuda_agrees_with_cpu(cuda: torch.device) -> None:
    for case in [case for case in (*ODD, *CORNER) if case.tokens]:
        here = case.make("cpu", seed=5)
        moved = {name: getattr(here, name).to(cuda) for name in ("q", "kv", "slots", "positions", "cos_sin")}
        pages = guarded(here.cache.shape, torch.uint8, cuda, strides=here.cache.stride(), fill=here.cache.to(cuda))
        there = replace(here, **moved, cache=pages.tensor)
        here.run(mla_prologue)
        there.run(mla_prologue)
        assert_bitwise_equal(there.cache.cpu(), here.cache, f"{case}: cache")


# --- the scale of a quantization block --------------------------------------------------------------------------------


@DTYPES
def test_scale_rule_of_the_reference(dtype: torch.dtype) -> None:
    amax = torch.arange(finite_magnitudes(dtype)).to(torch.int16).view(dtype)
    expected = torch.tensor([exact_exponent(value) for value in amax.tolist()])
    assert_bitwise_equal(reference.mla_prologue.quant_block_exponent(amax).long(), expected, "exponent")
    by_logarithm = torch.ceil(torch.log2(amax.double().clamp(min=1e-4) / 448)).long()
    assert_bitwise_equal(by_logarithm, expected, "exponent by logarithm")


@APIS
@DTYPES
def test_scale_of_every_magnitude(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Every finite magnitude as the amax of its quantization block, at every position in it."""
    amax = torch.arange(finite_magnitudes(dtype)).to(torch.int16).view(dtype)
    blocks = torch.zeros(len(amax), 64, dtype=dtype)
    index = torch.arange(len(amax))
    blocks[index, index % 64] = torch.where(index % 3 == 0, -amax, amax)
    data, codes = insert_unrotated(api, rows_of_blocks(blocks).to(device), block_size=64)
    expected = torch.tensor([exact_exponent(value) + 127 for value in amax.tolist()], dtype=torch.uint8)
    assert_bitwise_equal(codes[:, :7].cpu().reshape(-1)[: len(amax)], expected, "codes")
    assert not bool(codes[:, 7].any()), "the eighth scale byte is zero"
    scaled = blocks.double() * torch.exp2(127 - expected.double())[:, None]
    assert_bitwise_equal(data.cpu().reshape(-1, 64)[: len(amax)], e4m3_by_torch(scaled.float()), "values")
    assert int(data.cpu().reshape(-1, 64)[64:][: len(amax) - 64].bitwise_and(0x7F).amax()) <= 0x7E


@APIS
@pytest.mark.parametrize("exponent", [-22, -5, 0, 7, 100])
@DTYPES
def test_rounding_of_every_value(api: ModuleType, exponent: int, dtype: torch.dtype, device: torch.device) -> None:
    """Every value up to 448 * 2^exponent, in quantization blocks of that scale."""
    largest = torch.tensor(448.0 * 2.0**exponent, dtype=dtype)
    if not bool(largest.isfinite()) or float(largest) != 448.0 * 2.0**exponent:
        pytest.skip(f"{dtype} does not hold 448 * 2^{exponent}")
    values = every(dtype)
    values = values[values.abs() <= largest]
    blocks = torch.zeros(-(-len(values) // 63), 64, dtype=dtype)
    blocks[:, 0] = largest
    blocks[:, 1:] = torch.nn.functional.pad(values, (0, blocks[:, 1:].numel() - len(values))).reshape(-1, 63)
    data, codes = insert_unrotated(api, rows_of_blocks(blocks).to(device))
    assert bool((codes[:, :7].cpu().reshape(-1)[: len(blocks)] == exponent + 127).all())
    expected = e4m3_by_torch((blocks.double() * 2.0**-exponent).float())
    assert_bitwise_equal(data.cpu().reshape(-1, 64)[: len(blocks)], expected, "values")


@APIS
@DTYPES
def test_special_values(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Zeros, tiny values, infinities and NaN, with the expected bytes written out."""
    inf, nan = math.inf, math.nan
    top = torch.finfo(dtype).max
    top_code = 127 + (120 if dtype == torch.bfloat16 else 8)
    table: list[tuple[list[float], int, list[int]]] = [
        ([0.0, -0.0], 105, [0x00, 0x80]),
        ([2.0**-24, -(2.0**-23), 0.0, -0.0], 105, [0x28, 0xB0, 0x00, 0x80]),
        ([inf, 1.0, -1.0, -inf], 247, [0x7E, 0x00, 0x80, 0xFE]),
        ([-inf, nan, 2.0**15], 247, [0xFE, 0x7F, 0x00]),
        ([nan, 448.0, -448.0, 1.0], 127, [0x7F, 0x7E, 0xFE, 0x38]),
        ([-nan, 449.0 if dtype == torch.float16 else 450.0, 1.0], 128, [0x7F, 0x76, 0x30]),
        ([nan] * 64, 105, [0x7F] * 64),
        ([top, -top], top_code, [0x78, 0xF8]),
    ]
    blocks = torch.zeros(len(table), 64, dtype=dtype)
    expected = torch.zeros(len(table), 64, dtype=torch.uint8)
    for row, (values, _, bytes_) in enumerate(table):
        blocks[row, : len(values)] = torch.tensor(values, dtype=dtype)
        expected[row, : len(bytes_)] = torch.tensor(bytes_, dtype=torch.uint8)
    data, codes = insert_unrotated(api, rows_of_blocks(blocks).to(device))
    assert codes.cpu()[:, :7].reshape(-1)[: len(table)].tolist() == [code for _, code, _ in table]
    assert_bitwise_equal(data.cpu().reshape(-1, 64)[: len(table)], expected, "values")


@APIS
@DTYPES
def test_special_rows_write_only_their_own_record(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    kv = torch.randn(3, 512, dtype=dtype, device=device)
    slots, positions, table = unrotated(3, device)
    caches = []
    for special in (0.0, math.nan, math.inf):
        kv[1] = special
        cache = torch.full((1, 8 * 584 + 40), 0xEE, dtype=torch.uint8, device=device)
        api.insert_kv(kv, cache, slots + 2, positions, table, block_size=8)
        caches.append(cache)
    own = torch.zeros(8 * 584 + 40, dtype=torch.bool, device=device)
    own[3 * 576 : 4 * 576] = True
    own[8 * 576 + 3 * 8 : 8 * 576 + 4 * 8] = True
    for cache in caches[1:]:
        assert_bitwise_equal(cache[0, ~own], caches[0][0, ~own], "bytes of the neighbors")


# --- RoPE -------------------------------------------------------------------------------------------------------------


def rotated_exactly(row: list[float], cos: list[float], sin: list[float]) -> list[float]:
    """fma(e, c, -(o * s)) and fma(e, s, o * c) in float32, one rounding per product and one per fma."""
    result = []
    for j in range(32):
        e, o, c, s = Fraction(row[2 * j]), Fraction(row[2 * j + 1]), Fraction(cos[j]), Fraction(sin[j])
        result.append(nearest(e * c - Fraction(nearest(o * s, torch.float32)), torch.float32))
        result.append(nearest(e * s + Fraction(nearest(o * c, torch.float32)), torch.float32))
    return result


def cancelling_rows(rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs and angles whose rotation cancels to rounding error, so that another FMA contraction changes all bits."""
    angle = torch.rand(rows, 64)
    angle[:, 32:] = angle[:, :32]
    kv = torch.randn(rows, 512).to(dtype)
    kv[:, 449::2] = kv[:, 448::2]
    kv[::2, 449::2] *= -1
    # A third of the pairs cancels nearly, a third not at all.
    kv[::3, 449::2] = torch.randn(len(kv[::3]), 32).to(dtype)
    angle[1::3, 32:] *= 1 + 2.0**-20
    return kv, angle


@APIS
@DTYPES
def test_rotation_is_two_fused_multiply_adds(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    rows = 24
    kv, table = cancelling_rows(rows, dtype)
    exact = [rotated_exactly(kv[i, 448:].tolist(), table[i, :32].tolist(), table[i, 32:].tolist()) for i in range(rows)]
    expected = torch.tensor(
        [[nearest(Fraction(value), dtype) for value in row] for row in exact], dtype=torch.float64
    ).to(dtype)
    slots = positions = torch.arange(rows, device=device)
    kv, table = kv.to(device), table.to(device)

    cache = torch.zeros(rows, 584, dtype=torch.uint8, device=device)
    api.insert_kv(kv, cache, slots, positions, table, block_size=1)
    assert_bitwise_equal(cache[:, 448:576].contiguous().view(dtype).cpu(), expected, "cache")

    scale = torch.full((1,), 2.0**-24, device=device)
    one = torch.ones(1, device=device)
    cache8 = torch.zeros(rows, 1, 512, dtype=torch.uint8, device=device)
    api.qnorm_rope_full_cache_fp8_insert(
        kv[:, None], kv, cache8, slots, positions, table, kv_scale=scale, q_scale_inv=one
    )
    scaled = torch.tensor(exact, dtype=torch.float64).float() * 2.0**24
    assert_bitwise_equal(cache8[:, 0, 448:].cpu(), e4m3_by_torch(scaled), "e4m3 cache")
    if dtype == torch.bfloat16:
        cache16 = torch.zeros(rows, 1, 512, dtype=dtype, device=device)
        api.qnorm_rope_full_cache_bf16_insert(kv[:, None].clone(), kv, cache16, slots, positions, table)
        assert_bitwise_equal(cache16[:, 0, 448:].cpu(), expected, "bfloat16 cache")
        assert_bitwise_equal(cache16[:, 0, :448], kv[:, :448], "bfloat16 cache")


@DTYPES
def test_rotation_of_q_is_the_same(dtype: torch.dtype, device: torch.device) -> None:
    rows = 24
    kv, table = cancelling_rows(rows, dtype)
    positions = torch.arange(rows)
    exact = [rotated_exactly(kv[i, 448:].tolist(), table[i, :32].tolist(), table[i, 32:].tolist()) for i in range(rows)]
    expected = torch.tensor(
        [[nearest(Fraction(value), dtype) for value in row] for row in exact], dtype=torch.float64
    ).to(dtype)
    q, table, positions = kv.to(device), table.to(device), positions.to(device)
    cache = torch.zeros(0, 584, dtype=torch.uint8, device=device)
    out = mla_prologue.qnorm_rope_kv_insert(
        q[:, None], q, cache, positions[:0], positions, table, block_size=1, apply_q_norm=False
    )
    assert_bitwise_equal(out[:, 0, 448:].cpu(), expected, "q")
    assert_bitwise_equal(out[:, 0, :448], q[:, :448], "q")


def test_quantized_values_are_rounded_to_the_dtype_of_kv_first(device: torch.device) -> None:
    """RoPE comes before quantization, also where a whole row is quantized."""
    kv, table = torch.zeros(1, 512, dtype=torch.bfloat16, device=device), torch.zeros(1, 64, device=device)
    kv[0, 448], table[0, 0] = 1.0, 1.0625 + 2.0**-10  # between two bfloat16 values, just above a tie of e4m3
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    cache8 = torch.zeros(1, 1, 512, dtype=torch.uint8, device=device)
    one = torch.ones(1, device=device)
    mla_prologue.qnorm_rope_full_cache_fp8_insert(
        kv[:, None], kv, cache8, zero, zero, table, kv_scale=one, q_scale_inv=one
    )
    assert int(cache8[0, 0, 448]) == 0x39, "1.0625 + 2^-10 is rounded once, to 1.125"


# --- reading a cache back ---------------------------------------------------------------------------------------------


@APIS
@DTYPES
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_gather_of_every_code_and_byte(
    api: ModuleType, dtype: torch.dtype, index_dtype: torch.dtype, device: torch.device
) -> None:
    block_size, pages = 16, 10
    rows = block_size * pages
    blocks = torch.arange(rows * 7)
    codes = (blocks // 4 % 256).to(torch.uint8)
    values = (torch.arange(64) + 64 * (blocks[:, None] % 4)).to(torch.uint8)
    rope = torch.randint(0, 256, (rows, 128), dtype=torch.uint8)
    data = torch.cat([values.reshape(rows, 448), rope], dim=1).reshape(pages, -1)
    scales = torch.cat([codes.reshape(rows, 7), torch.full((rows, 1), 0xEE)], dim=1).to(torch.uint8).reshape(pages, -1)
    cache = guarded(
        (pages, block_size * 584),
        torch.uint8,
        device,
        strides=(block_size * 584 + 24, 1),
        fill=torch.cat([data, scales], 1).to(device),
    )

    order = torch.randperm(rows)
    slots = torch.cat([order, torch.tensor([-1, rows, -(1 << 31), (1 << 31) - 1, rows + 5])]).to(index_dtype)
    if index_dtype == torch.int64:
        slots = torch.cat([slots, torch.tensor([-(1 << 63), (1 << 63) - 1, 1 << 32])])
    shuffled = api.gather_kv(cache.tensor, slots.to(device), block_size=block_size, dtype=dtype).cpu()
    cache.check()
    assert_bitwise_equal(shuffled[rows:], torch.zeros_like(shuffled[rows:]), "rows without a slot")
    actual = torch.empty(rows, 512, dtype=dtype)
    actual[order] = shuffled[:rows]

    factor = torch.where(codes == 255, math.nan, torch.exp2(codes.double() - 127))
    exact = values.view(torch.float8_e4m3fn).double() * factor[:, None]  # what float32 holds exactly, or overflows
    assert_close(actual[:, :448], exact.reshape(rows, 448).float().to(dtype), name="values")
    signs = torch.signbit(actual[:, :448]) == torch.signbit(values.view(torch.float8_e4m3fn).float().reshape(rows, 448))
    assert bool((signs | actual[:, :448].isnan()).all())
    assert_bitwise_equal(actual[:, 448:].contiguous().view(torch.int16), rope.view(torch.int16), "RoPE values")


@APIS
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0])
@DTYPES
def test_round_trip(api: ModuleType, scale: float, dtype: torch.dtype, device: torch.device) -> None:
    """Values read back are within half a step of e4m3 at the scale of their quantization block."""
    kv = (torch.randn(200, 512) * torch.rand(200, 1) * scale).to(dtype).to(device)
    slots, positions, table = unrotated(200, device)
    cache = torch.zeros(4, 64 * 584, dtype=torch.uint8, device=device)
    api.insert_kv(kv, cache, slots, positions, table, block_size=64)
    back = api.gather_kv(cache, slots, block_size=64, dtype=dtype)
    assert_close(back[:, 448:], kv[:, 448:], name="RoPE values")  # -0 may become +0, even when nothing is rotated
    x, y = kv[:, :448].double(), back[:, :448].double()
    amax = x.abs().unflatten(1, (7, 64)).amax(-1, keepdim=True).expand(-1, -1, 64).flatten(1).clamp(min=1e-4)
    # The scale is less than 2 * amax / 448; e4m3 has steps of 2^-9 up to 2^-6, of 2^-3 of a power of two above.
    subnormal = 2.0**-10 * 2 * amax / 448
    allowed = torch.maximum(x.abs() * 2.0**-4, subnormal)
    if dtype == torch.float16:
        allowed += 2.0**-25
    worst = ((x - y).abs() - allowed).max()
    assert float(worst) <= 0, f"off by {float(worst)} more than half a step"
    assert bool((y[x == 0] == 0).all())


# --- where results go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [3, 5])
@DTYPES
def test_out_may_be_q_itself(padded: int, dtype: torch.dtype, device: torch.device) -> None:
    case = PrologueCase(19, 3, padded, dtype=dtype, wild=0.2)
    plain, inputs = case.make(device), case.make(device)
    expected = plain.run(mla_prologue)
    rows = guarded((19, padded, 512), dtype, device, strides=(padded * 512 + 8, 512, 1))
    rows.tensor[:, :3] = inputs.q
    inputs = replace(inputs, q=rows.tensor[:, :3])
    assert inputs.run(mla_prologue, out=rows.tensor) is rows.tensor
    rows.check()
    assert_bitwise_equal(rows.tensor, expected, "q")
    assert_bitwise_equal(inputs.storage, plain.storage, "cache")


def test_out_of_the_caller(device: torch.device) -> None:
    case = PrologueCase(19, 3, 6)
    plain, inputs = case.make(device), case.make(device)
    expected = plain.run(mla_prologue)
    out = guarded((19, 6, 512), torch.bfloat16, device, strides=(6 * 520 + 40, 520, 1), offset_bytes=16)
    inputs.run(mla_prologue, out=out.tensor)
    out.check()
    assert_bitwise_equal(out.tensor, expected, "q")

    kept = guarded((19, 6, 512), torch.bfloat16, device, fill=0x3C)
    before = kept.tensor[:, 3:].clone()
    inputs.run(mla_prologue, out=kept.tensor, zero_padding=False)
    assert_bitwise_equal(kept.tensor[:, :3], expected[:, :3], "live heads")
    assert_bitwise_equal(kept.tensor[:, 3:], before, "padding heads that are not to be written")
    kept.check()


@pytest.mark.parametrize("tokens", [33, 1100])
def test_rows_do_not_depend_on_their_neighbors(tokens: int, device: torch.device) -> None:
    case = PrologueCase(tokens, 5, 7, skipped=0.1)
    together = case.make(device)
    out = together.run(mla_prologue)
    single = case.make(device)
    for t in {0, 1, 7, tokens // 2, tokens - 1}:
        row = replace(single, **{name: getattr(single, name)[t : t + 1] for name in ("q", "kv", "slots", "positions")})
        assert_bitwise_equal(row.run(mla_prologue)[0], out[t], f"q of token {t}")
    rest = case.make(device)
    first = replace(rest, **{name: getattr(rest, name)[: tokens // 2] for name in ("q", "kv", "slots", "positions")})
    other = replace(rest, **{name: getattr(rest, name)[tokens // 2 :] for name in ("q", "kv", "slots", "positions")})
    assert_bitwise_equal(torch.cat([first.run(mla_prologue), other.run(mla_prologue)]), out, "q in two calls")
    assert_bitwise_equal(rest.storage, together.storage, "cache in two calls")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pages", "stride", "block_size", "slots"),
    [
        (5, (1 << 29) + 576, 2, [9, 0, 7, 8, 3]),
        (1, 4_000_000 * 584, 4_000_000, [3_999_999, 0, 3_728_271, 2_000_000, 3_728_270]),
    ],
    ids=["many pages", "one large page"],
)
def test_cache_over_2_gib(pages: int, stride: int, block_size: int, slots: list[int], device: torch.device) -> None:
    """Byte offsets beyond 32 bits. The memory is allocated and not filled, so this is fast."""
    inputs = PrologueCase(5, 2).make(device)
    cache = torch.empty(pages * stride, dtype=torch.uint8, device=device).view(pages, stride)
    where = torch.tensor(slots, device=device)
    replace(inputs, cache=cache, slots=where).run(mla_prologue, block_size=block_size)
    small = torch.zeros(5, 584, dtype=torch.uint8, device=device)
    reference.mla_prologue.insert_kv(
        inputs.kv, small, torch.arange(5, device=device), inputs.positions, inputs.cos_sin, block_size=1
    )
    for token, slot in enumerate(slots):
        page, index = divmod(slot, block_size)
        scales = block_size * 576 + index * 8
        record = torch.cat([cache[page, index * 576 :][:576], cache[page, scales:][:8]])
        assert_bitwise_equal(record, small[token], f"record of token {token}")
    gathered = mla_prologue.gather_kv(cache, where, block_size=block_size)
    expected = mla_prologue.gather_kv(small, torch.arange(5, device=device), block_size=1)
    assert_bitwise_equal(gathered, expected, "gather_kv")


# --- full caches ------------------------------------------------------------------------------------------------------

SIBLING_CASES = [
    PrologueCase(1, 1),
    PrologueCase(17, 17, block_size=16, skipped=0.2, index_dtype=torch.int32),
    PrologueCase(40, 3, block_size=3, wild=0.4, position_dtype=torch.int32),
    PrologueCase(9, 2, inserted=5, q_stride=3 * 512, kv_stride=520, offset_bytes=16),
    PrologueCase(0, 2),
    PrologueCase(4, 0, block_size=1),
    *(PrologueCase(9, 3, values=values) for values in ("zero", "tiny", "subnormal", "huge", "nan", "inf", "bits")),
]


@pytest.mark.parametrize("strided", [False, True], ids=["dense cache", "strided cache"])
@pytest.mark.parametrize("case", SIBLING_CASES, ids=str)
def test_bf16_sibling(case: PrologueCase, strided: bool, device: torch.device) -> None:
    inputs, untouched = case.make(device), case.make(device)
    shape = (inputs.cache.shape[0], case.block_size, 512)
    strides = (case.block_size * 528 + 16, 528, 1) if strided else None
    ours = guarded(shape, torch.bfloat16, device, strides=strides, fill=0x11)
    theirs = ours.clone()
    rest = (inputs.slots, inputs.positions, inputs.cos_sin)
    mla_prologue.qnorm_rope_full_cache_bf16_insert(inputs.q, inputs.kv, ours.tensor, *rest, eps=case.eps)
    assert_query(inputs.q, untouched)
    expected_q = untouched.q.clone()
    reference.mla_prologue.qnorm_rope_full_cache_bf16_insert(expected_q, inputs.kv, theirs.tensor, *rest, eps=case.eps)
    ours.check()
    assert_bitwise_equal(ours.storage, theirs.storage, "cache, with what lies around it")
    assert_bitwise_equal(inputs.kv, untouched.kv, "kv, which is not to be written,")


@pytest.mark.parametrize(
    ("strided", "cache_dtype"), [(False, torch.uint8), (True, torch.float8_e4m3fn)], ids=["dense uint8", "strided e4m3"]
)
@DTYPES
@pytest.mark.parametrize("case", SIBLING_CASES, ids=str)
def test_fp8_sibling(
    case: PrologueCase, dtype: torch.dtype, cache_dtype: torch.dtype, strided: bool, device: torch.device
) -> None:
    case = replace(case, dtype=dtype)
    inputs, untouched = case.make(device), case.make(device)
    shape = (inputs.cache.shape[0], case.block_size, 512)
    strides = (case.block_size * 528 + 16, 528, 1) if strided else None
    ours = guarded(shape, cache_dtype, device, strides=strides, fill=0x11)
    theirs = ours.clone()
    scales: dict[str, Any] = {
        "kv_scale": torch.tensor([0.37], device=device),
        "q_scale_inv": torch.tensor([3.1], device=device),
        "eps": case.eps,
    }
    rest = (inputs.slots, inputs.positions, inputs.cos_sin)
    q8 = guarded(inputs.q.shape, torch.float8_e4m3fn, device)
    out = mla_prologue.qnorm_rope_full_cache_fp8_insert(
        inputs.q, inputs.kv, ours.tensor, *rest, **scales, out=q8.tensor
    )
    assert out is q8.tensor
    expected = reference.mla_prologue.qnorm_rope_full_cache_fp8_insert(
        inputs.q, inputs.kv, theirs.tensor, *rest, **scales
    )
    ours.check()
    q8.check()
    assert_bitwise_equal(ours.storage, theirs.storage, "cache, with what lies around it")
    assert expected.dtype == torch.float8_e4m3fn
    assert_close(out, expected, ulps=1, name="q")
    assert bool((out.view(torch.uint8)[out.float().isnan()] == 0x7F).all()), "NaN is 0x7F, whatever its sign was"
    off = int((ulp_distance(out, expected) > 0).sum())
    assert off <= 2 + out.numel() / 2000, f"{off} of {out.numel()} Q values are not the exact ones rounded once"
    assert_bitwise_equal(inputs.q, untouched.q, "q, which is not to be written,")
    allocated = mla_prologue.qnorm_rope_full_cache_fp8_insert(inputs.q, inputs.kv, ours.tensor, *rest, **scales)
    assert allocated.dtype == torch.float8_e4m3fn
    assert_bitwise_equal(allocated.view(torch.uint8), out.view(torch.uint8), "q, allocated")


@APIS
@DTYPES
def test_full_fp8_cache_of_every_value(api: ModuleType, dtype: torch.dtype, device: torch.device) -> None:
    """Every bit pattern as a KV value, saturating and not; the reciprocal of the scale is float32."""
    kv = torch.zeros(-(-65536 // 448), 512, dtype=dtype)
    kv[:, :448] = torch.nn.functional.pad(every(dtype), (0, 448 * len(kv) - 65536)).reshape(-1, 448)
    slots, positions, table = unrotated(len(kv), device)
    for scale in (1.0, 0.3, 3000.0):
        kv_scale = torch.tensor([scale], device=device)
        cache = torch.zeros(len(kv), 1, 512, dtype=torch.uint8, device=device)
        arguments = (kv[:, None].to(device), kv.to(device), cache, slots, positions, table)
        api.qnorm_rope_full_cache_fp8_insert(*arguments, kv_scale=kv_scale, q_scale_inv=torch.ones(1, device=device))
        factor = nearest(1 / Fraction(float(kv_scale)), torch.float32)
        product = kv[:, :448].double() * factor  # exact in float64; one rounding to float32 follows
        assert_bitwise_equal(cache[:, 0, :448].cpu(), e4m3_by_torch(product.float()), f"scale {scale}")
