"""Which compiler errors count as sites that lint must find, and which follow from others."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import corpus
import corpus_truth

from abiding_abi.compilers import Diagnostic

CODE = """#include <torch/extension.h>
#include <vector>
#define CHECK_ALL(x) \\
  TORCH_CHECK((x).is_meta(), "meta")
#define CHECK_TWICE(x) CHECK_ALL(x); CHECK_ALL(x)
void f(torch::Tensor input) {
  CHECK_TWICE(input);
  auto out = zeros({2}); out.flip(0);
  AT_DISPATCH_ALL_TYPES(
      input.scalar_type(), "f",
      [&] { g(input.packed_accessor32<scalar_t, 2>()); });
  int m = input.size(0);
}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {}
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> corpus_truth.Code:
    (tmp_path / "a.cu").write_text(CODE)
    words = frozenset({"zeros", "m", "out", "PYBIND11_MODULE", "TORCH_CHECK", "Tensor", "input"})
    monkeypatch.setattr(corpus_truth, "torch_words", lambda: words)
    return corpus_truth.Code(tmp_path, [tmp_path / "a.cu"], frozenset())


@pytest.mark.parametrize(
    ("line", "column", "message", "name"),
    [
        (6, 15, "'Tensor' in namespace 'torch' does not name a type", "Tensor"),
        (6, 15, "'Tensor' is not a member of 'torch'; did you mean 'torch::stable::Tensor'?", "Tensor"),
        (8, 30, "'class torch::stable::Tensor' has no member named 'flip'", "flip"),
        (8, 0, 'class "torch::stable::Tensor" has no member "flip"', "flip"),
        (8, 14, "'zeros' was not declared in this scope", "zeros"),
        (8, 0, 'namespace "at" has no member "cat"', "cat"),
        (9, 0, 'identifier "TORCH_CHECK" is undefined', "TORCH_CHECK"),
        (14, 16, "expected constructor, destructor, or type conversion before '(' token", ""),
        (8, 4, "no match for 'operator+' (operand types are 'torch::stable::Tensor' and 'int')", ""),
    ],
)
def test_errors_that_name_something_of_torchs_are_sites(
    code: corpus_truth.Code, line: int, column: int, message: str, name: str
) -> None:
    assert corpus_truth.is_site(Diagnostic(code.folder / "a.cu", line, column, message), code)
    assert corpus_truth.name_of(message) == name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (8, "'out' was not declared in this scope; did you mean 'torch::headeronly::Tag::out'?"),
        (7, "'input' was not declared in this scope"),
        (12, 'identifier "m" is undefined'),
        (8, "no matching function for call to 'own_helper(torch::stable::Tensor&)'"),
        (8, "no match for 'operator+' (operand types are 'std::string' and 'int')"),
        (8, "'class std::vector<int>' has no member named 'flip'"),
        (8, "expected ';' before 'out'"),
    ],
)
def test_errors_that_follow_from_others_are_none(code: corpus_truth.Code, line: int, message: str) -> None:
    assert not corpus_truth.is_site(Diagnostic(code.folder / "a.cu", line, 3, message), code)


def test_sites_have_includes_extents_and_macros(
    code: corpus_truth.Code, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = replace(corpus.read_lock()[0], name="p", version="1", half="development")
    monkeypatch.setattr(corpus, "STORE", tmp_path / "store")
    monkeypatch.setattr(corpus_truth, "STORE", tmp_path / "store")
    package.folder.mkdir(parents=True)
    (package.folder / "a.cu").write_text(CODE)
    record = corpus_truth._record_of(package)
    record.parent.mkdir(parents=True)
    errors = [
        ("a.cu", 9, 0, 'class "torch::stable::Tensor" has no member "packed_accessor32"'),
        ("a.cu", 7, 3, "'class torch::stable::Tensor' has no member named 'is_meta'"),
        ("a.cu", 1, 0, 'namespace "c10" has no member "x" [other.h:3]'),
    ]
    record.write_text(json.dumps({"errors": errors, "trouble": [], "foreign": []}))
    found = {(s.line, s.last_line, s.name): s.macros for s in corpus_truth.sites(package)}
    assert found == {
        (1, 1, "torch/extension.h"): (),
        (7, 7, "is_meta"): (("a.cu", 5, 5), ("a.cu", 3, 4)),
        (9, 11, "packed_accessor32"): (),
    }
