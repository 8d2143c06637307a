"""Schemas from C++ signatures, with mutation marks from what the body does, and wrappers that widen narrow types."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from abiding_abi import boxing
from abiding_abi.composition import is_composed
from abiding_abi.signatures import Function, Parameter, bare
from abiding_abi.usage import Usage, Use

_KEYWORDS = frozenset(
    (
        "False",
        "None",
        "True",
        "and",
        "as",
        "assert",
        "async",
        "await",
        "break",
        "class",
        "continue",
        "def",
        "del",
        "elif",
        "else",
        "except",
        "finally",
        "for",
        "from",
        "global",
        "if",
        "import",
        "in",
        "is",
        "lambda",
        "nonlocal",
        "not",
        "or",
        "pass",
        "raise",
        "return",
        "try",
        "while",
        "with",
        "yield",
        "out",
    )
)


@dataclass
class Operator:
    """One operator to register."""

    name: str
    function: str
    """What TORCH_BOX takes: the function, or its wrapper."""
    schema: str
    wrapper: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Why a person should look, each as ``RULE: text``."""
    condition: str = ""
    """The preprocessor's condition under which it is there."""
    tensors: bool = True
    """Whether a tensor argument says which device it runs on."""
    composed: bool = False
    """Whether it only calls torch's functions, through which autograd has to go on."""


def operator(
    name: str,
    function: Function,
    usage: Usage,
    arguments: list[tuple[str, str]] | None = None,
    *,
    callee: str = "",
    pybind: bool = True,
    wrap: bool = False,
) -> Operator | str:
    """The operator of a function; ``arguments`` are the names and defaults that pybind was told. Text: why not."""
    callee = callee or function.name
    parameters = list(function.parameters)
    if arguments and len(arguments) != len(parameters):
        return f"{function.name} takes {len(parameters)} arguments, {len(arguments)} are named"
    marks = "abcdefghijklmnopqrstuvwxyz"
    parts: list[str] = []
    passed: list[str] = []
    checks: list[str] = []
    wide: list[str] = []
    needs_wrapper = wrap
    notes: list[str] = []
    letters: dict[str, str] = {}
    open_: list[str] = []
    for index, parameter in enumerate(parameters):
        boxed = boxing.box(parameter.type)
        if boxed is None:
            return f"{parameter.type} {parameter.name} does not box"
        given, default = arguments[index] if arguments else ("", "")
        label = given or parameter.name or f"arg{index}"
        label = f"{label}_" if label in _KEYWORDS else label
        kind, cpp = boxed.schema, boxed.wide
        value = parameter.name or f"arg{index}"
        optional = pybind and kind == "Tensor" and (_may_be_none(function, parameter) or default == "None")
        if optional:
            kind, cpp = "Tensor?", f"std::optional<{boxing.STABLE_TENSOR}>"
            passed.append(f"{value}.value_or({boxing.STABLE_TENSOR}())")
            needs_wrapper = True
        elif not boxed.exact or not _boxes_as_is(parameter.type):
            passed.append(_narrowed(parameter.type, value))
            checks += _range_checks(parameter.type, value)
            needs_wrapper = True
        else:
            passed.append(f"std::move({value})" if parameter.type.endswith("&&") else value)
        wide.append(f"{cpp} {value}")
        if kind.startswith("Tensor"):
            use = _tensor_use(function, parameter, usage)
            if use == Use.WRITTEN:
                letters[parameter.name] = marks[len(letters)]
                kind = f"Tensor({letters[parameter.name]}!)" + kind[len("Tensor") :]
            elif use == Use.UNKNOWN and pybind:
                open_.append(parameter.name or label)
        parts.append(f"{kind} {label}" + (f"={default}" if default else ""))
    if open_:
        names = open_[0] if len(open_) == 1 else f"{', '.join(open_[:-1])} or {open_[-1]}"
        notes.append(
            f"BOX005: does {function.name} write {names}? mark each that it writes, ({marks[len(letters)]}!) on"
        )
    result = boxing.box(function.result)
    if result is None:
        return f"the result {function.result} does not box"
    returns = _returns(function, result, letters)
    schema = f"{name}({', '.join(parts)}) -> {returns}"
    built = Operator(name, callee, schema, notes=notes, tensors=any("Tensor" in part for part in parts),
                     composed=is_composed(function, usage))  # fmt: skip
    if needs_wrapper or not result.exact or function.result.endswith("&"):
        built.function = re.sub(r"\W", "_", f"{name}_boxed")
        built.wrapper = _wrapper(built.function, result.wide, wide, callee, passed, function.result, checks)
    return built


def _boxes_as_is(kind: str) -> bool:
    """Whether TORCH_BOX accepts the parameter's form; references to anything but const fail for most types."""
    text = kind.replace(" ", "")
    return not text.endswith("&&") and (not text.endswith("&") or text.startswith("const") or "Tensor&" in text)


def _narrowed(kind: str, value: str) -> str:
    """The argument that the legacy function wants, from the wide one."""
    inner = bare(kind)
    if inner in ("const char*", "char*"):
        return f"{value}.c_str()"
    template = re.fullmatch(r"(?:std::|c10::|at::|torch::)*(vector|optional|ArrayRef|HeaderOnlyArrayRef)<(.*)>", inner)
    if template and template[1] in ("vector", "ArrayRef", "HeaderOnlyArrayRef"):
        element = boxing.box(template[2])
        if element and element.exact:
            return value
        return f"std::vector<{template[2]}>({value}.begin(), {value}.end())"
    if template:
        return (
            f"{value}.has_value() ? std::optional<{template[2]}>(static_cast<{template[2]}>(*{value})) : std::nullopt"
        )
    if "ArrayRef" in inner or "Tensor" in inner or "string" in inner:
        return value
    return f"static_cast<{inner}>({value})"


def _range_checks(kind: str, value: str) -> list[str]:
    """What pybind11 refused, and a cast would cut off: integers that do not fit."""
    inner = bare(kind)
    element = re.fullmatch(r"(?:std::|c10::|at::|torch::)*(vector|optional|ArrayRef|HeaderOnlyArrayRef)<(.*)>", inner)
    narrow = bare(element[2]) if element else inner
    boxed = boxing.box(narrow)
    if boxed is None or boxed.schema != "int" or boxed.exact:
        return []
    optional = element is not None and element[1] == "optional"
    one = f"*{value}" if optional else "item" if element else value
    fits = (
        f"{one} >= 0"
        if re.search(r"uint64_t|size_t|unsigned long|uintptr_t", narrow)
        else (f"static_cast<int64_t>(static_cast<{narrow}>({one})) == {one}")
    )
    check = f'STD_TORCH_CHECK({fits}, "{value}: ", {one}, " does not fit into {narrow}");'
    if optional:
        return [f"  if ({value}.has_value()) {check}"]
    return [f"  for (int64_t item : {value}) {check}" if element else f"  {check}"]


def _wrapper(
    name: str, result: str, wide: list[str], callee: str, passed: list[str], legacy: str, checks: list[str]
) -> list[str]:
    call = f"{callee}({', '.join(passed)})"
    body = f"  {call};" if result == "void" else f"  return {_widened(legacy, result, call)};"
    return [f"static {result} {name}({', '.join(wide)}) {{", *checks, body, "}"]


def _widened(legacy: str, result: str, call: str) -> str:
    inner = bare(legacy)
    if inner == result or "Tensor" in result:
        return call
    if result.startswith("std::vector<"):
        return f"[](const auto& values) {{ return {result}(values.begin(), values.end()); }}({call})"
    if result.startswith("std::tuple<"):
        return f"{result}({call})"
    return f"static_cast<{result}>({call})"


def _may_be_none(function: Function, parameter: Parameter) -> bool:
    """Whether the body asks if the tensor is there: pybind11 made an undefined tensor of None."""
    if not function.body or not parameter.name:
        return False
    code = function.source.code[slice(*function.body)]
    return bool(re.search(rf"\b{re.escape(parameter.name)}\s*\.\s*defined\s*\(", code))


def _tensor_use(function: Function, parameter: Parameter, usage: Usage) -> Use:
    if not parameter.name:
        return Use.READ
    if function.body is not None:
        return usage.tensor(function.source, function.body, parameter.name)
    index = function.parameters.index(parameter)
    return usage.parameter(function.name, index, len(function.parameters), tensor=True)


def _returns(function: Function, result: boxing.Boxed, letters: dict[str, str]) -> str:
    """The result's type, with the alias of a tensor argument that is handed back."""
    if result.schema == "Tensor" and function.body is not None:
        code = function.source.code[slice(*function.body)]
        returned = set(re.findall(r"\breturn\s+(\w+)\s*;", code))
        for name in returned & set(letters):
            return f"Tensor({letters[name]}!)"
    return result.schema
