"""torchlpc's operators on the CPU against the recursion that defines them.

Its own tests compile with numba for minutes.
"""

from __future__ import annotations

import pytest
import torch
import torchlpc

assert torchlpc.EXTENSION_LOADED, "the library was not found"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_lpc_is_the_recursion(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, steps, order = 3, 20, 4
    x = torch.randn(batch, steps, dtype=dtype)
    a = torch.randn(batch, steps, order, dtype=dtype) * 0.2
    zi = torch.randn(batch, order, dtype=dtype)
    padded = torch.cat([zi.flip(1), x], 1)
    expected = padded.clone()
    for t in range(steps):
        past = expected[:, t : t + order].flip(1)
        expected[:, t + order] = x[:, t] - (a[:, t] * past).sum(1)
    got = torch.ops.torchlpc.lpc(x, a, zi)
    torch.testing.assert_close(got[:, -steps:], expected[:, -steps:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_scan_is_the_recursion(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, weights, first = (torch.randn(*s, dtype=dtype) * 0.5 for s in ((3, 15), (3, 15), (3,)))
    state, expected = first, []
    for t in range(15):
        state = weights[:, t] * state + x[:, t]
        expected.append(state)
    got = torch.ops.torchlpc.scan(x, weights, first)
    torch.testing.assert_close(got, torch.stack(expected, 1), rtol=1e-4, atol=1e-4)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(RuntimeError):
        torch.ops.torchlpc.lpc(torch.zeros(3, 4), torch.zeros(3, 5, 2), torch.zeros(3, 2))
