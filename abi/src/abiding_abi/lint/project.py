"""The files of a run: collected from paths, read once, and followed through their includes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from abiding_abi.errors import UserError
from abiding_abi.lint.config import Config
from abiding_abi.lint.facts import Facts, gather
from abiding_abi.lint.tensors import Tensors, Vocabulary
from abiding_abi.source import EXTENSIONS, Source, UnreadableError, read

LEFT_OUT = frozenset((".git", ".hg", "build", "dist", "node_modules", ".venv", "__pycache__", ".eggs"))
"""Folders that a search for sources does not enter."""

Progress = Callable[[int, int], None]


def collect(paths: Iterable[Path], config: Config) -> Iterator[Path]:
    """Source files of the paths: a file as it is, a folder with everything in it that looks like C++ or CUDA."""
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        for file in _walk(path) if path.is_dir() else (path,):
            key = file.absolute()
            if key not in seen and not excluded(file, config):
                seen.add(key)
                yield file


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in LEFT_OUT)
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(root, name)


def shown(path: Path, config: Config) -> str:
    """A path as reports show it: relative to the root where it lies below it."""
    absolute = Path(os.path.abspath(path))
    try:
        return absolute.relative_to(config.root).as_posix()
    except ValueError:
        return path.as_posix()


def excluded(path: Path, config: Config) -> bool:
    """Whether a pattern of the settings leaves a path out."""
    name = shown(path, config)
    return any(fnmatch(name, pattern) or fnmatch(name, pattern.rstrip("/") + "/*") for pattern in config.exclude)


class Project:
    """Sources by path, with facts and tensor knowledge."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.problems: list[tuple[Path, str]] = []
        self._sources: dict[str, Source | None] = {}
        self._facts: dict[str, Facts] = {}
        self._tensors: dict[str, Tensors] = {}
        self._includes: dict[str, list[Path]] = {}
        self._exists: dict[str, bool] = {}
        self.roots: list[Path] = list(config.include)
        self.libraries: dict[str, tuple[str, int]] = {}

    def source(self, path: Path) -> Source | None:
        """A file, or None after its problem was noted."""
        key = os.path.abspath(path)
        if key not in self._sources:
            try:
                self._sources[key] = read(path)
            except UnreadableError as error:
                self._sources[key] = None
                self.problems.append((path, str(error)))
        return self._sources[key]

    def gather(self, paths: Iterable[Path], progress: Progress | None = None) -> list[Source]:
        """Read the files and, where the settings say so, the project headers that they include."""
        queue = list(paths)
        self.roots += [
            path for path in dict.fromkeys(file.parent for file in queue) if path.name in ("include", "csrc", "src")
        ]
        found: dict[str, Source] = {}
        at = 0
        while at < len(queue):
            path = queue[at]
            at += 1
            if progress:
                progress(at, len(queue))
            key = os.path.abspath(path)
            source = self.source(path) if key not in found else None
            if source is None:
                continue
            found[key] = source
            if self.config.follow:
                queue += [header for header in self.included(source) if not excluded(header, self.config)]
        return list(found.values())

    def included(self, source: Source) -> list[Path]:
        """Project headers that a file includes by itself."""
        key = os.path.abspath(source.path)
        if key not in self._includes:
            found = []
            for line in source.includes:
                for folder in (source.path.parent, *self.roots):
                    path = Path(os.path.normpath(folder / line.path))
                    if self._is_file(path):
                        found.append(path)
                        break
            self._includes[key] = found
        return self._includes[key]

    def included_locally(self, source: Source, path: str) -> bool:
        """Whether an include of a name that looks like torch's is a file of the project."""
        return any(self._is_file(folder / path) for folder in (source.path.parent, *self.roots))

    def _is_file(self, path: Path) -> bool:
        key = str(path)
        if key not in self._exists:
            try:
                self._exists[key] = path.is_file()
            except (OSError, ValueError):
                self._exists[key] = False
        return self._exists[key]

    def closure(self, source: Source) -> list[Source]:
        """A file and the project headers behind it."""
        seen = {os.path.abspath(source.path)}
        result = [source]
        for item in result:
            for path in self.included(item):
                key = os.path.abspath(path)
                if key not in seen:
                    seen.add(key)
                    header = self.source(path)
                    if header:
                        result.append(header)
        return result

    def own_facts(self, source: Source) -> Facts:
        """Facts of one file alone."""
        key = os.path.abspath(source.path)
        if key not in self._facts:
            self._facts[key] = gather(source)
        return self._facts[key]

    def facts(self, source: Source) -> Facts:
        """Facts of a file together with its headers."""
        closure = self.closure(source)
        if len(closure) == 1:
            return self.own_facts(source)
        result = Facts()
        for item in closure:
            result.add(self.own_facts(item))
        return result

    def tensors(self, source: Source) -> Tensors:
        """Tensor knowledge of a file, what its headers declare included."""
        key = os.path.abspath(source.path)
        if key not in self._tensors:
            shared = Vocabulary()
            for item in self.closure(source)[1:]:
                if "Tensor" in item.code:
                    shared.add(self.tensors_alone(item).vocabulary)
            self._tensors[key] = Tensors(source, shared)
        return self._tensors[key]

    def tensors_alone(self, source: Source) -> Tensors:
        """Tensor knowledge of a file without its headers."""
        key = "alone:" + os.path.abspath(source.path)
        if key not in self._tensors:
            self._tensors[key] = Tensors(source)
        return self._tensors[key]
