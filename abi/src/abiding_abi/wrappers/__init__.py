"""``wrappers``: a header of functions that the stable API lacks, each a call of the dispatcher by name and schema.

``schemas.tsv`` is written by ``tools/make_wrappers.py``, which asks every torch release at hand for the schemas. The
headers beside it hold what needs more than one call. The header that is written has the functions asked for, and no
more: copy it into the project.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from abiding_abi import __version__
from abiding_abi.errors import UserError

HEADER_NAME = "abi_ops.h"
NAMESPACE = "abi_ops"
_COMPOSED = ("composed.h", "options.h", "indexing.h")

_TYPES = {
    "Tensor": "const Tensor&",
    "Tensor?": "const std::optional<Tensor>&",
    "Tensor[]": "const std::vector<Tensor>&",
    "Tensor?[]": "const std::vector<std::optional<Tensor>>&",
    "int": "int64_t",
    "int?": "std::optional<int64_t>",
    "int[]": "IntArray",
    "int[]?": "IntArray",
    "float": "double",
    "float?": "std::optional<double>",
    "bool": "bool",
    "bool?": "std::optional<bool>",
    "str": "const std::string&",
    "str?": "const std::optional<std::string>&",
    "ScalarType": "ScalarType",
    "ScalarType?": "std::optional<ScalarType>",
    "Layout?": "std::optional<torch::headeronly::Layout>",
    "MemoryFormat?": "std::optional<torch::headeronly::MemoryFormat>",
    "Device?": "std::optional<Device>",
}
_RETURNS = {"Tensor": "Tensor", "Tensor[]": "std::vector<Tensor>", "bool": "bool", "int": "int64_t", "float": "double"}
_RETURNS |= {"ScalarType": "ScalarType"}
_DEFAULTS = {"None": "std::nullopt", "True": "true", "False": "false", "[]": "{}"}
_SCALARS = frozenset(
    [
        *("mul", "mul_", "div", "div_", "eq", "ne", "lt", "le", "gt", "ge", "pow", "remainder", "floor_divide"),
        *("masked_fill", "masked_fill_", "where", "maximum", "minimum", "bitwise_and", "bitwise_or", "bitwise_xor"),
    ]
)
"""Functions that also take a number in place of the last tensor."""
_REVERSED = ("mul", "div")
"""Functions that also take a number in place of the first tensor."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operator's schema."""

    type: str
    name: str
    default: str | None

    @property
    def declaration(self) -> str:
        """The C++ parameter."""
        if self.default is None or self.type == "int[]?":
            return f"{_TYPES[self.type]} {self.name}"
        value = _DEFAULTS.get(self.default, self.default)
        if self.type == "ScalarType?" and value == "4":  # how a schema prints torch.int64
            value = "ScalarType::Long"
        if value.startswith("["):
            value = f"{{{value[1:-1]}}}"
        elif value.startswith("'"):
            value = f'"{value[1:-1]}"'
        return f"{_TYPES[self.type]} {self.name} = {value}"

    @property
    def argument(self) -> str:
        """What goes on the dispatcher's stack."""
        if self.type == "Generator?":  # cannot be named before 2.13: always the default generator
            return "std::nullopt"
        return f"std::optional<IntArray>({self.name})" if self.type == "int[]?" else self.name


@dataclass(frozen=True)
class Operator:
    """An aten operator and the C++ function that calls it."""

    schema: str
    op: str
    overload: str
    parameters: tuple[Parameter, ...]
    returns: tuple[str, ...]

    @property
    def name(self) -> str:
        """The C++ function; with a result to write into, named and ordered as in torch's C++ API."""
        return self.op.removeprefix("aten::") + "_out" * (self.overload == "out")

    def code(self) -> str:
        """The C++ function's definition."""
        declared = self._declared()
        stack = ", ".join(f"detail::from({p.argument})" for p in self.parameters)
        size = max(len(self.parameters), len(self.returns))
        call = f'"{self.op}", "{self.overload}", stack.data(), TORCH_ABI_VERSION'
        values = [f"detail::to<{_RETURNS[r]}>(stack[{i}])" for i, r in enumerate(self.returns)]
        result = values[0] if len(values) == 1 else f"{{{', '.join(values)}}}"
        return "\n".join(
            [
                f"/// {self.schema}",
                _wrapped(f"inline {self._returned()} {self.name}(", declared, ") {"),
                _wrapped(f"  std::array<StableIValue, {size}> stack{{", stack, "};"),
                f"  ABI_OPS_CHECK(torch_call_dispatcher({call}));",
                *([f"  return {result};"] if values else []),
                "}",
                *self._with_numbers(),
            ]
        )

    def _declared(self) -> str:
        names = [p for p in self.parameters if p.type != "Generator?"]
        if self.overload == "out":
            names.insert(0, names.pop())
        last = max((i for i, p in enumerate(names) if p.default is None or p.type == "int[]?"), default=-1)
        plain = [Parameter(p.type, p.name, None) if i < last else p for i, p in enumerate(names)]
        return ", ".join(p.declaration for p in plain)

    def _returned(self) -> str:
        if not self.returns:
            return "void"
        kinds = [_RETURNS[r] for r in self.returns]
        return kinds[0] if len(kinds) == 1 else f"std::tuple<{', '.join(kinds)}>"

    def _with_numbers(self) -> list[str]:
        tensors = [i for i, p in enumerate(self.parameters) if p.type == "Tensor"]
        if self.name not in _SCALARS or len(tensors) != len(self.parameters):
            return []
        names = [p.name for p in self.parameters]
        like = names[-2] if self.name == "where" else names[0]
        lines = []
        for place in [len(names) - 1] + ([0] if self.name in _REVERSED else []):
            beside = like if place else names[-1]
            declared = ", ".join(f"{'Scalar' if i == place else 'const Tensor&'} {n}" for i, n in enumerate(names))
            passed = [f"detail::scalar_tensor({beside}, {n})" if i == place else n for i, n in enumerate(names)]
            lines.append(f"inline {self._returned()} {self.name}({declared}) {{")
            lines += [f"  return abi_ops::{self.name}({', '.join(passed)});", "}"]
        return lines


def _wrapped(head: str, inside: str, tail: str, width: int = 120) -> str:
    """One line, or the inside on lines of its own."""
    if len(head + inside + tail) <= width:
        return head + inside + tail
    indent = " " * (len(head) - len(head.lstrip()) + 4)
    lines = [""]
    for part in inside.split(", "):
        if lines[-1] and len(indent + lines[-1] + part) > width - 4:
            lines.append("")
        lines[-1] += part + ", "
    lines[-1] = lines[-1].removesuffix(", ")
    return "\n".join([head.rstrip(), *(indent + line.rstrip() for line in lines)]) + tail


def parse(schema: str) -> Operator:
    """Read a schema such as ``aten::cat(Tensor[] tensors, int dim=0) -> Tensor``."""
    match = re.fullmatch(r"(aten::\w+)(?:\.(\w+))?\((.*)\) -> (.*)", schema)
    if not match:
        raise UserError(f"'{schema}' is not a schema of an aten operator")
    parameters = []
    for part in _split(match[3]):
        if part != "*":
            kind, _, rest = part.rpartition(" ") if "=" not in part else _with_default(part)
            name, _, default = rest.partition("=")
            parameters.append(Parameter(_plain(kind), name, default or None))
    inside = match[4][1:-1] if match[4].startswith("(") else match[4]
    returns = tuple(_plain(part.split(" ")[0]) for part in _split(inside))
    return Operator(schema, match[1], match[2] or "", tuple(parameters), returns)


def _with_default(part: str) -> tuple[str, str, str]:
    head, _, default = part.partition("=")
    kind, _, name = head.rpartition(" ")
    return kind, "", f"{name}={default}"


def _split(text: str) -> list[str]:
    parts = re.split(r",\s*(?![^\[(]*[\])])", text)
    return [part.strip() for part in parts if part.strip()]


def _plain(kind: str) -> str:
    """The type without aliases, sizes and symbols: ``Tensor(a!)`` is a Tensor, ``SymInt[2]`` is int[]."""
    return re.sub(r"\[\d+\]", "[]", re.sub(r"\([^)]*\)", "", kind)).replace("SymInt", "int")


@cache
def operators() -> tuple[Operator, ...]:
    """All operators that are wrapped by one call."""
    lines = files(__package__).joinpath("schemas.tsv").read_text(encoding="utf-8").splitlines()
    return tuple(parse(line) for line in lines if line and not line.startswith("#"))


@cache
def composed() -> dict[str, tuple[tuple[str, ...], str]]:
    """Functions of composed.h: what they use, and their code."""
    text = "".join(files(__package__).joinpath(name).read_text(encoding="utf-8") for name in _COMPOSED)
    found: dict[str, tuple[tuple[str, ...], str]] = {}
    for name, uses, code in re.findall(r"// function (\w+):((?:.*,\n//)*.*)\n((?:(?!// function ).*\n)*)", text):
        found[name] = (tuple(use for u in uses.split(",") if (use := u.strip(" /\n"))), code.strip())
    return found


NAMES = frozenset({op.name for op in operators()} | set(composed())) - {"Scalar", "store_"}
"""What can be asked for: the C++ functions, and ``operators`` for ``+ - * /`` and comparisons of tensors."""


def header(wanted: Iterable[str] | None = None) -> str:
    """The header with the functions wanted and those that they use; without a list, with all."""
    asked = set(NAMES if wanted is None else wanted)
    if unknown := sorted(asked - NAMES):
        raise UserError(f"no wrapper is called {', '.join(unknown)}; 'abiding-abi wrappers --list' lists them")
    needed: set[str] = set()
    waiting = sorted(asked)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += composed()[name][0] if name in composed() else ()
            waiting += ["Scalar"] if name in _SCALARS else []
    head = files(__package__).joinpath("head.h").read_text(encoding="utf-8")
    parts = [head.replace("@version@", __version__).rstrip()]
    parts += [composed()["Scalar"][1]] if "Scalar" in needed else []
    parts += [op.code() for op in operators() if op.name in needed]
    last = ("Scalar", "operators")
    parts += [code for name, (_, code) in composed().items() if name in needed and name not in last]
    parts += [f"}} // namespace {NAMESPACE}"]
    parts += [composed()["operators"][1]] if "operators" in needed else []
    return "\n\n".join(parts) + "\n"


def listing() -> list[str]:
    """One line for each function: its C++ name and the schema behind it."""
    direct = {op.name for op in operators()}
    lines = [f"{op.name:20} {op.schema}" for op in operators()]
    lines += [f"{name:20} composed of {', '.join(composed()[name][0]) or 'stable functions'}" for name in composed()
              if name in NAMES and name not in direct]  # fmt: skip
    return sorted(lines)
