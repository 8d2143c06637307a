"""Rebasing: reference and kernel against rules written a second time, and against each other."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from types import ModuleType
from typing import Any

import pytest
import torch
from mxfp8_rules import APIS, exact_value, magnitudes
from torch import Tensor

from abiding import mxfp8_moe, reference
from abiding.mxfp8_moe import Rebased
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import guarded

VALUES = [Fraction(float(value)) for value in magnitudes()]


@cache
def moved_byte(byte: int, shift: int) -> int:
    """The nearest e4m3 byte to a byte's value times 2^-shift, ties to even; NaN is 0x7F."""
    if byte & 0x7F == 0x7F:
        return 0x7F
    wanted = VALUES[byte & 0x7F] / 2**shift
    return min(range(127), key=lambda m: (abs(VALUES[m] - wanted), m % 2)) | byte & 0x80


def rebased_row(data: list[int], codes: list[int]) -> tuple[list[int], list[int], bool]:
    """A row by the rules of the documentation, in rational numbers: bytes, codes, whether it is left."""
    blocks = [data[begin : begin + 32] for begin in range(0, len(data), 32)]
    largest = [max((VALUES[x & 0x7F] for x in block if x & 0x7F != 0x7F), default=Fraction(0)) for block in blocks]
    counting = [b for b, code in enumerate(codes) if code != 255 and largest[b] > 0]
    if len(set(codes)) == 1:
        return data, codes, False
    top = max((codes[b] for b in counting), default=0)
    if any(codes[b] < top and largest[b] / 2 ** (top - codes[b]) < Fraction(1, 64) for b in counting):
        return data, codes, True
    for b, code in enumerate(codes):
        if code == 255:
            blocks[b] = [0x7F] * 32
        elif code != top:
            blocks[b] = [moved_byte(x, top - code if b in counting else 0) for x in blocks[b]]
    return [x for block in blocks for x in block], [top] * len(codes), False


def rows_of_every_kind() -> tuple[Tensor, Tensor]:
    """Weights [n, 160] and codes [n, 5]."""
    generator = torch.Generator().manual_seed(0)
    rows, codes = [], []

    def add(row: Tensor, *of_row: int) -> None:
        rows.append(row.flatten())
        codes.append(torch.tensor([*of_row, 120], dtype=torch.uint8))

    def random(low: int = 0, high: int = 0x7F) -> Tensor:
        signs = torch.randint(0, 2, (5, 32), generator=generator) * 0x80
        return (torch.randint(low, high, (5, 32), generator=generator) | signs).to(torch.uint8)

    for shift in range(20):  # every shift; some of them too far
        add(random(), 120, 120 - shift, 119, 120)
        add(random(0x70, 0x7F), 100, 100, 100 + shift, 100)
        add(random(), 120 - shift // 2, 120 - shift, 120, 118)
    for byte in range(128):  # every byte as the largest of a scale block that moves
        row = random()
        row[1] = torch.arange(32) % 2 * 0x80
        row[1, byte % 32] = byte
        for shift in (1, (byte >> 3) - 1, byte >> 3, (byte >> 3) + 1):
            add(row, 120, 120 - max(shift, 0), 120, 120)
    for of_row in ((254, 0, 1, 254), (0, 1, 2, 3), (254, 254, 253, 252), (120, 254, 120, 119), (247, 246, 245, 244)):
        add(random(), *of_row)
        add(random(0x68, 0x7F), *of_row)
    zero = torch.arange(32) % 2 * 0x80
    for of_row in ((120, 254, 119, 0), (0, 254, 0, 120), (254, 255, 3, 0), (255, 255, 255, 255), (255, 255, 255, 7)):
        for blocks in ((1,), (1, 3), (0, 1, 2), (0, 1, 2, 3)):  # zeros, and zeros with NaN
            row = random(0x68, 0x7F)
            for block in blocks:
                row[block] = zero
            add(row, *of_row)
            row = row.clone()
            row[blocks[-1], 5] = 0x7F
            row[blocks[0], 6] = 0xFF
            add(row, *of_row)
    for of_row in ((120, 255, 119, 255), (255, 120, 119, 118), (255, 120, 120, 120), (120, 119, 118, 117)):
        row = random(0x68, 0x7F)
        row[1, 3:6], row[2, 7], row[0] = 0x7F, 0xFF, 0x7F
        add(row, *of_row)
        add(random(0x68, 0x80), *of_row)
    add(random(), 120, 120, 120, 120)
    return torch.stack(rows), torch.stack(codes)


def report_of(before: Tensor, codes: Tensor, after: Tensor, new_codes: Tensor, left: int) -> dict[str, float]:
    """The report by its definition. Codes are so that bfloat16 holds all values."""
    pairs = ((before, codes), (after, new_codes))
    values, moved = (exact_value(data.long(), plain.long().repeat_interleave(32, -1)) for data, plain in pairs)
    error, norm = (moved - values).nan_to_num(0).square(), values.nan_to_num(0).square()
    by_row = (error.sum(1) / norm.sum(1)).nan_to_num(0).sqrt()
    return {
        "changed": int((error > 0).sum()),
        "left": left,
        "rms": float((error.sum() / norm.sum()).sqrt()),
        "worst_row": int(by_row.argmax()) if float(by_row.max()) > 0 else -1,
        "worst_rms": float(by_row.max()),
    }


def assert_report(found: Rebased, expected: Any) -> None:
    for name in Rebased._fields:
        value = getattr(found, name)
        assert value.dtype == (torch.float64 if "rms" in name else torch.int64)
        assert value.shape == ()
        wanted = expected[name] if isinstance(expected, dict) else getattr(expected, name).item()
        assert value.item() == pytest.approx(wanted, rel=1e-5), name


@APIS
def test_every_kind_of_row(api: ModuleType, device: torch.device) -> None:
    data, codes = rows_of_every_kind()
    expected = [rebased_row(*pair) for pair in zip(data.tolist(), codes.tolist(), strict=True)]
    n = len(data) // 32 * 32
    weight, scales = data[None, :n].to(device), api.swizzle_scales(codes[None, :n]).to(device)
    given = weight.clone(), scales.clone()
    new, new_scales, report = api.rebase(weight.view(torch.float8_e4m3fn), scales)
    assert new.dtype == torch.float8_e4m3fn
    assert_bitwise_equal(weight, given[0], "the weights given")
    assert_bitwise_equal(scales, given[1], "the scales given")
    after = torch.tensor([row[0] for row in expected], dtype=torch.uint8)[:n]
    new_codes = torch.tensor([row[1] for row in expected], dtype=torch.uint8)[:n]
    assert_bitwise_equal(new[0].view(torch.uint8).cpu(), after, "bytes")
    assert_bitwise_equal(api.unswizzle_scales(new_scales, n, 160)[0].cpu(), new_codes, "codes")
    left = sum(row[2] for row in expected[:n])
    assert int(report.left) == left > 20
    again, scales_again, nothing = api.rebase(new, new_scales)
    assert_bitwise_equal(again, new, "rebased again")
    assert_bitwise_equal(scales_again, new_scales, "rebased again")
    assert (int(nothing.changed), int(nothing.left), float(nothing.rms), int(nothing.worst_row)) == (0, left, 0, -1)

    held = (codes[:n] >= 10).all(1) & ((codes[:n] <= 240) | (codes[:n] == 255)).all(1)
    held = held.nonzero().flatten()[: int(held.sum()) // 32 * 32]
    weight, scales = data[None, held].to(device), api.swizzle_scales(codes[None, held]).to(device)
    left = sum(expected[row][2] for row in held.tolist())
    _, _, report = api.rebase(weight, scales)
    assert_report(report, report_of(data[held], codes[held], after[held], new_codes[held], left))


def weights(experts: int, n: int, k: int, device: torch.device, tail: float | None = None) -> tuple[Tensor, Tensor]:
    """Quantized Gaussian weights, or heavy-tailed ones, and their scales in tiles."""
    x = torch.randn(experts * n, k, device=device)
    if tail is not None:
        chi = torch.distributions.Chi2(torch.tensor(tail)).sample((experts * n, k)).to(device)
        x = x / (chi / tail).sqrt()
    data, _ = mxfp8_moe.quantize((x / 32).bfloat16())
    codes = reference.mxfp8_moe.quantize_rows((x / 32).bfloat16())[1]
    return data.view(experts, n, k), mxfp8_moe.swizzle_scales(codes.view(experts, n, k // 32))


SHAPES = [(1, 32, 32), (3, 96, 160), (2, 160, 128), (1, 32, 2080), (5, 64, 640), (2, 288, 416), (40, 32, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("values", ["normal", "heavy", "bits"])
def test_equals_the_reference(shape: tuple[int, int, int], values: str, device: torch.device) -> None:
    weight, scales = weights(*shape, device, tail=2.5 if values == "heavy" else None)
    if values == "bits":
        weight = torch.randint(0, 256, shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        codes = torch.randint(100, 116, (*shape[:2], shape[2] // 32), dtype=torch.uint8, device=device)
        scales = mxfp8_moe.swizzle_scales(codes.masked_fill(torch.rand(codes.shape, device=device) < 0.02, 255))
    expected = reference.mxfp8_moe.rebase(weight, scales)
    found = mxfp8_moe.rebase(weight, scales)
    assert_bitwise_equal(found[0], expected[0], "bytes")
    assert_bitwise_equal(found[1], expected[1], "codes")
    assert_report(found[2], expected[2])
    again = mxfp8_moe.rebase(weight, scales)[2]
    for one, same in zip(found[2], again, strict=True):
        assert_bitwise_equal(one, same, "the report again")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_memory(shape: tuple[int, int, int], device: torch.device) -> None:
    """In place or apart, with gaps between rows and experts: nothing else is written, and padding comes along."""
    _, n, k = shape
    weight, scales = weights(*shape, device)
    expected = mxfp8_moe.rebase(weight, scales)
    strides = (n * (k + 48) + 16, k + 48, 1)
    given = guarded(shape, torch.float8_e4m3fn, device, fill=weight, strides=strides, offset_bytes=16)
    codes = guarded(scales.shape, torch.uint8, device, fill=scales, offset_bytes=16)
    new, new_scales, _ = mxfp8_moe.rebase(given.tensor, codes.tensor)
    assert_bitwise_equal(new, expected[0])
    assert_bitwise_equal(new_scales, expected[1])
    out = guarded(shape, torch.float8_e4m3fn, device, strides=strides)
    out_codes = guarded(scales.shape, torch.uint8, device)
    counts = guarded((3,), torch.int64, device)
    errors = guarded((2,), torch.float64, device)
    torch.ops.abiding.mxfp8_rebase(
        given.tensor,
        codes.tensor,
        out=out.tensor,
        out_scales=out_codes.tensor,
        counts=counts.tensor,
        errors=errors.tensor,
    )
    assert_bitwise_equal(given.tensor, weight, "the weights given")
    same, same_scales, report = mxfp8_moe.rebase(given.tensor, codes.tensor, inplace=True)
    assert same is given.tensor
    assert same_scales is codes.tensor
    for guard in (given, codes, out, out_codes, counts, errors):
        guard.check()
    for data, its_codes in ((given, codes), (out, out_codes)):
        assert_bitwise_equal(data.tensor, expected[0], "bytes")
        assert_bitwise_equal(its_codes.tensor, expected[1], "codes")
    assert_report(report, expected[2])


def test_forms_of_arguments(device: torch.device) -> None:
    weight, scales = weights(2, 64, 160, device)
    data, codes, _ = mxfp8_moe.rebase(weight, scales)
    assert not torch.equal(codes, scales)
    view = weight.transpose(1, 2)
    for api in (mxfp8_moe, reference.mxfp8_moe):
        turned, same, _ = api.rebase(view, scales.view(torch.float8_e8m0fnu).flatten())
        assert turned.shape == view.shape
        assert same.dtype == torch.float8_e8m0fnu
        assert_bitwise_equal(turned.transpose(1, 2), data)
        assert_bitwise_equal(same.view(torch.uint8), codes.flatten())
        one, its, _ = api.rebase(weight[1].view(torch.uint8), scales[1])
        assert_bitwise_equal(one, data[1].view(torch.uint8))
        assert_bitwise_equal(its, codes[1])
        held, kept = view.clone(memory_format=torch.preserve_format), scales.clone()
        assert api.rebase(held, kept, inplace=True)[0] is held
        assert_bitwise_equal(held.transpose(1, 2), data)
        assert_bitwise_equal(kept, codes)
        empty = api.rebase(weight[:0], scales[:0])[2]
        assert [one.item() for one in empty] == [0, 0, 0.0, -1, 0.0]


def test_what_it_costs(device: torch.device) -> None:
    """Of Gaussian weights hardly anything changes, and products of them stay what they were."""
    weight, scales = weights(2, 256, 2048, device)
    data, codes, report = mxfp8_moe.rebase(weight, scales)
    assert 0 < int(report.changed) < 1e-4 * weight.numel()
    assert 0 < float(report.rms) < 1e-6
    assert int(report.left) == 0
    plain = mxfp8_moe.unswizzle_scales(codes, 256, 2048)
    assert_bitwise_equal(plain, plain[..., :1].expand(plain.shape).contiguous(), "codes of a row")
    x = torch.randn(64, 2048, device=device).bfloat16()
    offsets = torch.tensor([0, 30, 64], dtype=torch.int32, device=device)
    before, after = (mxfp8_moe.grouped_mm(x, *w, offsets) for w in ((weight, scales), (data, codes)))
    assert_close(after, before, rtol=2.0**-7, atol=1e-4 * float(before.float().std()))
