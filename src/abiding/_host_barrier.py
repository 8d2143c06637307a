"""Where the ranks of a communicator wait for each other on the host: waits that end, and that name who is missing."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

MAX_RANKS = 16
_LOOK_S = 0.05  # from one look at the other processes to the next


class Step(IntEnum):
    """What ranks wait for."""

    STOPPED = 0
    CLEARED = 1
    CLOSING = 2


class HostBarrier:
    """A table in shared memory with a number for each step and rank, which only that rank writes; negative: it gave up.

    The table outlives any process that dies, so the others always learn who did not come.

    Args:
        address: of the table, zeros at first.
        rank: of this process.
        pids: the processes of all ranks.
    """

    BYTES = 8 * len(Step) * MAX_RANKS

    def __init__(self, address: int, rank: int, pids: Sequence[int]) -> None:
        self._numbers = (ctypes.c_int64 * (len(Step) * MAX_RANKS)).from_address(address)
        self._rank, self._pids = rank, pids

    def wait(self, step: Step, number: int, timeout_s: float) -> int:
        """Wait until every rank has come to a step with the same number, the largest that any of them brings.

        Ranks that gave up earlier, and others that did not, may bring different numbers.

        Raises:
            RuntimeError: a rank did not come in time, or its process has ended. Whoever gives up leaves the step, so
                that nobody counts on it.
        """
        deadline = time.monotonic() + timeout_s
        look = time.monotonic() + _LOOK_S
        while True:
            self._write(step, number)
            numbers = self._read(step)
            number = max(numbers)
            if min(numbers) == number:
                return number
            now = time.monotonic()
            late = [rank for rank, theirs in enumerate(numbers) if theirs != number]
            gone = [rank for rank in late if now > look and has_ended(self._pids[rank])]
            if gone or now > deadline:
                self._write(step, -number)
                # Whoever came and gave up before is not to blame, unless nobody else is.
                missing = [rank for rank in late if -numbers[rank] < number] or late
                blamed = f"{_named(gone)} gone" if gone else f"{_named(missing)} missing after {timeout_s:g} s"
                raise RuntimeError(blamed)
            if now > look:
                look = now + _LOOK_S
            time.sleep(0.001)

    def _read(self, step: Step) -> list[int]:
        return self._numbers[step * MAX_RANKS : step * MAX_RANKS + len(self._pids)]

    def _write(self, step: Step, number: int) -> None:
        self._numbers[step * MAX_RANKS + self._rank] = number


def has_ended(pid: int) -> bool:
    """Whether a process has ended, waited for by its parent or not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def _named(ranks: list[int]) -> str:
    return f"ranks {', '.join(map(str, ranks))} are" if len(ranks) > 1 else f"rank {ranks[0]} is"
