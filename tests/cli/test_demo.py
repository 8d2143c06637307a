"""The demo passes, and fails as soon as a result is wrong; the command line around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding import mla_prologue, mxfp8_moe

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from abiding.cli.app import app
from abiding.cli.demo import collectives
from abiding.cli.demo import mla_prologue as section
from abiding.cli.demo import mxfp8_moe as layers
from abiding.cli.demo.section import Section
from abiding.testing.ranks import run_processes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's cases with fewer tokens, and a narrow layer."""
    monkeypatch.setattr(section, "CASES", [replace(case, tokens=case.tokens // 16) for case in section.CASES])
    monkeypatch.setattr(layers, "CASES", [replace(case, hidden=512, intermediate=256) for case in layers.CASES])


def demo(*only: Section) -> tuple[int, str]:
    """The demo's exit status and output: of all sections, or of these alone."""
    with pytest.MonkeyPatch.context() as patch:
        if only:
            patch.setattr("abiding.cli.demo.SECTIONS", only)
        result = CliRunner().invoke(app, ["demo"])
    return result.exit_code, " ".join(result.output.split())


def test_the_demo_passes_and_shows_every_case() -> None:
    status, text = demo()
    assert status == 0, text
    assert "All results agree with the reference." in text
    for case in (
        "decode, 64 heads",
        "decode, 128 heads",
        "prefill, 64 heads",
        "prefill, 128 heads",
        "w8a8",
        "w8a16",
        "fp8",
    ):
        assert case in text


def test_a_wrong_q_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mla_prologue.qnorm_rope_kv_insert

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        out = right(*args, **kwargs)
        out[-1, -1, 17] *= 1.05
        return out

    monkeypatch.setattr(mla_prologue, "qnorm_rope_kv_insert", wrong)
    status, text = demo(section.SECTION)
    assert status == 1
    assert "WRONG decode, 64 heads: Q is " in text
    assert "cache:" not in text


def test_one_wrong_cache_bit_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mla_prologue.qnorm_rope_kv_insert

    def wrong(q: Tensor, kv: Tensor, cache: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = right(q, kv, cache, *args, **kwargs)
        cache[0, 576 * 64 + 7] ^= 1
        return out

    monkeypatch.setattr(mla_prologue, "qnorm_rope_kv_insert", wrong)
    status, text = demo(section.SECTION)
    assert status == 1
    assert "cache: 1 of" in text
    assert "at (0, 36871), byte offset 36871" in text


def test_a_byte_beyond_the_page_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mla_prologue.qnorm_rope_kv_insert

    def wrong(q: Tensor, kv: Tensor, cache: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = right(q, kv, cache, *args, **kwargs)
        cache.as_strided((1,), (1,), cache.storage_offset() + cache.shape[1]).zero_()
        return out

    monkeypatch.setattr(mla_prologue, "qnorm_rope_kv_insert", wrong)
    status, text = demo(section.SECTION)
    assert status == 1
    assert "cache: 1 bytes outside of the tensor were written; the first is at byte offset 37376" in text


def test_a_wrong_read_back_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mla_prologue.gather_kv
    monkeypatch.setattr(mla_prologue, "gather_kv", lambda *args, **kwargs: torch.ones_like(right(*args, **kwargs)))
    status, text = demo(section.SECTION)
    assert status == 1
    assert "read-back is off by" in text
    assert "read-back of skipped slots" in text


def test_a_wrong_layer_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mxfp8_moe.moe
    monkeypatch.setattr(mxfp8_moe, "moe", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    status, text = demo(layers.SECTION)
    assert status == 1
    assert "WRONG w8a8: the layer is 1.0" in text
    assert "WRONG w8a16: the layer is 1.0" in text


def test_one_wrong_scale_fails_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mxfp8_moe.quantize

    def wrong(*args: Any, **kwargs: Any) -> mxfp8_moe.MXFP8:
        data, scales = right(*args, **kwargs)
        scales.view(-1)[77] += 1
        return mxfp8_moe.MXFP8(data, scales)

    monkeypatch.setattr(mxfp8_moe, "quantize", wrong)
    status, text = demo(layers.SECTION)
    assert status == 1
    assert "WRONG w8a8: quantized activations: 1 of" in text


def test_without_the_extra_one_sentence_says_what_to_install(python: Any) -> None:
    result = python(
        "import sys; sys.modules['typer'] = None\nfrom abiding.cli import main; main()",
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.strip() == "abiding's command line needs typer; install it with: pip install 'abiding[cli]'"


def test_the_collectives_are_held_against_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that is one bit off on one rank, and a norm that is two steps off."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        everyone = run_processes(*args, **kwargs)
        by_name = {answer.call: answer for answer in everyone[1]}
        by_name["all_reduce"].results[0].view(torch.int16)[5, 17] ^= 1
        by_name["qk_norm"].results[1].view(torch.int16)[3] += 2
        return everyone

    monkeypatch.setattr(collectives, "run_processes", wrong)
    status, text = demo(collectives.SECTION)
    assert status == 1
    assert "all_reduce on rank 1: 1 of" in text
    assert "all_reduce on ranks 0 and 1" in text
    assert "qk_norm on rank 1:" in text
    assert text.count("WRONG ") >= 3
