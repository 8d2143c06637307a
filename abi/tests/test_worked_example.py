"""The documentation's worked example, from lint to a library that torch loads."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from abiding_abi import headers, lint, migrate, ratchet, verify
from abiding_abi.compilers import find_cxx
from abiding_abi.lint import Config
from abiding_abi.versions import OLDEST, parse
from extension import build

EXAMPLE = Path(__file__).parent.parent / "examples" / "rolling"
COMPARE = """
import torch
import rolling

def reference(x, window):
    return torch.stack([x[:, max(0, i - window + 1): i + 1].sum(1) for i in range(x.shape[1])], 1)

torch.manual_seed(0)
x = torch.randn(5, 40, dtype=torch.float64)
weights = torch.rand(5, dtype=torch.float64)
torch.testing.assert_close(rolling.rolling_sum(x, 7), reference(x, 7))
torch.testing.assert_close(rolling.rolling_sum(x, 7, weights), reference(x, 7) * weights[:, None])
y = x.clone()
assert rolling.rolling_mean_(y, 3) is y
torch.testing.assert_close(y, reference(x, 3) / 3)
assert torch.equal(rolling.busiest(x.float(), 4), reference(x, 4).argmax(1))
for wrong in (x[0], x.t()):
    try:
        rolling.rolling_sum(wrong, 7)
    except RuntimeError:
        continue
    raise AssertionError("accepted")
for window in (2**32 + 7, -(2**31) - 1):
    try:
        rolling.rolling_sum(x, window)
    except RuntimeError as error:
        assert "does not fit into int" in str(error)
        continue
    raise AssertionError("cut off")
torch.library.opcheck(torch.ops.rolling__C.rolling_mean_.default, (y, 3, 3.0), test_utils="test_schema")
print("same values")
"""


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example") / "rolling"
    shutil.copytree(EXAMPLE, folder)
    result = migrate.run([folder], Config(root=folder))
    assert result.todos == 0
    migrate.write(result)
    return folder


def test_lint_before_and_after(migrated: Path) -> None:
    before = lint.run([EXAMPLE], Config(root=EXAMPLE)).findings
    assert {f.rule.code for f in before} >= {"REG007", "TYP001", "CHK001", "MET001", "DIS001", "FUN016", "MET031"}
    assert lint.run([migrated], Config(root=migrated)).findings == ()


def test_a_second_migration_changes_nothing(migrated: Path) -> None:
    again = migrate.run([migrated], Config(root=migrated))
    assert again.edits == 0
    assert migrate.write(again) == 0


def test_python_callers_stay(migrated: Path) -> None:
    assert (migrated / "rolling" / "__init__.py").read_bytes() == (EXAMPLE / "rolling" / "__init__.py").read_bytes()


@pytest.mark.compile
def test_verify_build_load_and_audit(migrated: Path) -> None:
    cached = headers.cached()
    if find_cxx() is None or not cached:
        pytest.skip("needs a C++ compiler and torch headers: abiding-abi verify --fetch-headers 2.15.0")
    newest = max(cached, key=lambda found: found.version)
    result = verify.verify(migrated / "csrc" / "rolling.cpp", newest)
    assert (result.status, result.target) == ("stable", OLDEST)
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch to load the library")
    library = migrated / "rolling" / "lib_C.so"
    build(migrated / "csrc" / "rolling.cpp", library, newest.include)
    done = subprocess.run([sys.executable, "-c", COMPARE], cwd=migrated, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "same values"), done.stderr[-2000:]
    audited = pytest.importorskip("torch_abi_audit").inspect_extension(library).torch
    assert list(audited.unstable_symbols) == []
    assert audited.min_torch_version is not None
    assert parse(audited.min_torch_version) <= OLDEST
    assert ratchet.unstable_symbols(library) == {}
