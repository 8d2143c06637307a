"""torchsort on the CPU: soft sort and rank against isotonic regression by definition, and gradients by differences.

The tests in its sdist compare with a package that is on no index.
"""

from __future__ import annotations

import pytest
import torch
from torchsort import soft_rank, soft_sort
from torchsort.ops import isotonic_kl, isotonic_l2


def pooled(y: torch.Tensor, value: object) -> torch.Tensor:
    """The non-increasing fit of one row: neighbours that are out of order are pooled."""
    blocks = [[i] for i in range(len(y))]
    done = False
    while not done:
        done = True
        for i in range(len(blocks) - 1):
            if value(y, blocks[i]) < value(y, blocks[i + 1]):  # type: ignore[operator]
                blocks[i : i + 2] = [blocks[i] + blocks[i + 1]]
                done = False
                break
    out = torch.empty_like(y)
    for block in blocks:
        out[block] = value(y, block)  # type: ignore[operator]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 17)])
def test_isotonic_l2_is_the_fit_by_means(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    y = torch.randn(shape, dtype=dtype)
    fit = isotonic_l2["cpu"](y)
    for row, got in zip(y, fit, strict=True):
        torch.testing.assert_close(got, pooled(row, lambda v, b: v[b].mean()))


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (3, 17)])
def test_isotonic_kl_is_the_fit_by_log_sums(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    y, w = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64).sort(1, True).values
    fit = isotonic_kl["cpu"](y, w)
    for row, weights, got in zip(y, w, fit, strict=True):
        value = lambda v, b, weights=weights: v[b].logsumexp(0) - weights[b].logsumexp(0)  # noqa: E731
        torch.testing.assert_close(got, pooled(row, value))


@pytest.mark.parametrize("function", [soft_rank, soft_sort])
@pytest.mark.parametrize("regularization", ["l2", "kl"])
def test_gradients(function: object, regularization: str) -> None:
    torch.manual_seed(3)
    values = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: function(v, regularization, 0.7), (values,))  # type: ignore[operator]


def test_small_regularization_sorts_and_ranks() -> None:
    values = torch.tensor([[3.0, -1.0, 2.0, 10.0]])
    torch.testing.assert_close(soft_sort(values, regularization_strength=1e-3), values.sort(1).values)
    torch.testing.assert_close(soft_rank(values, regularization_strength=1e-3), torch.tensor([[3.0, 1.0, 2.0, 4.0]]))
