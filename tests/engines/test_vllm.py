"""vLLM's real Python, oldest and newest release, on a pretended Hopper GPU: what our jobs rest on, and what they do."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RELEASES: list[Path | None] = [*sorted((ROOT / "build" / "engines").glob("vllm-*[0-9]"))]
PROGRAM = Path("vllm_inside.py")


@pytest.fixture(params=RELEASES or [None], ids=lambda path: path.name if path else "none")
def scenario(
    request: pytest.FixtureRequest, python: Callable[..., subprocess.CompletedProcess[str]]
) -> Callable[..., str]:
    if os.environ.get("ABIDING_REQUIRE_ENGINES") != "1":
        pytest.skip("importing vLLM takes long; `make engines` unpacks it and runs these")
    if request.param is None:
        pytest.fail("no release of vLLM is unpacked under build/engines; tools/fetch_engines.py does that")

    return lambda name: python(PROGRAM, request.param, name).stdout


@pytest.mark.timeout(300)
def test_contracts_selection_and_undo(scenario: Callable[..., str]) -> None:
    """One process for all, because importing vLLM takes most of the time."""
    scenario("contracts_selection_and_undo")


@pytest.mark.timeout(300)
def test_layers_through_vllm(scenario: Callable[..., str]) -> None:
    """vLLM's own modular kernel and linear registry call ours, on the CPU; values are those of a direct call."""
    scenario("layers_through_vllm")


@pytest.mark.timeout(300)
def test_every_quantization_method(scenario: Callable[..., str]) -> None:
    """ModelOpt, compressed-tensors, online, and in newer releases Quark and INC, each constructed by its own class."""
    scenario("every_quantization_method")
