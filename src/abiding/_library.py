"""Find and load the two binaries: libabiding.so (schemas, CPU kernels) and, if torch has CUDA, libabiding_cuda.so."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)

# What waits call to run the handlers of signals, in the order of csrc/peer/interrupt.h.
_PYTHON_FUNCTIONS = (
    "PyGILState_Ensure",
    "PyGILState_Release",
    "PyErr_CheckSignals",
    "PyErr_Fetch",
    "PyErr_Restore",
    "Py_AddPendingCall",
)
_python_functions = (ctypes.c_void_p * len(_PYTHON_FUNCTIONS))(
    *(ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _PYTHON_FUNCTIONS)
)

_cuda_reason: str | None = "abiding's binaries are not loaded."


def binaries() -> list[Path]:
    """The paths of this installation's binaries, the CPU binary first."""
    return [path for name in ("libabiding.so", "libabiding_cuda.so") if (path := _find(name)) is not None]


def has_cuda_kernels() -> bool:
    """Whether the CUDA kernels are loaded and the driver supports them."""
    return _cuda_reason is None


def cuda_unavailable_reason() -> str | None:
    """Why the CUDA kernels are unavailable, in one sentence; None if they are available."""
    return _cuda_reason


def require_cuda_kernels() -> None:
    """Raise a RuntimeError with :func:`cuda_unavailable_reason` unless the CUDA kernels are available."""
    if _cuda_reason is not None:
        raise RuntimeError(_cuda_reason)


def load() -> None:
    """Load the binaries into this process.

    Raises:
        ImportError: torch is too old, the CPU binary is missing or does not load, or another copy is already loaded.
    """
    global _cuda_reason
    _check_torch()
    cpu = _find("libabiding.so")
    if cpu is None:
        raise ImportError(
            "abiding has no libabiding.so beside its Python files: install a wheel, or build one with `pip install .`"
        )
    try:
        _load_once(cpu)
    except OSError as error:
        raise ImportError(f"abiding's binary {cpu} does not load here: {error}") from None
    ctypes.CDLL(str(cpu)).abiding_peer_use_python(_python_functions)
    _cuda_reason = _load_cuda()


def _check_torch() -> None:
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and tuple(map(int, version.groups())) < OLDEST_TORCH:
        raise ImportError(
            f"abiding needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, whose stable ABI it is built on; "
            f"this is torch {torch.__version__}."
        )


def _find(name: str) -> Path | None:
    # An editable installation has two folders: the sources, and the build's output with the binaries.
    folders = map(Path, sys.modules[__package__].__path__)
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _load_once(path: Path) -> None:
    other = next((p for p in _mapped(path.name) if not p.samefile(path)), None)
    if other is not None:
        raise ImportError(
            f"abiding cannot load {path}: another copy of it, {other}, already serves this process; "
            "keep one installation of abiding on the path."
        )
    torch.ops.load_library(path)


def _mapped(name: str) -> set[Path]:
    """The files of this name that are mapped into this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps if line.endswith("/" + name)}
    return {path for path in paths if path.exists()}


def _load_cuda() -> str | None:
    """Load the CUDA binary; returns why it cannot be used, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA, so abiding's CUDA kernels are not loaded."
    path = _find("libabiding_cuda.so")
    if path is None:
        return "this build of abiding has no libabiding_cuda.so; build it where nvcc is found, or with ABIDING_CUDA=on."
    try:
        _load_once(path)
    except OSError as error:
        return f"abiding's CUDA binary does not load here: {error}"
    binary, cpu = ctypes.CDLL(str(path)), ctypes.CDLL(str(_find("libabiding.so")))
    # The CPU binary owns the communicator registry; each binary implements the peer memory of its own device type.
    binary.abiding_cuda_connect.restype = ctypes.c_void_p
    memory = binary.abiding_cuda_connect(cpu.abiding_peer_acquire, cpu.abiding_peer_release, cpu.abiding_peer_owns)
    cpu.abiding_peer_use_cuda(ctypes.c_void_p(memory))
    needed, found = binary.abiding_cuda_runtime_version(), binary.abiding_cuda_driver_version()
    if found // 1000 < needed // 1000:
        have = f"the driver supports CUDA {found // 1000}.{found % 1000 // 10}" if found else "there is no CUDA driver"
        return f"abiding's CUDA kernels need a driver for CUDA {needed // 1000} (>= 580 for CUDA 13), and {have}."
    return None
