"""RMSNorm over a width that is sharded across ranks, in plain PyTorch and float64.

:func:`normalized` is the specification: the unrounded result from the shards of all ranks. The functions with the names
of :mod:`abiding.reduce_rms` all-gather these shards through the communicator's group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from abiding.reference.all_reduce import gather

if TYPE_CHECKING:
    from abiding.reference.all_reduce import Group as Communicator


def rms_norm(x: Tensor, weight: Tensor, comm: Communicator, *, eps: float = 1e-6) -> Tensor:
    """Normalize rows over the columns of all ranks, as :func:`abiding.reduce_rms.rms_norm` does."""
    return normalized(x, weight, gather(x, comm), eps=eps).to(x.dtype)


def qk_norm(qkv: Tensor, wq: Tensor, wk: Tensor, comm: Communicator, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalize the Q and the K columns of a fused projection, as :func:`abiding.reduce_rms.qk_norm` does."""
    q, k, _ = qkv.split([wq.numel(), wk.numel(), wk.numel()], dim=1)
    return rms_norm(q, wq, comm, eps=eps), rms_norm(k, wk, comm, eps=eps)


def normalized(x: Tensor, weight: Tensor, shards: Sequence[Tensor], *, eps: float) -> Tensor:
    """One rank's columns ``x[T, d]``, scaled by its weight and divided by the RMS of all ranks' columns."""
    row = torch.cat([shard.double() for shard in shards], dim=1)
    return x.double() * weight.double() / torch.sqrt(row.square().mean(1, keepdim=True) + eps)
