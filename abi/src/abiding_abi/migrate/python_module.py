"""The Python module that keeps a pybind11 module's names, so that its callers stay as they are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MARK = "made by abiding-abi migrate"
_EXTENSION = re.compile(r"\b\w*Extension\s*\(\s*(?:name\s*=\s*)?[\"']([\w.]+)[\"']")


def extension(source: Path, macro: str) -> tuple[str, Path]:
    """Name of the extension that a source belongs to, and the folder from which its dots count."""
    if macro != "TORCH_EXTENSION_NAME":
        return macro, build_folder(source.parent.absolute())
    folder = build_folder(source.parent.absolute())
    names = _extensions(folder / "setup.py")
    for name, text in names:
        if re.search(rf"\b{re.escape(source.name)}\b", text) or source.stem == name.rpartition(".")[2]:
            return name, folder
    return (names[0][0] if len(names) == 1 else source.stem), folder


@cache
def build_folder(start: Path) -> Path:
    """The folder with the build script of what lies in ``start``; without one, ``start`` itself."""
    for folder in (start, *start.parents):
        if (folder / "setup.py").is_file() or (folder / "pyproject.toml").is_file():
            return folder
    return start


@cache
def _extensions(setup: Path) -> list[tuple[str, str]]:
    try:
        text = setup.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = list(_EXTENSION.finditer(text))
    ends = [*(match.start() for match in found[1:]), len(text)]
    return [(match[1], text[match.end() : end]) for match, end in zip(found, ends, strict=False)]


def _assigned(namespace: str, name: str, there: str) -> list[str]:
    line = f"{name} = torch.ops.{namespace}.{name}"
    return [line] if there == "always" else [f'if hasattr(torch.ops.{namespace}, "{name}"):', f"    {line}"]


@dataclass
class Bindings:
    """What a pybind11 module bound."""

    functions: dict[str, str]
    """The old names: ``always`` there, or ``if`` the library has the operator."""
    attributes: list[tuple[str, str]]

    def either(self, other: Bindings) -> Bindings:
        """The names of two modules of one name, of which a build has one or both."""
        both = {*self.functions, *other.functions}
        always = {name for name in both if self.functions.get(name) == other.functions.get(name) == "always"}
        functions = {name: "always" if name in always else "if" for name in both}
        return Bindings(functions, [*dict.fromkeys([*self.attributes, *other.attributes])])


def path_of(name: str, folder: Path) -> Path:
    """Where the module of an extension goes; packages may lie in ``src``."""
    first = name.partition(".")[0]
    if "." in name and not (folder / first).is_dir() and (folder / "src" / first).is_dir():
        folder = folder / "src"
    return folder.joinpath(*name.split(".")).with_suffix(".py")


def occupied(path: Path) -> bool:
    """Whether a file stands there that is not ours to replace."""
    return path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")


def text(name: str, namespace: str, bindings: Bindings) -> str:
    """The module."""
    last = name.rpartition(".")[2]
    lines = [
        f'"""The operators of {name} under the names of its former pybind11 module; {MARK}.',
        "",
        f"The library next to this file is called _{last}.so or lib{last}.so; it may not keep the name {last}, since",
        "Python would take it for the module.",
        '"""',
        "",
        "from pathlib import Path",
        "",
        "import torch",
        "",
        "_FOLDER = Path(__file__).parent",
        f'_FOUND = sorted([*_FOLDER.glob("_{last}.*so"), *_FOLDER.glob("_{last}.so"), *_FOLDER.glob("lib{last}.so")])',
        "if not _FOUND:",
        f'    raise ImportError(f"{{_FOLDER}} holds no _{last}.so and no lib{last}.so: build the extension first")',
        "torch.ops.load_library(str(_FOUND[0]))",
        "",
        *(line for name, there in sorted(bindings.functions.items()) for line in _assigned(namespace, name, there)),
        *(f"{key} = {value}" for key, value in bindings.attributes),
        "",
    ]
    return "\n".join(lines)
