"""vLLM's kernels of the collectives, as its callers prepare memory for them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from abiding.testing.cases.reduce_rms import RmsInputs


class VllmTable:
    """A rank's workspace of vLLM's operator: a table of pointers to all ranks' buffers and to its own counters."""

    SLOT_BYTES = 2 << 20

    @classmethod
    def buffer(cls, device: torch.device) -> Tensor:
        """A rank's Lamport buffer: three slots whose words are all empty, that is -0.0."""
        return torch.full((3 * cls.SLOT_BYTES // 4,), -0.0, device=device)

    def __init__(self, buffers: Sequence[int], device: torch.device) -> None:
        self.ranks = len(buffers)
        self._counters = torch.zeros(3, dtype=torch.int32, device=device)
        self._sizes = torch.tensor([0, self.SLOT_BYTES], device=device)
        pointers = [*[0] * 2 * self.ranks, *buffers, self._counters.data_ptr(), self._sizes.data_ptr()]
        self._table = torch.tensor(pointers, device=device)

    def qk_norm(self, one: RmsInputs, rank: int) -> tuple[Tensor, Tensor]:
        op: Any = torch.ops._C.minimax_allreduce_rms_qk
        case = one.case
        q, k = op(one.rows, one.wq, one.wk, self._table, case.q, case.kv, rank, self.ranks, case.eps)
        return q, k


def copy_to_address(address: int, like: Tensor) -> Tensor:
    """Copy a tensor to an address of GPU memory; returns the tensor there, which does not own its memory."""
    memory = SimpleNamespace(
        __cuda_array_interface__={"shape": (like.nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
    )
    made: Tensor = torch.as_tensor(memory, device=like.device).view(like.dtype).view(like.shape)
    return made.copy_(like)
