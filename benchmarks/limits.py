"""What limits MoE layers: how busy each of their GEMMs, profiled alone under Nsight Compute, keeps the units of a GPU;
which SM clock the board's power limit leaves to a layer that runs repeatedly; and which kernels its time goes to.
Quantizers and `rebase` are profiled too."""

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
from functools import partial
from pathlib import Path
from typing import get_args

import torch

import abiding
from abiding import mxfp8_moe as api
from abiding.mxfp8_moe import Mode
from abiding.testing.cases.mxfp8_moe import PERFORMANCE_TOKENS, SHAPES, LayerCase, LayerInputs, performance_case
from abiding.testing.timing import Roofline, graph_us
from benchmarks.base import say
from benchmarks.groups.mxfp8_moe import QUANTIZERS, layer_calls
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
MODES: tuple[Mode, ...] = get_args(Mode)
_QUERIED = "clocks.sm,power.draw.instant,clocks_event_reasons.sw_power_cap"
_SECONDS = 0.5
"""Duration of back-to-back calls, once as a warm-up until the clock has settled and once measured."""


def named(what: str, mode: Mode) -> str:
    """What results call a layer ("layer") or one of its GEMMs in a mode."""
    return what if mode == "w8a8" else f"{what}_{mode}"


def measure(
    shapes: Sequence[str],
    tokens: Sequence[int],
    commit: str | None = None,
    *,
    modes: Sequence[Mode] = MODES,
    profiled: Sequence[int] | None = None,
) -> Results:
    """Time layers and their kernels, and profile the GEMMs of those with the numbers of tokens `profiled` (default
    all), one call each; with them `rebase` of their weights, and the quantizers of the most such tokens. An interrupt
    ends it early.

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
    try:
        for case in _cases(shapes, tokens, modes, profiled, roofline, device):
            results.cases.append(case)
    except KeyboardInterrupt:
        say("Interrupted; what was measured until now is kept")
    return results


def _cases(
    shapes: Sequence[str],
    tokens: Sequence[int],
    modes: Sequence[Mode],
    profiled: Sequence[int],
    roofline: Roofline,
    device: torch.device,
) -> Iterator[CaseResult]:
    for shape in shapes:
        if tokens:
            say(f"{shape}: making weights")
            layer = performance_case(shape, 1).make(device)
            for weight, scales in ((layer.w13, layer.s13), (layer.w2, layer.s2)):
                api.rebase(weight, scales, inplace=True)  # as mode "fp8" needs them; the others read them as well
            for mode in modes:
                for count in tokens:
                    say(f"{shape}, {mode}, {count} tokens")
                    case = replace(performance_case(shape, count), mode=mode)
                    yield _time_layer(layer, case, roofline, device)
            del layer
            torch.cuda.empty_cache()  # for the process that is profiled
        if profiled:
            say(f"{shape}: profiling")
            yield from _profile_layers(shape, modes, profiled)
    if profiled:
        for width in sorted({SHAPES[shape][0] for shape in shapes}):
            say(f"{width} columns: profiling the quantizers")
            params: dict[str, Param] = {"tokens": max(profiled), "k": width}
            found = profile("quantize|round", ("quantizers", "--tokens", str(max(profiled)), "--width", str(width)))
            yield from (_profiled(op, params, busy) for op, busy in zip(QUANTIZERS, found, strict=True))


def _profile_layers(shape: str, modes: Sequence[Mode], tokens: Sequence[int]) -> list[CaseResult]:
    arguments = ("moe", "--shape", shape, "--mode", *modes, "--tokens", *map(str, tokens))
    kernels: list[tuple[str, dict[str, Param]]] = [("rebase", {"shape": shape, "gemm": name}) for name in GEMMS]
    for mode in modes:
        for count in tokens:
            kernels += [(named(name, mode), {"tokens": count, "shape": shape}) for name in GEMMS]
    found = profile("grouped_mm|rebase_kernel", arguments)
    return [_profiled(op, params, busy) for (op, params), busy in zip(kernels, found, strict=True)]


def _profiled(op: str, params: dict[str, Param], busy: dict[str, float]) -> CaseResult:
    shares: dict[str, Param] = {unit: round(busy[unit], 1) for unit in UTILIZATION_METRICS}
    return CaseResult(op, params | shares, round(busy["us"], 3), 0.0, l2_warm=False, bound_us=0.0)


def profile(kernels: str, arguments: Sequence[str]) -> list[dict[str, float]]:
    """Utilization by unit, and microseconds ("us"), of each kernel that `benchmarks.one_call` has profiled and whose
    name the regular expression `kernels` finds."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--profile-from-start", "off", "--kernel-name", f"regex:{kernels}"]
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
    the driver names the power cap as what holds the clock down; and the time of each kernel."""
    timed = layer_calls(layer, case, device)
    with torch.cuda.device(device):
        nodes = max(4, len(timed.calls))
        replays = math.ceil(_SECONDS * 1e6 / (graph_us(timed.calls, nodes=nodes).us * nodes))
        with _watch(device) as board:
            graph_us(timed.calls, nodes=nodes, replays=replays)
            settled = graph_us(timed.calls, nodes=nodes, replays=replays)
    params: dict[str, Param] = {"tokens": case.tokens, "shape": case.name}
    params |= {"mhz": round(board.mhz), "watts": round(board.watts), "capped": round(board.capped, 2)}
    with torch.cuda.device(device):
        params |= {step: round(us, 3) for step, us in steps(_kernel_ends(timed.calls, replays * nodes)).items()}
    bound_us = roofline.bound_us(timed.bytes, timed.flops / 2 if case.mode == "fp8" else timed.flops)
    return CaseResult.of(named("layer", case.mode), params, settled, {}, l2_warm=False, bound_us=bound_us)


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
    """A table of the layers of each mode, one of their profiled GEMMs, and one of the other profiled kernels. Columns
    are numbers of tokens; cells of GEMMs hold both, "GEMM1 / GEMM2"."""
    found = {(case.params.get("shape"), case.params.get("tokens"), case.op): case for case in results.cases}
    shapes = list(dict.fromkeys(str(case.params["shape"]) for case in results.cases if "shape" in case.params))

    def rows_of(op: str, cells: dict[str, Callable[..., str]], *ops: str) -> tuple[list[str], list[list[str]]]:
        columns = sorted({int(case.params["tokens"]) for case in results.cases if case.op == op})
        rows = []
        for shape in shapes:
            some = [[found.get((shape, t, name)) for name in (op, *ops)] for t in columns]
            if any(cases[0] for cases in some):
                for what, cell in cells.items():
                    texts = [cell(*cases) if cases[0] else "" for cases in some]
                    rows += [[shape, what, *texts]] * any(texts)
        return ["", "tokens", *map(str, columns)], rows

    of_layers: dict[str, Callable[..., str]] = {
        "µs": lambda case: f"{case.us:.0f}",
        "of the bound": lambda case: f"{100 * case.bound_us / case.us:.0f} %",
        "SM clock, MHz": lambda case: str(case.params["mhz"]),
        "board power, W": lambda case: str(case.params["watts"]),
        "power cap active": lambda case: f"{100 * case.params['capped']:.0f} %",
    }
    of_layers |= {f"{step}, µs": partial(_share, step=step) for step in STEPS}
    busy: dict[str, Callable[..., str]] = {
        f"{unit} busy": lambda *both, unit=unit: " / ".join(f"{case.params[unit]:.0f}" for case in both) + " %"
        for unit in UTILIZATION_METRICS
    }
    busy["µs"] = lambda *both: " / ".join(f"{case.us:.0f}" for case in both)

    def head(*ops: str) -> str:
        commits = {(case.commit or results.commit)[:12]: None for case in results.cases if case.op in ops}
        return f"**{results.gpu}** (driver {results.driver}, commit {' and '.join(commits)}, {results.date})"

    parts = []
    for mode in MODES:
        first, second = (named(name, mode) for name in GEMMS)
        layers, gemms = rows_of(named("layer", mode), of_layers), rows_of(first, busy, second)
        if layers[1]:
            about = f"layers back to back, {mode}, uniform routing."
            if any(row[1].startswith(STEPS[0]) for row in layers[1]):
                about += (
                    " A kernel's time is from the end of the kernel before to its own end, traced in graph replays; in "
                    "parentheses its share of the layer's."
                )
            parts += [wrap(f"{head(named('layer', mode))}: {about}"), table(*layers)]
        if gemms[1]:
            about = f"one GEMM of {mode} alone under Nsight Compute, GEMM1 / GEMM2."
            parts += [wrap(f"{head(first)}: {about}"), table(*gemms)]
    others = [case for case in results.cases if case.op in (*QUANTIZERS, "rebase")]
    if others:
        rows = [[case.op, _size(case), *(cell(case) for cell in busy.values())] for case in others]
        about = "one call alone under Nsight Compute."
        parts += [wrap(f"{head(*QUANTIZERS, 'rebase')}: {about}"), table(["", "", *busy], rows)]
    return "\n\n".join(parts)


def _size(case: CaseResult) -> str:
    if case.op == "rebase":
        return f"{case.params['shape']}, weights of {case.params['gemm']}"
    return f"{case.params['tokens']} x {case.params['k']}"


def _share(case: CaseResult, step: str) -> str:
    """The time of one kernel of a layer, and in parentheses the percent that it has of all; empty if unknown."""
    if step not in case.params:
        return ""
    us = float(case.params[step])
    return f"{us:.1f} ({100 * us / sum(float(case.params[one]) for one in STEPS):.0f} %)"


def _place(case: CaseResult) -> tuple[Param | None, ...]:
    return case.op, *(case.params.get(name) for name in ("shape", "tokens", "gemm", "k"))


def main() -> None:
    """The command line `python -m benchmarks.limits`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits",
        description="Profile a layer's GEMMs with Nsight Compute, and quantizers; sample clock and power; time the "
        "kernels of layers. What is not measured keeps its results in the file.",
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    counts = PERFORMANCE_TOKENS["uniform"]
    parser.add_argument("--tokens", type=int, nargs="*", choices=counts, default=counts, help="of the layers to time")
    parser.add_argument(
        "--profiled", type=int, nargs="*", choices=counts, default=[8, 128, 8192], help="of the layers to profile"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--commit", help="commit to record (default: that of the checkout)")
    chosen = parser.parse_args()
    results = measure(chosen.shape, chosen.tokens, chosen.commit, modes=chosen.mode, profiled=chosen.profiled)
    print(to_markdown(results))
    path = results.path_in(chosen.output)
    if path.exists():
        results = Results.read(path).replaced(results, _place)
    print(f"Wrote {results.write(chosen.output)}")


if __name__ == "__main__":
    main()
