"""symbols: the table against the specification's counts and against compilers, and the command."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from abiding_abi import headers, symbols
from abiding_abi.cli import app
from abiding_abi.compilers import compile_stable, find_cxx
from abiding_abi.versions import dotted, parse

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import make_symbols

RELEASES = {h.version: h for h in headers.cached()}
needs_all = pytest.mark.skipif(
    not find_cxx() or not {parse(r) for r in make_symbols.RELEASES} <= set(RELEASES),
    reason="the headers of every release of tools/make_symbols.py are not in the cache",
)


@pytest.mark.compile
@needs_all
def test_the_table_regenerates_byte_for_byte() -> None:
    assert make_symbols.make() == make_symbols.DATA.read_text()


def test_each_release_added_the_shims_that_its_headers_declare() -> None:
    count = Counter(dotted(s.headers) for s in symbols.table() if s.kind == "shim")
    assert count == {"2.9": 145, "2.10": 34, "2.11": 3, "2.12": 21, "2.13": 9, "2.14": 3, "2.15": 5}
    assert len(symbols.search(kind="shim")) == 220


@pytest.mark.parametrize(
    ("name", "first", "runs"),
    [
        ("torch::stable::permute", "2.14", "2.10"),
        ("torch::stable::sort", "2.15", "2.10"),
        ("torch::stable::index_select", "2.14", "2.10"),
        ("torch::stable::narrow", "2.9", "2.10"),
        ("torch::stable::fill_", "2.9", "2.10"),
        ("torch::stable::Tensor::has_storage", "2.14", "2.14"),
        ("torch::stable::Tensor::layout", "2.11", "2.10"),
        ("torch::stable::accelerator::Stream::nativeHandle", "2.13", "2.13"),
        ("torch::stable::Generator", "2.13", "2.13"),
        ("torch::headeronly::ScalarType::Float8_e8m0fnu", "2.9", "2.10"),
        ("STABLE_TORCH_ERROR_CODE_CHECK", "2.13", "2.10"),
        ("TORCH_BOX", "2.10", "2.10"),
        ("torch_call_dispatcher", "2.10", "2.10"),
        ("torch_tensor_to_pyobject", "2.14", "2.14"),
    ],
)
def test_both_versions(name: str, first: str, runs: str) -> None:
    (symbol,) = [s for s in symbols.table() if s.name == name]
    assert (dotted(symbol.headers), dotted(symbol.runs)) == (first, runs)


def test_an_added_overload_has_a_row_of_its_own() -> None:
    rows = {s.name: (dotted(s.headers), dotted(s.runs)) for s in symbols.search("torch::stable::view")}
    assert rows == {
        "torch::stable::view": ("2.10", "2.10"),
        "torch::stable::view(const Tensor&, ScalarType)": ("2.14", "2.10"),
    }


@pytest.mark.compile
@needs_all
@pytest.mark.parametrize("version", sorted(v for v in RELEASES if v >= (2, 10)), ids=dotted)
def test_compilers_agree_which_functions_each_release_has(version: tuple[int, int], tmp_path: Path) -> None:
    """A using declaration of every function: with each release's headers, exactly the absent ones fail."""
    functions = [s for s in symbols.table() if s.kind in ("function", "shim") and s.needs == "" and s.until is None]
    functions = [s for s in functions if "pyobject" not in s.name]
    includes = {f"#include <{s.header}>\n" for s in functions if s.headers <= version}
    source = tmp_path / "a.cpp"
    lines = [f"namespace n{i} {{ using ::{s.name}; }}" for i, s in enumerate(functions)]
    source.write_text("".join(sorted(includes)) + "\n".join(lines) + "\n")
    errors = compile_stable(source, RELEASES[version].include, version)
    offset = len(includes)
    assert [e for e in errors if e.line <= offset] == []
    absent = {functions[e.line - offset - 1].name for e in errors}
    assert absent == {s.name for s in functions if s.headers > version or s.runs > version}


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["symbols", *arguments])
    return done.exit_code, done.stdout


def test_the_command_lists() -> None:
    status, text = run("torch::stable::perm*")
    assert (status, text.splitlines()[1].split()) == (
        0,
        ["2.14", "2.10", "function", "torch::stable::permute", "<torch/csrc/stable/ops.h>"],
    )


def test_the_command_writes_json_of_what_a_target_and_headers_have() -> None:
    status, text = run("stream", "--kind", "member", "--target", "2.10", "--json")
    assert status == 0
    assert [s["name"] for s in json.loads(text)] == ["torch::stable::accelerator::Stream::id"]
    _, text = run("permute", "--headers", "2.13", "--json")
    assert json.loads(text) == []


def test_the_command_says_that_nothing_is_found() -> None:
    status, text = run("getCurrentCUDAStream")
    assert status == 1
    assert "nothing stable matches 'getCurrentCUDAStream'" in text
