"""Operator schemas, and which C++ types carry their values through TORCH_BOX."""

from __future__ import annotations

import re
from dataclasses import dataclass

from abiding_abi import lexical
from abiding_abi.signatures import bare, normalized

STABLE_TENSOR = "torch::stable::Tensor"
_SPACE = r"(?:::)?(?:(?:at|c10|torch|std|caffe2)::)*(?:(?:stable|headeronly)::)*"
_INTEGERS = frozenset(
    (
        "int",
        "int32_t",
        "uint32_t",
        "unsigned",
        "unsigned int",
        "short",
        "int16_t",
        "uint16_t",
        "char",
        "int8_t",
        "uint8_t",
        "signed char",
        "unsigned char",
        "long",
        "long int",
        "unsigned long",
        "size_t",
        "std::size_t",
        "uint64_t",
        "long long",
        "unsigned long long",
        "std::int64_t",
        "std::int32_t",
        "std::uint32_t",
        "std::uint64_t",
        "ssize_t",
        "ptrdiff_t",
        "std::ptrdiff_t",
        "uintptr_t",
        "intptr_t",
        "std::uintptr_t",
        "unsigned short",
        "signed",
        "signed int",
        "long long int",
        "unsigned long int",
        "std::int8_t",
        "std::uint8_t",
        "std::int16_t",
        "fptr_t",
    )
)
_SAME_AS_INT64 = frozenset(("long", "long int", "std::int64_t"))
_STABLE_NAMES = {
    "ScalarType": ("ScalarType", "torch::headeronly::ScalarType"),
    "Dtype": ("ScalarType", "torch::headeronly::ScalarType"),
    "Device": ("Device", "torch::stable::Device"),
    "Layout": ("Layout", "torch::headeronly::Layout"),
    "MemoryFormat": ("MemoryFormat", "torch::headeronly::MemoryFormat"),
}


@dataclass(frozen=True)
class Boxed:
    """A C++ type as the boundary sees it."""

    schema: str
    """The type in a schema."""
    wide: str
    """The C++ type that boxes right."""
    exact: bool
    """Whether the given type is already that one (references and const apart)."""


def box(cpp: str) -> Boxed | None:
    """What a parameter's or result's type becomes; None where nothing carries it."""
    text = bare(cpp)
    if text in ("const char*", "char*"):
        return Boxed("str", "std::string", False)
    if text.endswith("*"):
        return Boxed("str", "std::string", False) if text == "char *" else None
    if text == "int64_t":
        return Boxed("int", "int64_t", True)
    if text in _INTEGERS:
        return Boxed("int", "int64_t", text in _SAME_AS_INT64)
    if text in ("double", "bool"):
        return Boxed({"double": "float"}.get(text, text), text, True)
    if text == "float":
        return Boxed("float", "double", False)
    if text == "void":
        return Boxed("()", "void", True)
    name = re.sub(rf"^{_SPACE}", "", text)
    if name == "Tensor":
        return Boxed("Tensor", STABLE_TENSOR, True)
    if name in ("string", "string_view"):
        return Boxed("str", "std::string" if name == "string" else "std::string_view", True)
    if name in _STABLE_NAMES:
        schema, wide = _STABLE_NAMES[name]
        return Boxed(schema, wide, True)
    if name in ("TensorList", "tensor_list", "variable_list"):
        return Boxed("Tensor[]", f"std::vector<{STABLE_TENSOR}>", True)
    if name in ("IntArrayRef", "IntHeaderOnlyArrayRef"):
        return Boxed("int[]", "std::vector<int64_t>", name == "IntHeaderOnlyArrayRef")
    return _template(name)


def _template(name: str) -> Boxed | None:
    match = re.fullmatch(r"(optional|vector|ArrayRef|HeaderOnlyArrayRef|tuple|pair|List)<(.*)>", name)
    if not match:
        return None
    inner = [box(name[slice(*span)]) for span in lexical.split(name, match.start(2), match.end(2))]
    parts = [part for part in inner if part is not None]
    if len(parts) < len(inner) or not parts or any(part.schema == "()" for part in parts):
        return None
    exact = all(part.exact for part in parts)
    if match[1] == "optional":
        return Boxed(f"{parts[0].schema}?", f"std::optional<{parts[0].wide}>", exact)
    if match[1] in ("tuple", "pair"):
        wide = f"std::tuple<{', '.join(part.wide for part in parts)}>"
        return Boxed(f"({', '.join(part.schema for part in parts)})", wide, exact and match[1] == "tuple")
    return Boxed(f"{parts[0].schema}[]", f"std::vector<{parts[0].wide}>", exact and match[1] == "vector")


@dataclass(frozen=True)
class Argument:
    """One argument of a schema."""

    type: str
    name: str
    default: str = ""
    mutated: bool = False


@dataclass(frozen=True)
class Schema:
    """An operator schema."""

    name: str
    arguments: tuple[Argument, ...]
    results: tuple[str, ...]


_ARGUMENT = re.compile(
    r"(?P<type>[A-Za-z_]\w*)(?P<alias>\(([^)]*)\)|!)?(?P<more>(?:\[\d*\]|\?)*)\s+(?P<name>\w+)"
    r"\s*(?:=\s*(?P<default>.+))?"
)


def parse_schema(text: str) -> Schema | None:
    """Read ``name(Tensor a, int b=1) -> Tensor``; None if it is not a whole schema."""
    match = re.fullmatch(r"\s*([\w:.]+)\s*\((.*)\)\s*->\s*(.+?)\s*", text, re.DOTALL)
    if not match:
        return None
    arguments: list[Argument] = []
    for span in lexical.split(text, match.start(2), match.end(2)):
        part = text[slice(*span)]
        if part == "*":
            continue
        found = _ARGUMENT.fullmatch(part)
        if not found:
            return None
        alias = found["alias"] or ""
        arguments.append(Argument(found["type"] + found["more"], found["name"], found["default"] or "", "!" in alias))
    inner = match[3].strip()
    body = inner[1:-1] if inner.startswith("(") and inner.endswith(")") else inner
    results = tuple(
        re.sub(r"\([a-z!|* >-]*\)|\s+\w+$", "", body[slice(*span)]) for span in lexical.split(body, 0, len(body))
    )
    return Schema(match[1], tuple(arguments), results)


def same_type(schema: str, boxed: str) -> bool:
    """Whether a schema's type and the one of a C++ signature are carried alike."""

    def plain(text: str) -> str:
        text = re.sub(r"\[\d+\]", "[]", text).replace("SymInt", "int")
        return re.sub(r"\bScalar\b", "float", text)

    return plain(schema) == plain(boxed)


def joined_literal(text: str) -> str | None:
    """The value of adjacent C++ string literals; None if it is another expression."""
    parts = re.findall(r'"((?:[^"\\]|\\.)*)"', text)
    rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    if not parts or rest.strip(" \t\r\n\\"):
        return None
    return "".join(parts).replace('\\"', '"').replace("\\n", "\n")


__all__ = ["Argument", "Boxed", "Schema", "box", "joined_literal", "normalized", "parse_schema", "same_type"]
