"""The corpus tool: what is committed is what the tool would write again, and archives cannot leave their folder."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load(name: str) -> ModuleType:
    """Import a script of tools/, which is no package."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


corpus = load("corpus")


def test_the_split_is_what_the_rule_gives() -> None:
    locked = corpus.read_lock()
    assert corpus.deal(list(reversed(locked))) == list(reversed(locked))


@pytest.mark.parametrize("half", ["development", "held-out"])
def test_each_half_holds_every_kind(half: str) -> None:
    packages = [p for p in corpus.read_lock() if p.half == half]
    assert len(packages) >= 20
    assert any(p.pybind for p in packages)
    assert any(p.library for p in packages)
    assert any(p.cuda_units for p in packages)
    assert any(not p.cuda_units for p in packages)


def test_what_was_seen_is_in_the_development_half() -> None:
    assert {p.half for p in corpus.read_lock() if p.seen} == {"development"}


def test_lock_survives_a_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = corpus.LOCK.read_bytes()
    packages = corpus.read_lock()
    monkeypatch.setattr(corpus, "LOCK", tmp_path / "lock.json")
    corpus.write_lock(packages)
    assert (tmp_path / "lock.json").read_bytes() == before


def test_members_that_climb_out_are_left_out(tmp_path: Path) -> None:
    archive = tmp_path / "p-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("p-1/a.cpp", "p-1/../../climbed.cpp", "p-1/sub/b.cu"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"int"))
    corpus.unpack(archive, tmp_path / "out" / "p")
    assert sorted(p.name for p in tmp_path.rglob("*.c*")) == ["a.cpp", "b.cu"]


def test_a_changed_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = replace(corpus.read_lock()[0], half="development")
    monkeypatch.setattr(corpus, "STORE", tmp_path)
    monkeypatch.setattr(corpus, "read_lock", lambda: [package])
    (tmp_path / "sdists").mkdir()
    (tmp_path / "sdists" / package.file).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="the lock says"):
        corpus.fetch(None)


def test_units_are_found_through_headers_and_foreign_code_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "csrc/third_party").mkdir(parents=True)
    (tmp_path / "csrc/a.cpp").write_text('#include "mine.h"\n')
    (tmp_path / "csrc/mine.h").write_text('#include "deeper.h"\n')
    (tmp_path / "csrc/deeper.h").write_text("#include <torch/extension.h>\n")
    (tmp_path / "csrc/plain.cpp").write_text("#include <vector>\n")
    (tmp_path / "csrc/third_party/x.cpp").write_text("#include <torch/torch.h>\n")
    assert [p.name for p in corpus.units(tmp_path)] == ["a.cpp"]
