"""What migrate does to the files of a project."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from abiding_abi import migrate
from abiding_abi.errors import UserError
from abiding_abi.lint import Config


def test_second_run_keeps_the_header_of_wrappers(tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    path.write_text(
        "at::Tensor f(at::Tensor t) { auto a = at::cat({t, t}, 0).flip({0}); a.true_divide_(t); return a * t; }\n"
    )
    first = migrate.run([tmp_path], Config(root=tmp_path))
    assert "abi_ops::flip(abi_ops::cat({t, t}, 0), {0})" in first.files[0].after.decode()
    migrate.write(first)
    assert migrate.write(migrate.run([tmp_path], Config(root=tmp_path))) == 0


def test_header_that_leans_on_its_includer_gets_the_version_macros(tmp_path: Path) -> None:
    header = tmp_path / "a.h"
    header.write_text("#pragma once\n#if TORCH_VERSION_MAJOR >= 2\n#define NEW 1\n#endif\n")
    (tmp_path / "a.cpp").write_text('#include <torch/extension.h>\n#include "a.h"\nint x = NEW;\n')
    result = migrate.run([tmp_path], Config(root=tmp_path))
    after = {file.path.name: file.after.decode() for file in result.files}
    assert after["a.h"] == header.read_text().replace("once\n", "once\n#include <torch/headeronly/version.h>\n")
    assert result.todos == 0


def test_write_refuses_a_file_that_changed_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    path.write_text("at::Tensor a;\n")
    result = migrate.run([path], Config(root=tmp_path))
    path.write_text("at::Tensor b;\n")
    with pytest.raises(UserError, match=r"^a.cpp changed meanwhile; nothing written$"):
        migrate.write(result)
    assert path.read_text() == "at::Tensor b;\n"


def test_read_only_file_stops_everything(tmp_path: Path) -> None:
    for name in ("a.cpp", "b.cpp"):
        (tmp_path / name).write_text("at::Tensor a;\n")
    (tmp_path / "b.cpp").chmod(0o444)
    with pytest.raises(UserError, match=r"^b.cpp: read-only; nothing written$"):
        migrate.write(migrate.run([tmp_path], Config(root=tmp_path)))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(("a.cpp", "b.cpp"), "at::Tensor a;\n")


def test_failure_while_writing_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.cpp", "b.cpp"):
        (tmp_path / name).write_text("at::Tensor a;\n")
    result = migrate.run([tmp_path], Config(root=tmp_path))
    real = os.replace

    def fails(old: Path, new: Path) -> None:
        if new.name == "b.cpp":
            raise OSError(5, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError, match=r"^b.cpp: input/output error; 1 written$"):
        migrate.write(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.cpp", "b.cpp"]


def _extension(folder: Path, name: str) -> None:
    """A package of one file with a pybind11 module that needs the header of wrappers."""
    (folder / "csrc").mkdir(parents=True)
    (folder / name).mkdir()
    (folder / "setup.py").write_text(f"CppExtension('{name}._C', ['csrc/a.cpp'])\n")
    (folder / "csrc" / "a.cpp").write_text(
        "#include <torch/extension.h>\nat::Tensor f(at::Tensor x) { return at::cat({x, x}, 0); }\n"
        'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("f", &f); }\n'
    )


def test_two_extensions_of_one_repository_stay_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        _extension(tmp_path / name, name)
    result = migrate.run([tmp_path], Config(root=tmp_path))
    new = ["one/csrc/abi_ops.h", "one/one/_C.py", "two/csrc/abi_ops.h", "two/two/_C.py"]
    assert [name for name, _, _ in result.new] == new
    for file, name in zip(result.files, ("one", "two"), strict=True):
        assert '#include "abi_ops.h"' in file.after.decode()
        assert f"STABLE_TORCH_LIBRARY({name}__C, m)" in file.after.decode()


def test_package_in_a_folder_src(tmp_path: Path) -> None:
    _extension(tmp_path, "pack")
    (tmp_path / "src").mkdir()
    (tmp_path / "pack").rename(tmp_path / "src" / "pack")
    result = migrate.run([tmp_path], Config(root=tmp_path))
    assert "src/pack/_C.py" in [name for name, _, _ in result.new]


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    _extension(tmp_path, "pack")
    module, header = tmp_path / "pack" / "_C.py", tmp_path / "csrc" / "abi_ops.h"
    module.write_text("mine = 1\n")
    result = migrate.run([tmp_path], Config(root=tmp_path))
    assert "ABI-TODO(REG007): _C.py stands where the module of the old names would go" in result.files[0].after.decode()
    assert module not in result.modules
    header.write_text("#pragma once\n")
    with pytest.raises(UserError, match=r"abi_ops.h is not the header of wrappers"):
        migrate.run([tmp_path], Config(root=tmp_path))


def test_two_modules_of_one_name_keep_the_names_of_both(tmp_path: Path) -> None:
    _extension(tmp_path, "pack")
    (tmp_path / "csrc" / "b.cpp").write_text(
        "#include <torch/extension.h>\nat::Tensor f(at::Tensor x);\nvoid g(at::Tensor x) {}\n"
        'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("f", &f); m.def("g", &g); }\n'
    )
    result = migrate.run([tmp_path], Config(root=tmp_path))
    text = result.modules[tmp_path / "pack" / "_C.py"]
    assert "\nf = torch.ops.pack__C.f\n" in text
    assert 'if hasattr(torch.ops.pack__C, "g"):\n    g = torch.ops.pack__C.g\n' in text


def test_diff_names_every_file_from_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _extension(tmp_path, "pack")
    monkeypatch.chdir(tmp_path / "csrc")
    names = re.findall(r"^\+\+\+ b/(.*)$", migrate.diff(migrate.run([tmp_path], Config(root=tmp_path))), re.MULTILINE)
    assert names == ["csrc/a.cpp", "csrc/abi_ops.h", "pack/_C.py"]


def test_includes_spelled_as_on_windows(migrated: Callable[..., str]) -> None:
    text = migrated("#include <torch\\extension.h>\nat::Tensor a;\n")
    assert text == "#include <torch/csrc/stable/tensor.h>\ntorch::stable::Tensor a;\n"


def test_two_passes_over_options_are_one_stage(tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    path.write_text(
        "at::Tensor f(at::Tensor t) {\n  auto a = at::zeros({2}, t.options());\n"
        "  auto o = torch::dtype(torch::kInt);\n  auto b = at::zeros({2}, o);\n  o = o.dtype(torch::kByte);\n"
        "  return at::zeros({2}, o);\n}\n"
    )
    kinds = [stage.kind for stage in migrate.run([path], Config(root=tmp_path)).files[0].stages]
    assert kinds == [kind for kind in migrate.KINDS if kind in kinds]
    assert kinds.count("options") == 1
