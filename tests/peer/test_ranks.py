"""The push protocol on the host: threads under ThreadSanitizer, processes that share memory, ranks that are missing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Compile = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


def passes(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="session")
def ranks(compile_program: Compile) -> Path:
    return compile_program("ranks.cpp", "-O2")


@pytest.fixture(scope="session")
def ranks_sanitized(compile_program: Compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program under ThreadSanitizer; skips where the operating system's kernel does not let that run."""
    program = compile_program("ranks.cpp", "-O1", "-g", "-Wno-tsan", "-fsanitize=thread")
    result = subprocess.run([str(program), "threads", "2", "1", "0"], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    return program


@pytest.mark.parametrize(("count", "calls"), [(2, 12000), (3, 8000), (4, 4000)])
def test_processes_get_the_sum_in_rank_order(ranks: Path, run_program: Run, count: int, calls: int) -> None:
    passes(run_program(ranks, "processes", count, calls, 1))


@pytest.mark.parametrize(("count", "calls"), [(2, 6000), (3, 3000), (4, 1500)])
def test_threads_do_not_race(ranks_sanitized: Path, run_program: Run, count: int, calls: int) -> None:
    passes(run_program(ranks_sanitized, "threads", count, calls, 2))


def test_the_sanitizer_sees_a_race(
    compile_program: Compile, run_program: Run, ranks_sanitized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSAN_OPTIONS", "halt_on_error=1")
    header = (Path(__file__).parents[2] / "csrc" / "peer" / "host.h").read_text()
    atomic = "__atomic_store_n(at, value, __ATOMIC_RELAXED);"
    assert header.count(atomic) == 1
    headers = {"host.h": header.replace(atomic, "*at = value;")}
    program = compile_program("ranks.cpp", "-O1", "-g", "-Wno-tsan", "-fsanitize=thread", headers=headers)
    result = run_program(program, "threads", 2, 100, 0, timeout=60)
    assert result.returncode != 0
    assert "data race" in result.stderr


@pytest.mark.parametrize("sanitized", [False, True])
def test_two_threads_on_one_communicator(request: pytest.FixtureRequest, run_program: Run, sanitized: bool) -> None:
    passes(run_program(request.getfixturevalue("ranks_sanitized" if sanitized else "ranks"), "twice"))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_survivors_name_a_rank_that_was_killed(ranks: Path, run_program: Run, count: int) -> None:
    passes(run_program(ranks, "killed", count, 10, 3))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_ranks_name_one_that_makes_no_call(ranks: Path, run_program: Run, count: int) -> None:
    passes(run_program(ranks, "missing", count))
