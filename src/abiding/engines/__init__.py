"""Abiding inside serving engines: what it took over, and what it left to them.

Each engine is a package of this one and has a function ``register()``, which is safe to call at any time: it takes the
chosen jobs whose checks pass, leaves the others to the engine, and raises nothing. :func:`report` says what came of it.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from dataclasses import asdict
from typing import Any

import torch

import abiding
from abiding.engines._jobs import Engine, Job, State, Status, UnavailableError

NAMES = ("vllm", "transformers")
"""Packages of this one; each has ``ENGINE`` (an :class:`Engine`), ``chosen()`` and ``register()``."""

__all__ = ["NAMES", "Engine", "Job", "State", "Status", "UnavailableError", "report"]


def report(*, probe: bool = False) -> dict[str, Any]:
    """What runs here, as plain data that ``json.dumps`` takes: torch, CUDA, driver, GPUs, binaries, engines and jobs.

    Args:
        probe: also check the jobs that this process has not registered. This imports the engines that are installed.
    """
    return {
        "abiding": abiding.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver_cuda": _driver_cuda(),
        "gpus": _gpus(),
        "binaries": _binaries(),
        "engines": {name: _engine(name, probe) for name in NAMES},
    }


def _driver_cuda() -> str | None:
    """The CUDA release that the driver supports, or None without a driver."""
    version = ctypes.c_int()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if status else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for gpu in devices
    ]


def _binaries() -> list[dict[str, Any]]:
    cuda_reason = abiding.cuda_unavailable_reason()
    found = {path.name: str(path) for path in abiding.binaries()}
    return [
        {"name": "libabiding.so", "path": found.get("libabiding.so"), "usable": True, "reason": None},
        {
            "name": "libabiding_cuda.so",
            "path": found.get("libabiding_cuda.so"),
            "usable": cuda_reason is None,
            "reason": cuda_reason,
        },
    ]


def _engine(name: str, probe: bool) -> dict[str, Any]:
    module = importlib.import_module(f"abiding.engines.{name}")
    engine: Engine = module.ENGINE
    chosen = module.chosen()
    jobs = engine.status(probe=probe, chosen=chosen)
    return {
        "installed": engine.version(),
        "chosen": sorted(chosen),
        "how": engine.how,
        "jobs": {job: asdict(status) for job, status in jobs.items()},
    }
