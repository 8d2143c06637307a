"""A rank that leaves is announced: by an exception, by close(), by being collected, by Ctrl-C. Nobody waits for it."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from abiding import Communicator, reduce_rms
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import run_processes

SOON_S = 3.0  # about a second, on a machine that does other work; the timeouts here are ten times longer
TIMEOUT_S = 30.0


@contextlib.contextmanager
def soon() -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < SOON_S


def error_of(call: Callable[[], Any]) -> str:
    with soon(), pytest.raises(RuntimeError) as error:
        call()
    return str(error.value)


# --- leaving ----------------------------------------------------------------------------------------------------------


class OutOfLuckError(Exception):
    """What makes rank 0 leave."""


def leave_by_an_exception(comm: Communicator) -> Communicator | None:
    with soon(), contextlib.suppress(OutOfLuckError), comm:
        raise OutOfLuckError
    return comm


def close(comm: Communicator) -> Communicator | None:
    comm.close()  # waits: the others do not close
    return comm


def leaves(rank: int, how: str) -> list[str]:
    """Rank 0 leaves while the others wait for it in each kind of call, and lives on."""
    x, rows = torch.ones(1000), torch.ones(4, 8)
    errors = []
    for call in (
        lambda comm: comm.all_reduce(x),
        lambda comm: comm.all_reduce(x, x),
        lambda comm: reduce_rms.rms_norm(rows, rows[0], comm),
        lambda comm: comm.reset(),
    ):
        made: Communicator | None = Communicator(timeout_s=TIMEOUT_S)
        assert made is not None
        made.all_reduce(torch.ones(1000))
        dist.barrier()
        if rank == 0:
            time.sleep(0.2)
            if how == "exception":
                made = leave_by_an_exception(made)
            elif how == "collected":
                made = None
                gc.collect()
            else:
                threading.Thread(target=close, args=(made,)).start()
        else:
            errors.append(error_of(lambda: call(made)))  # noqa: B023
            errors.append(error_of(lambda: made.reset()))  # noqa: B023
        dist.barrier()
        with soon():
            if made is not None and how != "closed":
                made.close()
    return errors


@pytest.mark.parametrize("how", ["exception", "collected", "closed"])
def test_the_others_are_told(how: str) -> None:
    _, *others = run_processes(leaves, 3, how)
    for rank, errors in enumerate(others, 1):
        for number, error in enumerate(errors):
            assert error.startswith("abiding::"), (rank, number, error)
            assert "rank 0 has closed" in error, (rank, number, error)
        assert "close it, and make one of the ranks that are left" in errors[0]


def leaves_in_order(rank: int, calls: int) -> None:
    """A rank may close as soon as its last call has returned: the others still get the right sum."""
    for attempt in range(calls):
        comm = Communicator(timeout_s=TIMEOUT_S)
        x = torch.full((200_000,), float(rank))
        if rank == attempt % 3:
            total = comm.all_reduce(x)
            comm.__exit__(OutOfLuckError, OutOfLuckError(), None)
        else:
            time.sleep(0.03 * rank)
            total = comm.all_reduce(x)
            comm.close()
        assert_bitwise_equal(total, torch.full((200_000,), 3.0))


def test_what_was_sent_before_leaving_arrives() -> None:
    run_processes(leaves_in_order, 3, 12)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(f"signal {number}")


def raw_call(comm: Communicator) -> None:
    """The operator's own error is a RuntimeError; what interrupted it is raised in whatever runs next."""
    x = torch.ones(1000)
    try:
        torch.ops.abiding_custom_ar.all_reduce(comm._handle, x, x.clone(), 0, 0)
    except RuntimeError:
        time.sleep(0.01)
        raise


def interrupted(rank: int, what: str) -> tuple[str, str, str]:
    """Rank 0 waits for rank 1, is interrupted, and recovers with all others."""
    x, rows = torch.ones(1000), torch.ones(4, 8)
    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    calls: dict[str, Callable[[Communicator], Any]] = {
        "all_reduce": lambda comm: comm.all_reduce(x),
        "out": lambda comm: comm.all_reduce(x, x),
        "rms_norm": lambda comm: reduce_rms.rms_norm(rows, rows[0], comm),
        "raw": raw_call,
        "reset": lambda comm: comm.reset(),
    }
    number, error = (signal.SIGTERM, SystemExit) if what == "out" else (signal.SIGINT, KeyboardInterrupt)
    with Communicator(timeout_s=TIMEOUT_S) as comm:
        comm.all_reduce(torch.ones(1000))
        dist.barrier()
        text = ""
        if rank == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
            with soon(), pytest.raises(error) as raised:
                calls[what](comm)
            text = f"{type(raised.value).__name__} {raised.value}"
        elif rank == 1:
            time.sleep(1.5)
            if what != "reset":
                text = error_of(lambda: comm.all_reduce(x))
        elif what != "reset":
            text = error_of(lambda: calls[what](comm))
        dist.barrier()
        state = comm.state, str(comm.fault)
        comm.reset()
        total = comm.all_reduce(torch.ones(7))
        assert_bitwise_equal(total, torch.full((7,), 3.0))
    return text, *state


@pytest.mark.parametrize("what", ["all_reduce", "out", "rms_norm", "raw"])
def test_ctrl_c_ends_a_wait_and_stops_all_ranks(what: str) -> None:
    (mine, state, fault), *others = run_processes(interrupted, 3, what)
    assert mine == ("SystemExit signal 15" if what == "out" else "KeyboardInterrupt ")
    assert state == "stopped"
    assert "rank 0 was interrupted (found by rank 0" in fault
    for rank, (text, *_) in enumerate(others, 1):
        assert "rank 0 was interrupted" in text, (rank, text)


def test_ctrl_c_ends_a_reset() -> None:
    (mine, state, _), *_ = run_processes(interrupted, 3, "reset")
    assert mine == "KeyboardInterrupt "
    assert state == "ready"


def handled(rank: int) -> int:
    """A handler that returns, as a profiler's timer has, interrupts nothing."""
    ticks = []
    signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    with Communicator(timeout_s=TIMEOUT_S) as comm:
        comm.all_reduce(torch.ones(3))
        if rank == 0:
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        else:
            time.sleep(1.0)
        assert_bitwise_equal(comm.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
        signal.setitimer(signal.ITIMER_REAL, 0)
    return len(ticks)


def test_handlers_that_return_run_during_a_wait() -> None:
    assert run_processes(handled, 2)[0] >= 3
