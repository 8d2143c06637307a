"""Argument errors of the all-reduce and their messages; nothing is written then, and no other rank waits."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import refusal
from torch import Tensor

from abiding import Communicator
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import virtual_ranks

raw = torch.ops.abiding_custom_ar
summed = torch.ops.abiding.all_reduce


def base(device: torch.device) -> Tensor:
    return torch.zeros(64, device=device)


WRONG: dict[str, tuple[Callable[[Tensor], tuple[Any, ...]], type[Exception], str]] = {
    "no tensor": (lambda t: ([1.0],), TypeError, "all_reduce: x is a list; expected a Tensor"),
    "out is no tensor": (lambda t: (t, 3), TypeError, "out is a int; expected a Tensor"),
    "another device": (lambda t: (t.to("meta"),), ValueError, "all_reduce: x is on meta; expected"),
    "out on another device": (lambda t: (t, t.to("meta")), ValueError, "out is on meta"),
    "out of another dtype": (
        lambda t: (t, t.half()),
        TypeError,
        "out has dtype float16; expected dtype float32",
    ),
    "out of another size": (lambda t: (t[:32], t), ValueError, r"all_reduce: out has shape \[64\].*expected \[32\]"),
    "out of another shape": (
        lambda t: (t[:16], t[16:32].view(4, 4)),
        ValueError,
        r"all_reduce: out has shape \[4, 4\]; expected \[16\] as x",
    ),
    "out of other strides": (
        lambda t: (t[:16].view(4, 4), t[16:32].view(4, 4).t()),
        ValueError,
        r"all_reduce: out has shape \[4, 4\] and strides \[1, 4\]; expected \[4, 4\] and \[4, 1\] as x",
    ),
    "out with gaps": (
        lambda t: (t[:8], t[16:32:2]),
        ValueError,
        "out has .*; expected memory without gaps or overlaps",
    ),
    "out overlaps": (lambda t: (t[:8], t[4:12]), ValueError, "all_reduce: out overlaps x; expected memory of its own"),
    "out one element behind": (lambda t: (t[:8], t[7:15]), ValueError, "all_reduce: out overlaps x; expected"),
    "out one element ahead": (lambda t: (t[7:15], t[:8]), ValueError, "all_reduce: out overlaps x; expected"),
    "out is one element": (
        lambda t: (t[:8], t[16:17].expand(8)),
        ValueError,
        r"out has shape \[8\] and strides \[0\]; expected memory without gaps or overlaps",
    ),
    "out of strides in another order": (
        lambda t: (t[:24].view(2, 3, 4), t[24:48].view(3, 2, 4).transpose(0, 1)),
        ValueError,
        r"strides \[4, 8, 1\]; expected \[2, 3, 4\] and \[12, 4, 1\] as x",
    ),
}


# Ranks and max_bytes: over peer memory, through torch.distributed, alone.
ROUTES = {"abiding": (2, 8 << 20), "torch.distributed": (2, 0), "copy": (1, 8 << 20)}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, route: str, device: torch.device) -> None:
    """The same refusal on every route, before another rank is involved."""
    make, error, text = WRONG[name]
    ranks, max_bytes = ROUTES[route]
    with virtual_ranks(ranks, device, max_bytes=max_bytes) as comms:
        assert comms[0].explain(base(device)).backend == route
        memory = base(device)
        refusal(lambda: comms[0].all_reduce(*make(memory)), error, text)
        assert_bitwise_equal(memory, base(device))
        assert comms[0].state == "ready"
        comms[0].check()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"max_bytes": -1}, "max_bytes is -1; expected at least 0"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0; expected a positive number of seconds"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"device": "meta"}, "device is meta; expected cpu or cuda"),
    ],
)
def test_wrong_arguments_of_the_communicator(arguments: dict[str, Any], text: str) -> None:
    refusal(lambda: Communicator(**arguments), ValueError, text.replace(".", r"\."))


def test_raw_operators_check_their_arguments(device: torch.device) -> None:
    with virtual_ranks(2, device) as (comm, _):
        fa, x, memory = comm._handle, base(device), comm._memory
        assert memory is not None
        data, handle = torch.empty(0, dtype=torch.uint8, device=device), torch.zeros(64, dtype=torch.uint8)
        for op, arguments, text in (
            (raw.init_custom_ar, ([], data, 0, True), "ipc_tensors has 0 entries; expected one for each of 1 to 16"),
            (raw.init_custom_ar, ([1] * 17, data, 0, True), "ipc_tensors has 17 entries"),
            (raw.init_custom_ar, ([4096, 0], data, 0, True), r"ipc_tensors\[0\] is 4096; expected the address"),
            (raw.init_custom_ar, ([4096, 4096], data, 2, True), "rank is 2; expected 0 or more and less than 2"),
            (raw.init_custom_ar, ([4096, 4096], data, -1, True), "rank is -1"),
            (raw.init_custom_ar, ([memory.own] * 2, data, 0, True), r"ipc_tensors\[1\] is \d+, as ipc_tensors\[0\]"),
            (raw.register_buffer, (fa, [1]), "ipc_tensors has 1 entries; expected one for each of 2 ranks"),
            (
                raw.register_buffer,
                (fa, [memory.own, 4096]),
                r"ipc_tensors\[1\] is 4096; expected the address",
            ),
            (raw.register_graph_buffers, (fa, [[]], [[]]), "handles and offsets have 1 and 1 entries"),
            (raw.configure, (fa, 0.0, 8), "timeout_s is 0; expected seconds"),
            (raw.configure, (fa, 1.0, 0), "max_blocks is 0; expected 1 or more"),
            (raw.configure, (fa, 1.0, 129), "max_blocks is 129"),
            (raw.configure, (fa, 1.0, 8, -2), "one_shot_bytes is -2; expected -1 for the default"),
            (raw.allocate_shared_memory_and_handle, (0,), "size is 0; expected a number of bytes"),
            (raw.open_mem_handle, (handle[:63],), r"mem_handle has shape \[63\]; expected \[64\]"),
            (raw.open_mem_handle, (handle.int(),), "mem_handle has dtype int32; expected dtype uint8"),
            (raw.close_mem_handle, (4096,), "ptr is 4096; expected what open_mem_handle returned, once"),
            (raw.free_shared_buffer, (memory.own + 64,), "what allocate_shared_buffer_and_handle or"),
            (raw.all_reduce, (fa, x, x, 4096, 8), "inp has 256 bytes; expected at most 8"),
            (raw.all_reduce, (fa, x, x, 4096, 1 << 10), "reg_buffer is 4096; expected 0, or the address of 1024 bytes"),
            (
                raw.all_reduce,
                (fa, x, x, memory.own, 1 << 40),
                "reg_buffer is .*; expected 0, or the address",
            ),
            (raw.all_reduce, (fa, x, x, x.data_ptr(), 1 << 10), "reg_buffer is .*; expected 0, or"),
            (raw.all_reduce, (fa, x.double(), x.double(), 0, 0), "inp has dtype float64; expected"),
            (raw.all_reduce, (fa, x[::2], x[::2], 0, 0), "inp has .*; expected memory without gaps"),
            (
                raw.all_reduce,
                (fa, x[:1].expand(2), x[:2], 0, 0),
                "inp has .*; expected memory without gaps",
            ),
            (summed, (x[::2], comm._token, fa), "all_reduce: input has .*; expected memory without gaps"),
            (summed, (x[:1].expand(2), comm._token, fa), "all_reduce: input has .*; expected memory without gaps"),
        ):
            refusal(partial(op, *arguments), RuntimeError, text)
        with pytest.raises(RuntimeError, match="CUDA"):  # of CUDA itself, where there is a GPU
            raw.open_mem_handle(handle)
        assert_bitwise_equal(x, base(device))
        assert comm.state == "ready"


def test_stale_and_foreign_handles_are_refused(device: torch.device) -> None:
    x = base(device)
    with virtual_ranks(1, device) as (comm,):
        stale, token = comm._handle, comm._token
    with virtual_ranks(1, device) as (comm,):
        assert comm._handle != stale, "the registry entry is reused, the handle is not"
        for handle in (stale, 0, -1, 1, 1 << 62, comm._handle + 1):
            for op, arguments in (
                (torch.ops.abiding.all_reduce, (x, token, handle)),
                (raw.all_reduce, (handle, x, x, 0, 0)),
                (raw.dispose, (handle,)),
                (raw.fault, (handle,)),
                (raw.clear, (handle,)),
            ):
                refusal(partial(op, *arguments), RuntimeError, "expected the handle of a communicator that is open")
    assert_bitwise_equal(x, base(device))


@pytest.mark.gpu
def test_a_communicator_of_another_device_type(cuda: torch.device) -> None:
    with virtual_ranks(1, "cpu") as (host,), virtual_ranks(1, cuda) as (gpu,):
        for comm, x in ((host, base(cuda)), (gpu, base(torch.device("cpu")))):
            with pytest.raises(RuntimeError, match=r"another kind of device|expected device"):
                torch.ops.abiding.all_reduce(x, comm._token.to(x.device), comm._handle)
            with pytest.raises(ValueError, match="all_reduce: x is on"):
                comm.all_reduce(x)


def test_memory_of_a_process_that_has_ended_is_refused(python: Callable[..., Any]) -> None:
    """Its handle is refused, also if another process has the same process id by now."""
    made = python(Path("make_handle.py"))
    handle = torch.tensor(ast.literal_eval(made.stdout), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"open_mem_handle: mem_handle leads to .*; expected a running process"):
        raw.open_mem_handle(handle)
    _, own = raw.allocate_shared_memory_and_handle(64)
    own[16:24] += 1
    with pytest.raises(RuntimeError, match="which is now another file"):
        raw.open_mem_handle(own)


def test_a_communicator_that_is_not_closed_frees_its_memory(python: Callable[..., Any]) -> None:
    """When it is garbage-collected, or when the interpreter exits."""
    result = python(Path("free_communicators.py"))
    assert result.stderr == ""
