"""reduce_rms as PyTorch operators: schemas, fakes, opcheck, gradients, graphs. (torch.compile: tests/all_reduce.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from calls.collectives import minimax_tables
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from abiding import Communicator, reduce_rms
from abiding.testing.cases.reduce_rms import RmsCase
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.ranks import captured_on_each, on_each, virtual_ranks

MINIMAX = "Tensor workspace, int rank, int nranks, float eps"
SCHEMAS = {
    "reduce_rms": "(Tensor input, Tensor weight, Tensor! state, int comm, float eps) -> Tensor",
    "reduce_rms_qk": (
        "(Tensor qkv, Tensor weight_q, Tensor weight_k, Tensor! state, int comm, float eps) -> (Tensor, Tensor)"
    ),
    "minimax_allreduce_rms": f"(Tensor input, Tensor norm_weight, {MINIMAX}) -> Tensor",
    "minimax_allreduce_rms_qk": (
        "(Tensor qkv, Tensor norm_weight_q, Tensor norm_weight_k, Tensor workspace, int q_size, int kv_size, int rank, "
        "int nranks, float eps) -> (Tensor, Tensor)"
    ),
}


@contextmanager
def arguments(name: str, device: torch.device, tokens: int = 5) -> Iterator[list[Any]]:
    """Valid arguments of a raw operator for a single rank."""
    i = RmsCase(tokens, 24, 8).make(1, device)[0]
    rows = i.rows[:, :24].contiguous()
    with virtual_ranks(1, device) as (comm,), minimax_tables(1, device) as (table,):
        state = [comm._token, comm._handle]
        found: dict[str, list[Any]] = {
            "reduce_rms": [rows, i.wq, *state, 1e-6],
            "reduce_rms_qk": [i.rows, i.wq, i.wk, *state, 1e-6],
            "minimax_allreduce_rms": [rows, i.wq, table, 0, 1, 1e-6],
            "minimax_allreduce_rms_qk": [i.rows, i.wq, i.wk, table, 24, 8, 0, 1, 1e-6],
        }
        yield found[name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    expected = torch._C.parse_schema(f"abiding::{name}{SCHEMAS[name]}")
    found = getattr(torch.ops.abiding, name).default._schema
    assert str(found) == str(expected)
    for ours, theirs in zip(found.arguments, expected.arguments, strict=True):
        assert (ours.alias_info is not None and ours.alias_info.is_write) == (theirs.alias_info is not None)
        assert not ours.has_default_value()


@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(name: str, tokens: int, device: torch.device) -> None:
    with arguments(name, device, tokens) as args:
        torch.library.opcheck(getattr(torch.ops.abiding, name).default, tuple(args))


@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("name", SCHEMAS)
def test_fake_results_look_like_real_ones(name: str, tokens: int, device: torch.device) -> None:
    def looks(result: Tensor | tuple[Tensor, ...]) -> list[Any]:
        outs = result if isinstance(result, tuple) else (result,)
        return [(out.shape, out.stride(), out.dtype, out.device, out.requires_grad) for out in outs]

    op = getattr(torch.ops.abiding, name)
    with arguments(name, device, tokens) as args:
        real = looks(op(*args))
        with FakeTensorMode() as mode:
            fake = looks(op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)))
    assert fake == real


def test_weights_may_require_gradients_and_results_do_not(device: torch.device) -> None:
    with virtual_ranks(2, device) as comms:
        inputs = RmsCase(4, 32, 8).make(2, device)
        for one in inputs:
            for weight in (one.wq, one.wk):
                assert weight is not None
                weight.requires_grad_()
        for outs in on_each(comms, lambda rank, comm: inputs[rank].run(reduce_rms, comm)):
            assert not any(out.requires_grad for out in outs)
        for fake_rank in inputs:
            fake_rank.rows.requires_grad_()
        for outs in on_each(comms, lambda rank, comm: inputs[rank].run(reduce_rms, comm)):
            assert not any(out.requires_grad for out in outs)


def test_several_communicators_side_by_side(device: torch.device) -> None:
    with virtual_ranks(2, device) as ones, virtual_ranks(2, device) as others:
        inputs = RmsCase(4, 32, 8).make(2, device)

        def calls(rank: int, comm: Communicator) -> list[Tensor]:
            first = inputs[rank].run(reduce_rms, comm)
            summed = others[rank].all_reduce(first[0].float())
            return [*first, summed, *inputs[rank].run(reduce_rms, others[rank])]

        outs = on_each(ones, calls)
        for rank in range(2):
            q, k, summed, q_again, k_again = outs[rank]
            assert_bitwise_equal(q, q_again)
            assert_bitwise_equal(k, k_again)
            assert_bitwise_equal(summed, outs[0][0].float() + outs[1][0].float())


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("tokens", [1, 130])
def test_cuda_graph(ranks: int, tokens: int, cuda: torch.device) -> None:
    """A graph per rank with two calls, replayed on other rows, before and after a reset."""
    case = RmsCase(tokens, 6144 // ranks, 1024 // ranks)
    with virtual_ranks(ranks, cuda) as comms:
        static = case.make(ranks, cuda)

        def twice(rank: int, comm: Communicator) -> list[Tensor]:
            first = static[rank].run(reduce_rms, comm)
            return [*first, *static[rank].run(reduce_rms, comm)]

        replay_all, results = captured_on_each(comms, twice)
        for seed in range(1, 5):
            fresh = case.make(ranks, cuda, seed)
            for old, new in zip(static, fresh, strict=True):
                old.rows.copy_(new.rows)
            replay_all()
            for comm, old, outs in zip(comms, static, results, strict=True):
                comm.check()
                for out, again, expected in zip(outs[:2], outs[2:], old.expected(), strict=True):
                    assert_close(out, expected, ulps=1, name=f"replay {seed}")
                    assert_bitwise_equal(out, again, f"replay {seed}, second call")
            if seed == 2:
                for comm in comms:
                    comm.reset()
