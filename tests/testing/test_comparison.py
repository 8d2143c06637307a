"""Comparisons pass what is equal, fail what is not, and name the place: a test of the tests' own instruments."""

from __future__ import annotations

import math
from bisect import bisect_left

import pytest
import torch
from torch import Tensor

from abiding.testing import assert_bitwise_equal, assert_close, max_error, max_ulps, round_once, ulp_distance

FLOATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64]
STORED = [*FLOATS, torch.float8_e8m0fnu, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def from_bits(bits: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([bits], dtype=INTEGER_OF_SIZE[dtype.itemsize]).view(dtype)


# --- bit by bit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED, ids=name_of)
def test_bitwise_accepts_the_same_bits_and_refuses_one_flipped(dtype: torch.dtype, device: torch.device) -> None:
    raw = torch.randint(0, 2, (6, 8 * dtype.itemsize), dtype=torch.uint8, device=device)
    x = raw.view(dtype)
    assert_bitwise_equal(x, x.clone())
    flipped = raw.clone()
    flipped[4, 3 * dtype.itemsize] ^= 1
    with pytest.raises(AssertionError, match=r"1 of 48 elements differs in their bits; the first is at \(4, 3\)"):
        assert_bitwise_equal(flipped.view(dtype), x)


def test_bitwise_tells_zeros_apart_and_accepts_equal_nans() -> None:
    assert_bitwise_equal(torch.tensor([math.nan]), torch.tensor([math.nan]))
    with pytest.raises(AssertionError, match=r"actual -0 \(0x80000000\), expected 0 \(0x00000000\)"):
        assert_bitwise_equal(torch.tensor([-0.0]), torch.tensor([0.0]))


def test_bitwise_counts_bytes_along_the_real_strides() -> None:
    page = torch.zeros(3, 100, dtype=torch.uint8)[:, :10]
    expected = torch.zeros(3, 10, dtype=torch.uint8)
    page[2, 7] = 0x7F
    with pytest.raises(AssertionError, match=r"^cache: .* at \(2, 7\), byte offset 207: actual 0x7f, expected 0x00$"):
        assert_bitwise_equal(page, expected, "cache")


def test_bitwise_names_shape_and_dtype_before_anything_else() -> None:
    with pytest.raises(AssertionError, match=r"q: shape is \(2, 3\), expected \(3, 2\)"):
        assert_bitwise_equal(torch.zeros(2, 3), torch.zeros(3, 2), "q")
    with pytest.raises(AssertionError, match=r"dtype is torch.float16, expected torch.bfloat16"):
        assert_bitwise_equal(torch.zeros(2).half(), torch.zeros(2).bfloat16())


def test_empty_and_scalar_tensors_compare() -> None:
    assert_bitwise_equal(torch.zeros(0, 4), torch.zeros(0, 4))
    assert_close(torch.zeros(0, 4), torch.zeros(0, 4), ulps=1)
    assert_bitwise_equal(torch.tensor(3), torch.tensor(3))
    assert max_error(torch.zeros(0), torch.zeros(0)) == 0
    assert max_ulps(torch.zeros(0), torch.zeros(0)) == 0
    with pytest.raises(AssertionError, match=r"at \(\)"):
        assert_close(torch.tensor(3.0), torch.tensor(4.0))


# --- representable steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16], ids=name_of)
def test_ulp_distance_is_the_distance_in_the_sorted_list_of_all_values(dtype: torch.dtype) -> None:
    width = 8 * dtype.itemsize
    bits = torch.arange(1 << width).to(INTEGER_OF_SIZE[dtype.itemsize])
    every = bits.view(dtype)
    every = every[~every.float().isnan()]
    ranked = sorted(set(every.double().tolist()))
    chosen = every.view(bits.dtype)[torch.randperm(len(every))[:200]].view(dtype)
    a, b = chosen[:100], chosen[100:]
    expected = [
        abs(bisect_left(ranked, x) - bisect_left(ranked, y))
        for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True)
    ]
    assert ulp_distance(a, b).tolist() == expected


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_ulp_distance_across_zero_and_of_nan(dtype: torch.dtype) -> None:
    smallest = from_bits(1, dtype).double()
    assert int(ulp_distance(smallest.to(dtype), (-smallest).to(dtype))) == 2
    zero = torch.zeros(1).to(dtype)
    assert int(ulp_distance(zero, (-torch.zeros(1)).to(dtype))) == 0
    nan = torch.full((1,), math.nan).to(dtype)
    assert int(ulp_distance(nan, nan)) == 0
    assert int(ulp_distance(nan, zero)) == int(ulp_distance(zero, nan)) == 2**63 - 1


def test_ulp_distance_does_not_overflow() -> None:
    big = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert int(ulp_distance(big, -big)) == 2**63 - 1
    assert int(ulp_distance(-big, big)) == 2**63 - 1
    assert int(ulp_distance(big, torch.full_like(big, math.inf))) == 1


# --- rounding once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=name_of)
def test_round_once_settles_near_ties_by_the_exact_value(dtype: torch.dtype) -> None:
    """A hair from the middle between two neighbors, the nearer one wins; a cast by way of float32 fails this."""
    below = from_bits(0x35, dtype) if dtype.itemsize == 1 else from_bits(0x3A35, dtype)
    above = from_bits(0x36, dtype) if dtype.itemsize == 1 else from_bits(0x3A36, dtype)
    lo, hi = below.double(), above.double()
    middle, hair = (lo + hi) / 2, (hi - lo) * 2.0**-40
    x = torch.cat([middle - hair, middle + hair, middle, -(middle - hair), -(middle + hair)])
    even = hi  # 0x..36 ends in a zero bit
    assert round_once(x, dtype).double().tolist() == torch.cat([lo, hi, even, -lo, -hi]).tolist()
    assert x.to(dtype).double().tolist() != round_once(x, dtype).double().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_round_once_finds_the_nearest_of_all_values(dtype: torch.dtype) -> None:
    x = torch.randn(2000, dtype=torch.float64) * torch.exp2(torch.randint(-30, 15, (2000,)).double())
    rounded = round_once(x, dtype)
    bits = rounded.view(torch.int16)
    for neighbor in (bits - 1, bits + 1):
        assert not bool(((neighbor.view(dtype).double() - x).abs() < (rounded.double() - x).abs()).any())


def test_round_once_at_the_ends_of_the_range() -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e300, -1e300, 1e-320, math.nan], dtype=torch.float64)
    rounded = round_once(x, torch.bfloat16)
    assert_bitwise_equal(
        rounded[:7], torch.tensor([0.0, -0.0, math.inf, -math.inf, math.inf, -math.inf, 0.0]).bfloat16()
    )
    assert bool(rounded[7].isnan())
    saturated = round_once(torch.tensor([1e9, -464.1, math.inf, math.nan], dtype=torch.float64), torch.float8_e4m3fn)
    assert saturated.view(torch.uint8).tolist() == [0x7E, 0xFE, 0x7E, 0x7F]


# --- within a tolerance -----------------------------------------------------------------------------------------------


def test_close_counts_steps_against_a_float64_expectation(device: torch.device) -> None:
    exact = torch.linspace(0.1, 9.0, 500, dtype=torch.float64, device=device).reshape(5, 100)
    rounded = round_once(exact, torch.bfloat16)
    assert_close(rounded, exact, ulps=0)
    off = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    assert_close(off, exact, ulps=1)
    with pytest.raises(AssertionError, match=r"500 of 500 elements differ by too much; .* = 1 ulps, allowed 0 ulps"):
        assert_close(off, exact, ulps=0)


def test_close_names_the_worst_place_with_everything_one_asks_next() -> None:
    expected = torch.full((4, 5), 2.0)
    actual = expected.clone()
    actual[1, 1], actual[3, 4] = 2.25, 2.5
    with pytest.raises(AssertionError) as failure:
        assert_close(actual, expected, atol=0.125, rtol=0.03125, name="k")
    assert str(failure.value) == (
        "k: 2 of 20 elements differ by too much; the worst is at (3, 4): actual 2.5 (0x40200000), "
        "expected 2 (0x40000000), error 0.5, allowed 0.1875"
    )


def test_close_passes_an_element_by_either_measure() -> None:
    exact = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    actual = torch.tensor([1.0078125, -1e-9]).bfloat16()
    assert_close(actual, exact, ulps=1, atol=1e-8)
    with pytest.raises(AssertionError, match=r"1 of 2 elements differs .* at \(1,\).*allowed 1 ulp$"):
        assert_close(actual, exact, ulps=1)
    with pytest.raises(AssertionError, match=r"1 of 2 elements differs .* at \(0,\).*allowed 1e-08$"):
        assert_close(actual, exact, atol=1e-8)


def test_close_compares_nans_then_infinities_before_any_value() -> None:
    expected = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert_close(expected.clone(), expected)
    with pytest.raises(
        AssertionError, match=r"NaN in different places \(1 only in actual, 1 only in expected\).*\(0,\)"
    ):
        assert_close(torch.tensor([5.0, math.inf, -math.inf, math.nan]), expected)
    with pytest.raises(AssertionError, match=r"\+Inf in different places .* at \(1,\): actual -inf"):
        assert_close(torch.tensor([math.nan, -math.inf, -math.inf, 9.0]), expected)
    with pytest.raises(AssertionError, match=r"-Inf in different places"):
        assert_close(torch.tensor([math.nan, math.inf, -3e38, 9.0]), expected, atol=math.inf)


def test_close_refuses_an_expectation_of_another_narrow_dtype() -> None:
    with pytest.raises(AssertionError, match=r"dtype is torch.float32, expected torch.bfloat16"):
        assert_close(torch.zeros(1), torch.zeros(1).bfloat16())


def test_close_of_float8_and_integers() -> None:
    codes = torch.tensor([0x00, 0x80, 0x38, 0x7F, 0x7E], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert_close(codes, codes.clone(), ulps=0)
    assert_close(codes, codes.float().double(), ulps=0)
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_close(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 5]), atol=1)


def test_max_error_counts_matching_specials_as_nothing_and_others_as_infinite() -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf])
    assert max_error(torch.cat([special, torch.ones(1)]), torch.cat([special, torch.tensor([1.5])])) == 0.5
    for other in (0.0, math.inf):
        assert max_error(torch.tensor([math.nan]), torch.tensor([other])) == math.inf
    assert max_error(torch.tensor([math.inf]), torch.tensor([-math.inf])) == math.inf
