"""PYBIND11_MODULE as operators, and a Python module with the old names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from abiding_abi import boxing, lexical, signatures
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate import library, python_module
from abiding_abi.migrate.edits import replace
from abiding_abi.migrate.schema import Operator, operator
from abiding_abi.migrate.work import Answer, Handler, Work
from abiding_abi.registrations import Call, calls
from abiding_abi.signatures import Function, best
from abiding_abi.source import Source

_FUNCTION = re.compile(r"&?\s*((?:::)?(?:\w+\s*::\s*)*\w+)\s*\Z")
_ARG = re.compile(
    r"(?:py|pybind11)\s*::\s*arg\s*\(\s*\"([^\"]*)\"\s*\)(?:\s*\.\s*noconvert\s*\([^)]*\))?\s*(?:=\s*(.*))?\Z",
    re.DOTALL,
)
_LITERAL_ARG = re.compile(r"\"([^\"]*)\"\s*_a\s*(?:=\s*(.*))?\Z", re.DOTALL)
_OVERLOAD = re.compile(r"(?:py|pybind11)\s*::\s*overload_cast\s*<(.*)>\s*\(\s*&?\s*((?:\w+::)*\w+)\s*\)\Z", re.DOTALL)
_LAMBDA = re.compile(r"\[[^\]]*\]\s*\(")
_NONE = ("py::none()", "pybind11::none()", "nullptr", "c10::nullopt", "std::nullopt", "at::nullopt", "torch::nullopt")
_DEFAULTS = {"true": "True", "false": "False", **dict.fromkeys(_NONE, "None")}


@dataclass
class Module:
    """What a PYBIND11_MODULE becomes."""

    operators: list[Operator] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    """Text of a statement and why it stays for a person."""
    attributes: list[tuple[str, str]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    """The old names, and the operator of each."""
    lambdas: list[str] = field(default_factory=list)


def pybind(work: Work, hit: Hit) -> Answer:
    """A module's definition."""
    if hit.name != "PYBIND11_MODULE":
        return "no counterpart: keep it in a module that knows no tensor"
    code = work.code
    read = lexical.arguments(code, lexical.skip_space(code, hit.end))
    if not read or len(read[0]) != 2:
        return "the module is not readable"
    open_at = lexical.skip_space(code, read[1])
    close = lexical.closing(code, open_at) if code[open_at : open_at + 1] == "{" else -1
    if close < 0:
        return "the module's body is not closed"
    module = _read_module(work, work.word(read[0][1]), Span(open_at + 1, close))
    if isinstance(module, str):
        return module
    if not module.operators:
        return module.failures[0][1] if module.failures else "nothing is registered here"
    extension, folder = python_module.extension(work.source.path, work.word(read[0][0]))
    path = python_module.path_of(extension, folder)
    if python_module.occupied(path):
        return f"{path.name} stands where the module of the old names would go: rename it, or the extension"
    namespace = work.shared.namespace or re.sub(r"\W", "_", extension).strip("_")
    keys = library.device_keys(work, [])
    fragment = namespace in work.shared.namespaces
    work.shared.namespaces.add(namespace)
    lines = [*module.lambdas, *library.block_lines(namespace, module.operators, keys, fragment=fragment)]
    for text, reason in module.failures:
        lines += [f"// ABI-TODO(REG008): {reason}", *(f"//   {line}" for line in text.splitlines())]
    bindings = python_module.Bindings(module.names, module.attributes)
    if path in work.shared.bindings:
        bindings = work.shared.bindings[path].either(bindings)
    work.shared.bindings[path] = bindings
    work.shared.modules[path] = python_module.text(extension, namespace, bindings)
    return replace(hit.start, close + 1, work.newline.join(lines), rule=hit.rule.code)


def _read_module(work: Work, variable: str, body: Span) -> Module | str:
    module = Module()
    overloads: dict[str, int] = {}
    covered: list[Span] = []
    for call in calls(work.source, variable, body):
        covered.append(Span(call.start, call.end))
        if call.method == "attr" and call.literal:
            _attribute(work, module, call)
        elif call.method == "def" and call.literal is not None and len(call.arguments) > 1:
            _definition(work, module, call, overloads)
        elif call.method not in ("doc", "attr"):
            module.failures.append((work.text[call.start : call.end], f"m.{call.method} has no counterpart"))
    rest = re.compile(r"(?:py|pybind11)\s*::\s*(class_|enum_|register_\w+|implicitly_convertible)\b").search(
        work.code, body.start, body.end
    )
    if rest:
        return f"py::{rest[1]} has no stable form: keep it in a module that knows no tensor"
    return module


def _attribute(work: Work, module: Module, call: Call) -> None:
    value = re.compile(r"\s*=\s*([^;]*);").match(work.text, call.end)
    plain = value[1].strip() if value else ""
    plain = _DEFAULTS.get(plain, plain)
    if re.fullmatch(r'-?[\d.]+|True|False|None|"[^"\\]*"', plain):
        module.attributes.append((call.literal or "", plain))
    elif (call.literal or "") not in ("__doc__", "__version__"):
        module.failures.append(
            (work.text[call.start : value.end() if value else call.end], "the value is not a literal")
        )


def _definition(work: Work, module: Module, call: Call, overloads: dict[str, int]) -> None:
    name = call.literal or ""
    said = work.text[call.start : call.end]
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        module.failures.append((said, f"'{name}' is not a name"))
        return
    function, callee, reason = _resolve(work, module, name, call.arguments[1])
    if function is None:
        module.failures.append((said, reason))
        return
    arguments = _arguments(work, call.arguments[2:])
    if arguments is None:
        module.failures.append((said, "a default value is not a literal"))
        return
    number = overloads.get(name, 0)
    overloads[name] = number + 1
    full = f"{name}.overload{number}" if number else name
    wrap = bool(_OVERLOAD.match(work.text[slice(*call.arguments[1])]))
    made = operator(full, function, work.usage, arguments or None, callee=callee, wrap=wrap)
    if isinstance(made, str):
        module.failures.append((said, made))
        return
    made.condition = _condition(work, call.start)
    module.operators.append(made)
    module.names[name] = module.names.get(name, "") or ("if" if made.condition else "always")


_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(if|ifdef|ifndef|elif|else|endif)\b[ \t]*([^\n]*)", re.MULTILINE)


def _condition(work: Work, at: int) -> str:
    """The preprocessor's condition inside the module under which a statement is compiled."""
    begin = work.code.rfind("PYBIND11_MODULE", 0, at)
    stack: list[tuple[str, str]] = []
    for match in _DIRECTIVE.finditer(work.code, begin, at):
        word, rest = match[1], work.text[match.start(2) : match.end(2)].split("//")[0].strip()
        if word in ("if", "ifdef", "ifndef"):
            said = {"if": f"({rest})", "ifdef": f"defined({rest})", "ifndef": f"!defined({rest})"}[word]
            stack.append((said, ""))
        elif word == "endif" and stack:
            stack.pop()
        elif stack:
            now, before = stack[-1]
            before = f"{before} && !{now}" if before else f"!{now}"
            stack[-1] = (f"({rest})" if word == "elif" else "", before)
    parts = [part for pair in stack for part in (pair[1], pair[0]) if part]
    return " && ".join(parts)


def _arguments(work: Work, spans: tuple[Span, ...]) -> list[tuple[str, str]] | None:
    found: list[tuple[str, str]] = []
    for span in spans:
        text = work.text[slice(*span)]
        match = _ARG.match(text) or _LITERAL_ARG.match(text)
        if match:
            default = (match[2] or "").strip()
            default = _DEFAULTS.get("".join(default.split()), default)
            number = re.fullmatch(r"(-?\d+\.?\d*(?:e-?\d+)?)[fFlLuU]*", default)
            default = number[1] + ("0" if number[1].endswith(".") else "") if number else default
            if not re.fullmatch(r'|-?\d+\.?\d*(?:e-?\d+)?|True|False|None|"[^"\\]*"', default):
                return None
            found.append((match[1], default))
    return found


def _resolve(work: Work, module: Module, name: str, span: Span) -> tuple[Function | None, str, str]:
    """The function behind a definition's second argument, and how to call it."""
    text = work.word(span)
    plain = _FUNCTION.fullmatch(text)
    if plain:
        callee = re.sub(r"\s", "", plain[1])
        everywhere = work.usage.functions(callee)
        candidates = [f for f in everywhere if f.source.path == work.source.path] or everywhere
        shapes = {tuple(p.type for p in f.parameters) for f in candidates}
        if not candidates:
            return None, "", f"{callee} is not found in the files at hand"
        if len({len(shape) for shape in shapes}) > 1:
            return None, "", f"{callee} is overloaded: choose one"
        return _defined(best(candidates), everywhere), callee, ""
    overload = _OVERLOAD.match(work.text[slice(*span)])
    if overload:
        wanted = [signatures.bare(overload[1][slice(*s)]) for s in lexical.split(overload[1], 0, len(overload[1]))]
        for function in sorted(work.usage.functions(overload[2]), key=lambda f: f.body is None):
            if [signatures.bare(p.type) for p in function.parameters] == wanted:
                return function, overload[2], ""
        return None, "", f"no {overload[2]} takes ({', '.join(wanted)})"
    if _LAMBDA.match(text):
        return _lambda(work, module, name, span)
    return None, "", "TORCH_BOX needs the name of a function"


def _defined(function: Function | None, everywhere: list[Function]) -> Function | None:
    """The definition of what may only be declared here."""
    if function is None or function.body is not None:
        return function
    types = [signatures.bare(p.type) for p in function.parameters]
    same = (f for f in everywhere if f.body and [signatures.bare(p.type) for p in f.parameters] == types)
    return next(same, function)


def _lambda(work: Work, module: Module, name: str, span: Span) -> tuple[Function | None, str, str]:
    """A lambda without captures becomes a function."""
    code, text = work.code, work.text
    if not re.match(r"\[\s*\]", code[span.start : span.end]):
        return None, "", "the lambda captures"
    open_at = code.index("(", span.start)
    close = lexical.closing(code, open_at)
    brace = code.find("{", close, span.end)
    if close < 0 or brace < 0 or lexical.closing(code, brace) != span.end - 1:
        return None, "", "the lambda is not readable"
    arrow = re.compile(r"\s*(?:mutable\s*)?->\s*([^{]+)").match(code, close + 1)
    result = arrow[1].strip() if arrow else _inferred(work, code[brace + 1 : span.end - 1])
    if result is None:
        return None, "", "the lambda's result is not written: add -> type"
    made = f"{name}_function"
    source_text = f"static {result} {made}({text[open_at + 1 : close]}) {text[brace : span.end]}"
    module.lambdas += [*source_text.splitlines(), ""]
    piece = Source(work.source.path, source_text.encode("latin-1"))
    function = best(list(signatures.find(piece, made)))
    return function, made, "" if function else "the lambda is not readable"


def _inferred(work: Work, body: str) -> str | None:
    """The result of a lambda's body: nothing, or what the one function that it returns gives."""
    returns = re.findall(r"\breturn\b\s*([^;]*);", body)
    if not returns:
        return "void"
    called = re.fullmatch(r"((?:\w+\s*::\s*)*\w+)\s*\(.*\)", returns[0].strip(), re.DOTALL)
    found = best(work.usage.functions(called[1])) if called and len(returns) == 1 else None
    return found.result if found and boxing.box(found.result) else None


HANDLERS: dict[str, Handler] = {"pybind": pybind}
__all__ = ["HANDLERS", "Path", "pybind"]
