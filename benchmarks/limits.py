"""What limits MoE layers: how busy each of their GEMMs, profiled alone under Nsight Compute, keeps the units of a GPU,
and which SM clock the board's power limit leaves to a layer that runs repeatedly."""

from __future__ import annotations

import argparse
import csv
import io
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

import abiding
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
CALLS = 4
"""Calls of the profiled program; the last one is profiled."""
_QUERIED = "clocks.sm,power.draw.instant,clocks_event_reasons.sw_power_cap"
_SECONDS = 0.5
"""Duration of back-to-back calls, once as a warm-up until the clock has settled and once measured."""


def measure(
    shapes: Sequence[str], tokens: Sequence[int], commit: str | None = None, *, profiled: Sequence[int] | None = None
) -> Results:
    """Time layers, and profile the GEMMs of those with the numbers of tokens `profiled` (default all), one call each.

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
    the driver names the power cap as what holds the clock down."""
    timed = layer_calls(layer, case, device)
    with torch.cuda.device(device):
        nodes = max(4, len(timed.calls))
        replays = math.ceil(_SECONDS * 1e6 / (graph_us(timed.calls, nodes=nodes).us * nodes))
        with _watch(device) as board:
            graph_us(timed.calls, nodes=nodes, replays=replays)
            settled = graph_us(timed.calls, nodes=nodes, replays=replays)
    params: dict[str, Param] = {"tokens": case.tokens, "shape": case.name}
    params |= {"mhz": round(board.mhz), "watts": round(board.watts), "capped": round(board.capped, 2)}
    bound_us = roofline.bound_us(timed.bytes, timed.flops)
    return CaseResult.of("layer", params, settled, {}, l2_warm=False, bound_us=bound_us)


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

    layers = rows_of(
        "layer",
        {
            "µs": lambda case: f"{case.us:.0f}",
            "of the bound": lambda case: f"{100 * case.bound_us / case.us:.0f} %",
            "SM clock, MHz": lambda case: str(case.params["mhz"]),
            "board power, W": lambda case: str(case.params["watts"]),
            "power cap active": lambda case: f"{100 * case.params['capped']:.0f} %",
        },
    )
    busy = {
        f"{unit} busy": lambda *both, unit=unit: " / ".join(f"{case.params[unit]:.0f}" for case in both) + " %"
        for unit in UTILIZATION_METRICS
    }
    gemms = rows_of(GEMMS[0], busy | {"µs": lambda *both: " / ".join(f"{case.us:.0f}" for case in both)}, GEMMS[1])
    head = f"**{results.gpu}** (driver {results.driver}, commit {results.commit[:12]}, {results.date})"
    parts = [wrap(f"{head}: layers back to back, w8a8, uniform routing."), table(*layers)]
    if gemms[1]:
        parts += [wrap(f"{head}: one GEMM alone under Nsight Compute, GEMM1 / GEMM2."), table(*gemms)]
    return "\n\n".join(parts)


def main() -> None:
    """The command line `python -m benchmarks.limits`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits",
        description="Profile a layer's GEMMs with Nsight Compute; sample clock and power.",
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    counts = PERFORMANCE_TOKENS["uniform"]
    parser.add_argument("--tokens", type=int, nargs="+", choices=counts, default=counts, help="of the layers to time")
    parser.add_argument(
        "--profiled", type=int, nargs="*", choices=counts, default=[8, 128, 8192], help="of the layers to profile"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--commit", help="commit to record (default: that of the checkout)")
    chosen = parser.parse_args()
    results = measure(chosen.shape, chosen.tokens, chosen.commit, profiled=chosen.profiled)
    print(to_markdown(results))
    print(f"Wrote {results.write(chosen.output)}")


if __name__ == "__main__":
    main()
