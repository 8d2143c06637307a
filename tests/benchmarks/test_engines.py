"""Benchmarks inside engines: the gate of a comparison, and what is left of a library's device code."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import compare, condense, engine, pack, report


def result(variant: str, noise: float, *, ours: bool) -> dict[str, Any]:
    numbers = random.Random(variant)

    def text() -> list[list[list[float]]]:
        return [[[-3 + numbers.gauss(0, noise), 5] for _ in range(50)] for _ in range(8)]

    kernels = {"void marlin": [3, 5.0]} | ({"void abiding::mxfp8_moe::gemm": [2, 4.0]} if ours else {})
    times = {"decode": {"8": {"graph_ms": 2.0, "wall_ms_per_step": 3.0}}, "prefill": {"2048": {"forward_ms": 9.0}}}
    return {
        "variant": variant,
        "model": "tiny",
        "gpu": "H200",
        "vllm": "0.26.0",
        "torch": "2.11.0",
        "load_bytes": {"peak": 2 << 30, "after": 1 << 30},
        "jobs": {"moe": {"state": "active" if ours else "off"}},
        **{name: text() for name in ("forced", "forced_again", "forced_singly")},
        "kernels": {"decode 8": kernels},
        "times": [times] * 3,
    }


@pytest.mark.parametrize(
    ("changed", "failure"),
    [
        ({}, None),
        ({"w8a16": result("w8a16", 0.5, ours=True)}, "w8a16 differs from stock"),
        ({"off": result("off", 0.5, ours=False)}, "off differs from stock"),
        ({"fp8": result("fp8", 0.005, ours=True)}, None),
        ({"fp8": result("fp8", 0.05, ours=True)}, "fp8 differs from stock"),
        ({"fp8": result("fp8", 0.005, ours=False)}, "fp8, decode 8: 0 kernels of ours"),
        ({"spoilt": result("spoilt", 0.002, ours=True)}, "the comparison notices nothing"),
        ({"w8a16": result("w8a16", 0.002, ours=False)}, "w8a16, decode 8: 0 kernels of ours"),
        ({"off": result("off", 0.002, ours=True)}, "off, decode 8: 2 kernels of ours"),
        ({"w8a16": None}, "w8a16 has no result"),
    ],
)
def test_the_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], failure: str | None
) -> None:
    noises = {"stock": (0.002, False), "off": (0.002, False), "w8a16": (0.002, True), "spoilt": (0.5, True)}
    noises["fp8"] = (0.005, True)
    for name, (noise, ours) in noises.items():
        if (content := changed.get(name, result(name, noise, ours=ours))) is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    status = compare.main(tmp_path, list(noises))
    output = capsys.readouterr().out
    assert bool(status) == (failure is not None)
    assert output.count("FAILED") == (failure is not None)
    assert failure is None or failure in output
    assert "graph_ms: 8: 2.000 (1.00x)" in output


def test_condensed_results_and_their_tables(tmp_path: Path) -> None:
    for name, ours in (("stock", False), ("w8a16", True), ("fp8", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(name, 0.002, ours=ours)))
    condensed = condense.condense([tmp_path], "0123456789abcdef", skipped=["prefill 2048"])
    row = condensed["models"][0]["variants"]["w8a16"]
    assert row["decode"] == {"8": 2.0}
    assert row["prefill"] == {}
    assert row["kernels"] == {"decode 8": {"ours": 2, "all": 5}}
    assert "| **abiding**, w8a16 | 2 (1.00)  |" in report.times_table(condensed)
    assert "| **abiding**, fp8   | 2 (1.00)  |" in report.times_table(condensed)
    assert "2 of 5" in report.equality_table(condensed)


def test_every_variant_has_a_name_and_what_may_be_timed_a_line() -> None:
    assert report.NAMES.keys() == engine.VARIANTS.keys()
    assert report.STYLES.keys() <= engine.VARIANTS.keys()
    assert {"stock", "humming", "w8a16", "w8a8", "fp8"} <= report.STYLES.keys()
    assert {*compare.OURS} == {
        name for name, setting in engine.VARIANTS.items() if setting.get("ABIDING_VLLM", "0") != "0"
    }


@pytest.mark.parametrize("name", pack.PROGRAMS)
def test_packed_programs_start_without_this_checkout(name: str, tmp_path: Path) -> None:
    pack.pack_programs(tmp_path)
    command = [sys.executable, "-m", f"benchmarks.engines.{name}", "--help"]
    path = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{name}.py" in done.stdout


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    body = b""
    for kind, architecture, payload in entries:
        body += struct.pack("<HHIQ", kind, 0, 64, len(payload)) + bytes(12) + struct.pack("<I", architecture)
        body += bytes(32) + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    ("entries", "kept"),
    [
        ([(2, 80, b"old!"), (2, 90, b"mine"), (1, 90, b"ptx!")], [b"mine"]),
        ([(1, 80, b"ptx8"), (1, 90, b"ptx9"), (1, 100, b"ptxX")], [b"ptx9"]),
        ([(2, 100, b"new!")], []),
    ],
)
def test_other_architectures_are_dropped(entries: list[tuple[int, int, bytes]], kept: list[bytes]) -> None:
    data = bytearray(b"before" + fatbin(*entries) + b"after")
    before = len(data)
    dropped = pack.drop_other_architectures(data, 90)
    assert len(data) == before
    assert data.startswith(b"before")
    assert data.endswith(b"after")
    assert dropped == 4 * (len(entries) - len(kept))
    assert [payload for _, _, payload in entries if payload in data] == kept
