"""What limits a mixture-of-experts layer: how busy its products keep the parts of a GPU, each alone under Nsight
Compute, and what clock the board's power leaves when the layer runs again and again."""

from __future__ import annotations

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
from abiding import mxfp8_moe as face
from abiding.testing.benchmarks.base import say
from abiding.testing.benchmarks.report import table
from abiding.testing.cases.mxfp8_moe import performance_case
from abiding.testing.results import CaseResult, Param, Results
from abiding.testing.timing import Roofline, graph_us

GROUP = "mxfp8_moe_limits"
MARKER = "limits:mxfp8_moe"
"""Documents have the table between `<!-- limits:mxfp8_moe -->` and `<!-- /limits:mxfp8_moe -->`."""

SHARES = {
    "device memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor cores": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue slots": "smsp__inst_issued.avg.pct_of_peak_sustained_active",
}
"""Of the parts of a GPU, the metric that says how busy one is, in percent; of issue slots, while there are warps."""
_TIME = "gpu__time_duration.sum"

PRODUCTS = ("GEMM1", "GEMM2")
CALLS = 4
"""Of the profiled program, the last of which counts."""
_SECONDS = 0.5
"""Of calls one after the other, once until the clock has settled and once that count."""


def measure(shape: str, tokens: Sequence[int], program: Path, commit: str | None = None) -> Results:
    """Profile the products of layers that `program` calls, `benchmarks/one_call.py`, and time the layers.

    Raises:
        RuntimeError: without a GPU, Nsight Compute's `ncu` or `nvidia-smi`, or when one of these fails.
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
        for name, busy in zip(PRODUCTS, profile(program, arguments), strict=True):
            params: dict[str, Param] = {"tokens": count, "shape": shape}
            params |= {part: round(busy[part], 1) for part in SHARES}
            results.cases.append(CaseResult(name, params, round(busy["us"], 3), 0.0, l2_warm=False, bound_us=0.0))
        results.cases.append(_time_layer(shape, count, device))
    return results


def profile(program: Path, arguments: Sequence[str]) -> list[dict[str, float]]:
    """The shares of `SHARES` and the microseconds ("us") of the products in the program's last call."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += ["--kernel-name", "regex:grouped_mm", "--launch-skip", str((CALLS - 1) * len(PRODUCTS))]
    command += ["--metrics", ",".join((_TIME, *SHARES.values())), sys.executable, str(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return parse(done.stdout)


def parse(shown: str) -> list[dict[str, float]]:
    """What `profile` returns, of ncu's CSV: after its own lines a header, a line of units, a line for each kernel."""
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
        {part: number(kernel, metric) for part, metric in SHARES.items()} | {"us": number(kernel, _TIME) / 1e3}
        for kernel in kernels
    ]


def _time_layer(shape: str, tokens: int, device: torch.device) -> CaseResult:
    """A layer's time when it has run for a while, and the clock and the board's power then."""
    inputs = performance_case(shape, tokens).make(device)
    calls = [partial(inputs.turned(index, CALLS).run, face) for index in range(CALLS)]
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
    """Clock and power, over the second half of the time that they were looked at."""

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
    """A column for each number of tokens; of the products that of the first and that of the second."""
    columns = sorted({int(case.params["tokens"]) for case in results.cases})
    found = {(case.op, case.params["tokens"]): case for case in results.cases}
    products = {tokens: [found[name, tokens] for name in PRODUCTS] for tokens in columns}
    layers = [found["layer", tokens] for tokens in columns]
    rows = [
        [f"{part} busy", *(" / ".join(f"{case.params[part]:.0f}" for case in products[t]) + " %" for t in columns)]
        for part in SHARES
    ]
    rows.append(["a product alone, us", *(" / ".join(f"{case.us:.0f}" for case in products[t]) for t in columns)])
    rows.append(["a layer again and again, us", *(f"{case.us:.0f}" for case in layers)])
    rows.append(["the clock then, MHz", *(str(case.params["mhz"]) for case in layers)])
    rows.append(["the board's power then, W", *(str(case.params["watts"]) for case in layers)])
    head = f"**{results.gpu}** (driver {results.driver}, commit {results.commit[:12]}, {results.date}), "
    return f"{head}{layers[0].params['shape']}.\n\n" + table(["tokens", *map(str, columns)], rows)
