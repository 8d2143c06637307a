"""Bad input: one clear line, and the rest goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abiding_abi import lint, migrate
from abiding_abi.lint import Config
from abiding_abi.progress import progress
from abiding_abi.source import MAX_BYTES

GOOD = "at::Tensor a;\n"
EXAMPLE = (Path(__file__).parent.parent / "examples" / "rolling" / "csrc" / "rolling.cpp").read_text()
TOKENS = (
    *("at::Tensor", "torch::", "c10", "::", "Tensor", "t", "x", "(", ")", "[", "]", "{", "}", "<", ">", "<<<", ">>>"),
    *(
        ".",
        "->",
        ",",
        ";",
        "=",
        "+",
        "*",
        "&",
        '"',
        "'",
        "\\\n",
        "\n",
        " ",
        "//",
        "/*",
        "*/",
        "#",
        "#if 0\n",
        "#define",
    ),
    *("TORCH_CHECK", "AT_DISPATCH_FLOATING_TYPES", "PYBIND11_MODULE", "TORCH_LIBRARY", "TORCH_EXTENSION_NAME", "m.def"),
    *(
        "data_ptr",
        "accessor",
        "options()",
        "zeros_like",
        "view",
        "using namespace at",
        "return",
        "auto",
        "const",
        'R"(',
    ),
    *("float", "int", "1", "0.5f", "#include <torch/extension.h>\n", "getCurrentCUDAStream", "template", "ABI-TODO(X)"),
)
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def _written(folder: Path, data: bytes) -> Path:
    path = folder / "fuzz.cu"
    path.write_bytes(data)
    return path


def both(folder: Path, data: bytes) -> bytes:
    """Lint and migrate a text; what it becomes."""
    path = _written(folder, data)
    lint.run([path], Config(root=folder))
    result = migrate.run([path], Config(root=folder))
    return result.files[0].after if result.files else data


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("binary.cpp", b"\x7fELF\0\1at::Tensor", "binary; left out"),
        ("wide.cpp", "at::Tensor".encode("utf-16"), "UTF-16 is not read; store it as UTF-8"),
    ],
)
def test_unreadable_files_are_named_and_the_rest_goes_on(name: str, data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good.cpp").write_text(GOOD)
    report = lint.run([tmp_path], Config(root=tmp_path))
    assert report.problems == ((name, reason),)
    assert [f.path for f in report.findings] == ["good.cpp"]
    assert migrate.run([tmp_path], Config(root=tmp_path)).problems == [(name, reason)]


def test_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.cu").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    ((name, reason),) = lint.run([tmp_path], Config(root=tmp_path)).problems
    assert (name, reason) == ("huge.cu", "16 MiB is too large for a source file; left out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_forbidden_file(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text(GOOD)
    (tmp_path / "a.cpp").chmod(0)
    assert lint.run([tmp_path], Config(root=tmp_path)).problems == (("a.cpp", "permission denied"),)


def test_dangling_link_and_pipe(tmp_path: Path) -> None:
    (tmp_path / "link.cpp").symlink_to(tmp_path / "nowhere.cpp")
    os.mkfifo(tmp_path / "pipe.cpp")
    problems = lint.run([tmp_path], Config(root=tmp_path)).problems
    assert problems == (("link.cpp", "no such file"), ("pipe.cpp", "not a regular file"))


def test_a_file_and_links_to_it_are_one_file(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    header = tmp_path / "src" / "b.h"
    header.write_text("at::Tensor b;\n")
    (tmp_path / "src" / "a.cpp").symlink_to("b.h")  # comes first
    (tmp_path / "src" / "loop").symlink_to(tmp_path)
    (tmp_path / "src" / "self.cpp").symlink_to("self.cpp")
    (tmp_path / "include").symlink_to("src")
    (tmp_path / "c.cpp").write_text('#include "include/b.h"\nat::Tensor c;\n')
    config = Config(root=tmp_path)
    report = lint.run([tmp_path, tmp_path / "include" / "b.h"], config)
    assert [f.path for f in report.findings] == ["c.cpp", "src/b.h"]
    assert report.problems == (("src/self.cpp", "no such file"),)
    migrate.write(migrate.run([tmp_path], config))
    assert (tmp_path / "src" / "a.cpp").is_symlink()
    assert header.read_text() == "#include <torch/csrc/stable/tensor.h>\ntorch::stable::Tensor b;\n"


def test_root_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.cpp").write_text(GOOD)
    (tmp_path / "link").symlink_to("real")
    report = lint.run([tmp_path / "link"], Config(root=tmp_path / "link", exclude=("b*",)))
    assert [f.path for f in report.findings] == ["a.cpp"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_first_line_behind_a_byte_order_mark(newline: str, tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    text = f"#include <torch/extension.h>{newline}at::Tensor a;{newline}"
    findings = lint.run([_written(tmp_path, mark + text.encode())], Config(root=tmp_path)).findings
    assert [(f.line, f.column, f.rule.code) for f in findings][:1] == [(1, 11, "INC001")]
    want = text.replace("torch/extension.h", "torch/csrc/stable/tensor.h").replace("at::", "torch::stable::")
    assert both(tmp_path, mark + text.encode()) == mark + want.encode()
    # What stays for a person is marked behind the mark, which is no mark any more in the middle of a file.
    assert both(tmp_path, mark + b"#define X(t) at::nothing(t)\n").startswith(mark + b"// ABI-TODO(ABI001)")


def test_latin_1_survives(tmp_path: Path) -> None:
    data = b"// \xe4\xff\nat::Tensor a;\n"
    assert both(tmp_path, data).splitlines()[-2:] == [b"// \xe4\xff", b"torch::stable::Tensor a;"]


def test_every_half_of_a_file(tmp_path: Path) -> None:
    for end in range(0, len(EXAMPLE), 97):
        both(tmp_path, EXAMPLE[:end].encode())


@given(st.binary(max_size=300))
@QUICK
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    both(tmp_path_factory.getbasetemp(), data)


@given(st.lists(st.sampled_from(TOKENS), max_size=60).map(" ".join))
@QUICK
def test_any_tokens(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    both(tmp_path_factory.getbasetemp(), text.encode())


@given(st.integers(0, len(EXAMPLE)), st.integers(0, 200), st.sampled_from(TOKENS))
@settings(QUICK, max_examples=40)
def test_any_wound_in_a_real_file(tmp_path_factory: pytest.TempPathFactory, at: int, size: int, token: str) -> None:
    both(tmp_path_factory.getbasetemp(), (EXAMPLE[:at] + token + EXAMPLE[at + size :]).encode())


@pytest.mark.parametrize(
    "text",
    ["TORCH_CHECK(" * 5000, "{" * 20000, "t.data_ptr" + "<" * 5000, "'" * 20000, "#if 0\n" * 5000, 'R"(' * 3000,
     "void f(at::Tensor t) { t" + ".view(1)" * 300 + "; }"],
    ids=["parentheses", "braces", "angles", "quotes", "conditions", "raw", "chain"],
)  # fmt: skip
def test_cost_stays_near_the_length(text: str, tmp_path: Path) -> None:
    start = time.process_time()
    both(tmp_path, text.encode())
    assert time.process_time() - start < 30


def test_twenty_thousand_files(tmp_path: Path) -> None:
    for folder in range(200):
        (tmp_path / str(folder)).mkdir()
        for file in range(100):
            (tmp_path / str(folder) / f"{file}.cpp").write_text("int a;\n")
    (tmp_path / "7" / "7.cpp").write_text(GOOD)
    seen: list[tuple[int, int]] = []
    report = lint.run([tmp_path], Config(root=tmp_path), lambda done, total: seen.append((done, total)))
    assert (report.files, [f.path for f in report.findings]) == (20_000, ["7/7.cpp"])
    assert seen[-1] == (20_000, 20_000)


def test_progress_is_shown_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress("reading") as tell:
        assert tell is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("reading", least=2) as tell:
        assert tell
        tell(1, 3)
    assert "\rreading 1 of 3 files" in capsys.readouterr().err


def test_no_traceback_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_bytes(b"\0")
    for arguments in (["lint", "none"], ["lint", ".", "--target", "x"], ["explain", "XXX"], ["migrate", "none"],
                      ["migrate", ".", "--only", "QQQ"], ["ratchet", "check"]):  # fmt: skip
        command = [sys.executable, "-m", "abiding_abi", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("abiding-abi: ")
        assert len(done.stderr.strip().splitlines()) == 1
