"""A soak of the collectives: random calls between processes, to which random things happen.

    python -m benchmarks.soak                       # 4 CPU processes, 10 minutes
    python -m benchmarks.soak --seconds 30 --seed 7 --ranks 3
    python -m benchmarks.soak --device cuda:0 --ranks 2     # two processes on one GPU

Each round all ranks make a communicator and then the same random calls; at a random call something happens to one of
them, or to nobody: the rank is killed, is interrupted (SIGINT), closes, leaves `with` by an exception, comes too late,
or forks a child that tries a call and exits. Every result is compared with the reference, bit for bit for sums. A call
may fail only after such an event, and then every rank must hear of it in time, in words that name an operator and a
rank. After each round no rank may hold more mappings, descriptors or files in /dev/shm than before. All of it follows
from the seed, which is printed; only how far a rank is when a signal arrives does not.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import Communicator
from abiding.testing.ranks import RanksFailedError, run_processes
from benchmarks.stress import Stress

EVENTS = ("nothing", "killed", "interrupted", "closes", "raises", "late", "forks")
TIMEOUT_S = 3.0  # of a communicator
LATE_S = TIMEOUT_S + 1.0
CALLS = 60
# The errors that an event may cause.
REASONS = (
    r"abiding::(all_reduce|rms_norm|qk_norm|check): .*"
    r"rank {rank} (did not send in time|is gone|has closed|was interrupted)"
)


@dataclass(frozen=True)
class Round:
    """What happens in one round: `event` to rank `victim`, before call `at`."""

    seed: int
    event: str
    victim: int
    at: int

    @staticmethod
    def of(seed: int, ranks: int) -> Round:
        rng = random.Random(seed)
        return Round(seed, rng.choice(EVENTS), rng.randrange(ranks), rng.randrange(CALLS - 20))

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.event}, rank {self.victim}, before call {self.at}"


def held() -> dict[str, int]:
    """What this process holds of what a communicator takes."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "mappings": sum("memfd:abiding" in line for line in maps),
        "descriptors": sum("memfd:abiding" in link for link in map(_link, Path("/proc/self/fd").iterdir())),
        "files in /dev/shm": len(list(Path("/dev/shm").glob("*abiding*"))),
    }


def _link(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def play(rank: int, ranks: int, one: Round, device: str) -> str:
    """One rank's part of a round; returns what became of it."""
    before = held()
    stress = Stress(rank, ranks, torch.device(device), calls=CALLS, seed=one.seed, variants=1, largest=8192)
    stress.load(0)
    comm = Communicator(device=device, timeout_s=TIMEOUT_S)
    returned: dict[int, Tensor] = {}
    begin = time.monotonic()
    try:
        with comm:
            for index in range(CALLS):
                if index == one.at:
                    _happens(one.event, comm, rank == one.victim)
                returned |= stress.run(comm, [index])
            comm.check()
            stress.collect(returned)
            stress.record_golden(0)
            outcome = "right"
    except KeyboardInterrupt:
        outcome = "interrupted"
    except LeavesError:
        outcome = "left"
    except RuntimeError as error:
        outcome = str(error).splitlines()[0]
    _judge(one, rank, outcome, time.monotonic() - begin)
    comm.close()
    del comm, stress
    # On a GPU a rank that leaves by an exception does not wait; a thread frees its memory when the others have left.
    deadline = time.monotonic() + (2 * TIMEOUT_S if torch.device(device).type == "cuda" else 0.0)
    while held() != before and time.monotonic() < deadline:
        time.sleep(0.05)
    if (after := held()) != before:
        raise AssertionError(f"{one}, rank {rank}: held {before} before and {after} after")
    return outcome


class LeavesError(Exception):
    """Raised by a rank in its `with`."""


def _happens(event: str, comm: Communicator, to_me: bool) -> None:
    if event == "interrupted":
        if to_me:  # while this rank waits, as the others are late
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            time.sleep(1.0)
    elif not to_me:
        return
    elif event == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif event == "closes":
        comm.close()
    elif event == "raises":
        raise LeavesError
    elif event == "late":
        time.sleep(LATE_S)
    elif event == "forks":
        _fork(comm)


def _fork(comm: Communicator) -> None:
    x = torch.ones(4, device=comm.device)
    pid = os.fork()
    if pid == 0:
        try:
            comm.all_reduce(x)
        except RuntimeError as error:
            os._exit(0 if "is a fork; expected a Communicator that was made in this process" in str(error) else 1)
        os._exit(2)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise AssertionError(f"the fork's call was not refused: exit status {os.waitstatus_to_exitcode(status)}")


def _judge(one: Round, rank: int, outcome: str, seconds: float) -> None:
    """Raise AssertionError unless this outcome is one that the event may have."""
    expected = {
        "nothing": "right",
        "forks": "right",
        "interrupted": "interrupted" if rank == one.victim else None,
        "raises": "left" if rank == one.victim else None,
        "closes": None,
        "late": None,
        "killed": None,
    }[one.event]
    if one.event == "closes" and rank == one.victim:
        right = "communicator is closed" in outcome
    elif expected is not None:
        right = outcome == expected
    else:
        # Calls that this rank needed no more of the victim's for, or that the victim had made, may all be right.
        right = outcome == "right" or re.search(REASONS.format(rank=one.victim), outcome) is not None
    limit = 2 * TIMEOUT_S + LATE_S + 10.0
    if not right or seconds > limit:
        raise AssertionError(f"{one}: rank {rank} ended after {seconds:.1f} s (at most {limit:g}) with: {outcome}")


def rounds(rank: int, ranks: int, seeds: list[int], device: str) -> list[str]:
    """Rounds that nobody dies in, one after the other in the same processes, so that leaks add up."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    outcomes = []
    for seed in seeds:
        outcomes.append(play(rank, ranks, Round.of(seed, ranks), device))
        dist.barrier()
    return outcomes


def a_death(rank: int, ranks: int, seed: int, device: str) -> str:
    return play(rank, ranks, Round.of(seed, ranks), device)


def soak(seconds: float, ranks: int, seed: int, device: str, *, batch: int = 12) -> dict[str, int]:
    """Play rounds until the time is over.

    Returns:
        How many rounds of each event there were.

    Raises:
        RanksFailedError: a rank was wrong, leaked, hung or died unasked; the message has the round's seed.
    """
    deadline, counts = time.monotonic() + seconds, dict.fromkeys(EVENTS, 0)
    while time.monotonic() < deadline:
        seeds = [seed + offset for offset in range(batch)]
        seed += batch
        calm = [one for one in seeds if Round.of(one, ranks).event != "killed"]
        timeout_s = 60.0 + 15.0 * len(calm)
        run_processes(rounds, ranks, ranks, calm, device, timeout_s=timeout_s)
        for one in calm:
            counts[Round.of(one, ranks).event] += 1
        for one in sorted(set(seeds) - set(calm)):
            if time.monotonic() > deadline:
                break
            victim = Round.of(one, ranks).victim
            with contextlib.suppress(FileNotFoundError):
                run_processes(a_death, ranks, ranks, one, device, timeout_s=60.0, may_die=[victim])
            counts["killed"] += 1
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="Soak the collectives.")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--device", default="cpu")
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}, {chosen.ranks} ranks on {chosen.device}, {chosen.seconds:g} s", flush=True)
    try:
        counts = soak(chosen.seconds, chosen.ranks, chosen.seed, chosen.device)
    except RanksFailedError as error:
        print(error)
        return 1
    print("rounds that were right: " + ", ".join(f"{count} {event}" for event, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
