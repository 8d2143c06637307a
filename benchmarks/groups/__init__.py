"""The cases of each kernel group, timed with their peers on one device in one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

import abiding
from abiding.testing.timing import Roofline
from benchmarks.base import Benchmark, Settings, say
from benchmarks.groups import all_reduce, mla_prologue, mxfp8_moe, reduce_rms
from benchmarks.result_file import RESULTS, Results
from benchmarks.tables import about, of_op, targets_met

GROUPS: dict[str, Benchmark] = {
    one.BENCHMARK.group: one.BENCHMARK for one in (mla_prologue, all_reduce, reduce_rms, mxfp8_moe)
}


def prepared(
    group: str, *, peers: Sequence[Path] = (), quick: bool = False, ops: Sequence[str] = (), at: Sequence[int] = ()
) -> tuple[Benchmark, Settings]:
    """A group's benchmark and its settings, as `run` takes them, on the device that has kernels. Measures that device's
    roofline."""
    benchmark = GROUPS[group]
    unknown = sorted(set(ops) - set(benchmark.ops))
    if unknown:
        raise ValueError(f"ops {unknown}; expected some of {list(benchmark.ops)}")
    benchmark.prepare()
    device = torch.device("cuda", torch.cuda.current_device()) if abiding.has_cuda_kernels() else torch.device("cpu")
    if device.type == "cpu":
        say(f"No CUDA kernels here, so this times the CPU kernels: {abiding.cuda_unavailable_reason()}")
    say("Measuring the roofline: a large copy, a large GEMM")
    few, chosen = quick or device.type == "cpu", tuple(ops) or benchmark.ops
    return benchmark, Settings(device, Roofline.measure(device), tuple(peers), few, chosen, tuple(at))


def run(
    group: str,
    *,
    peers: Sequence[Path] = (),
    output: Path | None = None,
    quick: bool = False,
    ops: Sequence[str] = (),
    at: Sequence[int] = (),
    commit: str | None = None,
) -> Results:
    """Time a group's cases and print them in a table.

    Args:
        group: one of `GROUPS`.
        peers: the files that hold the peers' kernels, timed in the same run: libraries, for some groups packages.
        output: the folder, or the .json file, to write the results to. By default a whole run on a GPU writes to
            `benchmarks/results` and any other run writes nothing. If it holds results of this GPU, a run of some `ops`
            or `at` some points replaces only those.
        quick: time a few sizes only. On a CPU this is always so.
        ops: the operators to time, all by default.
        at: the points of the tables' axis (tokens, bytes) to time, all by default.
        commit: recorded in the results; that of the checkout by default.
    """
    benchmark, settings = prepared(group, peers=peers, quick=quick, ops=ops, at=at)
    device, roofline = settings.device, settings.roofline
    if output is None and device.type == "cuda" and not (quick or ops or at):
        output = RESULTS
    results = Results.begin(group, device, roofline, commit)
    say(f"{results.gpu}: copy {roofline.copy_gbps:.0f} GB/s, bf16 GEMM {roofline.matmul_tflops:.0f} TFLOP/s")
    path = results.path_in(output) if output is not None else None
    older = Results.read(path) if (ops or at) and path is not None and path.exists() else None
    for case in benchmark.measure(settings):
        results.cases.append(case)
        theirs = "".join(f", {name} {us:.2f}" for name, us in case.peers.items())
        axis = benchmark.axis_of(case.op)
        say(f"{case.op} {benchmark.row(case)}, {axis} {case.params[axis]}, "
            f"{case.cache_state}: {case.us:.2f} µs{theirs}, bound {case.bound_us:.2f}")  # fmt: skip
        if output is not None:
            (older.replaced(results, benchmark.place if at else None) if older else results).write(output)
    if not results.cases:
        raise ValueError(f"at {list(at)} there are no cases of {', '.join(settings.ops)}")
    parts = [about(results)]
    for op in dict.fromkeys(case.op for case in results.cases):
        parts += [f"`{op}`, µs per call:", of_op(results, benchmark, op)]
    print("\n\n".join(filter(None, [*parts, targets_met(results, benchmark, benchmark.ops)])))
    if path is not None:
        say(f"Wrote {path}")
    return results
