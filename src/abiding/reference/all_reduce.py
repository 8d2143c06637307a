"""The all-reduce of :class:`abiding.Communicator`, in plain PyTorch.

:func:`sum_in_rank_order` is the specification: it defines every rank's result, bit for bit, from all ranks' messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """What the reference needs of a communicator: its torch.distributed group and the number of ranks."""

    group: dist.ProcessGroup | None
    ranks: int


def all_reduce(x: Tensor, comm: Group, out: Tensor | None = None) -> Tensor:
    """Sum ``x`` over all ranks, as :meth:`abiding.Communicator.all_reduce` does."""
    total = sum_in_rank_order(gather(x, comm))
    return total if out is None else out.copy_(total)


def sum_in_rank_order(messages: Sequence[Tensor]) -> Tensor:
    """The float32 sum that starts with rank 0's message and adds the others in turn, rounded once to their dtype.

    It does not start from +0, so the sum of -0 over all ranks is -0. The payload of a NaN is unspecified.
    """
    total = messages[0].float()
    for message in messages[1:]:
        total = total + message.float()
    return total.to(messages[0].dtype)


def gather(x: Tensor, comm: Group) -> list[Tensor]:
    """All-gather ``x``."""
    if comm.ranks == 1:
        return [x]
    gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(comm.ranks)]
    dist.all_gather(gathered, x.contiguous(), group=comm.group)
    return gathered
