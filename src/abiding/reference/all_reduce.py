"""The all-reduce of :class:`abiding.Communicator`, in plain PyTorch.

:func:`sum_in_rank_order` is the rule: what every rank's result is, bit for bit, from what all ranks hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """What the reference asks of a communicator: the torch.distributed group that it stands beside."""

    group: dist.ProcessGroup | None
    ranks: int


def all_reduce(x: Tensor, comm: Group, out: Tensor | None = None) -> Tensor:
    """The sum of all ranks' ``x``. As :meth:`abiding.Communicator.all_reduce`."""
    total = sum_in_rank_order(gather(x, comm))
    return total if out is None else out.copy_(total)


def sum_in_rank_order(messages: Sequence[Tensor]) -> Tensor:
    """The float32 sum that starts with rank 0's message and adds the others in turn, rounded once to their dtype.

    So -0 is the sum of -0 alone. Of NaNs only their being NaN is promised.
    """
    total = messages[0].float()
    for message in messages[1:]:
        total = total + message.float()
    return total.to(messages[0].dtype)


def gather(x: Tensor, comm: Group) -> list[Tensor]:
    """Every rank's ``x``."""
    if comm.ranks == 1:
        return [x]
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(comm.ranks)]
    dist.all_gather(gathered, x.contiguous(), group=comm.group)
    return gathered
