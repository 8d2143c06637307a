"""The operators of torch_discounted_cumsum on the CPU against a loop in Python, forward and backward.

One gamma for several rows is left out: the CPU code of this release reads beyond it, before the migration too.
"""

from __future__ import annotations

import pytest
import torch
from torch_discounted_cumsum import discounted_cumsum_left, discounted_cumsum_right


def expected(x: torch.Tensor, gamma: torch.Tensor, left: bool) -> torch.Tensor:
    columns = list(x.unbind(1)) if left else list(x.unbind(1))[::-1]
    state, out = torch.zeros_like(columns[0]), []
    for column in columns:
        state = column + gamma * state
        out.append(state)
    return torch.stack(out if left else out[::-1], 1)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (4, 65)])
def test_forward_and_backward(left: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    gamma = torch.rand(shape[0], dtype=torch.float64)
    mine = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    theirs = mine.detach().clone().requires_grad_()
    out = (discounted_cumsum_left if left else discounted_cumsum_right)(mine, gamma)
    reference = expected(theirs, gamma, left)
    torch.testing.assert_close(out, reference)
    out.sin().sum().backward()
    reference.sin().sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
