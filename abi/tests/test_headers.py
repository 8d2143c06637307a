"""headers: what is kept of a wheel, what an interruption leaves, and what is said when something is wrong."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from abiding_abi import headers
from abiding_abi.errors import UserError

LIBRARY = "torch/include/torch/csrc/stable/library.h"
VERSION = "torch/include/torch/headeronly/version.h"
CONTENT = {
    LIBRARY: "// library",
    VERSION: "#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 13\n#define TORCH_VERSION_PATCH 1\n",
    "torch/include/torch/csrc/inductor/aoti_torch/c/shim.h": "// shim",
    "torch/include/torch/csrc/stable/c/": "",
    "torch/include/torch/extension.h": "// not stable",
    "torch/include/ATen/ATen.h": "// not stable",
    "torch/lib/libtorch_cpu.so": "a large library",
    "torch/include/torch/csrc/stable/../../../climbed.h": "// outside",
}
Download = Callable[[str, Path], Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABIDING_ABI_CACHE", str(tmp_path / "cache"))


def downloader(content: dict[str, str], calls: list[str]) -> Download:
    def download(release: str, folder: Path) -> Path:
        calls.append(release)
        path = folder / f"torch-{release}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, text in content.items():
                wheel.writestr(name, text)
        return path

    return download


def test_only_stable_headers_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    monkeypatch.setattr(headers, "_download", downloader(CONTENT, calls))
    found = headers.fetch("2.13.1")
    assert found.version == (2, 13)
    files = {p.relative_to(tmp_path / "cache").as_posix() for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    prefix = "headers/2.13.1/"
    assert files == {prefix + n.removeprefix("torch/") for n in list(CONTENT)[:3]}
    assert headers.fetch("2.13.1") == found
    assert headers.cached() == [found]
    assert calls == ["2.13.1"]


def test_a_release_without_patch_level_is_its_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(headers, "_download", downloader(CONTENT, calls))
    assert headers.fetch("2.13").release == "2.13.0"
    assert headers.choose("2.13", None).release == "2.13.0"


def test_an_interruption_leaves_nothing_half_and_the_wheel_for_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(headers, "_download", downloader(CONTENT, calls))
    unpack = headers._unpack

    def interrupted(wheel: Path, folder: Path) -> None:
        with headers._whole(folder) as partial:
            (partial / "include").mkdir()
            raise KeyboardInterrupt

    monkeypatch.setattr(headers, "_unpack", interrupted)
    with pytest.raises(KeyboardInterrupt):
        headers.fetch("2.13.1")
    assert headers.cached() == []
    monkeypatch.setattr(headers, "_unpack", unpack)
    headers.fetch("2.13.1")
    assert calls == ["2.13.1"]
    assert not list((headers.cache_folder() / "downloads").iterdir())


def test_a_broken_wheel_is_deleted_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(release: str, folder: Path) -> Path:
        (folder / "torch.whl").write_bytes(b"half of a wheel")
        return folder / "torch.whl"

    monkeypatch.setattr(headers, "_download", download)
    with pytest.raises(UserError, match=r"torch\.whl: File is not a zip file; it was deleted"):
        headers.fetch("2.13.0")
    assert not list((headers.cache_folder() / "downloads").iterdir())


def test_a_wheel_without_stable_headers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_download", downloader({"torch/include/torch/extension.h": ""}, []))
    with pytest.raises(UserError, match=r"no stable headers; torch 2\.9 was the first"):
        headers.fetch("2.4.0")
    assert headers.cached() == []


@pytest.mark.parametrize("release", ["2", "newest", "2.13.0; rm", "../2.13.0", ""])
def test_what_is_no_release_is_refused_before_anything_is_downloaded(release: str) -> None:
    with pytest.raises(UserError, match="is not a torch release"):
        headers.fetch(release)


def test_pip_saying_no_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError, match=r"torch 2\.13\.0 could not be downloaded: .*torch==2\.13\.0") as caught:
        headers.fetch("2.13.0")
    assert "\n" not in str(caught.value)


def test_of_a_folder_the_stable_part_alone_is_used(tmp_path: Path) -> None:
    for name, text in CONTENT.items():
        if ".." not in name and not name.endswith("/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    found = headers.choose(str(tmp_path / "torch"), None)
    assert found.release == "2.13.1"
    assert (found.include / "torch/csrc/stable/library.h").is_file()
    assert not (found.include / "torch/extension.h").exists()
    assert headers.choose(str(tmp_path / "torch/include"), None) == found


def test_a_folder_without_torch_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no torch/csrc/stable/library\.h"):
        headers.choose(str(tmp_path), None)


def test_headers_that_are_not_here_are_said() -> None:
    with pytest.raises(UserError, match=r"give their folder, or --fetch-headers 2\.99"):
        headers.choose("2.99", None)


def test_nothing_at_hand_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="install torch, or use --fetch-headers"):
        headers.choose(None, None)
