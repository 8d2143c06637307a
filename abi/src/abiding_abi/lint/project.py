"""The files of a run: collected from paths, read once, and followed through their includes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from abiding_abi.errors import UserError
from abiding_abi.lint.config import Config
from abiding_abi.lint.facts import Facts, gather
from abiding_abi.lint.tensors import Tensors
from abiding_abi.lint.vocabulary import Vocabulary
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
        for file in map(real, _walk(path) if path.is_dir() else (path,)):
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


def real(path: Path) -> Path:
    """The file that a path leads to, so that two links to it are one file; the path itself where no link is in it."""
    folder, name = os.path.split(os.path.abspath(path))
    resolved = os.path.join(_real_folder(folder), name)
    if os.path.islink(resolved) and os.path.exists(resolved):
        resolved = os.path.realpath(resolved)
    return path if resolved == os.path.join(folder, name) else Path(resolved)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def shown(path: Path, config: Config) -> str:
    """A path as reports show it: relative to the root where it lies below it."""
    absolute = os.path.abspath(path)
    for root in (str(config.root), _real_folder(str(config.root))):
        if absolute.startswith(os.path.join(root, "")):
            return Path(os.path.relpath(absolute, root)).as_posix()
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
        self._resolved: dict[tuple[str, str], str | None] = {}
        self._closures: dict[str, list[Source]] = {}
        self.roots: list[Path] = list(config.include)
        self.libraries: dict[str, tuple[str, int]] = {}

    def with_sources(self, sources: Iterable[Source]) -> Project:
        """The same project with other texts of its files."""
        other = Project(self.config)
        other.roots = self.roots
        other.problems = self.problems
        other._sources = {**self._sources, **{os.path.abspath(source.path): source for source in sources}}
        other._exists = self._exists
        other._resolved = self._resolved
        return other

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
            found = (self._resolve(source, line.path) for line in source.includes)
            self._includes[key] = [Path(path) for path in found if path]
        return self._includes[key]

    def included_locally(self, source: Source, path: str) -> bool:
        """Whether an include of a name that looks like torch's is a file of the project."""
        return self._resolve(source, path) is not None

    def _resolve(self, source: Source, name: str) -> str | None:
        """The project's file that an include means."""
        key = os.path.dirname(source.path), name
        if key not in self._resolved:
            folders = (key[0], *map(str, self.roots), *self._above(key[0] if "/" in name else ""))
            candidates = (os.path.normpath(os.path.join(folder, name)) for folder in folders)
            found = next((path for path in candidates if self._is_file(path)), None)
            self._resolved[key] = str(real(Path(found))) if found else None
        return self._resolved[key]

    def _above(self, folder: str) -> Iterator[str]:
        """The folders above one, up to the root: many projects spell includes from their own top."""
        root = os.path.abspath(self.config.root)
        folder = os.path.abspath(folder) if folder else root
        while folder != root and folder.startswith(os.path.join(root, "")):
            folder = os.path.dirname(folder)
            yield folder

    def _is_file(self, path: str) -> bool:
        if path not in self._exists:
            try:
                self._exists[path] = os.path.isfile(path)
            except ValueError:
                self._exists[path] = False
        return self._exists[path]

    def closure(self, source: Source) -> list[Source]:
        """A file and the project headers behind it."""
        start = os.path.abspath(source.path)
        if start not in self._closures:
            seen = {start}
            result = [source]
            for item in result:
                for path in self.included(item):
                    key = os.path.abspath(path)
                    if key not in seen:
                        seen.add(key)
                        header = self.source(path)
                        if header:
                            result.append(header)
            self._closures[start] = result
        return self._closures[start]

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
            self._tensors[key] = Tensors(source, shared, bare=self._sees_tensor(self.closure(source)))
        return self._tensors[key]

    def _sees_tensor(self, closure: list[Source]) -> bool:
        """Whether an unqualified Tensor is torch's, rather than CuTe's or the project's own."""
        for source in closure:
            facts = self.own_facts(source)
            if "" in facts.prefixes or facts.names.get("Tensor") == "Tensor" or facts.stable:
                return True
        return False

    def tensors_alone(self, source: Source) -> Tensors:
        """Tensor knowledge of a file without its headers."""
        key = "alone:" + os.path.abspath(source.path)
        if key not in self._tensors:
            self._tensors[key] = Tensors(source, bare=self._sees_tensor(self.closure(source)))
        return self._tensors[key]
