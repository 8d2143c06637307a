"""What an empty call of the collectives costs the host, without a GPU: checks, dispatcher, and no message.

    python -m benchmarks.host_cost

Prints microseconds per call of processor time of this thread, the least of many repetitions, so that other processes
matter little. Beside each function stands its operator alone. The first two lines are what torch itself takes on the
same path: an operator of its own that makes a tensor, and one of ours that takes no argument and does nothing.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable

import torch

import abiding  # noqa: F401  (registers the operators)
from abiding import reduce_rms
from abiding.testing.ranks import virtual_ranks

CALLS, REPETITIONS = 2000, 40


def cost_us(call: Callable[[], object]) -> float:
    samples = timeit.repeat(call, number=CALLS, repeat=REPETITIONS, timer=time.thread_time)
    return min(samples) / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    ops, aten = torch.ops.abiding, torch.ops.aten
    x, out, weight, rows = torch.empty(0), torch.empty(0), torch.ones(8), torch.empty(0, 8)
    wq, wk = torch.ones(4), torch.ones(2)
    with virtual_ranks(2) as (comm, _):
        token, handle = comm._token, comm._handle
        calls: dict[str, Callable[[], object]] = {
            "torch.ops.aten.clone.default(x)": lambda: aten.clone.default(x),
            "torch.ops.abiding_custom_ar.meta_size.default()": torch.ops.abiding_custom_ar.meta_size.default,
            "operator all_reduce": lambda: ops.all_reduce.default(x, token, handle),
            "comm.all_reduce(x)": lambda: comm.all_reduce(x),
            "operator all_reduce.out": lambda: ops.all_reduce.out(x, token, handle, out=out),
            "comm.all_reduce(x, out)": lambda: comm.all_reduce(x, out),
            "operator reduce_rms": lambda: ops.reduce_rms.default(rows, weight, token, handle, 1e-6),
            "rms_norm(x, weight, comm)": lambda: reduce_rms.rms_norm(rows, weight, comm),
            "operator reduce_rms_qk": lambda: ops.reduce_rms_qk.default(rows, wq, wk, token, handle, 1e-6),
            "qk_norm(qkv, wq, wk, comm)": lambda: reduce_rms.qk_norm(rows, wq, wk, comm),
        }
        for name, call in calls.items():
            print(f"{cost_us(call):6.2f}  {name}", flush=True)


if __name__ == "__main__":
    main()
