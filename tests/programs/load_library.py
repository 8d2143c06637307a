"""Loads torch, abiding and copies of both libraries in an order that the arguments say, and reports.

    python load_library.py STEP[=VALUE] ...

STEPS has the steps. Nothing is imported before a step asks for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys


def pretend_torch(version: str) -> None:
    import torch

    torch.__version__ = version  # type: ignore[assignment]


def report(_: str) -> None:
    """Import abiding, and print its library or the error."""
    try:
        package = importlib.import_module("abiding")
    except ImportError as error:
        print(type(error).__name__, error, sep=": ")
    else:
        print("imported", package.binaries()[0])


def report_copy(folder: str) -> None:
    """The same of the copy of the package in a folder, whatever else is installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "abiding"]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(
        "abiding", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    package = sys.modules["abiding"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(package)
    except ImportError as error:
        print(type(error).__name__, error, sep=": ")
    else:
        print("imported", package.binaries()[0])


def load(path: str) -> None:
    """A library, without the package's loader."""
    import torch

    try:
        torch.ops.load_library(path)
    except Exception as error:
        print(type(error).__name__, error)


def load_again(_: str) -> None:
    import torch

    import abiding

    abiding._library.load()
    torch.ops.load_library(abiding.binaries()[0])


def show_library(_: str) -> None:
    import abiding

    print(abiding.binaries()[0])


def show_packages(_: str) -> None:
    """What abiding imports beside torch and the standard library."""
    import torch  # noqa: F401

    before = {name.partition(".")[0] for name in sys.modules}
    for name in ("engines.vllm.operators", "reference", "testing", "testing.cases.mla_prologue"):
        importlib.import_module(f"abiding.{name}")
    after = {name.partition(".")[0] for name in sys.modules}
    print(sorted(after - before - set(sys.stdlib_module_names)))


def works(_: str) -> None:
    import torch

    cache = torch.zeros(1, 584, dtype=torch.uint8)
    kv, zero, table = torch.ones(1, 512, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64), torch.ones(1, 64)
    torch.ops.abiding.fused_deepseek_v4_kv_rope_quant_insert(kv, cache, zero, zero, table, 1)
    assert cache.any()
    print("works")


STEPS = {
    "torch": pretend_torch,
    "import": lambda _: importlib.import_module("abiding"),
    "report": report,
    "copy": report_copy,
    "load": load,
    "again": load_again,
    "library": show_library,
    "packages": show_packages,
    "works": works,
}

if __name__ == "__main__":
    for step in sys.argv[1:]:
        name, _, value = step.partition("=")
        STEPS[name](value)
