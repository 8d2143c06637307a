"""C++ functions by name: return type, parameters and body, read from text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from abiding_abi import lexical
from abiding_abi.source import Source

_NOISE = re.compile(
    r"\b(?:static|inline|extern|virtual|constexpr|__host__|__device__|__forceinline__|TORCH_API|C10_EXPORT|C10_API|"
    r"TORCH_CUDA_CU_API|friend|explicit|__global__|[A-Z][A-Z0-9_]*_(?:API|EXPORT|EXPORTS|INLINE))\b"
    r"|\[\[[^\]]*\]\]|\"[^\"]*\"|"
    r"__attribute__\s*\(\([^)]*\)\)|\b__launch_bounds__\s*\([^)]*\)"
)
_TEMPLATE = re.compile(r"\btemplate\s*<")
_BEFORE = re.compile(r"[;{}]|^[ \t]*#[^\n]*\n|\b(?:public|private|protected)\s*:(?!:)", re.MULTILINE)
_AFTER = re.compile(
    r"\s*(?:const\b\s*|noexcept\b\s*(?:\([^)]*\)\s*)?|override\b\s*|->\s*[\w:<>,&*\s]+?(?=\s*[{;]))*([{;])"
)
_NOT_A_TYPE = re.compile(r"(?:[-=+*/,(<!|?]|\breturn|\bnew|\belse|\bthrow|\bgoto|\bcase)\s*\Z")
_NAME = re.compile(r"([A-Za-z_]\w*)\s*(?:\[[^\]]*\])?\Z")
_BUILTIN = frozenset(("int", "long", "short", "char", "bool", "float", "double", "unsigned", "signed", "void", "auto"))


@dataclass(frozen=True)
class Parameter:
    """One parameter; offsets are of the whole of it."""

    type: str
    name: str
    default: str
    start: int
    end: int
    type_end: int


@dataclass(frozen=True)
class Function:
    """One declaration or definition."""

    source: Source
    name: str
    result: str
    parameters: tuple[Parameter, ...]
    start: int
    result_start: int
    result_end: int
    open: int
    close: int
    body: lexical.Span | None
    template: bool


def normalized(text: str) -> str:
    """A type as one writes it: single spaces, none around ``::``, ``<`` and ``>``, references last."""
    text = re.sub(r"\\\r?\n", " ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"\s*(::|<|>|,|&|\*)\s*", r"\1", text).replace(",", ", ")


def bare(kind: str) -> str:
    """A type without const, references and ``typename``."""
    text = re.sub(r"\bconst\b|\btypename\b|\bvolatile\b", " ", normalized(kind))
    return normalized(text).rstrip("&").strip()


def find(source: Source, name: str) -> Iterator[Function]:
    """Every declaration and definition of a function called ``name`` (its last component)."""
    code = source.code
    if name not in code:
        return
    for match in re.finditer(rf"(?<![\w.~]){re.escape(name)}\s*\(", code):
        open_at = match.end() - 1
        close = lexical.closing(code, open_at)
        if close < 0 or code[max(0, match.start() - 2) : match.start()] == "->":
            continue
        after = _AFTER.match(code, close + 1)
        if not after:
            continue
        start = match.start()
        while code[lexical.back_over_space(code, start) - 2 : lexical.back_over_space(code, start)] == "::":
            qualifier = re.compile(r"[A-Za-z_]\w*\s*::\s*\Z").search(code, max(0, start - 200), start)
            if not qualifier:
                break
            start = qualifier.start()
        begin = _declaration_start(code, start)
        head = code[begin:start]
        if not head.strip() or _NOT_A_TYPE.search(head):
            continue
        template = bool(_TEMPLATE.search(head))
        if template:
            angle = code.index("<", _TEMPLATE.search(code, begin).start())  # type: ignore[union-attr]
            close_angle = lexical.closing_angle(code, angle)
            begin = close_angle + 1 if 0 <= close_angle < start else begin
        result = normalized(_NOISE.sub(" ", code[begin:start]))
        if not result:
            continue
        noise = re.compile(rf"(?:\s|{_NOISE.pattern})*").match(code, begin, start)
        result_start = noise.end() if noise else begin
        body = None
        if after[1] == "{":
            end = lexical.closing(code, after.end() - 1)
            body = lexical.Span(after.end(), end if end >= 0 else len(code))
        yield Function(
            source, name, result, tuple(parameters(source, open_at + 1, close)), begin, result_start,
            lexical.back_over_space(code, start), open_at, close, body, template,
        )  # fmt: skip


def _declaration_start(code: str, at: int) -> int:
    low = max(0, at - 600)
    begin = low
    for match in _BEFORE.finditer(code, low, at):
        begin = match.end()
    return lexical.skip_space(code, begin)


def parameters(source: Source, start: int, end: int) -> Iterator[Parameter]:
    """The parameters between two parentheses."""
    code = source.code
    for part in lexical.split(code, start, end):
        declarator = lexical.split(code, *part, "=")
        if not declarator:
            continue
        span = declarator[0]
        default = source.text[declarator[1].start : part.end] if len(declarator) > 1 else ""
        text = code[span.start : span.end]
        if text == "void":
            continue
        name = _NAME.search(text)
        type_text = text[: name.start()] if name else text
        has_type = re.sub(r"\b(?:const|volatile|struct|typename|enum|class)\b", "", type_text).strip(" \t\r\n\\")
        if name and has_type and not has_type.endswith("::") and name[1] not in _BUILTIN:
            yield Parameter(
                normalized(type_text), name[1], default, span.start, part.end,
                span.start + len(type_text.rstrip()),
            )  # fmt: skip
        else:
            yield Parameter(normalized(text), "", default, span.start, part.end, span.end)


def best(functions: list[Function]) -> Function | None:
    """The definition, or the first declaration."""
    return next((f for f in functions if f.body), functions[0] if functions else None)
