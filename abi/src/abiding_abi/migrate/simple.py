"""Rewrites that need no more than the place: renames, checks, free functions for members."""

from __future__ import annotations

import re

from abiding_abi import lexical
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate import wrapped
from abiding_abi.migrate.edits import Edit, replace
from abiding_abi.migrate.work import Answer, Handler, Work
from abiding_abi.rules import Include, Macro, Method, Name
from abiding_abi.wrappers import NAMES

_COMPARE = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}


def rename(work: Work, hit: Hit) -> Answer:
    """What the rule's match says: another name, or a free function for a member."""
    match = hit.match
    if isinstance(match, Name | Macro) and match.to:
        name = hit.name.rpartition("::")[2]
        return replace(hit.start, hit.end, match.to.replace("{name}", name), rule=hit.rule.code)
    if isinstance(match, Method):
        if match.to:
            return replace(hit.start, hit.end, match.to, rule=hit.rule.code)
        if match.free:
            return free_function(work, hit, match.free)
    if isinstance(match, Include):
        return None
    return "no mechanical replacement"


def free_function(work: Work, hit: Hit, function: str, *, reference: bool = False) -> Edit | str:
    """``x.name(args)`` as ``function(x, args)``."""
    read = work.call(hit.end)
    if not read:
        return "the call's parentheses are not closed"
    spans, _, end = read
    target, star = work.receiver(hit.start)
    if work.word(target) == "this":
        return "called on this"
    if reference and not named(work, target):
        return f"{function.rpartition('::')[2]} takes a reference, and this is a temporary: name it first"
    parts: list[str | Span] = [f"{function}({star}", target]
    if spans:
        parts += [", ", Span(spans[0].start, spans[-1].end)]
    return replace(target.start, end, *parts, ")", rule=hit.rule.code)


def named(work: Work, span: Span) -> bool:
    """Whether an expression is a name (or a member or element of one), not a temporary."""
    return not work.word(span).endswith(")")


_EXACT = re.compile(
    r"-?(?:\d{1,15}[uUlL]*|(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE]-?\d+)?[fF]?)|true|false|-?(?:INFINITY|NAN)"
    r"|(?:static_cast<(?:float|double|int|bool)>|\((?:float|double|int|bool)\)|(?:float|double|int)).*"
    r"|-?std::numeric_limits<(?:float|double|int|int32_t)>::\w+\(\)|std::numeric_limits<[\w:]+>::(?:lowest|min)\(\)"
)
_NARROW = "int|int32_t|int16_t|int8_t|uint8_t|uint16_t|uint32_t|unsigned|bool|float|double"


def through_double(work: Work, value: Span) -> bool:
    """Whether a number surely survives as a double, which torch::stable::full and fill_ take: an int64 may not."""
    text = work.plain(value)
    return bool(_EXACT.fullmatch(text)) or is_number(work, text, value.start, _NARROW)


def is_number(work: Work, name: str, at: int, kinds: str) -> bool:
    """Whether a name is declared as one of these types in the function."""
    region = work.tensors.function_at(at)
    if region is None or not name.isidentifier():
        return False
    declared = re.compile(rf"\b(?:{kinds})\s+(?:\w+\s*,\s*)*{re.escape(name)}\b")
    head = work.code.rfind(";", 0, region[0]) + 1  # the parameters stand in front of the body
    return bool(declared.search(work.code, head, at))


def compare(work: Work, hit: Hit) -> Answer:
    """TORCH_CHECK_EQ and its kin."""
    read = work.call(hit.end)
    if not read or len(read[0]) < 2:
        return "the two operands are not readable"
    spans, _, end = read
    sign = _COMPARE[hit.name.rpartition("_")[2]]
    rest: list[str | Span] = [", ", Span(spans[2].start, spans[-1].end)] if len(spans) > 2 else []
    parts = ["STD_TORCH_CHECK((", spans[0], f") {sign} (", spans[1], ")", *rest, ")"]
    return replace(hit.start, end, *parts, rule=hit.rule.code)


def error(work: Work, hit: Hit) -> Answer:
    """AT_ERROR."""
    read = work.call(hit.end)
    if not read:
        return "the call's parentheses are not closed"
    spans, paren, _ = read
    return replace(hit.start, paren + 1, "STD_TORCH_CHECK(false" + (", " if spans else ""), rule=hit.rule.code)


def internal_assert(work: Work, hit: Hit) -> Answer:
    """TORCH_INTERNAL_ASSERT, and the one that release builds leave out, as they do assert."""
    if not hit.name.endswith("DEBUG_ONLY"):
        return rename(work, hit)
    read = work.call(hit.end)
    if not read or not read[0]:
        return "the condition is not readable"
    return replace(hit.start, read[2], "assert((", read[0][0], "))", rule=hit.rule.code)


def warn(work: Work, hit: Hit) -> Answer:
    """TORCH_WARN."""
    read = work.call(hit.end)
    if not read or len(read[0]) != 1 or work.text[read[0][0].start] != '"':
        return "aoti_torch_warn takes one C string: build the message first"
    head = "aoti_torch_warn(__func__, __FILE__, __LINE__, "
    if hit.name == "TORCH_WARN_ONCE":
        call: list[str | Span] = [
            "{ static const bool warned = [] { ",
            head,
            read[0][0],
            "); return true; }(); (void)warned; }",
        ]
        end = lexical.skip_space(work.code, read[2])
        return replace(hit.start, end + 1 if work.code[end : end + 1] == ";" else read[2], *call, rule=hit.rule.code)
    if hit.name != "TORCH_WARN":
        return "no counterpart"
    return replace(hit.start, read[2], head, read[0][0], ")", rule=hit.rule.code)


def nbytes(work: Work, hit: Hit) -> Answer:
    """``t.nbytes()``"""
    if isinstance(hit.match, Method) and hit.match.to:
        return rename(work, hit)
    read = work.call(hit.end)
    target, star = work.receiver(hit.start)
    if not read or star or not named(work, target):
        return "name the tensor first: its two members are multiplied"
    return replace(target.start, read[2], "(", target, ".numel() * ", target, ".element_size())", rule=hit.rule.code)


def matrix_transpose(work: Work, hit: Hit) -> Answer:
    """``t.transpose(..)`` and ``t.t()``"""
    if hit.name == "transpose":
        return rename(work, hit)
    return wrapped.member(work, hit, "t")


def to_device(work: Work, hit: Hit) -> Answer:
    """``t.cpu()`` and ``t.cuda()``"""
    read = work.call(hit.end)
    if not read or read[0]:
        return "the arguments have no counterpart"
    target, star = work.receiver(hit.start)
    device = f"torch::stable::Device(torch::headeronly::DeviceType::{hit.name.upper()})"
    return replace(target.start, read[2], f"torch::stable::to({star}", target, f", {device})", rule=hit.rule.code)


def question(work: Work, hit: Hit) -> Answer:
    """``t.is_sparse()`` and other questions about layout and device."""
    read = work.call(hit.end)
    if not read:
        return "no call"
    target, star = work.receiver(hit.start)
    dot = "->" if star else "."
    kind = {"is_mps": "MPS", "is_xpu": "XPU", "is_meta": "Meta"}.get(hit.name)
    asked = (
        f"{dot}device().type() == torch::headeronly::DeviceType::{kind})"
        if kind
        else f"{dot}layout() == torch::headeronly::Layout::Sparse)"
    )
    return replace(target.start, read[2], "(", target, asked, rule=hit.rule.code)


def type_member(work: Work, hit: Hit) -> Answer:
    """``t.type()`` with what is asked of it."""
    read = work.call(hit.end)
    if not read:
        return "no call"
    after = work.code[read[2] : read[2] + 40]
    for member, name in ((".scalarType()", "scalar_type()"), (".is_cuda()", "is_cuda()"), (".is_sparse()", "")):
        if "".join(after.split()).startswith(member) and name:
            end = work.code.index(")", read[2]) + 1
            return replace(hit.start, end, name, rule=hit.rule.code)
    before = work.code[lexical.back_over_space(work.code, work.receiver(hit.start)[0].start) - 1]
    if before in "(," or after.lstrip()[:2] in ("==", "!="):
        return replace(hit.start, hit.end, "scalar_type", rule=hit.rule.code)
    return "the result's type is not known here"


def synchronize(work: Work, hit: Hit) -> Answer:
    """Waiting for the device or a stream."""
    read = work.call(hit.end)
    if not read:
        return "no call"
    name = "cudaDeviceSynchronize" if hit.name.endswith("device_synchronize") else "cudaStreamSynchronize"
    inner: list[str | Span] = [Span(read[0][0].start, read[0][-1].end)] if read[0] else []
    return replace(hit.start, read[2], f"STD_CUDA_CHECK({name}(", *inner, "))", rule=hit.rule.code)


def ceil_div(work: Work, hit: Hit) -> Answer:
    """``at::ceil_div(a, b)``, and helpers that the header of wrappers has."""
    if hit.name.rpartition("::")[2] in NAMES:
        return wrapped.wrapped(work, hit)
    read = work.call(hit.end)
    if not read or len(read[0]) != 2:
        return "no counterpart in the stable headers: write the helper"
    a, b = read[0]
    return replace(hit.start, read[2], "((", a, ") + (", b, ") - 1) / (", b, ")", rule=hit.rule.code)


def visibility(work: Work, hit: Hit) -> Answer:
    """TORCH_API"""
    return replace(hit.start, hit.end, '__attribute__((visibility("default")))', rule=hit.rule.code)


def no_grad(work: Work, hit: Hit) -> Answer:
    """A guard against autograd, which a stable operator is below of."""
    if hit.name not in ("NoGradGuard", "InferenceMode"):
        return "autograd has no stable C++ form: move it to Python"
    end = work.code.find(";", hit.end)
    if end < 0 or "\n" in work.code[hit.end : end]:
        return "not a plain declaration"
    return replace(*whole_line(work, hit.start, end + 1), rule=hit.rule.code)


def whole_line(work: Work, start: int, end: int) -> tuple[int, int]:
    """The range with its line, where nothing else stands on it."""
    begin = max(work.text.rfind("\n", 0, start) + 1, work.source.start)
    stop = work.text.find("\n", end)
    stop = len(work.text) if stop < 0 else stop + 1
    alone = not work.text[begin:start].strip() and not work.text[end:stop].strip()
    return (begin, stop) if alone else (start, end)


def name_guard(work: Work, hit: Hit) -> Answer:
    """A name for a guard that has none."""
    return replace(hit.end, hit.end, " guard", rule=hit.rule.code)


def fragment(work: Work, hit: Hit) -> Answer:
    """A second library of a namespace becomes a fragment."""
    return replace(
        hit.start, hit.start + len("STABLE_TORCH_LIBRARY"), "STABLE_TORCH_LIBRARY_FRAGMENT", rule=hit.rule.code
    )


def element_size(work: Work, hit: Hit) -> Answer:
    """``elementSize(dtype)``"""
    read = work.call(hit.end)
    if not read or len(read[0]) != 1:
        return "no call"
    head = "aoti_torch_dtype_element_size(torch::stable::detail::to<int32_t>(torch::stable::detail::from("
    return replace(hit.start, read[2], head, read[0][0], ")))", rule=hit.rule.code)


def small_vector(work: Work, hit: Hit) -> Answer:
    """``c10::SmallVector<T, N>`` as a vector."""
    arguments = work.template(hit.end)
    if hit.name == "DimVector" or not arguments:
        return rename(work, hit)
    close = lexical.closing_angle(work.code, lexical.skip_space(work.code, hit.end))
    return replace(hit.start, close + 1, "std::vector<", arguments[0], ">", rule=hit.rule.code)


def itself(work: Work, hit: Hit) -> Answer:
    """``t.detach()`` is the tensor itself below autograd."""
    read = work.call(hit.end)
    target, star = work.receiver(hit.start)
    if not read or read[0]:
        return "the arguments have no counterpart"
    if star:
        return replace(target.start, read[2], "(*", target, ")", rule=hit.rule.code)
    return replace(target.end, read[2], "", rule=hit.rule.code)


def device_member(work: Work, hit: Hit) -> Answer:
    """``t.device().is_meta()`` as a comparison of its type."""
    kinds = {"is_meta": "Meta", "is_mps": "MPS", "is_xpu": "XPU", "is_hip": "HIP", "is_xla": "XLA"}
    kind = kinds.get(work.code[hit.start : hit.end])
    read = work.call(hit.end)
    if kind is None or not read:
        return "torch::stable::Device has type(), index(), is_cuda() and is_cpu() alone"
    target, _ = work.receiver(hit.start)
    tail = f".type() == torch::headeronly::DeviceType::{kind})"
    return replace(target.start, read[2], "(", target, tail, rule=hit.rule.code)


HANDLERS: dict[str, Handler] = {
    "device_member": device_member,
    "itself": itself,
    "compare": compare,
    "internal_assert": internal_assert,
    "error": error,
    "warn": warn,
    "nbytes": nbytes,
    "matrix_transpose": matrix_transpose,
    "to_device": to_device,
    "question": question,
    "type_member": type_member,
    "synchronize": synchronize,
    "ceil_div": ceil_div,
    "visibility": visibility,
    "no_grad": no_grad,
    "name_guard": name_guard,
    "fragment": fragment,
    "element_size": element_size,
    "small_vector": small_vector,
}
