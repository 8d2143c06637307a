"""Nsight Compute's CSV becomes utilization by unit of the GPU, and a table with one column per number of tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import abiding
from abiding import mxfp8_moe
from abiding.mxfp8_moe import Mode
from abiding.testing.cases import mxfp8_moe as moe_cases
from abiding.testing.cases.mxfp8_moe import LayerCase
from benchmarks import limits, one_call
from benchmarks.result_file import CaseResult, Param, Results
from benchmarks.tables import fill

CSV = """==PROF== Connected to process 12
==PROF== Disconnected from process 12
"ID","Kernel Name","dram__throughput.avg.pct_of_peak_sustained_elapsed","gpu__time_duration.sum",\
"lts__throughput.avg.pct_of_peak_sustained_elapsed",\
"sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed",\
"smsp__inst_issued.avg.pct_of_peak_sustained_active"
"","","%","ns","%","%","%"
"0","grouped_mm_kernel<1, 2>","52.4","387,424","62.36","60.55","40.78"
"1","grouped_mm_kernel<1, 2>","51","196512","60.5","59","39.25"
"""


def test_utilization_and_microseconds_of_each_kernel() -> None:
    first, second = limits.parse(CSV)
    assert first == {"device memory": 52.4, "L2": 62.36, "tensor cores": 60.55, "issue slots": 40.78, "us": 387.424}
    assert second["us"] == 196.512


def test_other_lines_are_left_out() -> None:
    assert limits.parse(CSV + "\n==WARNING== The clock was not held.\n") == limits.parse(CSV)


def test_what_has_no_kernels_or_no_number_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no kernels:\n==PROF== No kernels"):
        limits.parse("==PROF== No kernels were profiled.\n")
    with pytest.raises(RuntimeError, match="ncu shows 'n/a' as dram__throughput"):
        limits.parse(CSV.replace('"52.4"', '"n/a"'))


def test_without_a_gpu_or_tools_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(abiding, "has_cuda_kernels", lambda: False)
    with pytest.raises(RuntimeError, match="this needs a GPU"):
        limits.measure(["minimax-m3-ep8"], [1])
    monkeypatch.setattr(abiding, "has_cuda_kernels", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="ncu is not on the PATH"):
        limits.measure(["minimax-m3-ep8"], [1])


def test_profiled_kernels_are_told_apart_by_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """`one_call` makes the calls whose kernels `limits` names; each layer has two GEMMs."""
    profiled_now, launched = False, list[tuple[object, ...]]()
    monkeypatch.setattr(one_call, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(moe_cases, "performance_case", lambda shape, tokens: LayerCase(tokens, 64, 32, 4, 2))

    @contextmanager
    def profiled() -> Iterator[None]:
        nonlocal profiled_now
        profiled_now = True
        yield
        profiled_now = False

    def record(name: str, kernels: int) -> None:
        real = getattr(mxfp8_moe, name)

        def recorded(first: Tensor, *args: object, **options: object) -> object:
            launched.extend([(name, options.get("mode"), len(first))] * kernels * profiled_now)
            return real(first, *args, **options)

        monkeypatch.setattr(mxfp8_moe, name, recorded)

    monkeypatch.setattr(one_call, "profiled", profiled)
    record("rebase", 1)
    record("moe", 2)
    modes: Sequence[Mode] = ("w8a8", "fp8")
    one_call.moe("some", modes, (1, 3))
    layers = [("moe", mode, tokens) for mode in modes for tokens in (1, 3) for _ in limits.GEMMS]
    assert launched == [("rebase", None, 4), ("rebase", None, 4), *layers]

    busy = [dict.fromkeys(limits.UTILIZATION_METRICS, 50.0) | {"us": float(index)} for index in range(len(launched))]
    monkeypatch.setattr(limits, "profile", lambda kernels, arguments: busy)
    cases = limits._profile_layers("some", modes, (1, 3))
    assert [case.op for case in cases] == ["rebase"] * 2 + ["GEMM1", "GEMM2"] * 2 + ["GEMM1_fp8", "GEMM2_fp8"] * 2
    assert [case.params.get("tokens") for case in cases] == [None, None, 1, 1, 3, 3, 1, 1, 3, 3]
    assert [case.us for case in cases] == list(range(10))
    with pytest.raises(ValueError, match="zip"):
        limits._profile_layers("some", modes, (1,))


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """One that does what `script` does, in place of the driver's."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_clock_and_power_are_those_of_the_second_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    samples = ("345, 70.25, Active", "1980, 600.5, Active", "1500, 690.00, Active", "1410, 700, Not Active")
    script = "; ".join(f"echo '{sample}'" for sample in samples) + '; touch "$0.done"; exec sleep 60'
    nvidia_smi(tmp_path, monkeypatch, script)
    with limits._watch(torch.device("cpu")) as board:
        while not (tmp_path / "nvidia-smi.done").exists():
            time.sleep(0.01)
    assert (board.mhz, board.watts, board.capped) == (1455, 695, 0.5)


def test_a_silent_board_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi(tmp_path, monkeypatch, "echo 'Field \"power.draw.instant\" is not valid'")
    with pytest.raises(RuntimeError, match="neither clock nor power:\nField"), limits._watch(torch.device("cpu")):
        time.sleep(0.5)


def test_tables_have_a_column_for_each_number_of_tokens(tmp_path: Path) -> None:
    cases = []
    for tokens in (32, 1):
        params: dict[str, Param] = {"tokens": tokens, "shape": "s", "mhz": 1980, "watts": 400 + tokens, "capped": 0.25}
        cases.append(CaseResult("layer", params, 15.6, 0.0, l2_warm=False, bound_us=7.8))
    for name, percent in zip(limits.GEMMS, (72.4, 30.0), strict=True):
        profiled: dict[str, Param] = {"tokens": 32, "shape": "s"}
        profiled |= dict.fromkeys(limits.UTILIZATION_METRICS, percent)
        cases.append(CaseResult(name, profiled, 9.0, 0.0, l2_warm=False, bound_us=0.0))
    some = Results(limits.GROUP, "NVIDIA H200", "580", "2.11", "13.0", "c" * 40, "2026-01-02", 3000.0, 790.0, cases)
    assert Results.read(some.write(tmp_path)) == some

    document = f"<!-- {limits.MARKER} -->\nold\n<!-- /{limits.MARKER} -->\n"
    lines = fill(document, limits.MARKER, [limits.to_markdown(some)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["", "tokens", "1", "32"]
    assert ["s", "µs", "16", "16"] in cells
    assert ["s", "of the bound", "50 %", "50 %"] in cells
    assert ["s", "board power, W", "401", "432"] in cells
    assert ["s", "power cap active", "25 %", "25 %"] in cells
    assert ["", "tokens", "32"] in cells, "only one layer was profiled"
    assert ["s", "tensor cores busy", "72 / 30 %"] in cells
    assert ["s", "µs", "9 / 9"] in cells
    assert "old" not in lines
    assert not any("fp8" in line or "traced" in line for line in lines[1:-1])


def test_each_mode_has_a_table_of_its_own_with_its_kernels() -> None:
    params: dict[str, Param] = {"tokens": 8, "shape": "s", "mhz": 1980, "watts": 400, "capped": 0.25}
    params |= dict(zip(limits.STEPS, (1.0, 2.0, 10.0, 1.5, 4.5, 1.0), strict=True))
    fp8 = CaseResult("layer_fp8", params, 20.2, 0.0, l2_warm=False, bound_us=10.1, commit="d" * 40)
    shares: dict[str, Param] = dict.fromkeys(limits.UTILIZATION_METRICS, 60.4)
    rebase = CaseResult("rebase", {"shape": "s", "gemm": "GEMM1"} | shares, 9.0, 0.0, l2_warm=False, bound_us=0.0)
    quantize = CaseResult("quantize", {"tokens": 128, "k": 64} | shares, 2.0, 0.0, l2_warm=False, bound_us=0.0)
    cases = [fp8, rebase, quantize]
    some = Results(limits.GROUP, "NVIDIA H200", "580", "2.11", "13.0", "c" * 40, "2026-01-02", 3000.0, 790.0, cases)
    text = limits.to_markdown(some)
    assert text.startswith("**NVIDIA H200** (driver 580, commit dddddddddddd, 2026-01-02): layers back to back, fp8")
    assert "traced in graph replays" in text
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]
    assert cells[0] == ["", "tokens", "8"]
    assert ["s", "of the bound", "50 %"] in cells
    assert ["s", "GEMM1, µs", "10.0 (50 %)"] in cells
    assert ["s", "activate, µs", "1.5 (8 %)"] in cells
    assert ["rebase", "s, weights of GEMM1", *["60 %"] * 4, "9"] in cells
    assert ["quantize", "128 x 64", *["60 %"] * 4, "2"] in cells


KERNELS = [
    "void abiding::mxfp8_moe::(anonymous namespace)::route_kernel<4>(abiding::mxfp8_moe::RouteParams, int, int)",
    "void abiding::mxfp8_moe::(anonymous namespace)::gather_rowwise_kernel<true>(abiding::mxfp8_moe::GatherParams",
    "void abiding::mxfp8_moe::sm90_mm::grouped_mm_kernel<abiding::mxfp8_moe::sm90_mm::Config<(abiding::mxfp8_moe::Row",
    "void abiding::mxfp8_moe::(anonymous namespace)::activate_rowwise_kernel<(abiding::mxfp8_moe::Activation)0, true>(",
    "void abiding::mxfp8_moe::sm90_mm::grouped_mm_kernel<abiding::mxfp8_moe::sm90_mm::Config<(abiding::mxfp8_moe::Row",
    "abiding::mxfp8_moe::(anonymous namespace)::combine_kernel(abiding::mxfp8_moe::CombineParams)",
]


def test_a_kernel_lasts_from_the_end_of_the_one_before() -> None:
    lasts = [1.0, 2.0, 10.0, 1.5, 4.5, 1.0]
    ends, now = [], 100.0
    for call in range(4):
        for name, us in zip(KERNELS, lasts, strict=True):
            now += us + 50 * (call == 3 and us == 2.0)  # one is late
            ends += [(name, now), ("void at::native::elementwise_kernel<4>(int)", now + 0.1)]
    assert limits.steps(ends) == pytest.approx(dict(zip(limits.STEPS, lasts, strict=True)))
    with pytest.raises(RuntimeError, match="shows no activate among the kernels"):
        limits.steps([kernel for kernel in ends if "activate" not in kernel[0]])
