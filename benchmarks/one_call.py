r"""One call of an operator on a benchmark's inputs, for a profiler; three warm-up calls on other inputs precede it.

    METRICS=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    ncu --clock-control none --kernel-name regex:prologue --launch-skip 3 --metrics $METRICS \
        python -m benchmarks.one_call prologue --tokens 64 --heads 128

A layer is two GEMMs and four kernels around them. This shows at which instructions the warps of the GEMMs stall:

    ncu --kernel-name regex:grouped_mm --launch-skip 6 --section SourceCounters --section WarpStateStats --page source \
        python -m benchmarks.one_call moe --tokens 512 --shape minimax-m3-ep8
"""

from __future__ import annotations

import argparse

import torch

from abiding import mla_prologue, mxfp8_moe
from abiding.testing.cases import mla_prologue as prologue_cases
from abiding.testing.cases import mxfp8_moe as moe_cases
from benchmarks.limits import CALLS


def prologue(tokens: int, heads: int) -> None:
    """Calls on distinct inputs, so that the last is L2-cold."""
    cases = prologue_cases.PERFORMANCE
    case = next(case for case in cases if (case.tokens, case.heads, case.padded_heads) == (tokens, heads, None))
    for seed in range(CALLS):
        inputs = case.make("cuda", seed, guards=False)
        inputs.run(mla_prologue, out=torch.empty_like(inputs.q))


def moe(tokens: int, shape: str) -> None:
    """Calls with distinct experts, as far as there are any, so that the weights of the last are L2-cold."""
    inputs = moe_cases.performance_case(shape, tokens).make("cuda")
    for call in range(CALLS):
        inputs.rotated(call, CALLS).run(mxfp8_moe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prologue_parser, moe_parser = commands.add_parser("prologue"), commands.add_parser("moe")
    prologue_parser.add_argument("--heads", type=int, required=True)
    moe_parser.add_argument("--shape", choices=moe_cases.SHAPES, required=True)
    for subparser in (prologue_parser, moe_parser):
        subparser.add_argument("--tokens", type=int, required=True)
    chosen = parser.parse_args()
    if chosen.command == "prologue":
        prologue(chosen.tokens, chosen.heads)
    else:
        moe(chosen.tokens, chosen.shape)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
