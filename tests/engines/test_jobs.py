"""Jobs and their report, with an engine of our own: nothing raises, twice is once, off is undone."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from abiding import engines
from abiding.engines import Engine, Job, UnavailableError, vllm


class Switch(Job):
    """A job that is on or off, and notes what happens to it."""

    def __init__(self, name: str, fails: Exception | None = None, fails_late: bool = False) -> None:
        self.name, self.fails, self.fails_late = name, fails, fails_late
        self.is_on, self.events = False, list[str]()

    def check(self) -> None:
        self.events.append("check")
        if self.fails and not self.fails_late:
            raise self.fails

    def take(self) -> str:
        self.events.append("take")
        if self.fails:
            raise self.fails
        self.is_on = True
        return "it is on"

    def release(self) -> None:
        self.events.append("release")
        self.is_on = False


def states(engine: Engine, *chosen: str) -> dict[str, str]:
    return {name: status.state for name, status in engine.register(chosen).items()}


def test_a_job_is_taken_once_and_released(caplog: pytest.LogCaptureFixture) -> None:
    job, other = Switch("one"), Switch("two")
    engine = Engine("motor", [job, other], how="say so")
    with caplog.at_level(logging.INFO, "motor.abiding"):
        assert states(engine, "one") == {"one": "active", "two": "off"}
        assert states(engine, "one") == {"one": "active", "two": "off"}
        assert job.is_on
        assert job.events == ["check", "take"]
        assert not other.events
        assert states(engine) == {"one": "off", "two": "off"}
        assert not job.is_on
        assert states(engine, "one", "two") == {"one": "active", "two": "active"}
    assert caplog.messages == [
        "abiding: one is active: it is on",
        "abiding: one is off",
        "abiding: one is active: it is on",
        "abiding: two is active: it is on",
    ]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (UnavailableError("the engine is odd", "mend it"), "the engine is odd", "mend it"),
        (RuntimeError("boom"), "RuntimeError: boom", ""),
        (ImportError("no such thing"), "ImportError: no such thing", ""),
    ],
)
def test_a_failing_job_is_left_to_the_engine(
    caplog: pytest.LogCaptureFixture, error: Exception, reason: str, remedy: str, late: bool
) -> None:
    engine = Engine("motor", [Switch("bad", error, late), Switch("good")], how="say so")
    with caplog.at_level(logging.INFO, "motor.abiding"):
        for _ in range(2):
            assert states(engine, "bad", "good") == {"bad": "unavailable", "good": "active"}
    assert engine.status()["bad"] == engines.Status("unavailable", reason, remedy)
    assert caplog.messages == [f"abiding: bad is left to motor: {reason}", "abiding: good is active: it is on"]


def test_an_unknown_job_is_said(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine("motor", [Switch("one")], how="say so")
    assert states(engine, "tea") == {"one": "off"}
    assert caplog.messages == ["abiding: there is no job 'tea'; expected some of one"]


def test_probing_takes_nothing() -> None:
    good, bad = Switch("good"), Switch("bad", UnavailableError("odd", "mend it"))
    engine = Engine("torch", [good, bad], how="say so")  # a distribution that is installed
    found = engine.status(probe=True, chosen=["good"])
    assert found["good"].state == "ready"
    assert found["bad"] == engines.Status("unavailable", "odd", "mend it")
    assert engine.status(probe=True)["good"] == engines.Status("off", "not chosen", "say so")
    unregistered = engines.Status("off", "chosen, but not registered in this process", "say so")
    assert engine.status(chosen=["good"])["good"] == unregistered
    assert good.events == ["check"] * 2
    assert not good.is_on
    missing = Engine("no-such-engine", [good], how="say so").status(probe=True)["good"]
    assert (missing.state, missing.reason) == ("off", "no-such-engine is not installed")


@pytest.mark.parametrize(
    ("value", "chosen"),
    [
        (None, set()),
        ("", set()),
        ("0", set()),
        ("all", {"moe", "linear", "qk_norm", "all_reduce", "prologue"}),
        ("moe", {"moe"}),
        (" moe, linear,", {"moe", "linear"}),
    ],
)
def test_the_variable(monkeypatch: pytest.MonkeyPatch, value: str | None, chosen: set[str]) -> None:
    monkeypatch.delenv("ABIDING_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("ABIDING_VLLM", value)
    assert vllm.chosen() == chosen


def test_register_without_vllm(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The entry point in a process where vLLM does not import, as when its binaries do not fit."""
    result = python(Path("register_without_vllm.py"))
    states = dict.fromkeys(("moe", "linear", "qk_norm", "all_reduce", "prologue"), "unavailable")
    assert result.stdout.strip().splitlines()[-1] == str(states)


def test_report_is_plain_data() -> None:
    report = engines.report(probe=True)
    assert json.loads(json.dumps(report)) == report
    assert set(report["engines"]["vllm"]["jobs"]) == set(vllm.ENGINE.jobs)
    assert [binary["name"] for binary in report["binaries"]] == ["libabiding.so", "libabiding_cuda.so"]
    assert report["binaries"][0]["usable"]
    assert report["binaries"][0]["path"]


def test_the_entry_point_is_in_the_distribution() -> None:
    from importlib.metadata import entry_points

    (point,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "abiding"]
    assert point.load() is vllm.register


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    from abiding.cli import doctor

    doctor.run(as_json=True)
    assert set(json.loads(capsys.readouterr().out)["engines"]) == set(engines.NAMES)
    doctor.run(as_json=False)
    text = capsys.readouterr().out
    assert "libabiding.so: loaded" in text
    assert "moe: " in text
