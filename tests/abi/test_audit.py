"""The audit passes our binaries and fails libraries that break one promise each, for that reason."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import abiding

audit_module = pytest.importorskip("abiding.abi.audit", reason="the audit needs abiding[cli]")

GXX = shutil.which("g++")
needs_compiler = pytest.mark.skipif(GXX is None, reason="seeding a bad library needs g++")


@pytest.mark.parametrize("binary", abiding.binaries(), ids=lambda path: path.name)
def test_our_binaries_pass(binary: Path) -> None:
    (report,) = audit_module.audit([binary])
    assert report.problems == ()
    assert report.shims
    assert report.min_torch in ("2.9.0", "2.10.0")
    assert set(report.runtime) == {"GLIBC", "GLIBCXX"}


def problems(folder: Path, code: str, *needed: str, flags: tuple[str, ...] = ()) -> str:
    """Compile a library that has this code and names these (empty) libraries as needed; what the audit says."""
    for name in needed:
        compile_library(folder / name, "", f"-Wl,-soname,{name}")
    names = [f"-l:{name}" for name in needed]
    library = compile_library(folder / "seeded.so", code, f"-L{folder}", "-Wl,--no-as-needed", *names, *flags)
    (report,) = audit_module.audit([library])
    return "\n".join(report.problems)


def compile_library(path: Path, code: str, *flags: str) -> Path:
    command = [GXX or "g++", "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", "-o", str(path), *flags]
    subprocess.run(command, input=code, text=True, check=True)
    return path


@needs_compiler
def test_seeding_alone_is_no_problem(tmp_path: Path) -> None:
    code = 'extern "C" int aoti_torch_abi_version(); int f() { return aoti_torch_abi_version(); }'
    assert problems(tmp_path, code, "libtorch.so") == ""


@needs_compiler
def test_unstable_symbol(tmp_path: Path) -> None:
    code = "namespace c10 { void seeded(int); } void f() { c10::seeded(1); }"
    assert problems(tmp_path, code, "libtorch.so") == "unstable symbols of libtorch: c10::seeded(int)"


@needs_compiler
def test_foreign_library(tmp_path: Path) -> None:
    found = problems(tmp_path, "", "libcudart.so.13")
    assert found == "needs libraries that neither torch >= 2.10 nor every Linux promises: libcudart.so.13"


@needs_compiler
def test_function_of_a_newer_torch(tmp_path: Path) -> None:
    code = 'extern "C" int torch_from_blob(); int f() { return torch_from_blob(); }'
    found = problems(tmp_path, code, "libtorch.so")
    assert found == "needs torch 2.11.0 for torch_from_blob\nnot in the stable ABI of torch 2.10.0: torch_from_blob"


@needs_compiler
def test_function_that_no_release_knows(tmp_path: Path) -> None:
    code = 'extern "C" int aoti_torch_seeded(); int f() { return aoti_torch_seeded(); }'
    found = problems(tmp_path, code, "libtorch.so")
    assert found == "not in the stable ABI of torch 2.10.0: aoti_torch_seeded"


@needs_compiler
def test_libtorch_not_named(tmp_path: Path) -> None:
    code = 'extern "C" int aoti_torch_abi_version(); int f() { return aoti_torch_abi_version(); }'
    assert problems(tmp_path, code) == "calls libtorch without naming libtorch.so as needed"


@needs_compiler
def test_search_path(tmp_path: Path) -> None:
    found = problems(tmp_path, "", flags=("-Wl,-rpath,/seeded",))
    assert found == "has a library search path of its own: /seeded"


def test_not_a_library(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("text")
    (report,) = audit_module.audit([path])
    assert "cannot be read as a shared library" in report.problems[0]
    assert audit_module.run([path]) == 1


def test_nothing_to_audit() -> None:
    assert audit_module.run([]) == 2
