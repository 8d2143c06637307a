"""Abiding inside transformers: what registration puts in place, and what undoing it leaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

from abiding.engines import transformers as engine  # noqa: E402  (after the skip)

fp8: Any = pytest.importorskip("transformers.integrations.finegrained_fp8", reason="this transformers has no FP8")

ORIGINAL_GROUPED = fp8.FP8GroupedLinear.forward
pytestmark = pytest.mark.usefixtures("registered")


def test_register_is_idempotent_and_undone() -> None:
    registries = (fp8.ALL_FP8_EXPERTS_FUNCTIONS, transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS)
    with_abiding = [dict(registry) for registry in registries]
    forwards = fp8.FP8Linear.forward, fp8.FP8GroupedLinear.forward
    assert engine.register() == engine.register()
    assert [dict(registry) for registry in registries] == with_abiding
    assert (fp8.FP8Linear.forward, fp8.FP8GroupedLinear.forward) == forwards
    assert engine.chosen() == {"experts", "linear"}

    engine.register(["experts"])
    assert "abiding" in registries[0]
    assert fp8.FP8Linear.forward.__module__ == fp8.__name__
    engine.unregister()
    assert not engine.chosen()
    assert all("abiding" not in registry for registry in registries)
    for before, registry in zip(with_abiding, registries, strict=True):
        assert dict(registry) == {name: function for name, function in before.items() if name != "abiding"}
    for cls in (fp8.FP8Linear, fp8.FP8GroupedLinear):
        assert cls.forward.__module__ == fp8.__name__


def test_a_mode_that_would_change_the_model_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    before = engine._experts.mode, engine._linear.mode
    engine.register(mode="fp8")
    assert "mode is 'fp8'; expected w8a16 or w8a8" in caplog.text
    assert (engine._experts.mode, engine._linear.mode) == before


def test_what_others_put_in_our_place_stays(caplog: pytest.LogCaptureFixture) -> None:
    mapping = type(fp8.ALL_FP8_EXPERTS_FUNCTIONS)._global_mapping
    mapping["abiding"], fp8.FP8GroupedLinear.forward = print, len
    try:
        engine.unregister()
        assert mapping["abiding"] is print
        assert fp8.FP8GroupedLinear.forward is len
        assert "linear could not be undone" in caplog.text
    finally:
        del mapping["abiding"]
        fp8.FP8GroupedLinear.forward = ORIGINAL_GROUPED


@pytest.mark.parametrize(
    ("change", "job", "reason"),
    [
        (lambda patch: patch.delattr(fp8.FP8Experts, "_apply_gate"), "experts", "no FP8Experts._apply_gate"),
        (lambda patch: patch.delattr(fp8, "ALL_FP8_EXPERTS_FUNCTIONS"), "experts", "no ALL_FP8_EXPERTS_FUNCTIONS"),
        (
            lambda patch: patch.setitem(
                type(fp8.ALL_FP8_EXPERTS_FUNCTIONS)._global_mapping, "grouped_mm", lambda self, routing: None
            ),
            "experts",
            "grouped_mm takes ['self', 'routing']; expected",
        ),
        (lambda patch: patch.setattr(fp8.FP8Linear, "forward", lambda self, x: x), "linear", "FP8Linear.forward takes"),
        (lambda patch: patch.delattr(fp8, "FP8GroupedLinear"), "linear", "no FP8GroupedLinear"),
        (lambda patch: patch.setitem(__import__("sys").modules, "transformers", None), "experts", "does not import"),
    ],
)
def test_another_transformers_is_left_alone(
    change: Callable[[pytest.MonkeyPatch], None], job: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a signature differs, the job is left, the reason is logged once, and nothing is raised."""
    engine.unregister()
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        change(patch)
        status = engine.register()[job]
        assert status.state == "unavailable"
        assert reason in status.reason
        engine.unregister()
    assert len([record for record in caplog.records if f"{job} is left to transformers" in record.message]) == 1


def test_the_report_has_it() -> None:
    from abiding import engines

    found = engines.report(probe=True)["engines"]["transformers"]
    assert found["installed"] == transformers.__version__
    assert {name: job["state"] for name, job in found["jobs"].items()} == {"experts": "active", "linear": "active"}
