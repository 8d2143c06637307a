r"""One call of an operator on a benchmark's inputs, for a profiler, which is told to start before that call and to stop
after it; calls on other inputs precede it.

    METRICS=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    ncu --clock-control none --profile-from-start off --kernel-name regex:prologue --metrics $METRICS \
        python -m benchmarks.one_call prologue --tokens 64 --heads 128

A layer is two GEMMs and four kernels around them. This shows at which instructions the warps of the GEMMs stall:

    ncu --profile-from-start off --kernel-name regex:grouped_mm --section SourceCounters --section WarpStateStats \
        --page source python -m benchmarks.one_call moe --tokens 512 --shape minimax-m3-ep8 --mode fp8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from abiding import mla_prologue, mxfp8_moe
from abiding.mxfp8_moe import Mode
from abiding.testing.cases import mla_prologue as prologue_cases
from abiding.testing.cases import mxfp8_moe as moe_cases
from benchmarks.groups.mxfp8_moe import QUANTIZERS, layer_calls
from benchmarks.limits import MODES

CALLS = 4
"""Calls of an operator; the last one is profiled."""
DEVICE = torch.device("cuda")


@contextmanager
def profiled() -> Iterator[None]:
    """What is launched inside is profiled."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def last_profiled(calls: Sequence[Callable[[], object]]) -> None:
    """Make `CALLS` calls, by turns those given."""
    for index in range(CALLS - 1):
        calls[index % len(calls)]()
    with profiled():
        calls[(CALLS - 1) % len(calls)]()


def prologue(tokens: int, heads: int) -> None:
    """Calls on distinct inputs, so that the last is L2-cold."""
    cases = prologue_cases.PERFORMANCE
    case = next(case for case in cases if (case.tokens, case.heads, case.padded_heads) == (tokens, heads, None))
    made = [case.make(DEVICE, seed, guards=False) for seed in range(CALLS)]
    last_profiled([partial(inputs.run, mla_prologue, out=torch.empty_like(inputs.q)) for inputs in made])


def moe(shape: str, modes: Sequence[Mode], tokens: Sequence[int]) -> None:
    """`rebase` of the weights of both GEMMs; then, of each mode and number of tokens, calls with distinct experts, as
    far as there are any, so that the weights of the last are L2-cold."""
    layer = moe_cases.performance_case(shape, 1).make(DEVICE)
    for weight, scales in ((layer.w13, layer.s13), (layer.w2, layer.s2)):
        with profiled():
            mxfp8_moe.rebase(weight, scales)
        mxfp8_moe.rebase(weight, scales, inplace=True)
    for mode in modes:
        for count in tokens:
            case = replace(moe_cases.performance_case(shape, count), mode=mode)
            last_profiled(layer_calls(layer, case, DEVICE).calls)


def quantizers(tokens: int, width: int) -> None:
    """Calls of each quantizer on distinct rows."""
    rows = [torch.randn(tokens, width, device=DEVICE).bfloat16() for _ in range(CALLS)]
    calls: dict[str, Callable[[torch.Tensor], object]] = {
        "quantize": mxfp8_moe.quantize,
        "quantize_rowwise": partial(mxfp8_moe.quantize, rowwise=True),
        "round": mxfp8_moe.round,
    }
    for name in QUANTIZERS:
        last_profiled([partial(calls[name], some) for some in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    prologue_parser, moe_parser = commands.add_parser("prologue"), commands.add_parser("moe")
    quantizers_parser = commands.add_parser("quantizers")
    prologue_parser.add_argument("--heads", type=int, required=True)
    moe_parser.add_argument("--shape", choices=moe_cases.SHAPES, required=True)
    moe_parser.add_argument("--mode", nargs="+", choices=MODES, default=["w8a8"])
    moe_parser.add_argument("--tokens", type=int, nargs="+", required=True)
    quantizers_parser.add_argument("--width", type=int, required=True)
    for subparser in (prologue_parser, quantizers_parser):
        subparser.add_argument("--tokens", type=int, required=True)
    chosen = parser.parse_args()
    if chosen.command == "prologue":
        prologue(chosen.tokens, chosen.heads)
    elif chosen.command == "moe":
        moe(chosen.shape, chosen.mode, chosen.tokens)
    else:
        quantizers(chosen.tokens, chosen.width)


if __name__ == "__main__":
    main()
