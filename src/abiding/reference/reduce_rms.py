"""RMSNorm of rows that are spread over ranks, in plain PyTorch and float64.

:func:`normalised` is the rule, on what all ranks hold and not yet rounded; the functions named as in
:mod:`abiding.reduce_rms` gather that through the communicator's group.
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
    """Normalise rows over the columns of all ranks. As :func:`abiding.reduce_rms.rms_norm`."""
    return normalised(x, weight, gather(x, comm), eps=eps).to(x.dtype)


def qk_norm(qkv: Tensor, wq: Tensor, wk: Tensor, comm: Communicator, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Normalise the Q and the K columns of a fused projection. As :func:`abiding.reduce_rms.qk_norm`."""
    q, k, _ = qkv.split([wq.numel(), wk.numel(), wk.numel()], dim=1)
    return rms_norm(q, wq, comm, eps=eps), rms_norm(k, wk, comm, eps=eps)


def normalised(x: Tensor, weight: Tensor, shards: Sequence[Tensor], *, eps: float) -> Tensor:
    """One rank's columns ``x[T, d]``, scaled by its weight and by the root mean square of all ranks' columns."""
    row = torch.cat([shard.double() for shard in shards], dim=1)
    return x.double() * weight.double() / torch.sqrt(row.square().mean(1, keepdim=True) + eps)
