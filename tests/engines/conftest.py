"""Fixtures of the engines' tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Abiding is active inside transformers."""
    from abiding.engines import transformers as engine

    quantizer: Any = pytest.importorskip("transformers.quantizers.quantizer_finegrained_fp8")
    # On a machine without a GPU, transformers would dequantize any FP8 checkpoint as it loads it.
    monkeypatch.setattr(quantizer.FineGrainedFP8HfQuantizer, "validate_environment", lambda *_args, **_kwargs: None)
    monkeypatch.setattr("abiding.engines.transformers._format._logged", set())
    logging.getLogger("transformers").propagate = True  # for caplog
    assert {status.state for status in engine.register().values()} == {"active"}
    yield
    assert {status.state for status in engine.unregister().values()} == {"off"}
