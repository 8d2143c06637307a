from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding.testing.cases.mxfp8_moe import expert_weights
from abiding.testing.timing import Roofline
from benchmarks.base import Settings
from benchmarks.groups.mxfp8_moe import _libraries
from benchmarks.peers.deep_gemm import BLOCK, AlignedRows
from benchmarks.peers.mxfp8 import Gemm, Routed

ALIGNMENT = 8
# What DeepGEMM computes from the experts' ends, without tiles.
PACKAGE = f"""
def get_m_alignment_for_contiguous_layout():
    return {ALIGNMENT}

def set_pdl(enable):
    global pdl
    pdl = enable

def m_grouped_fp8_gemm_nt_contiguous(a, b, d, grouped_layout, use_psum_layout=False):
    assert use_psum_layout
    weight = b[0].double() * b[1].double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    rows = a[0].double() * a[1].double().repeat_interleave(128, 1)
    start = 0
    for end, expert in zip(grouped_layout.tolist(), weight):
        start = -(-start // {ALIGNMENT}) * {ALIGNMENT}
        d[start:end] = (rows[start:end] @ expert.T).to(d.dtype)
        start = end
    return d
"""


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def dequantized(aligned: AlignedRows) -> Tensor:
    return aligned.data.double() * aligned.scales.double().repeat_interleave(BLOCK, 1)


@pytest.mark.parametrize("counts", [[3, 0, 8, 17], [0, 1, 1, 1], [9, 9, 9], [0, 0, 1]])
def test_rows_of_each_expert_begin_at_a_multiple_of_the_alignment(counts: list[int]) -> None:
    rows = torch.randn(sum(counts), 2 * BLOCK).bfloat16()
    rows[1:2] = 0
    aligned = AlignedRows.of(rows, offsets_of(counts), ALIGNMENT)
    total = len(aligned.data)
    assert total % ALIGNMENT == 0
    assert aligned.scales.stride() == (1, total)
    starts, end = [], 0
    for count, place_behind in zip(counts, aligned.ends.tolist(), strict=True):
        starts.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = place_behind
        assert end == starts[-1] + count
    assert end <= total
    expected = [start + row for start, count in zip(starts, counts, strict=True) for row in range(count)]
    assert aligned.places.tolist() == expected
    values = dequantized(aligned)
    # e4m3 has 3 bits behind the point, so half a unit is at most 1 / 16 of a number, or of the least normal one.
    bound = rows.double().abs() / 16 + aligned.scales[aligned.places].double().repeat_interleave(BLOCK, 1) * 2.0**-10
    assert ((values[aligned.places] - rows.double()).abs() <= bound).all()
    assert not values[[place for place in range(total) if place not in expected]].any()


def test_calls_with_as_many_rows_have_one_size() -> None:
    rows = torch.randn(20, BLOCK).bfloat16()
    sizes = {len(AlignedRows.of(rows, offsets_of(counts), ALIGNMENT).data) for counts in ([20, 0, 0], [1, 10, 9])}
    assert len(sizes) == 1


def test_the_package_is_called_on_our_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tmp_path / "deep_gemm-0.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("deep_gemm/__init__.py", PACKAGE)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("DG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "deep_gemm", raising=False)
    settings = Settings(torch.device("cuda"), Roofline(1.0), (archive,), False, ("grouped_mm_fp8",))
    (library,) = _libraries(settings)
    kernels: Any = sys.modules.pop("deep_gemm")
    assert kernels.pdl, "as in vLLM"

    rng = torch.Generator().manual_seed(0)
    weight, scale, _ = expert_weights(3, 2 * BLOCK, BLOCK, rng)
    gemm = Gemm("GEMM1", weight, scale)
    routed = Routed.of(torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [2, 0]]), 3, BLOCK)
    assert not library.gemms(gemm, [])
    assert not library.layers(gemm, gemm, []) + library.layers_fp8(gemm, gemm, [])
    (peer,) = library.gemms_fp8(gemm, [])
    assert peer.name == "deep_gemm"
    out: Any = peer.call(routed)()
    aligned = AlignedRows.of(routed.rows, routed.offsets, ALIGNMENT)
    rows = dequantized(aligned)[aligned.places]
    expected = torch.cat([rows[:5] @ weight[0].double().T, rows[5:] @ weight[2].double().T]) * 0.01
    torch.testing.assert_close(out[aligned.places], expected.bfloat16(), rtol=1e-2, atol=0)
