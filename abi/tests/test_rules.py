"""The rule table: form, firing examples, silent examples, and the page that it makes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abiding_abi import migrate, rules, versions
from abiding_abi.explain import explain, page
from abiding_abi.lint import Finding
from abiding_abi.lint.checks import CHECKS
from abiding_abi.rules import Check, Rule
from examples import after, before

ABI = Path(__file__).parent.parent
RULES = rules.table()
codes = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


def test_codes_are_unique_and_in_a_group() -> None:
    assert len({rule.code for rule in RULES}) == len(RULES)
    assert all(re.fullmatch(r"[A-Z]{3}\d{3}", rule.code) and rule.group in rules.GROUPS for rule in RULES)


@codes
def test_fields_are_sound(rule: Rule) -> None:
    assert versions.parse(rule.runs) >= versions.OLDEST
    assert versions.parse(rule.headers) <= versions.NEWEST
    assert rule.before, "every rule shows a source on which it fires"
    assert rule.after or rule.kind != "mechanical" or not rule.before.strip()
    assert all(match.name in CHECKS for match in rule.match if isinstance(match, Check))
    assert rule.edit == "" or rule.edit in migrate.PASSES


@codes
def test_fires_on_its_example(rule: Rule, lint_text: Callable[..., list[Finding]]) -> None:
    assert rule.code in {finding.rule.code for finding in lint_text(before(rule), notes=True)}


# Of rules whose replacement is not one piece of C++: what is near to the legacy form, and right.
NEAR = {
    "INC014": '#include "KernelUtils.h"',
    "INC020": "#include <pybind11/pybind11.h>\nint f(py::object a);",
    "INC099": "#include <torch/headeronly/util/irange.h>",
    "TYP032": "namespace attic {}\nusing namespace attic;",
    "MET099": "struct Own { int renorm(int); };\nvoid f(Own t) { t.renorm(2); }",
    "CUD101": "__global__ void k(float*);\nvoid f(float* p) { k<<<1, 32>>>(p); }",
    "CUD102": "__global__ void k(float*);\nvoid f(torch::stable::Tensor t, cudaStream_t s) {\n"
    "torch::stable::accelerator::DeviceGuard guard(t.get_device_index());\n"
    "k<<<1, 32, 0, s>>>(t.mutable_data_ptr<float>()); }",
    "DIS099": "#define AT_DISPATCH_OWN(f) f()\nvoid g() { AT_DISPATCH_OWN([] {}); }",
    "REG008": "#include <pybind11/pybind11.h>\nint f(py::object a);",
    "REG015": "#define TORCH_FN(f) f\nauto g = TORCH_FN(f);",
    "REG022": "#define OWN_LIBRARY(n, m) STABLE_TORCH_LIBRARY(n, m)\nOWN_LIBRARY(n, m) {}",
    "ABI001": "namespace attic { int nothing(int); }\nint a = attic::nothing(1);",
    "ABI002": "#define AT_SOMETHING_ELSE(n) n\nint a = AT_SOMETHING_ELSE(1);",
    "ABI003": "struct THCar;\nTHCar* f();",
    "ABI901": "#include <ATen/ATen.h>  // abi: allow(INC001) the control of a test",
    "FUN019": "struct TensorIterator {};\nTensorIterator a;",
}


@codes
def test_is_silent_on_the_replacement(
    rule: Rule, lint_text: Callable[..., list[Finding]], migrated: Callable[..., str]
) -> None:
    if rule.code in NEAR:
        assert rule.code not in {finding.rule.code for finding in lint_text(NEAR[rule.code], notes=True)}
        return
    text = after(rule) if rule.after else migrated(before(rule))
    assert "ABI-TODO" not in text
    assert [f"{f.line}: {f.rule.code} {f.found}" for f in lint_text(text, ignore=("CUD102",))] == []


@codes
def test_explain_has_both_versions(rule: Rule) -> None:
    text = explain(rule.code.lower())
    assert f"headers   torch {rule.headers}" in text
    assert f"runs on   torch {rule.runs}" in text


def test_page_is_what_the_table_makes() -> None:
    assert (ABI / "docs" / "rules.md").read_text() == page()
    check = [sys.executable, str(ABI / "tools" / "make_rules_page.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0
