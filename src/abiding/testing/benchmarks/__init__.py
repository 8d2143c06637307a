"""Benchmarks: each group's cases, timed beside its peers on one device in one run. `run` is the whole of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import abiding
from abiding.testing.benchmarks import all_reduce, mla_prologue, mxfp8_moe, reduce_rms
from abiding.testing.benchmarks.base import Benchmark, Settings, say
from abiding.testing.benchmarks.report import full_table
from abiding.testing.results import Results
from abiding.testing.timing import Floors

__all__ = ["GROUPS", "Benchmark", "Settings", "main", "run"]

GROUPS: dict[str, Benchmark] = {
    one.BENCHMARK.group: one.BENCHMARK for one in (mla_prologue, all_reduce, reduce_rms, mxfp8_moe)
}

DEFAULT_OUTPUT = Path("benchmarks/results")


def run(
    group: str,
    *,
    peers: Sequence[Path] = (),
    output: Path | None = None,
    quick: bool = False,
    ops: Sequence[str] = (),
    commit: str | None = None,
) -> Results:
    """Time a group's cases and print them in a table.

    Args:
        group: one of `GROUPS`.
        peers: what holds the peers' kernels, timed in the same run: shared libraries, for some groups Python packages.
        output: where to write the results. By default a whole run on a GPU writes to `benchmarks/results`, others
            nowhere. Where it holds results of this GPU, a run of some `ops` replaces those alone.
        quick: a few sizes only. On a CPU it is always so.
        ops: the operators to time, all by default.
        commit: recorded in the results; that of the source tree by default.
    """
    benchmark = GROUPS[group]
    unknown = sorted(set(ops) - set(benchmark.ops))
    if unknown:
        raise ValueError(f"ops {unknown}; expected some of {list(benchmark.ops)}")
    benchmark.prepare()
    device = torch.device("cuda", torch.cuda.current_device()) if abiding.has_cuda_kernels() else torch.device("cpu")
    if device.type == "cpu":
        say(f"No CUDA kernels here, so this times the CPU's: {abiding.cuda_unavailable_reason()}")
    if output is None and device.type == "cuda" and not quick and not ops:
        output = DEFAULT_OUTPUT

    say("Measuring the floors: a large copy, a large matrix product")
    floors = Floors.measure(device)
    results = Results.begin(group, device, floors, commit)
    say(f"{results.gpu}: copy {floors.copy_gbps:.0f} GB/s, bf16 product {floors.matmul_tflops:.0f} TFLOP/s")
    path = output / results.file_name if output is not None else None
    older = Results.read(path) if ops and path is not None and path.exists() else None
    settings = Settings(device, floors, tuple(peers), quick or device.type == "cpu", tuple(ops) or benchmark.ops)
    for case in benchmark.measure(settings):
        results.cases.append(case)
        theirs = "".join(f", {name} {us:.2f}" for name, us in case.peers.items())
        say(f"{case.op} {benchmark.row(case)}, {benchmark.axis} {case.params[benchmark.axis]}, "
            f"{'warm' if case.warm else 'cold'}: {case.us:.2f} us{theirs}, floor {case.floor_us:.2f}")  # fmt: skip
        if output is not None:
            (older.replaced(results) if older else results).write(output)
    print(full_table(results, benchmark))
    if path is not None:
        say(f"Wrote {path}")
    return results


def main(group: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of `benchmarks/<group>.py`."""
    parser = argparse.ArgumentParser(description=f"Time {group} on this machine.")
    parser.add_argument("--peer", type=Path, action="append", default=[], help="a peer's kernels; repeatable")
    parser.add_argument("--output", type=Path, help=f"where to write the JSON (whole runs on a GPU: {DEFAULT_OUTPUT})")
    parser.add_argument("--quick", action="store_true", help="a few sizes only")
    parser.add_argument("--op", action="append", default=[], choices=GROUPS[group].ops, help="only this; repeatable")
    parser.add_argument("--commit", help="recorded in the results (default: ask git)")
    chosen = parser.parse_args(arguments)
    run(group, peers=chosen.peer, output=chosen.output, quick=chosen.quick, ops=chosen.op, commit=chosen.commit)
