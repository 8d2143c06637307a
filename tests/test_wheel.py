"""What the wheel holds, and what its modules import: no benchmark, no peer, nothing that a user does not need."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import abiding

PACKAGE = Path(abiding.__file__).parent
SHIPPED = (
    *("__init__.py", "__main__.py", "py.typed", "_api.py", "_fakes.py", "_library.py"),
    *("communicator.py", "_host_barrier.py", "_peer_memory.py"),
    *("mla_prologue.py", "mxfp8_moe.py", "reduce_rms.py"),
    *(f"reference/{name}.py" for name in ("__init__", "all_reduce", "mla_prologue", "mxfp8_moe", "reduce_rms")),
    *("engines/__init__.py", "engines/_jobs.py", "engines/transformers/*.py", "engines/vllm/*.py"),
    *("compat/__init__.py", "compat/vllm.py"),
    *("abi/__init__.py", "abi/audit.py", "abi/shims_2_10.txt"),
    *("cli/__init__.py", "cli/app.py", "cli/doctor.py"),
    *(f"cli/demo/{name}.py" for name in ("__init__", "section", "collectives", "mla_prologue", "mxfp8_moe")),
    *(f"testing/{name}.py" for name in ("__init__", "comparison", "guarded", "ranks", "timing")),
    *(f"testing/cases/{name}.py" for name in ("__init__", "all_reduce", "mla_prologue", "mxfp8_moe", "reduce_rms")),
    *("libabiding.so", "libabiding_cuda.so"),
)
"""Patterns of the files in the folder `abiding`. A file that matches none has to earn its place here."""
IMPORTED = {
    "abi/*": {"elftools", "rich", "torch_abi_audit"},
    "cli/*": {"rich", "typer"},
    "engines/transformers/*": {"transformers"},
    "engines/vllm/*": {"vllm"},
}
"""What a file's modules may import besides the standard library, torch and abiding."""


def files() -> list[str]:
    found = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.parts[-2:-1] != ("__pycache__",))


def test_the_wheel_holds_what_a_user_needs_and_nothing_else() -> None:
    assert [name for name in files() if not any(fnmatch(name, pattern) for pattern in SHIPPED)] == []


@pytest.mark.parametrize("name", [name for name in files() if name.endswith(".py")])
def test_a_module_imports_only_what_it_may(name: str) -> None:
    allowed = {"abiding", "torch", *sys.stdlib_module_names}
    allowed.update(*(names for pattern, names in IMPORTED.items() if fnmatch(name, pattern)))
    assert sorted(set(imported(ast.parse((PACKAGE / name).read_text()))) - allowed) == []


def imported(tree: ast.Module) -> Iterator[str]:
    """The packages that a module imports, anywhere in it; also by `import_module` of a name that begins literally."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value).partition(".")[0]


def test_imports_are_found_wherever_they_are() -> None:
    source = (
        "import a.b\ndef f():\n    from c.d import e\n    importlib.import_module('g.h')\n    import_module(f'i.{j}')\n"
    )
    assert list(imported(ast.parse(source))) == ["a", "c", "g", "i"]
