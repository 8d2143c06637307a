"""torch's stable headers: found beside an installed torch, or taken from the package index, and nothing else kept.

What is cached is the part of ``torch/include`` that a stable extension may use, and no more: a file that reaches for
any other header of torch then fails to compile at its ``#include``. pip does the downloading, so that its settings for
indexes, proxies and certificates hold here too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from abiding_abi.errors import UserError
from abiding_abi.versions import Version, parse

STABLE = re.compile(
    r"torch/(csrc/stable/.+|headeronly/.+|csrc/inductor/aoti_torch/(c/.+|generated/.+|generated_enum_converters\.h))"
)
"""Paths under ``include`` that extensions with a stable ABI may include, directly or not."""

_FOREIGN_PLATFORM = ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.12", "--implementation", "cp"]
_MAX_HEADER = 16 << 20

Say = Callable[[str], None]


@dataclass(frozen=True, order=True)
class Headers:
    """One release's stable headers on this machine."""

    version: Version
    include: Path
    release: str


def cache_folder() -> Path:
    """Where headers are kept: ``ABIDING_ABI_CACHE``, or the user's cache folder."""
    if own := os.environ.get("ABIDING_ABI_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abiding-abi"


def cached() -> list[Headers]:
    """Every release in the cache, oldest first."""
    folder = cache_folder() / "headers"
    found = [p for p in folder.iterdir() if re.fullmatch(r"\d+\.\d+\.\d+", p.name)] if folder.is_dir() else []
    return sorted(Headers(parse(p.name), p / "include", p.name) for p in found)


def fetch(release: str, say: Say = lambda _: None) -> Headers:
    """The headers of a release such as ``2.13.0``, from the cache or else from the package index.

    A folder gets its final name only when it is whole. What an interrupted run had downloaded is used by the next.
    """
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", release):
        raise UserError(f"'{release}' is not a torch release such as 2.13.0")
    release = release if release.count(".") == 2 else f"{release}.0"
    folder = cache_folder() / "headers" / release
    if not folder.is_dir():
        say(f"headers of torch {release}: downloading the wheel; only its headers are kept")
        with _wheel_of(release) as wheel:
            _unpack(wheel, folder)
    return Headers(parse(release), folder / "include", release)


def of_installed(python: str | None = None) -> Headers | None:
    """The headers of the torch that this Python, or another one, would import; torch itself is not imported."""
    if python is None:
        spec = find_spec("torch")
        origin = spec.origin if spec else None
    else:
        code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        origin = done.stdout.strip() or None
    return of_folder(Path(origin).parent) if origin else None


def of_folder(folder: Path) -> Headers:
    """The headers in a torch package, or in its include folder; the stable ones alone, copied to the cache."""
    include = next((p for p in (folder / "include", folder) if (p / "torch/csrc/stable/library.h").is_file()), None)
    if include is None:
        raise UserError(f"{folder}: has no torch/csrc/stable/library.h, so these are no headers of torch >= 2.9")
    release = _release_of(include)
    stable = [p for p in sorted(include.rglob("*")) if p.is_file() and STABLE.match(p.relative_to(include).as_posix())]
    stamp = f"{sum(p.stat().st_size for p in stable):x}-{len(stable):x}"
    target = cache_folder() / "installed" / f"{release}-{stamp}"
    if not target.is_dir():
        with _whole(target) as partial:
            for path in stable:
                copy = partial / "include" / path.relative_to(include)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    return Headers(parse(release), target / "include", release)


def choose(given: str | None, fetch_release: str | None, say: Say = lambda _: None) -> Headers:
    """The headers to compile against: as asked for, else those of the torch at hand, else the newest in the cache."""
    if fetch_release:
        return fetch(fetch_release, say)
    if given:
        wanted = [h for h in cached() if given in (h.release, f"{h.version[0]}.{h.version[1]}")]
        if wanted:
            return wanted[-1]
        if Path(given).is_dir():
            return of_folder(Path(given))
        raise UserError(f"no headers of torch '{given}' here: give their folder, or --fetch-headers {given}")
    found = [h for h in (*cached(), of_installed()) if h]
    if not found:
        raise UserError("no headers of torch here: install torch, or use --fetch-headers 2.13.0, or --headers FOLDER")
    return max(found, key=lambda h: h.version)


def _release_of(include: Path) -> str:
    for name in ("torch/headeronly/version.h", "torch/csrc/api/include/torch/version.h"):
        path = include / name
        found = (
            re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", path.read_text()) if path.is_file() else []
        )
        if len(found) == 3:
            return ".".join(found)
    raise UserError(f"{include}: no torch/headeronly/version.h says which release this is")


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` if nothing was raised; two runs at once do no harm."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # else another run was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _wheel_of(release: str) -> Iterator[Path]:
    """The wheel of a release; it is deleted once its headers have been taken, and kept if that was interrupted."""
    folder = cache_folder() / "downloads" / release
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(iter(folder.glob("*.whl")), None) or _download(release, folder)
    try:
        yield wheel
    except zipfile.BadZipFile as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(f"{wheel.name}: {error}; it was deleted, try again") from None
    shutil.rmtree(folder, ignore_errors=True)


def _download(release: str, folder: Path) -> Path:
    # Which Python and system a wheel is for does not matter to headers: if there is none for this one, any will do.
    # The user's constraints say what may be installed, and nothing is: the last tries go without them.
    unset = {"PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": ""}
    problem = ""
    for environment in ({}, unset):
        for platform in ([], _FOREIGN_PLATFORM):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
            command += ["--only-binary=:all:", "--disable-pip-version-check", *platform]
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                done = subprocess.run(
                    [*command, "--dest", scratch, f"torch=={release}"],
                    env={**os.environ, **environment},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode == 0 and (found := next(iter(Path(scratch).glob("*.whl")), None)):
                    return Path(shutil.move(str(found), str(folder / found.name)))
                problem = problem or _last_error(done.stderr)
    raise UserError(f"torch {release} could not be downloaded: {problem}")


def _last_error(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip said nothing"])[-1]


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as opened, _whole(folder) as partial:
        for entry in opened.infolist():
            name = entry.filename.removeprefix("torch/include/")
            if entry.is_dir() or entry.file_size > _MAX_HEADER or ".." in name:
                continue
            if name != entry.filename and STABLE.fullmatch(name):
                target = partial / "include" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(opened.read(entry))
        if not (partial / "include/torch/csrc/stable/library.h").is_file():
            raise UserError(f"{wheel.name}: has no stable headers; torch 2.9 was the first release with them")
