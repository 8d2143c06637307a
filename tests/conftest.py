"""Fixtures for all tests: devices, a seed, a fresh interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Test processes share few cores, where OpenMP threads that spin-wait slow each other down several times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Virtual ranks (abiding.testing.ranks) need these before anything uses a GPU.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")

import torch

import abiding
from abiding import _library

pytest.register_assert_rewrite("calls", "mxfp8_rules", "prologue_rules")  # in tests/helpers

TESTS = Path(__file__).parent
PROGRAMS = TESTS / "programs"
# What no release of torch changes: C++ programs without a header of torch, gates of tools/, the files of the wheel,
# benchmarks, and how the kernels' own arithmetic is kept from a caller's floating-point environment. `.ci/run` leaves
# these out where it runs the tests again under another torch, and what `is_like_another` says.
ONCE = (
    *("peer/test_explorer.py", "peer/test_ranks.py", "mxfp8_moe/test_plan.py", "tools", "abi", "benchmarks"),
    *("test_wheel.py", "test_float_environment.py"),
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    once = {path for path in {item.path for item in items} if any(path.is_relative_to(TESTS / name) for name in ONCE)}
    for item in items:
        if item.path in once or is_like_another(item):
            item.add_marker("once")


def is_like_another(item: pytest.Item) -> bool:
    """Whether a test crosses the boundary to torch as another of its function does. A `case` is sizes and values for
    the same machine code: every fifth stands for all. Of each `api`, the kernels stand for their reference too, since
    other tests compare the two."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    if getattr(params.get("api"), "__name__", "").startswith("abiding.reference."):
        return True
    cases = (mark.args[1] for mark in item.iter_markers("parametrize") if mark.args[0] == "case")
    return any(values.index(params["case"]) % 5 > 0 for values in cases)


def require_cuda(gpus: int = 1) -> torch.device:
    """The CUDA device. Without one the calling test skips, or fails if ABIDING_REQUIRE_CUDA=1."""
    reason = None
    if torch.cuda.device_count() < gpus:
        reason = (
            f"needs {gpus} GPU{'s' if gpus > 1 else ''}, torch {torch.__version__} sees {torch.cuda.device_count()}"
        )
    elif not _library.has_cuda_kernels():
        reason = _library.cuda_unavailable_reason() or "the CUDA binary is not loaded"
    if reason is None:
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("ABIDING_REQUIRE_CUDA") == "1":
        pytest.fail(f"ABIDING_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that has kernels."""
    return torch.device("cpu") if request.param == "cpu" else require_cuda()


@pytest.fixture
def cuda() -> torch.device:
    return require_cuda()


@pytest.fixture
def two_gpus() -> tuple[torch.device, torch.device]:
    require_cuda(gpus=2)
    return torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def inductor_on_cpu() -> None:
    """Skips if inductor cannot generate code for the CPU."""
    if not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    if " " in torch.__file__:
        pytest.skip("inductor does not quote a torch whose path has spaces")


@pytest.fixture
def inductor(device: torch.device, request: pytest.FixtureRequest) -> None:
    """Skips if inductor cannot generate code for the device."""
    if device.type == "cpu":
        request.getfixturevalue("inductor_on_cpu")


@pytest.fixture(autouse=True)
def seed() -> int:
    torch.manual_seed(0)
    return 0


@pytest.fixture
def python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs one of tests/programs, or a line of code, in a fresh interpreter with the same abiding and torch; `first` is
    put first on its path."""

    def run(
        program: Path | str, *arguments: object, first: Path | None = None, check: bool = True, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        packages = Path(abiding.__file__).parent.parent
        path = [*([str(first)] if first else []), *sys.path, str(packages)]
        start = [PROGRAMS / program] if isinstance(program, Path) else ["-c", program]
        result = subprocess.run(
            [sys.executable, *start, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if check and result.returncode != 0:
            pytest.fail(f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}")
        return result

    return run
