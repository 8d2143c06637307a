"""Sums over a sliding window."""

import torch

from . import _C


def rolling_sum(x: torch.Tensor, window: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Each element with its predecessors, ``window`` in all."""
    return _C.rolling_sum(x, window, weights=weights)


def rolling_mean_(x: torch.Tensor, window: int) -> torch.Tensor:
    """The mean of each window, in place."""
    _C.rolling_mean_(x, window, float(window))
    return x


def busiest(x: torch.Tensor, window: int) -> torch.Tensor:
    """Where each row's window has the largest sum."""
    return _C.busiest(x, window)
