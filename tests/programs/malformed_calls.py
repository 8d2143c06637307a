"""Thousands of malformed calls of raw operators, those of each operator in a process of their own.

    python malformed_calls.py GROUP CALLS            # collectives, life, mla_prologue or mxfp8_moe
    python malformed_calls.py GROUP CALLS OP SEED    # one call again, in this process

Every call has a seed of its own. Prints a line per operator: its name, and how many calls were refused and accepted. A
process that dies or hangs, and a refusal that does not name operator and argument, is reported with the call's seed.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from calls import is_refused
from calls.malformed import WELL_FORMED, base, malformed

HANG_S = 20.0


def make_calls(group: str, op: str, wanted: int, progress: mmap.mmap) -> None:
    """Until so many were refused. `progress` shows how far they are, and survives this process."""
    refused = accepted = seed = 0
    while refused < wanted:
        progress[:24] = struct.pack("qqq", seed, refused, accepted)
        if is_refused(malformed(group, op, seed), spoiled=True, step=seed):
            refused += 1
        else:
            accepted += 1
            base.cache_clear()
        seed += 1
        if accepted > 4 * wanted:
            raise AssertionError(f"only {refused} of {seed} calls were refused")
    progress[:24] = struct.pack("qqq", seed, refused, accepted)


def in_child(group: str, op: str, wanted: int) -> str:
    """What became of an operator's calls. This process has one thread, and forks before it has called an operator."""
    progress = mmap.mmap(-1, 4096)
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            make_calls(group, op, wanted, progress)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    seed, since, status = -1, time.monotonic(), None
    while status is None:
        ended, code = os.waitpid(pid, os.WNOHANG)
        now, refused, accepted = struct.unpack("qqq", progress[:24])
        if now != seed:
            seed, since = now, time.monotonic()
        if ended:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() - since > HANG_S:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"hangs: {group} {wanted} '{op}' {seed}"
        else:
            time.sleep(0.01)
    if status < 0:
        return f"dies of {signal.Signals(-status).name}: {group} {wanted} '{op}' {seed}"
    return f"fails: {group} {wanted} '{op}' {seed}" if status else f"{refused} refused, {accepted} accepted: {op}"


if __name__ == "__main__":
    group, calls, *one = sys.argv[1:]
    if one:
        call = malformed(group, one[0], int(one[1]))
        print(call.args, flush=True)
        print("refused" if is_refused(call, spoiled=True, step=int(one[1])) else "accepted")
    else:
        for op in WELL_FORMED[group]:
            print(in_child(group, op, int(calls)), flush=True)
