"""Argument errors of reduce_rms and their messages."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from calls import refusal
from calls.collectives import minimax_tables
from torch import Tensor

from abiding import Communicator, reduce_rms
from abiding.testing.cases.reduce_rms import RmsCase, RmsInputs
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import virtual_ranks

WRONG: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], tuple[Any, Any, Any]], type[Exception], str]] = {
    "no tensor": (lambda x, q, k: (None, q, k), TypeError, "qkv is a NoneType; expected a Tensor"),
    "wq is no tensor": (lambda x, q, k: (x, 1.0, k), TypeError, "wq is a float; expected a Tensor"),
    "one dimension": (lambda x, q, k: (x[0], q, k), ValueError, r"qkv has shape \[48\]; expected 2 dimensions"),
    "columns": (
        lambda x, q, k: (x[:, 1:], q, k),
        ValueError,
        r"qkv has shape \[5, 47\]; expected 48 columns, q's 32 and twice k's 8",
    ),
    "wide weight": (lambda x, q, k: (x, torch.cat([q, q]), k), ValueError, "qkv .*expected 80 columns, q's 64"),
    "weight of two dimensions": (
        lambda x, q, k: (x, q[None], k),
        ValueError,
        r"wq has shape \[1, 32\]",
    ),
    "dtype": (lambda x, q, k: (x.double(), q, k), TypeError, "qkv has dtype float64; expected"),
    "weight's dtype": (lambda x, q, k: (x, q.float(), k), TypeError, "wq has dtype float32; expected dtype bfloat16"),
    "other weight's dtype": (lambda x, q, k: (x, q, k.half()), TypeError, "wk has dtype float16; expected"),
    "rows elsewhere": (lambda x, q, k: (x.to("meta"), q, k), ValueError, "qkv is on meta; expected .* communicator"),
    "device": (lambda x, q, k: (x, q.to("meta"), k), ValueError, "wq is on meta; expected device"),
    "columns apart": (
        lambda x, q, k: (torch.cat([x, x], 1)[:, ::2], q, k),
        ValueError,
        "qkv has strides? .*; expected",
    ),
    "weight's elements apart": (lambda x, q, k: (x, q.repeat(2)[::2], k), ValueError, "wq .*; expected .*contiguous"),
}


def make(device: torch.device) -> RmsInputs:
    return RmsCase(5, 32, 8).make(2, device)[0]


ROUTES = pytest.mark.parametrize("route", ["abiding", "torch.distributed"])


@contextmanager
def a_rank(device: torch.device, route: str) -> Iterator[Communicator]:
    with virtual_ranks(2, device) as (comm, _):
        memory = comm._memory
        if route == "torch.distributed":  # no group: nothing may be asked of it before a refusal
            comm._set_peer_memory(None, "there is no peer memory here")
        yield comm
        comm._set_peer_memory(memory, None)


@ROUTES
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, route: str, device: torch.device) -> None:
    """The same refusal with peer memory and without."""
    wrong, error, text = WRONG[name]
    inputs = make(device)
    assert inputs.wk is not None
    before = inputs.rows.clone()
    with a_rank(device, route) as comm:
        arguments = wrong(inputs.rows, inputs.wq, inputs.wk)
        refusal(lambda: reduce_rms.qk_norm(*arguments, comm), error, f"qk_norm: .*{text}")
        assert comm.state == "ready"
    assert_bitwise_equal(inputs.rows, before)


@ROUTES
@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_wrong_eps(eps: float, route: str, device: torch.device) -> None:
    inputs = make(device)
    with a_rank(device, route) as comm:
        call = partial(reduce_rms.rms_norm, inputs.rows[:, :32], inputs.wq, comm, eps=eps)
        refusal(call, ValueError, "rms_norm: eps is .*; expected a finite")


@ROUTES
def test_rms_norm_names_its_arguments(route: str, device: torch.device) -> None:
    inputs = make(device)
    with a_rank(device, route) as comm:
        with pytest.raises(TypeError, match=r"rms_norm: eps is a str; expected a .*float"):
            reduce_rms.rms_norm(inputs.rows[:, :32], inputs.wq, comm, eps="1e-6")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"rms_norm: x has shape \[5\]; expected 2 dimensions"):
            reduce_rms.rms_norm(inputs.rows[:, 0], inputs.wq, comm)
        with pytest.raises(ValueError, match=r"rms_norm: weight has shape \[32\]; expected size 31 .*the columns of x"):
            reduce_rms.rms_norm(inputs.rows[:, :31], inputs.wq, comm)
        with pytest.raises(TypeError, match="rms_norm: x has dtype int32"):
            reduce_rms.rms_norm(inputs.rows[:, :32].int(), inputs.wq.int(), comm)


@ROUTES
def test_a_closed_communicator(route: str, device: torch.device) -> None:
    inputs = make(device)
    with a_rank(device, route) as comm:
        comm.close()
        with pytest.raises(RuntimeError, match="rms_norm: communicator is closed; expected an open one"):
            reduce_rms.rms_norm(inputs.rows[:, :32], inputs.wq, comm)


def test_vllm_operators_check_their_table(device: torch.device) -> None:
    inputs = make(device)
    op, table = torch.ops.abiding.minimax_allreduce_rms_qk, torch.zeros(8, dtype=torch.int64, device=device)
    usual = [inputs.rows, inputs.wq, inputs.wk, table, 32, 8, 0, 2, 1e-6]
    for index, value, text in (
        (3, table.int(), "workspace has dtype int32; expected dtype int64"),
        (3, table[:7], r"workspace has shape \[7\]; expected at least \[8\] for 2 ranks"),
        (4, 31, "q_size is 31; expected the 32 elements"),
        (5, 9, "kv_size is 9; expected the 8 elements"),
        (6, 2, "rank is 2; expected 0 or more and less than 2"),
        (6, -1, "rank is -1"),
        (7, 0, "nranks is 0; expected 1 to 16"),
        (7, 17, "nranks is 17"),
        (1, inputs.wq.float(), "norm_weight_q has dtype float32"),
        (2, inputs.wq, r"qkv has shape \[5, 48\]; expected 96 columns"),
        (8, -1.0, "eps is -1"),
    ):
        arguments = list(usual)
        arguments[index] = value
        refusal(partial(op, *arguments), RuntimeError, f"abiding::minimax_allreduce_rms_qk: {text}")
    rows = inputs.rows[:, :32].contiguous()
    with pytest.raises(RuntimeError, match="abiding::minimax_allreduce_rms: norm_weight"):
        torch.ops.abiding.minimax_allreduce_rms(rows, inputs.wk, table, 0, 2, 1e-6)


def test_a_table_too_small_for_the_tokens_is_refused() -> None:
    i = RmsCase(64, 32, 8).make(2)[0]
    with minimax_tables(2, slot_bytes=64) as (table, _):
        call = partial(torch.ops.abiding.minimax_allreduce_rms_qk, i.rows, i.wq, i.wk, table, 32, 8, 0, 2, 1e-6)
        refusal(call, RuntimeError, "workspace has slots of 64 bytes; expected at least 1024")


def test_a_table_leads_only_to_memory_of_ours() -> None:
    """Any other address would be written to. On a GPU the table is device memory, and its caller's own affair."""
    i = RmsCase(4, 32, 8).make(1)[0]
    theirs = torch.zeros(4096)
    with minimax_tables(1) as (table,):
        op, gone = torch.ops.abiding.minimax_allreduce_rms_qk, table.tolist()
        call = partial(op, i.rows, i.wq, i.wk, table, 32, 8, 0, 1, 1e-6)
        good = call()
        for entry in (2, 3, 4):
            for address in (0, 1, 4096, -1, theirs.data_ptr(), gone[entry] + 64, id(table), 1 << 46):
                table[entry] = address
                refusal(call, RuntimeError, rf"workspace\[{entry}\] is {address}; expected the address of \d+ bytes or")
            table[entry] = gone[entry]
        table[2] = gone[3]  # three counters are no slots
        refusal(call, RuntimeError, r"workspace\[2\] is \d+; expected the address of 8192 bytes or more")
        table[2] = gone[2]
        for size, text in (
            (-16, "at least"),
            (7, "at least"),
            (4100, "a multiple of 16"),
            ((1 << 63) - 16, "multiple"),
        ):
            ctypes.c_int64.from_address(gone[4] + 8).value = size
            refusal(call, RuntimeError, f"workspace has slots of {size} bytes; expected .*{text}")
        ctypes.c_int64.from_address(gone[4] + 8).value = 4096
        assert_bitwise_equal(torch.cat(call(), 1), torch.cat(good, 1))
    table = torch.tensor(gone)
    refusal(call, RuntimeError, r"workspace\[3\] is .*; expected the address")
