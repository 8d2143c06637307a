r"""One call of an operator on a benchmark's inputs, for a profiler to look at.

    METRICS=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    ncu --clock-control none --kernel-name regex:prologue --launch-skip 3 --metrics $METRICS \
        python benchmarks/one_call.py --tokens 64 --heads 128
"""

from __future__ import annotations

import argparse

import torch

from abiding import mla_prologue
from abiding.testing.cases.mla_prologue import PERFORMANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    wanted = parser.parse_args()
    case = next(
        case
        for case in PERFORMANCE
        if (case.tokens, case.heads, case.padded_heads) == (wanted.tokens, wanted.heads, None)
    )
    # Several sets of inputs, so that the one profiled, the last, is not in the cache.
    for seed in range(4):
        inputs = case.make("cuda", seed, guards=False)
        inputs.run(mla_prologue, out=torch.empty_like(inputs.q))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
