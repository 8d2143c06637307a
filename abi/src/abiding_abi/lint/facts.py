"""What a file declares for the files that include it: using directives, aliases and macros of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from abiding_abi.source import Source

SPACES = ("at", "c10", "torch")

_USING_NAMESPACE = re.compile(r"using\s+namespace\s+(?:::\s*)?((?:at|c10|torch)(?:\s*::\s*\w+)*)\s*;")
_USING_NAME = re.compile(r"using\s+(?:::\s*)?((?:at|c10|torch)(?:\s*::\s*\w+)+)\s*;")
_INSIDE = re.compile(r"namespace\s+((?:at|c10|torch)(?:\s*::\s*\w+)*)\s*\{")
_ALIAS = re.compile(r"namespace\s+(\w+)\s*=\s*(?:::\s*)?((?:at|c10|torch)(?:\s*::\s*\w+)*)\s*;")
_TYPE_NAME = re.compile(
    r"\b(?:struct|class|enum|enum\s+class|union)\s+(?:[A-Z_]+\s+)?(\w+)\s*(?:final\s*)?[:{]|\busing\s+(\w+)\s*="
)
_STABLE = re.compile(r"using\s+(?:namespace\s+torch\s*::\s*stable\s*;|torch\s*::\s*stable\s*::\s*Tensor\s*;)")
_PYBIND = re.compile(r"namespace\s+(\w+)\s*=\s*pybind11\s*;")


@dataclass
class Facts:
    """Facts of one file, or of a file together with what it includes."""

    prefixes: set[str] = field(default_factory=set)
    """Namespaces inside at, c10 and torch that are visible without qualification; "" is the outermost."""
    names: dict[str, str] = field(default_factory=dict)
    """Names of using declarations, and the path inside at, c10 or torch that they mean."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Namespace aliases, with the whole path."""
    macros: set[str] = field(default_factory=set)
    pybind: set[str] = field(default_factory=set)
    stable: bool = False
    """Whether torch::stable::Tensor is visible as Tensor."""

    def add(self, other: Facts) -> None:
        """Take over what an included file declares."""
        self.prefixes |= other.prefixes
        self.names.update(other.names)
        self.aliases.update(other.aliases)
        self.macros |= other.macros
        self.pybind |= other.pybind
        self.stable |= other.stable


def _inner(path: str) -> str:
    parts = [part.strip() for part in path.split("::")]
    return "::".join(parts[1:])


def declared_types(source: Source) -> set[str]:
    """Names of classes, enumerations and aliases that a file declares."""
    return {match[1] or match[2] for match in _TYPE_NAME.finditer(source.code)}


def gather(source: Source) -> Facts:
    """The facts of one file alone."""
    code = source.code
    facts = Facts()
    if "namespace" in code or "using" in code:
        for pattern in _USING_NAMESPACE, _INSIDE:
            for match in pattern.finditer(code):
                path = [part.strip() for part in match[1].split("::")]
                if path[:1] == ["torch"] and path[1:2] in (["stable"], ["headeronly"]):
                    continue
                if pattern is _INSIDE and path[0] == "torch":
                    continue
                inner = "::".join(path[1:])
                facts.prefixes |= (
                    {"", inner + "::"} if pattern is _INSIDE and inner else {inner + "::" if inner else ""}
                )
        for match in _USING_NAME.finditer(code):
            inner = _inner(match[1])
            if not inner.startswith(("stable::", "headeronly::")):
                facts.names[inner.rpartition("::")[2]] = inner
        for match in _ALIAS.finditer(code):
            facts.aliases[match[1]] = re.sub(r"\s", "", match[2])
        facts.stable = bool(_STABLE.search(code))
        facts.pybind |= {m[1] for m in _PYBIND.finditer(code)}
    facts.macros |= {name for name, _, _ in source.defines}
    return facts
