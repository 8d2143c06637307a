"""What limits an MoE layer: how busy each of its GEMMs, profiled alone under Nsight Compute, keeps the units of a GPU,
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import abiding
from abiding import mxfp8_moe as api
from abiding.testing.cases.mxfp8_moe import PERFORMANCE_TOKENS, SHAPES, performance_case
from abiding.testing.timing import Roofline, graph_us
from benchmarks.base import say
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
_SECONDS = 0.5
"""Duration of back-to-back calls, once as a warm-up until the clock has settled and once measured."""


def measure(shape: str, tokens: Sequence[int], commit: str | None = None) -> Results:
    """Profile the GEMMs of layers, one call each, and time the layers.

    Raises:
        RuntimeError: there is no GPU, no `ncu` (Nsight Compute) or no `nvidia-smi`, or one of these fails.
    """
    if not abiding.has_cuda_kernels():
        raise RuntimeError(f"this needs a GPU: {abiding.cuda_unavailable_reason()}")
    for tool in ("ncu", "nvidia-smi"):
        if shutil.which(tool) is None:
            raise RuntimeError(
                f"{tool} is not on the PATH; Nsight Compute's ncu and the driver's nvidia-smi are needed"
            )
    device = torch.device("cuda", torch.cuda.current_device())
    results = Results.begin(GROUP, device, Roofline.measure(device), commit)
    for count in tokens:
        say(f"{shape}, {count} tokens")
        arguments = ("moe", "--tokens", str(count), "--shape", shape)
        for name, busy in zip(GEMMS, profile(arguments), strict=True):
            params: dict[str, Param] = {"tokens": count, "shape": shape}
            params |= {unit: round(busy[unit], 1) for unit in UTILIZATION_METRICS}
            results.cases.append(CaseResult(name, params, round(busy["us"], 3), 0.0, l2_warm=False, bound_us=0.0))
        results.cases.append(_time_layer(shape, count, device))
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


def _time_layer(shape: str, tokens: int, device: torch.device) -> CaseResult:
    """The time of a layer once the SM clock has settled, with that clock and the board's power."""
    inputs = performance_case(shape, tokens).make(device)
    calls = [partial(inputs.rotated(index, CALLS).run, api) for index in range(CALLS)]
    with torch.cuda.device(device):
        replays = math.ceil(_SECONDS * 1e6 / (graph_us(calls, nodes=CALLS).us * CALLS))
        with _watch(device) as board:
            graph_us(calls, nodes=CALLS, replays=replays)
            settled = graph_us(calls, nodes=CALLS, replays=replays)
    params: dict[str, Param] = {"tokens": tokens, "shape": shape}
    params |= {"mhz": round(board.mhz), "watts": round(board.watts)}
    return CaseResult.of("layer", params, settled, {}, l2_warm=False, bound_us=0.0)


@dataclass
class _Board:
    """Mean SM clock and power over the second half of the samples."""

    mhz: float = 0.0
    watts: float = 0.0


@contextmanager
def _watch(device: torch.device) -> Iterator[_Board]:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits", "-lms", "20"]
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
    samples = re.findall(r"^(\d+), ([\d.]+)$", shown, flags=re.MULTILINE)
    if not samples:
        raise RuntimeError(f"nvidia-smi shows neither clock nor power:\n{shown[-2000:]}")
    counted = samples[len(samples) // 2 :]
    board.mhz = sum(float(mhz) for mhz, _ in counted) / len(counted)
    board.watts = sum(float(watts) for _, watts in counted) / len(counted)


def to_markdown(results: Results) -> str:
    """A table with one column per number of tokens; cells of GEMMs hold both, "GEMM1 / GEMM2"."""
    columns = sorted({int(case.params["tokens"]) for case in results.cases})
    found = {(case.op, case.params["tokens"]): case for case in results.cases}
    gemms = {tokens: [found[name, tokens] for name in GEMMS] for tokens in columns}
    layers = [found["layer", tokens] for tokens in columns]
    rows = [
        [f"{unit} busy", *(" / ".join(f"{case.params[unit]:.0f}" for case in gemms[t]) + " %" for t in columns)]
        for unit in UTILIZATION_METRICS
    ]
    rows.append(["one GEMM alone, µs", *(" / ".join(f"{case.us:.0f}" for case in gemms[t]) for t in columns)])
    rows.append(["the layer, back to back, µs", *(f"{case.us:.0f}" for case in layers)])
    rows.append(["its SM clock, MHz", *(str(case.params["mhz"]) for case in layers)])
    rows.append(["its board power, W", *(str(case.params["watts"]) for case in layers)])
    head = f"**{results.gpu}** (driver {results.driver}, commit {results.commit[:12]}, {results.date}), "
    return wrap(f"{head}{layers[0].params['shape']}.") + "\n\n" + table(["tokens", *map(str, columns)], rows)


def main() -> None:
    """The command line `python -m benchmarks.limits`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.limits",
        description="Profile a layer's GEMMs with Nsight Compute; sample clock and power.",
    )
    parser.add_argument("--shape", choices=SHAPES, default="minimax-m3-ep8")
    parser.add_argument(
        "--tokens", type=int, nargs="+", choices=PERFORMANCE_TOKENS["uniform"], default=[1, 32, 512, 8192]
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--commit", help="commit to record (default: that of the checkout)")
    chosen = parser.parse_args()
    results = measure(chosen.shape, chosen.tokens, chosen.commit)
    print(to_markdown(results))
    print(f"Wrote {results.write(chosen.output)}")


if __name__ == "__main__":
    main()
