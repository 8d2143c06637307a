"""verify: reading compilers' errors, and verdicts on small files with each release's headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from abiding_abi import headers
from abiding_abi.cli import app
from abiding_abi.compilers import Options, find_cxx, find_nvcc, read_diagnostics, target_macro
from abiding_abi.errors import UserError
from abiding_abi.verify import Result, exit_status, report, units, verify

RELEASES = headers.cached()
compile_test = pytest.mark.compile
needs_compiler = pytest.mark.skipif(not RELEASES or not find_cxx(), reason="no torch headers in the cache, or no g++")
needs_nvcc = pytest.mark.skipif(not RELEASES or not find_nvcc(), reason="no torch headers in the cache, or no nvcc")

INCLUDES = """#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
"""


def test_errors_of_gnu_are_told_where_own_code_causes_them(tmp_path: Path) -> None:
    own = tmp_path / "own.cpp"
    own.write_text("")
    text = f"""In file included from {own}:2:
/torch/ops.h: In instantiation of 'void f(T) [with T = int]':
{own}:7:47:   required from here
/torch/library.h:280:24: error: call of overloaded 'from<S>(S&)' is ambiguous
{own}:8:3: error: 'TORCH_CHECK' was not declared in this scope
{own}:8:3: error: 'TORCH_CHECK' was not declared in this scope
{own}:8:3: note: suggested alternative
{own}:1:10: fatal error: torch/extension.h: No such file or directory
/torch/other.h:3:1: error: stray
"""
    found = read_diagnostics(text, [tmp_path], own)
    assert [(d.line, d.column, d.message) for d in found] == [
        (7, 47, "call of overloaded 'from<S>(S&)' is ambiguous [library.h:280]"),
        (8, 3, "'TORCH_CHECK' was not declared in this scope"),
        (1, 10, "torch/extension.h: No such file or directory"),
        (1, 0, "stray [other.h:3]"),
    ]
    assert [d.missing_header for d in found] == [None, None, "torch/extension.h", None]


def test_errors_of_nvcc_and_clang_are_read(tmp_path: Path) -> None:
    own = tmp_path / "own.cu"
    own.write_text("")
    text = f"""{own}(8): error: identifier "bad" is undefined
/torch/ops.h(12): error: no instance of function template "g" matches
          detected during instantiation of "void h(T)" at line 5 of {own}
{own}(1): catastrophic error: cannot open source file "torch/extension.h"
{own}:9:2: error: no member named 'x' in namespace 'at'
{own}:1:10: fatal error: 'ATen/ATen.h' file not found
"""
    found = read_diagnostics(text, [tmp_path], own)
    assert [(d.line, d.missing_header) for d in found] == [
        *[(8, None), (5, None), (1, "torch/extension.h"), (9, None), (1, "ATen/ATen.h")]
    ]


def test_the_targets_macro_is_what_torch_documents() -> None:
    assert target_macro((2, 10)) == "0x020a000000000000"


def test_folders_are_walked_in_order_and_absence_is_said(tmp_path: Path) -> None:
    for name in ("b.cu", "a.cpp", "notes.txt", "build/gone.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [p.name for p in units([tmp_path])] == ["a.cpp", "b.cu"]
    with pytest.raises(UserError, match="no such file"):
        list(units([tmp_path / "absent"]))


@compile_test
@needs_compiler
def test_the_lowest_target_and_what_forces_it(tmp_path: Path) -> None:
    newest = RELEASES[-1]
    if newest.version < (2, 14):
        pytest.skip("needs headers of torch 2.14")
    source = tmp_path / "a.cpp"
    source.write_text(INCLUDES + "bool f(torch::stable::Tensor t) { return t.has_storage(); }\n")
    result = verify(source, newest)
    assert (result.status, result.target) == ("stable", (2, 14))
    assert [(d.line, "has_storage" in d.message) for d in result.forced_by] == [(4, True)]
    lines = list(report([result], (2, 10)))
    assert "  an older target fails, for want of has_storage (torch 2.14):" in lines
    assert lines[-1] == "torch 2.10 was asked for"
    assert exit_status([result]) == 0
    assert exit_status([result], (2, 10)) == 1


@compile_test
@needs_compiler
@pytest.mark.parametrize("release", RELEASES, ids=lambda h: h.release)
def test_a_stable_file_compiles_with_every_release(release: headers.Headers, tmp_path: Path) -> None:
    if release.version < (2, 10):
        pytest.skip("no target version before torch 2.10")
    source = tmp_path / "a.cpp"
    source.write_text(INCLUDES + "int64_t f(torch::stable::Tensor t) { return t.size(-1); }\n")
    assert verify(source, release) == Result(source, "stable", (2, 10))


@compile_test
@needs_compiler
def test_a_legacy_header_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text("#include <torch/extension.h>\nat::Tensor f(at::Tensor t) { return t; }\n")
    result = verify(source, RELEASES[-1])
    assert result.status == "unstable"
    assert [(d.line, d.message) for d in result.errors] == [(1, "<torch/extension.h> is not a stable header")]


@compile_test
@needs_compiler
def test_a_header_that_is_not_torchs_leaves_the_file_unknown(tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text(INCLUDES + '#include "own_thing.h"\n')
    result = verify(source, RELEASES[-1])
    assert (result.status, exit_status([result])) == ("unknown", 2)
    assert "own_thing.h was not found (give its folder with -I)" in result.note
    (tmp_path / "include").mkdir()
    (tmp_path / "include/own_thing.h").touch()
    assert verify(source, RELEASES[-1], Options(include=(tmp_path / "include",))).status == "stable"


@compile_test
@needs_nvcc
def test_a_kernel_launch_is_verified_by_nvcc(tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    launch = "void f(torch::stable::Tensor t) { k<<<1, 32>>>(t.mutable_data_ptr<float>()); }\n"
    source.write_text(INCLUDES + "__global__ void k(float* p) { *p = 1; }\n" + launch)
    assert verify(source, RELEASES[-1]) == Result(source, "stable", (2, 10))
    source.write_text(INCLUDES + "void f(torch::stable::Tensor t) { t.cumsum(0); }\n")
    result = verify(source, RELEASES[-1])
    assert [(d.line, "cumsum" in d.message) for d in result.errors] == [(4, True)]


@compile_test
@needs_nvcc
def test_cpp_files_find_the_headers_of_cuda(tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text("#include <cuda_runtime.h>\n" + INCLUDES + "cudaStream_t stream;\n")
    assert verify(source, RELEASES[-1]) == Result(source, "stable", (2, 10))


def test_without_a_compiler_nothing_is_claimed(tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    source.touch()
    result = verify(source, headers.Headers((2, 13), tmp_path, "2.13.0"), Options(nvcc="no-such-nvcc"))
    assert (result.status, result.note) == ("unknown", "not compiled: no nvcc (give --nvcc) on this machine")


@compile_test
@needs_compiler
def test_a_compiler_that_does_not_end_leaves_the_file_unknown(tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text(INCLUDES)
    result = verify(source, RELEASES[-1], Options(timeout=0.001))
    assert result.status == "unknown"
    assert "stopped after" in result.note


@compile_test
@needs_compiler
def test_the_command_reports_and_exits(tmp_path: Path) -> None:
    (tmp_path / "good.cpp").write_text(INCLUDES)
    (tmp_path / "bad.cpp").write_text(INCLUDES + "at::Tensor t;\n")
    release = RELEASES[-1].release
    done = CliRunner().invoke(app, ["verify", str(tmp_path), "--headers", release, "--json"])
    assert done.exit_code == 1
    data = json.loads(done.stdout)
    assert [(Path(f["path"]).name, f["status"]) for f in data["files"]] == [
        ("bad.cpp", "unstable"),
        ("good.cpp", "stable"),
    ]
    assert data["files"][0]["errors"][0]["line"] == 4
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "good.cpp"), "--headers", release, "--target", "2.10"])
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "1 files: 1 stable; together they need torch >= 2.10")
