"""A communicator belongs to one process: copies and pickles are refused, and a fork cannot speak for the rank."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from abiding import Communicator, reduce_rms
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import run_processes

# --- copies -----------------------------------------------------------------------------------------------------------

REFUSED = (
    "Communicator: it belongs to one rank's process and cannot be copied, pickled or saved; expected a Communicator"
)


class Layer(torch.nn.Module):
    """A module that holds a communicator, as a tensor-parallel layer does."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        self.linear, self.comm = torch.nn.Linear(2, 2), comm


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda comm: pickle.dumps(comm, protocol=0),
        lambda comm: torch.save(comm, io.BytesIO()),
        lambda comm: copy.deepcopy(Layer(comm)),
        lambda comm: torch.save(Layer(comm), io.BytesIO()),
        lambda comm: pickle.dumps({"comm": comm}),
        lambda comm: multiprocessing.get_context("spawn").Process(target=print, args=(comm,)).start(),
    ],
)
def test_copies_are_refused(copied: Callable[[Any], Any]) -> None:
    with Communicator(device="cpu") as comm:
        with pytest.raises(TypeError, match=REFUSED):
            copied(comm)
        assert_bitwise_equal(comm.all_reduce(torch.ones(3)), torch.ones(3))


def test_the_memory_under_it_is_refused_too() -> None:
    with Communicator(device="cpu") as comm, pytest.raises(TypeError, match="PeerMemory: it belongs to one rank's"):
        copy.deepcopy(comm._memory)


def copies_on_two_ranks(rank: int) -> float:
    """Refused at once, and the communicator goes on."""
    with Communicator(timeout_s=20) as comm:
        begin = time.monotonic()
        with pytest.raises(TypeError, match=REFUSED):
            copy.deepcopy(comm)
        elapsed = time.monotonic() - begin
        assert_bitwise_equal(comm.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
    return elapsed


def test_copies_are_refused_on_two_ranks() -> None:
    assert max(run_processes(copies_on_two_ranks, 2)) < 5


# --- forks ------------------------------------------------------------------------------------------------------------


def in_fork(call: Callable[[], Any], leave: Callable[[], Any] = lambda: os._exit(0)) -> str:
    """Run a call in a fork that then leaves; returns "ok", or the error's type and text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            call()
            text = "ok"
        except BaseException as error:
            text = f"{type(error).__name__}: {error}" if str(error) else traceback.format_exc()
        os.write(writer, text.encode())
        os.close(writer)
        leave()
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    return text if status == 0 else f"{text}; exit status {status}"


def forked(rank: int) -> dict[str, str]:
    """Rank 0 forks; the fork tries everything, and both ranks go on as if it had not been."""
    found: dict[str, str] = {}
    x, total = torch.ones(1000), torch.full((1000,), 2.0)
    with Communicator(timeout_s=20, max_bytes=4000) as comm:
        assert_bitwise_equal(comm.all_reduce(x), total)
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: comm.all_reduce(x * 100),
            "out": lambda: comm.all_reduce(x, x.clone()),
            "past max_bytes": lambda: comm.all_reduce(torch.ones(2000)),
            "int": lambda: comm.all_reduce(torch.ones(5, dtype=torch.int64)),
            "rms_norm": lambda: reduce_rms.rms_norm(x.view(10, 100), x[:100], comm),
            "reset": comm.reset,
            "check": comm.check,
            "raw": lambda: torch.ops.abiding_custom_ar.all_reduce(comm._handle, x, x.clone(), 0, 0),
            "raw clear": lambda: torch.ops.abiding_custom_ar.clear(comm._handle),
            "close": comm.close,
            "leave": lambda: comm.__exit__(RuntimeError, RuntimeError(), None),
            "state": lambda: print(comm, comm.state, comm.fault, file=io.StringIO()),
        }
        if rank == 0:
            for name, call in calls.items():
                found[name] = in_fork(call)
            found["exit"] = in_fork(lambda: None, leave=lambda: (comm._finalizer(), sys.stdout.flush(), os._exit(0)))
            # A fork of a fork, and a fork while the other rank waits in a call.
            found["twice"] = in_fork(lambda: print(in_fork(calls["all_reduce"]), file=sys.stderr))
            time.sleep(0.2)
        for _ in range(3):
            assert_bitwise_equal(comm.all_reduce(x), total)
        assert comm.state == "ready"
        dist.barrier()
        comm.reset()
        assert_bitwise_equal(comm.all_reduce(x), total)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5, "both ranks close together"
    found["pid"] = str(os.getpid())
    return found


def test_a_fork_cannot_speak_for_the_rank() -> None:
    found, _ = run_processes(forked, 2)
    pid = found.pop("pid")
    for name in ("close", "leave", "state", "exit", "twice"):
        assert found.pop(name) == "ok", name
    for name in ("raw", "raw clear"):
        assert "expected the handle of a communicator that is open in this process" in found.pop(name), name
    for name, text in found.items():
        assert "RuntimeError: abiding::" in text, (name, text)
        assert f"communicator belongs to rank 0's process {pid}, of which this one" in text, (name, text)


def test_a_fork_has_tables_of_its_own(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """Its lock is free, its entries are copies, and those of its parent stay."""
    assert python(Path("fork_tables.py")).stdout == "{0: 100}\n"
