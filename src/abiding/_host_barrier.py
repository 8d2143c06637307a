"""A host barrier between the ranks of a communicator. Every wait has a timeout and names the ranks that are missing."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

MAX_RANKS = 16
_PROCESS_POLL_S = 0.05  # between two checks whether the late ranks' processes still exist


class Step(IntEnum):
    """The points at which ranks wait for each other; each has counters of its own."""

    STOPPED = 0
    CLEARED = 1
    CLOSING = 2


class HostBarrier:
    """A table of counters in shared memory, one per step and rank, which only that rank writes.

    A rank arrives by writing a positive number. A negative number means that its wait for that number timed out. The
    table survives any process that dies, so the others always find out which rank is missing.

    Args:
        address: address of the table, which is zero at first.
        rank: the rank of this process.
        pids: the process ids of all ranks.
    """

    BYTES = 8 * len(Step) * MAX_RANKS

    def __init__(self, address: int, rank: int, pids: Sequence[int]) -> None:
        self._numbers = (ctypes.c_int64 * (len(Step) * MAX_RANKS)).from_address(address)
        self._rank, self._pids = rank, pids

    def wait(self, step: Step, number: int, timeout_s: float) -> int:
        """Wait until every rank has arrived at a step with the same number: the largest that any of them brings.

        Ranks may bring different numbers if some of them have timed out at this step before.

        Raises:
            RuntimeError: a rank did not arrive in time, has closed, or its process has ended. A rank that raises, by
                Ctrl-C too, also withdraws its own arrival, so that no other rank proceeds as if it were still there.
        """
        try:
            return self._wait(step, number, timeout_s)
        except BaseException:
            self._write(step, -max(number, *self._read(step)))
            raise

    def leave(self) -> None:
        """Arrive at ``CLOSING`` without a wait."""
        self._write(Step.CLOSING, 1)

    def _wait(self, step: Step, number: int, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        next_process_poll = time.monotonic() + _PROCESS_POLL_S
        while True:
            self._write(step, number)
            numbers = self._read(step)
            number = max(numbers)
            if min(numbers) == number:
                return number
            now = time.monotonic()
            late = [rank for rank, theirs in enumerate(numbers) if theirs != number]
            closed = [rank for rank in late if self._read(Step.CLOSING)[rank] != 0]
            # A rank that has ended is blamed first: others may have closed because of it.
            if gone := [rank for rank in late if (closed or now > next_process_poll) and has_ended(self._pids[rank])]:
                raise RuntimeError(f"{_named(gone)} gone")
            if closed:
                raise RuntimeError(f"{_named(closed, 'has', 'have')} closed")
            if now > deadline:
                # A rank that arrived and timed out earlier is blamed only if no other rank is missing.
                missing = [rank for rank in late if -numbers[rank] < number] or late
                raise RuntimeError(f"{_named(missing)} missing after {timeout_s:g} s")
            if now > next_process_poll:
                next_process_poll = now + _PROCESS_POLL_S
            time.sleep(0.001)

    def _read(self, step: Step) -> list[int]:
        return self._numbers[step * MAX_RANKS : step * MAX_RANKS + len(self._pids)]

    def _write(self, step: Step, number: int) -> None:
        self._numbers[step * MAX_RANKS + self._rank] = number


def has_ended(pid: int) -> bool:
    """Whether a process has ended, reaped by its parent or still a zombie. False where that cannot be looked up."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "ZX"


def _named(ranks: list[int], one: str = "is", several: str = "are") -> str:
    return f"ranks {', '.join(map(str, ranks))} {several}" if len(ranks) > 1 else f"rank {ranks[0]} {one}"
