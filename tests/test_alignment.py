"""Tensors that lie at any address, as parts of mapped files do: on a CPU they are taken, on a GPU the error says what
helps."""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from calls import Call, collectives, mla_prologue, mxfp8_moe, refusal
from torch import Tensor

from abiding import mxfp8_moe as public
from abiding.testing.cases.mxfp8_moe import LayerCase
from abiding.testing.comparison import assert_bitwise_equal

MAKERS = {
    **dict.fromkeys(mla_prologue.SPOILS, mla_prologue.well_formed),
    **dict.fromkeys(mxfp8_moe.SPOILS, mxfp8_moe.well_formed),
}
WORKSPACE = ("workspace", 16)
"""Not one type of elements, so aligned on a CPU as well."""


def well_formed(op: str, device: torch.device) -> Call:
    torch.manual_seed(0)
    if op in collectives.OPERATORS:
        return collectives.well_formed(op, random.Random(0))
    return MAKERS[op](op, device)


def tensors_of(call: Call) -> list[str]:
    return [name for name, value in call.args.items() if isinstance(value, Tensor) and value.numel() > 0]


def moved(x: Tensor, by: int) -> Tensor:
    """The tensor in memory that starts so many bytes past a multiple of 64; `by` need not be a multiple of elements."""
    size = x.element_size()
    span = size * (1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)))
    memory = torch.zeros(span + 192, dtype=torch.uint8, device=x.device)
    start = -memory.data_ptr() % 64 + 64 + by
    if start % size == 0:
        result = memory[start:].view(torch.uint8)[: span // size * size].view(x.dtype).as_strided(x.shape, x.stride())
    else:  # only from a buffer of somebody else's does torch make such tensors
        bytes_ = (ctypes.c_char * len(memory)).from_address(memory.data_ptr())
        bytes_.owner = memory  # type: ignore[attr-defined]  # as long as a tensor has the buffer
        flat = torch.frombuffer(bytes_, dtype=torch.uint8, offset=start, count=span)
        result = torch.frombuffer(bytes_, dtype=x.dtype, offset=start, count=span // size)
        assert flat.data_ptr() == result.data_ptr()
        result = result.as_strided(x.shape, x.stride())
    result.view(torch.uint8).copy_(x.view(torch.uint8)) if x.is_contiguous() else result.copy_(x)
    return result


def outcome(call: Call) -> list[Tensor]:
    """All that a call returns and leaves in its tensors."""
    returned = call.raw()
    results = [returned] if isinstance(returned, Tensor) else list(returned or [])
    results += [call.args[name] for name in tensors_of(call) if name not in ("workspace", "state")]
    return [result.contiguous().view(torch.uint8) for result in results]


def every() -> Iterator[Any]:
    for op in (*MAKERS, *collectives.OPERATORS):
        for name in tensors_of(well_formed(op, torch.device("cpu"))):
            if not (op.startswith("minimax") and name == "workspace"):  # a table of addresses that are read as they are
                yield pytest.param(op, name, id=f"{op}-{name}")


@pytest.mark.parametrize(("op", "name"), list(every()))
def test_any_multiple_of_an_element_on_a_cpu(op: str, name: str) -> None:
    expected = outcome(well_formed(op, torch.device("cpu")))
    size = well_formed(op, torch.device("cpu")).args[name].element_size()
    for by in {size, 3 * size, 8 if size <= 8 else size}:
        call = well_formed(op, torch.device("cpu"))
        call.args[name] = moved(call.args[name], by)
        if name == "workspace":
            refusal(call.raw, RuntimeError, rf"workspace starts .* {by} bytes past a multiple of 16; .*aligned to 16")
            continue
        for result, theirs in zip(outcome(call), expected, strict=True):
            assert_bitwise_equal(result, theirs, f"{op}, {name}, {by} bytes further")


@pytest.mark.parametrize(("op", "name"), list(every()))
def test_less_than_an_element_is_taken_or_refused_with_a_remedy(op: str, name: str) -> None:
    call = well_formed(op, torch.device("cpu"))
    size = call.args[name].element_size()
    if size == 1:
        pytest.skip("elements of one byte")
    expected = outcome(well_formed(op, torch.device("cpu")))
    call.args[name] = moved(call.args[name], 1)
    try:
        found = outcome(call)
    except RuntimeError:
        pattern = rf": {name} starts .* 1 bytes past a multiple of {size}; expected data aligned to {size} bytes, "
        refusal(call.raw, RuntimeError, pattern + re.escape(f"as that of {name}.clone() is"))
        return
    for result, theirs in zip(found, expected, strict=True):
        assert_bitwise_equal(result, theirs, f"{op}, {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("op", MAKERS)
def test_a_gpu_takes_it_or_names_the_remedy(op: str, cuda: torch.device) -> None:
    expected = outcome(well_formed(op, cuda))
    refused = 0
    for name in tensors_of(well_formed(op, cuda)):
        call = well_formed(op, cuda)
        call.args[name] = moved(call.args[name], call.args[name].element_size())
        try:
            found = outcome(call)
        except RuntimeError:
            text = refusal(
                call.raw, RuntimeError, rf": {name} starts .* past a multiple of (8|16); expected data aligned"
            )
            assert f"{name}.clone()" in text
            refused += 1
            call.args[name] = call.args[name].clone()
            found = outcome(call)
        for result, theirs in zip(found, expected, strict=True):
            assert_bitwise_equal(result, theirs, f"{op}, {name}")
    assert refused > 0


def test_weights_in_the_middle_of_a_file(tmp_path: Any) -> None:
    """A layer's weights and scales where a loader that does not copy leaves them: one after another, from byte 8 on."""
    layer = LayerCase(6, 64, 96, 4, 2).make()
    parts = [layer.w13.view(torch.uint8), layer.s13, layer.w2.view(torch.uint8), layer.s2]
    path = tmp_path / "weights"
    path.write_bytes(b"12345678" + b"".join(bytes(part.flatten().tolist()) + b"-" for part in parts))
    file = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    mapped, at = [], 8
    for part in parts:
        mapped.append(file[at : at + part.numel()].view(part.shape))
        at += part.numel() + 1
    assert [part.data_ptr() % 2 for part in mapped] == [0, 1, 0, 1]
    w13, s13, w2, s2 = mapped
    out = public.moe(layer.x, w13.view(torch.float8_e4m3fn), s13, w2, s2, layer.topk_ids, layer.topk_weights)
    ids = (layer.topk_ids, layer.topk_weights)
    assert_bitwise_equal(out, public.moe(layer.x, layer.w13, layer.s13, layer.w2, layer.s2, *ids))
