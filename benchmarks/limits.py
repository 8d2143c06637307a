"""What limits MoE layers: how busy each of their GEMMs, profiled alone under Nsight Compute, keeps the units of a GPU;
which SM clock the board's power limit leaves to a layer that runs repeatedly; and which kernels its time goes to."""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import abiding
from abiding import mxfp8_moe as api
from abiding.testing.cases.mxfp8_moe import PERFORMANCE_TOKENS, SHAPES, LayerCase, LayerInputs, performance_case
from abiding.testing.timing import Roofline, graph_us
from benchmarks.base import say
from benchmarks.groups.mxfp8_moe import layer_calls
from benchmarks.result_file import RESULTS, CaseResult, Param, Results
from benchmarks.tables import table, wrap

GROUP = "mxfp8_moe_limits"
MARKER = "limits:mxfp8_moe"
"""The table stands between `<!-- limits:mxfp8_moe -->` and `<!-- /limits:mxfp8_moe -->` in documents."""

UTILIZATION_METRICS = {
    "device memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor cores": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue slots": "smsp__inst_issued.avg.pct_of_peak_sustained_active",
}
"""By unit of the GPU, the Nsight Compute metric of its utilization in percent; of issue slots, while warps are
active."""
_TIME_METRIC = "gpu__time_duration.sum"

GEMMS = ("GEMM1", "GEMM2")
STEPS = ("route", "gather", GEMMS[0], "activate", GEMMS[1], "combine")
"""The kernels of a layer."""
LAYERS = {"w8a8": "layer", "fp8": "layer_fp8"}
"""What results call a layer, by its mode."""
FP8_TOKENS = [8, 128, 512, 2048, 8192]
"""Numbers of tokens of the layers in mode "fp8" that are timed."""
CALLS = 4
"""Calls of the profiled program; the last one is profiled."""
_QUERIED = "clocks.sm,power.draw.instant,clocks_event_reasons.sw_power_cap"
_SECONDS = 0.5
"""Duration of back-to-back calls, once as a warm-up until the clock has settled and once measured."""


def measure(
    shapes: Sequence[str],
    tokens: Sequence[int],
    commit: str | None = None,
    *,
    profiled: Sequence[int] | None = None,
    fp8: Sequence[int] = (),
) -> Results:
    """Time layers, and profile the GEMMs of those with the numbers of tokens `profiled` (default all), one call each;
    time layers of mode "fp8" with the numbers of tokens `fp8`, and their kernels.

    Raises:
        RuntimeError: there is no GPU, no `ncu` (Nsight Compute) or no `nvidia-smi`, or one of these fails.
    """
    if not abiding.has_cuda_kernels():
        raise RuntimeError(f"this needs a GPU: {abiding.cuda_unavailable_reason()}")
    profiled = tokens if profiled is None else profiled
    for tool in ("ncu", "nvidia-smi")[0 if profiled else 1 :]:
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} is not on the PATH; Nsight Compute's ncu and the driver's nvidia-smi are needed"
            )
    device = torch.device("cuda", torch.cuda.current_device())
    roofline = Roofline.measure(device)
    results = Results.begin(GROUP, device, roofline, commit)
    for shape in shapes:
        say(f"{shape}: making weights")
        layer = performance_case(shape, 1).make(device)
        for count in tokens:
            say(f"{shape}, {count} tokens")
            results.cases.append(_time_layer(layer, performance_case(shape, count), roofline, device))
        if fp8:
            for weight, scales in ((layer.w13, layer.s13), (layer.w2, layer.s2)):
                api.rebase(weight, scales, inplace=True)
        for count in fp8:
            say(f"{shape}, {count} tokens, fp8")
            case = replace(performance_case(shape, count), mode="fp8")
            results.cases.append(_time_layer(layer, case, roofline, device))
        del layer
        for count in profiled:
            say(f"{shape}, {count} tokens, profiled")
            arguments = ("moe", "--tokens", str(count), "--shape", shape)
            for name, busy in zip(GEMMS, profile(arguments), strict=True):
                params: dict[str, Param] = {"tokens": count, "shape": shape}
                params |= {unit: round(busy[unit], 1) for unit in UTILIZATION_METRICS}
                results.cases.append(CaseResult(name, params, round(busy["us"], 3), 0.0, l2_warm=False, bound_us=0.0))
    return results


def profile(arguments: Sequence[str]) -> list[dict[str, float]]:
    """Utilization by unit, and microseconds ("us"), of each GEMM in the last call of `one_call.py`."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--kernel-name", "regex:grouped_mm", "--launch-skip", str((CALLS - 1) * len(GEMMS))]
    command += [
        "--metrics",
        ",".join((_TIME_METRIC, *UTILIZATION_METRICS.values())),
        sys.executable,
        *("-m", "benchmarks.one_call"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return parse(done.stdout)


def parse(shown: str) -> list[dict[str, float]]:
    """The result of `profile` from ncu's CSV output: its log lines, a header, a line of units, then one line per
    kernel."""
    begin = shown.find('"ID"')
    if begin < 0:
        raise RuntimeError(f"ncu shows no kernels:\n{shown[-2000:]}")
    head, *lines = csv.reader(io.StringIO(shown[begin:]))
    _, *kernels = (line for line in lines if len(line) == len(head))

    def number(kernel: list[str], metric: str) -> float:
        value = kernel[head.index(metric)]
        try:
            return float(value.replace(",", ""))
        except ValueError as error:
            raise RuntimeError(f"ncu shows {value!r} as {metric}") from error

    return [
        {unit: number(kernel, metric) for unit, metric in UTILIZATION_METRICS.items()}
        | {"us": number(kernel, _TIME_METRIC) / 1e3}
        for kernel in kernels
    ]


def _time_layer(layer: LayerInputs, case: LayerCase, roofline: Roofline, device: torch.device) -> CaseResult:
    """The time of a layer once the SM clock has settled, with that clock, the board's power, and how much of the time
    the driver names the power cap as what holds the clock down; in mode "fp8" also the time of each kernel."""
    timed = layer_calls(layer, case, device)
    with torch.cuda.device(device):
        nodes = max(4, len(timed.calls))
        replays = math.ceil(_SECONDS * 1e6 / (graph_us(timed.calls, nodes=nodes).us * nodes))
        with _watch(device) as board:
            graph_us(timed.calls, nodes=nodes, replays=replays)
            settled = graph_us(timed.calls, nodes=nodes, replays=replays)
    params: dict[str, Param] = {"tokens": case.tokens, "shape": case.name}
    params |= {"mhz": round(board.mhz), "watts": round(board.watts), "capped": round(board.capped, 2)}
    is_fp8 = case.mode == "fp8"
    if is_fp8:
        with torch.cuda.device(device):
            params |= {step: round(us, 3) for step, us in steps(_kernel_ends(timed.calls, replays * nodes)).items()}
    bound_us = roofline.bound_us(timed.bytes, timed.flops / 2 if is_fp8 else timed.flops)
    return CaseResult.of(LAYERS[case.mode], params, settled, {}, l2_warm=False, bound_us=bound_us)


def _kernel_ends(calls: Sequence[Callable[[], object]], count: int) -> list[tuple[str, float]]:
    """The names of the kernels of the second half of `count` calls, replayed from a graph, and when each ended, in
    microseconds."""
    graph = torch.cuda.CUDAGraph()
    rounds = math.ceil(20 / len(calls))  # the gap between two replays is not in the median
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    replays = max(2, count // 2 // (rounds * len(calls)))
    for _ in range(replays):
        graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    events = profiler.events() or []
    ends = [(str(e.name), float(e.time_range.end)) for e in events if e.device_type.name == "CUDA"]
    return sorted(ends, key=lambda kernel: kernel[1])


def steps(kernels: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Median microseconds of each kernel of a layer, from its name and when it ended, call after call: the time from
    the end of the kernel before. PDL lets a kernel start before that, but none ends before its predecessor; so these
    times add up to that of the layer."""
    samples: dict[str, list[float]] = defaultdict(list)
    before: float | None = None
    seen: set[str] = set()
    for name, end in kernels:
        found = re.search(r"mxfp8_moe::.*?\b(route|gather|grouped_mm|activate|combine)\w*_kernel\b", name)
        if not found:
            continue
        step = found[1]
        if step == "route":
            seen = set()
        elif step == "grouped_mm":
            step = GEMMS[1] if GEMMS[0] in seen else GEMMS[0]
        seen.add(step)
        if before is not None:
            samples[step].append(end - before)
        before = end
    if missing := set(STEPS) - set(samples):
        names = sorted({name for name, _ in kernels})
        raise RuntimeError(f"the profiler shows no {', '.join(sorted(missing))} among the kernels {names}")
    return {step: statistics.median(samples[step]) for step in STEPS}


@dataclass
class _Board:
    """Mean SM clock and power, and the share of samples with the power cap active, over the second half of the
    samples."""

    mhz: float = 0.0
    watts: float = 0.0
    capped: float = 0.0


@contextmanager
def _watch(device: torch.device) -> Iterator[_Board]:
    query = ["nvidia-smi", f"--query-gpu={_QUERIED}", "--format=csv,noheader,nounits", "-lms", "20"]
    if torch.cuda.device_count() > 1:
        query.append(f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}")
    watcher = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    board = _Board()
    try:
        yield board
    finally:
        watcher.terminate()
        try:
            shown, _ = watcher.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            watcher.kill()
            raise
    samples = re.findall(r"^(\d+), ([\d.]+), (Active|Not Active)$", shown, flags=re.MULTILINE)
    if not samples:
        raise RuntimeError(f"nvidia-smi shows neither clock nor power:\n{shown[-2000:]}")
    counted = samples[len(samples) // 2 :]
    board.mhz = sum(float(mhz) for mhz, _, _ in counted) / len(counted)
    board.watts = sum(float(watts) for _, watts, _ in counted) / len(counted)
    board.capped = sum(cap == "Active" for _, _, cap in counted) / len(counted)


def to_markdown(results: Results) -> str:
    """A table of all layers, then one of the profiled GEMMs; columns are numbers of tokens. Cells of GEMMs hold both,
    "GEMM1 / GEMM2"."""
    found = {(case.params["shape"], case.params["tokens"], case.op): case for case in results.cases}
    shapes = list(dict.fromkeys(str(case.params["shape"]) for case in results.cases))

    def rows_of(op: str, cells: dict[str, Callable[..., str]], *ops: str) -> tuple[list[str], list[list[str]]]:
        columns = sorted({int(case.params["tokens"]) for case in results.cases if case.op == op})
        rows = []
        for shape in shapes:
            some = [[found.get((shape, t, name)) for name in (op, *ops)] for t in columns]
            if any(cases[0] for cases in some):
                rows += [
                    [shape, what, *(cell(*cases) if cases[0] else "" for cases in some)] for what, cell in cells.items()
                ]
        return ["", "tokens", *map(str, columns)], rows

    of_layers = {
        "µs": lambda case: f"{case.us:.0f}",
        "of the bound": lambda case: f"{100 * case.bound_us / case.us:.0f} %",
        "SM clock, MHz": lambda case: str(case.params["mhz"]),
        "board power, W": lambda case: str(case.params["watts"]),
        "power cap active": lambda case: f"{100 * case.params['capped']:.0f} %",
    }
    of_steps = {
        f"{step}, µs": lambda case, step=step: f"{case.params[step]:.1f} ({_share(case, step):.0f} %)" for step in STEPS
    }
    layers, layers_fp8 = rows_of(LAYERS["w8a8"], of_layers), rows_of(LAYERS["fp8"], of_layers | of_steps)
    busy = {
        f"{unit} busy": lambda *both, unit=unit: " / ".join(f"{case.params[unit]:.0f}" for case in both) + " %"
        for unit in UTILIZATION_METRICS
    }
    gemms = rows_of(GEMMS[0], busy | {"µs": lambda *both: " / ".join(f"{case.us:.0f}" for case in both)}, GEMMS[1])

    def head(op: str) -> str:
        commit = next((case.commit for case in results.cases if case.op == op), "") or results.commit
        return f"**{results.gpu}** (driver {results.driver}, commit {commit[:12]}, {results.date})"

    parts = []
    if layers[1]:
        parts += [wrap(f"{head(LAYERS['w8a8'])}: layers back to back, w8a8, uniform routing."), table(*layers)]
    if layers_fp8[1]:
        about = (
            "layers back to back, fp8, uniform routing. A kernel's time is from the end of the kernel before to its "
            "own end, traced in graph replays; in parentheses its share of the layer's."
        )
        parts += [wrap(f"{head(LAYERS['fp8'])}: {about}"), table(*layers_fp8)]
    if gemms[1]:
        about = "one GEMM alone under Nsight Compute, GEMM1 / GEMM2."
        parts += [wrap(f"{head(GEMMS[0])}: {about}"), table(*gemms)]
    return "\n\n".join(parts)


def _share(case: CaseResult, step: str) -> float:
    """Percent of the time of a layer's kernels that one of them has."""
    return 100 * float(case.params[step]) / sum(float(case.params[one]) for one in STEPS)


def main() -> None:
    """The command line `python -m benchmarks.limits`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits",
        description="Profile a layer's GEMMs with Nsight Compute; sample clock and power; time the kernels of mode "
        "fp8. What is not measured keeps its results in the file.",
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    counts = PERFORMANCE_TOKENS["uniform"]
    parser.add_argument(
        "--tokens", type=int, nargs="*", choices=counts, default=counts, help="of the w8a8 layers to time"
    )
    parser.add_argument(
        "--profiled", type=int, nargs="*", choices=counts, default=[8, 128, 8192], help="of the layers to profile"
    )
    parser.add_argument(
        "--fp8", type=int, nargs="*", choices=counts, default=FP8_TOKENS, help="of the layers in mode fp8 to time"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--commit", help="commit to record (default: that of the checkout)")
    chosen = parser.parse_args()
    results = measure(chosen.shape, chosen.tokens, chosen.commit, profiled=chosen.profiled, fp8=chosen.fp8)
    print(to_markdown(results))
    path = results.path_in(chosen.output)
    if path.exists() and not (chosen.tokens and chosen.profiled and chosen.fp8):
        results = Results.read(path).replaced(results)
    print(f"Wrote {results.write(chosen.output)}")


if __name__ == "__main__":
    main()
