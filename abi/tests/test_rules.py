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


@codes
def test_is_silent_on_the_replacement(rule: Rule, lint_text: Callable[..., list[Finding]]) -> None:
    if not rule.after:
        pytest.skip("the replacement is not one piece of C++")
    assert [f"{f.line}: {f.rule.code} {f.found}" for f in lint_text(after(rule), ignore=("CUD102",))] == []


@codes
def test_explain_has_both_versions(rule: Rule) -> None:
    text = explain(rule.code.lower())
    assert f"headers   torch {rule.headers}" in text
    assert f"runs on   torch {rule.runs}" in text


def test_page_is_what_the_table_makes() -> None:
    assert (ABI / "docs" / "rules.md").read_text() == page()
    check = [sys.executable, str(ABI / "tools" / "make_rules_page.py"), "--check"]
    assert subprocess.run(check, check=False).returncode == 0
