"""Tensors of any strides, on each route of a call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from abiding import Communicator
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import run_processes

TIMEOUT_S = 1.0
GRACE_S = 10.0


def layouts() -> dict[str, Tensor]:
    x = torch.randn(6, 8, 4)
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 1),
        "permuted": x.permute(2, 0, 1),
        "channels last": x[None].to(memory_format=torch.channels_last),
        "one row": x[:1].transpose(0, 2),
        "empty": x[:0].transpose(0, 1),
    }


def each_layout_on_each_route(rank: int) -> None:
    """The same strides and values below max_bytes and past it, in a new tensor, in `out` and in place."""
    torch.manual_seed(0)
    with Communicator(timeout_s=20) as small, Communicator(timeout_s=20, max_bytes=0) as large:
        for name, x in layouts().items():
            expected = x + x
            for comm in (small, large):
                case = f"{name}, {comm.explain(x).backend}"
                assert comm.explain(x).backend == ("torch.distributed" if comm is large and x.numel() else "abiding")
                new, out, inside = comm.all_reduce(x), torch.empty_like(x), x.clone()
                assert comm.all_reduce(x, out) is out
                assert comm.all_reduce(inside, inside) is inside
                for result in (new, out, inside):
                    assert result.stride() == x.stride(), case
                    assert_bitwise_equal(result.contiguous(), expected.contiguous(), case)
        x = torch.randn(8, 64)
        for comm in (small, large):  # with gaps, always through torch.distributed
            gaps = x[:, :8]
            assert_bitwise_equal(comm.all_reduce(gaps), gaps + gaps)
            assert_bitwise_equal(comm.all_reduce(gaps, torch.empty(8, 8)), gaps + gaps)
            columns = x.clone()
            comm.all_reduce(columns[:, :8], columns[:, 8:16])
            assert_bitwise_equal(columns[:, 8:16].contiguous(), gaps + gaps)
            with pytest.raises(ValueError, match=r"all_reduce: out has .*; expected memory without overlaps"):
                comm.all_reduce(gaps, x[:1, :8].expand(8, 8))


def test_strides_on_every_route() -> None:
    run_processes(each_layout_on_each_route, 2)
