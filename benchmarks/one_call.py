r"""One call of an operator on a benchmark's inputs, for a profiler to look at; three on other inputs go before it.

    METRICS=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    ncu --clock-control none --kernel-name regex:prologue --launch-skip 3 --metrics $METRICS \
        python benchmarks/one_call.py prologue --tokens 64 --heads 128

A layer's call is two products and four kernels around them. Which instructions the products' warps wait at:

    ncu --kernel-name regex:grouped_mm --launch-skip 6 --section SourceCounters --section WarpStateStats --page source \
        python benchmarks/one_call.py moe --tokens 512 --shape minimax-m3-ep8
"""

from __future__ import annotations

import argparse

import torch

from abiding import mla_prologue, mxfp8_moe
from abiding.testing.benchmarks.limits import CALLS
from abiding.testing.cases import mla_prologue as prologue_cases
from abiding.testing.cases import mxfp8_moe as moe_cases


def prologue(tokens: int, heads: int) -> None:
    """A call has a set of inputs of its own, so that the last finds none in the cache."""
    cases = prologue_cases.PERFORMANCE
    case = next(case for case in cases if (case.tokens, case.heads, case.padded_heads) == (tokens, heads, None))
    for seed in range(CALLS):
        inputs = case.make("cuda", seed, guards=False)
        inputs.run(mla_prologue, out=torch.empty_like(inputs.q))


def moe(tokens: int, shape: str) -> None:
    """A call has other experts than those before, as far as there are others."""
    inputs = moe_cases.performance_case(shape, tokens).make("cuda")
    for call in range(CALLS):
        inputs.turned(call, CALLS).run(mxfp8_moe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_prologue, of_moe = commands.add_parser("prologue"), commands.add_parser("moe")
    of_prologue.add_argument("--heads", type=int, required=True)
    of_moe.add_argument("--shape", choices=moe_cases.SHAPES, required=True)
    for command in (of_prologue, of_moe):
        command.add_argument("--tokens", type=int, required=True)
    wanted = parser.parse_args()
    if wanted.command == "prologue":
        prologue(wanted.tokens, wanted.heads)
    else:
        moe(wanted.tokens, wanted.shape)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
