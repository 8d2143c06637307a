"""Compare tensors: bitwise, in ulps, or within a tolerance; errors name the place where they differ.

Every function takes tensors of any shape, strides and device; `expected` is copied to the device of `actual`. A NaN
matches any NaN, an infinity only one of the same sign, and +0 equals -0. The bitwise comparison requires equal bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_DISTANCE = torch.iinfo(torch.int64).max


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "output") -> None:
    """Raise AssertionError unless both tensors have the same dtype, the same shape and the same bytes."""
    _assert_same_shape(actual, expected, name)
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: dtype is {actual.dtype}, expected {expected.dtype}")
    ours, theirs = _bits(actual), _bits(expected.to(actual.device))
    if torch.equal(ours, theirs):
        return
    differs = ours != theirs
    first = _first(differs)
    place = _coordinate(first, actual.shape)
    offset = sum(index * stride for index, stride in zip(place, actual.stride(), strict=True)) * actual.element_size()
    raise AssertionError(
        f"{name}: {_count(differs)} in their bits; the first is at {place}, byte offset {offset}: "
        f"actual {_shown(actual, place)}, expected {_shown(expected, place)}"
    )


def assert_close(
    actual: Tensor,
    expected: Tensor,
    *,
    ulps: int | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    name: str = "output",
) -> None:
    """Raise AssertionError unless every element is within a tolerance.

    `ulps` counts representable steps of the dtype of `actual`; `atol` and `rtol` bound |actual - expected| by
    atol + rtol * |expected|. An element passes by either measure; without any, it must be equal. `expected` has the
    dtype of `actual` or is float32 or float64; for `ulps` it is rounded once, to the dtype of `actual`. NaNs are
    compared first, then infinities.
    """
    _assert_same_shape(actual, expected, name)
    if expected.dtype not in (actual.dtype, torch.float32, torch.float64):
        raise AssertionError(f"{name}: dtype is {actual.dtype}, expected {expected.dtype}")
    expected = expected.to(actual.device)
    rounded = round_once(expected, actual.dtype) if ulps is not None else expected
    ours, theirs = _float64(actual), _float64(rounded)
    _assert_same_mask(ours.isnan(), theirs.isnan(), "NaN", actual, expected, name)
    _assert_same_mask(ours == torch.inf, theirs == torch.inf, "+Inf", actual, expected, name)
    _assert_same_mask(ours == -torch.inf, theirs == -torch.inf, "-Inf", actual, expected, name)

    target = _float64(expected)
    error = (ours - target).abs().masked_fill_(~ours.isfinite(), 0.0)
    allowed = (atol + rtol * target.abs()).masked_fill_(~target.isfinite(), atol)
    wrong = error > allowed
    if ulps is None:
        severity, rule = error - allowed, ""
    else:
        steps = ulp_distance(actual, rounded)
        wrong &= steps > ulps
        severity, rule = steps, f"{ulps} ulp" if ulps == 1 else f"{ulps} ulps"
    if not bool(wrong.any()):
        return

    lowest = torch.iinfo(torch.int64).min if ulps is not None else -torch.inf
    worst = int(severity.masked_fill(~wrong, lowest).reshape(-1).argmax())
    place = _coordinate(worst, actual.shape)
    bounds = [rule] if rule else []
    if atol or rtol or not rule:
        bounds.append(f"{float(allowed[place]):.6g}")
    error_text = f"{float(error[place]):.6g}" + (f" = {int(steps[place])} ulps" if ulps is not None else "")
    raise AssertionError(
        f"{name}: {_count(wrong)} by too much; the worst is at {place}: actual {_shown(actual, place)}, "
        f"expected {_shown(expected, place)}, error {error_text}, allowed {' or '.join(bounds)}"
    )


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """The number of representable steps between a and b in a's dtype, as int64: 0 between +0 and -0 and between NaNs,
    2**63 - 1 between a NaN and a number. A `b` of another dtype is first rounded once to a's."""
    b = round_once(b.to(a.device), a.dtype)
    below, above = _ordinal(a), _ordinal(b)
    steps = (below - above).abs()
    far_apart = (below < 0) != (above < 0)
    overflown = far_apart & (below.abs() > _MAX_DISTANCE - above.abs())
    a_nan, b_nan = _isnan(a), _isnan(b)
    steps = torch.where(overflown | (a_nan != b_nan), _MAX_DISTANCE, steps)
    return steps.masked_fill_(a_nan & b_nan, 0)


def max_error(actual: Tensor, expected: Tensor) -> float:
    """The largest |actual - expected| in float64; infinite where only one of the two is a NaN or an infinity."""
    _assert_same_shape(actual, expected, "max_error")
    if actual.numel() == 0:
        return 0.0
    ours, theirs = _float64(actual), _float64(expected.to(actual.device))
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    error = (ours - theirs).abs().masked_fill_(same, 0.0)
    return float(error.nan_to_num_(nan=torch.inf, posinf=torch.inf).max())


def max_ulps(actual: Tensor, expected: Tensor) -> int:
    """The largest `ulp_distance` between the two; 0 for empty tensors."""
    _assert_same_shape(actual, expected, "max_ulps")
    return int(ulp_distance(actual, expected).max()) if actual.numel() else 0


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, rounded once, to nearest even; float8_e4m3fn saturates at +-448.

    A plain cast from float64 to a 16-bit or 8-bit float rounds twice, by way of float32, which breaks some ties
    wrongly. Here the step to float32 rounds to odd: an inexact result gets its last bit set, so that the second
    rounding knows that it is no tie.
    """
    if x.dtype == dtype:
        return x
    if x.dtype == torch.float64 and dtype.is_floating_point and dtype.itemsize < 4:
        near = x.float()
        exact = near.double()
        inexact_and_even = (exact != x) & ~x.isnan() & (near.view(torch.int32) & 1 == 0)
        outwards = torch.where(exact.abs() > x.abs(), -1, 1).to(torch.int32)
        x = torch.where(inexact_and_even, near.view(torch.int32) + outwards, near.view(torch.int32)).view(torch.float32)
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-448.0, 448.0)
    return x.to(dtype)


def _bits(x: Tensor) -> Tensor:
    """The bits of all elements, as integers of the same size."""
    return x.detach().contiguous().reshape(-1).view(_INTEGER_OF_SIZE[x.element_size()])


def _ordinal(x: Tensor) -> Tensor:
    """int64 that grows by 1 per representable value and is 0 at both zeros."""
    if not x.dtype.is_floating_point:
        return x.to(torch.int64)
    bits = _bits(x).to(torch.int64).reshape(x.shape)
    if x.dtype == torch.float8_e8m0fnu:
        return bits
    magnitude = bits & ((1 << (8 * x.element_size() - 1)) - 1)
    negative = (bits < 0) | ((bits >> 7 == 1) if x.element_size() == 1 else torch.zeros_like(bits, dtype=torch.bool))
    return torch.where(negative, -magnitude, magnitude)


def _isnan(x: Tensor) -> Tensor:
    return (x.float() if x.element_size() == 1 else x).isnan()


def _float64(x: Tensor) -> Tensor:
    return (x.detach().float() if x.element_size() == 1 else x.detach()).double()


def _assert_same_shape(actual: Tensor, expected: Tensor, name: str) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape is {tuple(actual.shape)}, expected {tuple(expected.shape)}")


def _assert_same_mask(ours: Tensor, theirs: Tensor, what: str, actual: Tensor, expected: Tensor, name: str) -> None:
    if torch.equal(ours, theirs):
        return
    differs = ours != theirs
    place = _coordinate(_first(differs), actual.shape)
    only = f"{int((ours & ~theirs).sum())} only in actual, {int((theirs & ~ours).sum())} only in expected"
    raise AssertionError(
        f"{name}: {what} in different places ({only}); the first is at {place}: "
        f"actual {_shown(actual, place)}, expected {_shown(expected, place)}"
    )


def _first(mask: Tensor) -> int:
    return int(mask.reshape(-1).to(torch.uint8).argmax())


def _coordinate(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(shape):
        index, remainder = divmod(index, size)
        place.append(remainder)
    return tuple(reversed(place))


def _count(mask: Tensor) -> str:
    count, total = int(mask.sum()), mask.numel()
    return f"{count} of {total} elements {'differs' if count == 1 else 'differ'}"


def _shown(x: Tensor, place: tuple[int, ...]) -> str:
    """An element: its value, if that is not obvious from the bits, and its bits in hex."""
    element = x.detach()[place].reshape(1)
    digits = 2 * x.element_size()
    bits = int(_bits(element)) & ((1 << 4 * digits) - 1)
    if not x.dtype.is_floating_point:
        return f"0x{bits:0{digits}x}" if x.dtype == torch.uint8 else f"{element.item()} (0x{bits:0{digits}x})"
    return f"{float(_float64(element)):.9g} (0x{bits:0{digits}x})"
