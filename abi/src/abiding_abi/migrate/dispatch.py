"""AT_DISPATCH macros as THO_DISPATCH_V2."""

from __future__ import annotations

import re

from abiding_abi import lexical
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate.edits import replace
from abiding_abi.migrate.work import Answer, Handler, Work
from abiding_abi.rules.dispatch import FIXED_TYPES, TYPE_GROUPS

_SCALAR = "torch::headeronly::ScalarType::"
_MEMBERS = {
    "AT_FLOATING_TYPES": ("Double", "Float"),
    "AT_INTEGRAL_TYPES": ("Byte", "Char", "Int", "Long", "Short"),
    "AT_COMPLEX_TYPES": ("ComplexDouble", "ComplexFloat"),
    "AT_ALL_TYPES": ("Byte", "Char", "Double", "Float", "Int", "Long", "Short"),
    "AT_ALL_TYPES_AND_COMPLEX": (
        *("Byte", "Char", "Double", "Float", "Int", "Long", "Short"),
        *("ComplexFloat", "ComplexDouble"),
    ),
}
_NAME = re.compile(r"AT_DISPATCH_(?:CASE_)?(.+?)(?:_AND(_HALF|\d*))?\Z")


def _shape(name: str) -> tuple[str, int, tuple[str, ...]] | None:
    """Group, number of types that lead the arguments, and types that the name itself adds."""
    groups = sorted(TYPE_GROUPS, key=len, reverse=True)
    body = re.sub(r"^AT_DISPATCH_(?:CASE_)?", "", name)
    group = next((g for g in groups if body == g or re.fullmatch(rf"{g}_AND(_HALF|\d*)", body)), None)
    if group is None:
        return None
    suffix = body[len(group) :]
    fixed = FIXED_TYPES.get(group, ())
    if suffix == "_AND_HALF":
        return group, 0, (*fixed, "Half")
    count = int(suffix.removeprefix("_AND") or 1) if suffix else 0
    return group, count, fixed


def dispatch(work: Work, hit: Hit) -> Answer:
    """``AT_DISPATCH_GROUP[_ANDn](types..., type, name, lambda...)``"""
    shape = _shape(hit.name)
    read = work.call(hit.end)
    if not shape or not read:
        return "no type list of Dispatch_v2.h means the same"
    group, count, fixed = shape
    spans, paren, end = read
    if len(spans) < count + 3:
        return "the arguments are not readable: is the macro passed on?"
    types: list[str | Span] = [f", AT_EXPAND({name})" for name in TYPE_GROUPS[group]]
    types += [f", {_SCALAR}{name}" for name in fixed]
    for span in spans[:count]:
        types += [", ", span]
    body = Span(spans[count + 2].start, spans[-1].end)
    head = Span(spans[count].start, spans[count + 1].end)
    gap = Span(spans[count + 1].end, body.start)
    tail = Span(body.end, end - 1)
    front = Span(paren + 1, spans[0].start)
    parts = ["THO_DISPATCH_V2(", front, head, gap, *_protected(work, body), *types, tail, ")"]
    return replace(hit.start, end, *parts, rule=hit.rule.code)


def _protected(work: Work, body: Span) -> list[str | Span]:
    """The body in parentheses, AT_WRAP around it left out."""
    if work.code.startswith("AT_WRAP", body.start):
        read = lexical.arguments(work.code, lexical.skip_space(work.code, body.start + len("AT_WRAP")))
        if read and read[0]:
            body = Span(read[0][0].start, read[0][-1].end)
    if work.code[body.start] == "(" and lexical.closing(work.code, body.start) == body.end - 1:
        return [body]
    return ["(", body, ")"]


def dispatch_v2(work: Work, hit: Hit) -> Answer:
    """AT_DISPATCH_V2, and AT_WRAP inside THO_DISPATCH_V2."""
    if hit.name == "wrapped_lambda":
        read = lexical.arguments(work.code, lexical.skip_space(work.code, hit.end))
        if not read or not read[0]:
            return "the call's parentheses are not closed"
        return replace(hit.start, read[1], "(", Span(read[0][0].start, read[0][-1].end), ")", rule=hit.rule.code)
    found = work.call(hit.end)
    if not found or len(found[0]) < 4:
        return "the arguments are not readable"
    spans, paren, end = found
    first = Span(paren, spans[2].start)
    rest = Span(spans[2].end, end)
    return replace(hit.start, end, "THO_DISPATCH_V2", first, *_protected(work, spans[2]), rest, rule=hit.rule.code)


def dispatch_case(work: Work, hit: Hit) -> Answer:
    """AT_DISPATCH_CASE_GROUP: one case per type."""
    shape = _shape(hit.name)
    read = work.call(hit.end)
    if not shape or not read or len(read[0]) < shape[1] + 1:
        return "no type list of Dispatch_v2.h means the same"
    group, count, fixed = shape
    spans, _, end = read
    body = Span(spans[count].start, spans[-1].end)
    names: list[str | Span] = [_SCALAR + t for name in TYPE_GROUPS[group] for t in _MEMBERS.get(name, ())]
    names += [_SCALAR + name for name in fixed] + list(spans[:count])
    parts: list[str | Span] = []
    for name in names:
        parts += [" " if parts else "", "THO_DISPATCH_CASE(", name, ", ", body, ")"]
    return replace(hit.start, end, *parts, rule=hit.rule.code)


def dispatch_index(work: Work, hit: Hit) -> Answer:
    """AT_DISPATCH_INDEX_TYPES: the type is called index_t."""
    read = work.call(hit.end)
    if not read or len(read[0]) < 3:
        return "the arguments are not readable"
    spans, paren, end = read
    body = Span(spans[2].start, spans[-1].end)
    open_at = work.code.find("{", body.start, body.end)
    inner = work.code[open_at : body.end]
    if open_at < 0 or re.search(r"\bscalar_t\b", inner):
        return "the lambda uses scalar_t of an outer dispatch, which the inner one would hide"
    types = f", {_SCALAR}Int, {_SCALAR}Long"
    parts: list[str | Span] = [
        Span(paren, body.start),
        "(",
        Span(body.start, open_at + 1),
        " using index_t = scalar_t;",
    ]
    return replace(hit.start, end, "THO_DISPATCH_V2", *parts, Span(open_at + 1, body.end), ")", types,
                   Span(body.end, end), rule=hit.rule.code)  # fmt: skip


HANDLERS: dict[str, Handler] = {
    "dispatch": dispatch,
    "dispatch_v2": dispatch_v2,
    "dispatch_case": dispatch_case,
    "dispatch_index": dispatch_index,
}
