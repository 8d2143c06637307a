"""Canaries catch a stray byte wherever it falls: before, behind, and in the gaps between rows."""

from __future__ import annotations

import pytest
import torch

from abiding.testing import POISON, guarded


def test_a_write_inside_passes(device: torch.device) -> None:
    guard = guarded((3, 4), torch.bfloat16, device, offset_bytes=6, strides=(10, 2))
    assert bool(guard.tensor.isnan().all())
    guard.tensor.fill_(1.0)
    guard.check()


@pytest.mark.parametrize("byte", [-1, -100, 8, 19, 48, 1000])
def test_a_write_outside_is_named_by_its_distance(byte: int, device: torch.device) -> None:
    guard = guarded((3, 8), torch.uint8, device, strides=(20, 1), name="cache")
    guard.storage[guard.start + byte] = 0x11
    with pytest.raises(AssertionError, match=rf"^cache: 1 bytes outside .* byte offset {byte}: 0x11 .* 0xa5$"):
        guard.check()


def test_contents_offset_and_strides_are_as_asked() -> None:
    values = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    guard = guarded((3, 4), torch.int32, fill=values, offset_bytes=20, strides=(6, 1))
    assert torch.equal(guard.tensor, values)
    assert guard.tensor.stride() == (6, 1)
    assert guard.tensor.data_ptr() % 64 == 20
    assert guarded((2,), torch.int32).tensor.tolist() == [-1, -1]
    assert guarded((2,), torch.uint8).tensor.tolist() == [POISON] * 2
    with pytest.raises(ValueError, match=r"offset_bytes 3; expected a multiple of torch.int32's size, 4"):
        guarded((2,), torch.int32, offset_bytes=3)


def test_a_clone_shares_nothing_and_guards_the_same() -> None:
    guard = guarded((2, 2), torch.float32, fill=0, offset_bytes=4, strides=(5, 1))
    copy = guard.clone()
    copy.tensor.fill_(7.0)
    copy.storage[0] = 0
    assert guard.tensor.tolist() == [[0, 0], [0, 0]]
    guard.check()
    with pytest.raises(AssertionError, match="1 bytes outside"):
        copy.check()


def test_an_empty_tensor_is_guarded_too() -> None:
    guard = guarded((0, 8), torch.bfloat16)
    guard.check()
    guard.storage[guard.start] = 0
    with pytest.raises(AssertionError, match="byte offset 0"):
        guard.check()
