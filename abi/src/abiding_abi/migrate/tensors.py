"""Data pointers, accessors and members of tensors."""

from __future__ import annotations

import re

from abiding_abi import lexical
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate import wrapped
from abiding_abi.migrate.edits import replace
from abiding_abi.migrate.helpers import ACCESSOR, PACKED
from abiding_abi.migrate.simple import free_function, is_number, named, rename, through_double
from abiding_abi.migrate.work import Answer, Handler, Work
from abiding_abi.rules import Method
from abiding_abi.usage import Use
from abiding_abi.wrappers import NAMES

_PACKED = "torch::headeronly::HeaderOnlyGenericPackedTensorAccessor"
_TRAITS = "torch::headeronly::DefaultPtrTraits"
_ELEMENT = {
    "half": "torch::headeronly::Half",
    "__half": "torch::headeronly::Half",
    "nv_half": "torch::headeronly::Half",
    "nv_bfloat16": "torch::headeronly::BFloat16",
    "__nv_bfloat16": "torch::headeronly::BFloat16",
    "__nv_fp8_e4m3": "torch::headeronly::Float8_e4m3fn",
    "__nv_fp8_e5m2": "torch::headeronly::Float8_e5m2",
    "long long": "int64_t",
    "unsigned long long": "uint64_t",
    "cuFloatComplex": "torch::headeronly::complex<float>",
    "cuComplex": "torch::headeronly::complex<float>",
    "cuDoubleComplex": "torch::headeronly::complex<double>",
}
_ITEMS = {
    "float": "float32",
    "double": "float64",
    "int": "int32",
    "int32_t": "int32",
    "int64_t": "int64",
    "long": "int64",
    "bool": "bool",
    "int8_t": "int8",
    "int16_t": "int16",
    "uint8_t": "uint8",
    "uint16_t": "uint16",
    "uint32_t": "uint32",
    "uint64_t": "uint64",
    "short": "int16",
}


def use_of(work: Work, start: int, end: int) -> Use:
    """What happens to the pointer that an expression yields."""
    region = work.tensors.function_at(start)
    if region is None:
        return Use.UNKNOWN
    return work.usage.consumer(work.source, Span(*region), start, end)


def pointers(work: Work, hit: Hit) -> Answer:
    """``t.data_ptr<T>()``: const where everything that receives it takes a pointer to const."""
    read = work.call(hit.end)
    types = work.template(hit.end)
    if not read or not types:
        return "the call is not readable"
    target, _ = work.receiver(hit.start)
    kind = work.word(types[0])
    written_const = kind.startswith("const ")
    kind = kind.removeprefix("const ").strip()
    constant = written_const or use_of(work, target.start, read[2]) == Use.CONST
    member = "const_data_ptr" if constant else "mutable_data_ptr"
    element = _ELEMENT.get(kind, kind)
    if element == kind and not written_const:
        if hit.name == "foreign_pointer":
            cast = f"reinterpret_cast<{'const ' if constant else ''}{kind}*>("
            return replace(
                target.start, read[2], cast, Span(target.start, hit.start), f"{member}())", rule=hit.rule.code
            )
        return replace(hit.start, hit.end, member, rule=hit.rule.code)
    inner: list[str | Span] = [Span(target.start, hit.start), f"{member}<{element}>()"]
    if element == kind:
        return replace(hit.start, read[2], f"{member}<{kind}>()", rule=hit.rule.code)
    cast = f"reinterpret_cast<{'const ' if constant else ''}{kind}*>("
    return replace(target.start, read[2], cast, *inner, ")", rule=hit.rule.code)


def accessors(work: Work, hit: Hit) -> Answer:
    """``t.accessor<T, N>()`` and the packed ones."""
    read = work.call(hit.end)
    types = work.template(hit.end)
    if not read or not types or len(types) < 2:
        return "the template arguments are not written out"
    target, star = work.receiver(hit.start)
    if not named(work, target):
        return "the accessor borrows sizes and strides from a temporary: name the tensor first"
    head: list[str | Span]
    if hit.name == "accessor":
        head = [ACCESSOR, "<", types[0], ", ", types[1]]
    else:
        traits: list[str | Span] = [types[2]] if len(types) > 2 else [_TRAITS]
        index = {"packed_accessor32": "int32_t", "packed_accessor64": "int64_t"}.get(hit.name)
        number: list[str | Span] = [index] if index else [types[3]] if len(types) > 3 else ["int64_t"]
        head = [PACKED, "<", types[0], ", ", types[1], ", ", *traits, ", ", *number]
    return replace(target.start, read[2], *head, f">({star}", target, ")", rule=hit.rule.code)


def accessor_type(work: Work, hit: Hit) -> Answer:
    """PackedTensorAccessor32 and 64 as types."""
    if hit.name == "GenericPackedTensorAccessor":
        return rename(work, hit)
    types = work.template(hit.end)
    if not types or len(types) < 2:
        return "the template arguments are not written out"
    close = lexical.closing_angle(work.code, lexical.skip_space(work.code, hit.end))
    index = "int32_t" if hit.name.endswith("32") else "int64_t"
    traits: list[str | Span] = [types[2]] if len(types) > 2 else [_TRAITS]
    number: list[str | Span] = [types[3]] if len(types) > 3 else [index]
    parts = [_PACKED, "<", types[0], ", ", types[1], ", ", *traits, ", ", *number, ">"]
    return replace(hit.start, close + 1, *parts, rule=hit.rule.code)


def cut(work: Work, hit: Hit) -> Answer:
    """``t.narrow(..)``, which takes a reference, and ``t.slice(..)``."""
    if hit.name == "slice":
        return wrapped.member(work, hit, "slice")
    target, _ = work.receiver(hit.start)
    if not named(work, target):
        return wrapped.member(work, hit, "narrow") if "narrow" in NAMES else _through_lambda(work, hit)
    return rename(work, hit)


def _through_lambda(work: Work, hit: Hit) -> Answer:
    """A temporary gets a name."""
    read = work.call(hit.end)
    target, star = work.receiver(hit.start)
    if not read or star:
        return "narrow takes a reference, and this is a temporary: name it first"
    parts: list[str | Span] = ["[&] { auto whole = ", target, f"; return torch::stable::{hit.name}(whole, "]
    return replace(target.start, read[2], *parts, Span(read[0][0].start, read[0][-1].end), "); }()", rule=hit.rule.code)


def tensor_index(work: Work, hit: Hit) -> Answer:
    """``t[i]``"""
    if isinstance(hit.match, Method):
        return rename(work, hit)
    close = lexical.closing(work.code, hit.start)
    inner = lexical.trim(work.code, hit.start + 1, close)
    start = lexical.receiver(work.code, hit.start)
    after = lexical.skip_space(work.code, close + 1)
    if close < 0 or inner.start >= inner.end:
        return "not readable"
    target = lexical.trim(work.code, start, hit.start)
    if work.code[after : after + 1] == "=" and work.code[after + 1 : after + 2] != "=":
        return _assigned_row(work, hit, target, inner, after)
    return replace(start, close + 1, "torch::stable::select(", target, ", 0, ", inner, ")", rule=hit.rule.code)


def _assigned_row(work: Work, hit: Hit, target: Span, index: Span, equals: int) -> Answer:
    """``t[i] = value;`` copies into the row."""
    end = work.code.find(";", equals)
    value = lexical.trim(work.code, equals + 1, end)
    before = work.code[lexical.back_over_space(work.code, target.start) - 1 : target.start].strip()
    if end < 0 or before not in (";", "{", "}", ")", ""):
        return "an assignment to t[i] copies into the tensor: write copy_ or fill_"
    row: list[str | Span] = ["{ auto row = torch::stable::select(", target, ", 0, ", index, "); "]
    if work.tensors.infer(*value) == "tensor":
        return replace(target.start, end + 1, *row, "torch::stable::copy_(row, ", value, "); }", rule=hit.rule.code)
    if through_double(work, value):
        return replace(target.start, end + 1, *row, "torch::stable::fill_(row, ", value, "); }", rule=hit.rule.code)
    if is_number(work, work.plain(value), hit.start, "int64_t|long|size_t|uint64_t"):
        return replace(target.start, end + 1, *row, f"{wrapped.NAMESPACE}::fill_(row, ", value, "); }",
                       rule=hit.rule.code)  # fmt: skip
    return "an assignment to t[i] copies into the tensor: write copy_ or fill_"


def summed(work: Work, hit: Hit) -> Answer:
    """``t.sum(dims, keepdim)``: the dimensions are an optional list."""
    read = work.call(hit.end)
    if not read:
        return "not readable"
    spans, _, end = read
    target, star = work.receiver(hit.start)
    parts: list[str | Span] = [f"torch::stable::sum({star}", target]
    if spans:
        first = work.word(spans[0])
        if "ScalarType" in first or first.startswith(("at::k", "torch::k")):
            return replace(target.start, end, *parts, ", std::nullopt, false, ", spans[0], ")", rule=hit.rule.code)
        braces = "{" if first.startswith("{") else "{{"
        closing = "}" if first.startswith("{") else "}}"
        parts += [", ", braces, spans[0], closing]
        if len(spans) > 1:
            parts += [", ", Span(spans[1].start, spans[-1].end)]
    return replace(target.start, end, *parts, ")", rule=hit.rule.code)


def item(work: Work, hit: Hit) -> Answer:
    """``t.item<T>()``"""
    read = work.call(hit.end)
    types = work.template(hit.end)
    if not read or not types:
        return "the type of item() is not written"
    kind = work.word(types[0])
    if kind not in _ITEMS:
        return f"no shim reads a {kind}"
    target, star = work.receiver(hit.start)
    dot = "->" if star else "."
    shim = {"int": "int32_t", "long": "int64_t", "short": "int16_t"}.get(kind, kind)
    head = f"[&] {{ {shim} value; TORCH_ERROR_CODE_CHECK(aoti_torch_item_{_ITEMS[kind]}("
    body = f"{dot}get(), &value)); return value; }}()"
    return replace(target.start, read[2], head, target, body, rule=hit.rule.code)


def streamed(work: Work, hit: Hit) -> Answer:
    """Sizes or a device in a message: its number of dimensions, or its index."""
    text = work.code[hit.start : hit.end]
    found = re.search(r"(?:\.|->)\s*(sizes|strides|device|options|layout)\s*\(\s*\)\Z", text)
    if not found or found[1] not in ("sizes", "device"):
        return "it cannot be streamed: print its parts"
    member = "dim()" if found[1] == "sizes" else "get_device_index()"
    dot = "->" if text[found.start() :].startswith("->") else "."
    return replace(hit.start + found.start(), hit.end, dot, member, rule=hit.rule.code)


def referenced(work: Work, hit: Hit) -> Answer:
    """Members that become functions of a tensor reference."""
    filled = work.call(hit.end) if hit.name == "fill_" else None
    if filled and len(filled[0]) == 1 and not through_double(work, filled[0][0]):
        return wrapped.member(work, hit, "fill_")
    if hit.name not in ("zero_", "copy_") or not isinstance(hit.match, Method) or not hit.match.free:
        return rename(work, hit)
    target, star = work.receiver(hit.start)
    read = work.call(hit.end)
    if star or named(work, target) or not read:
        return free_function(work, hit, hit.match.free, reference=True)
    after = lexical.skip_space(work.code, read[2])
    before = work.code[lexical.back_over_space(work.code, target.start) - 1 : target.start].strip()
    if before in (";", "{", "}", "") and work.code[after : after + 1] == ";":
        arguments: list[str | Span] = [", ", Span(read[0][0].start, read[0][-1].end)] if read[0] else []
        parts: list[str | Span] = ["{ auto view = ", target, f"; {hit.match.free}(view", *arguments, "); }"]
        return replace(target.start, after + 1, *parts, rule=hit.rule.code)
    return free_function(work, hit, hit.match.free, reference=True)


HANDLERS: dict[str, Handler] = {
    "pointers": pointers,
    "accessors": accessors,
    "accessor_type": accessor_type,
    "slice": cut,
    "tensor_index": tensor_index,
    "sum": summed,
    "item": item,
    "streamed": streamed,
    "referenced": referenced,
}
