"""A host barrier between the ranks of a communicator. Every wait has a timeout and names the ranks that are missing."""

from __future__ import annotations

import ctypes
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
            RuntimeError: a rank did not arrive in time, or its process has ended. The rank that raises also withdraws
                its own arrival, so that no other rank proceeds as if it were still there.
        """
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
            gone = [rank for rank in late if now > next_process_poll and has_ended(self._pids[rank])]
            if gone or now > deadline:
                self._write(step, -number)
                # A rank that arrived and timed out earlier is blamed only if no other rank is missing.
                missing = [rank for rank in late if -numbers[rank] < number] or late
                blamed = f"{_named(gone)} gone" if gone else f"{_named(missing)} missing after {timeout_s:g} s"
                raise RuntimeError(blamed)
            if now > next_process_poll:
                next_process_poll = now + _PROCESS_POLL_S
            time.sleep(0.001)

    def _read(self, step: Step) -> list[int]:
        return self._numbers[step * MAX_RANKS : step * MAX_RANKS + len(self._pids)]

    def _write(self, step: Step, number: int) -> None:
        self._numbers[step * MAX_RANKS + self._rank] = number


def has_ended(pid: int) -> bool:
    """Whether a process has ended, reaped by its parent or still a zombie."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def _named(ranks: list[int]) -> str:
    return f"ranks {', '.join(map(str, ranks))} are" if len(ranks) > 1 else f"rank {ranks[0]} is"
