"""Functions that make tensors, and the options that they take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from dataclasses import replace as changed

from abiding_abi import lexical
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate import wrapped
from abiding_abi.migrate.edits import Edit, replace
from abiding_abi.migrate.simple import named, rename, through_double, whole_line
from abiding_abi.migrate.work import Answer, Handler, Work
from abiding_abi.rules import Method
from abiding_abi.wrappers import NAMES

_STABLE = "torch::stable::"
_DTYPE = re.compile(r"torch::headeronly::ScalarType|(?:\.|->)(?:scalar_type|dtype)\(\)\Z|\bCppTypeToScalarType\b")
_DEVICE = re.compile(r"torch::headeronly::DeviceType|torch::stable::Device|(?:\.|->)device\(\)\Z")
_CHAIN = re.compile(r"\s*\.\s*(dtype|device|layout|requires_grad|memory_format|pinned_memory)\s*(?=\()")
_START = re.compile(r"(?:at|torch|c10)\s*::\s*(?:(TensorOptions)\s*\(\s*\)|(?=(?:dtype|device|requires_grad)\b))")
_DECLARATION = re.compile(
    r"(?:const\s+)?(?:auto|(?:(?:at|torch|c10)\s*::\s*)?TensorOptions)\s*(?:const\s*)?&?\s*(\w+)\s*(=|\(|\{)\s*"
)


@dataclass(frozen=True)
class Options:
    """What options say: a tensor to be like, a dtype, a device."""

    like: Span | None = None
    dtype: Span | None = None
    device: tuple[str | Span, ...] = ()
    variable: str = ""
    declared: int = -1


def read_options(work: Work, span: Span, depth: int = 0) -> Options | None:
    """Options, or a dtype in their place; None where something cannot be carried over."""
    code = work.code
    text = work.plain(span)
    if depth > 3:
        return None
    if re.fullmatch(r"[A-Za-z_]\w*", text):
        return _variable(work, text, span.start, depth)
    found = re.search(r"(?:\.|->)\s*options\s*\(\s*\)", code[span.start : span.end])
    if found:
        like = lexical.trim(code, span.start, span.start + found.start())
        if lexical.receiver(code, span.start + found.start()) != span.start:
            return None
        return _chain(work, Options(like=like), span.start + found.end(), span.end)
    start = _START.match(code, span.start)
    if start:
        return _chain(work, Options(), start.end(), span.end, first=not start[1])
    if _DTYPE.search(text) and not text.startswith("torch::stable::"):
        return Options(dtype=span)
    if _DEVICE.search(text):
        return Options(device=_device(work, [span]))
    return None


def _chain(work: Work, options: Options, at: int, end: int, *, first: bool = False) -> Options | None:
    code = work.code
    while at < end:
        pattern = re.compile(r"\s*(dtype|device|layout|requires_grad)\s*(?=\()") if first else _CHAIN
        call = pattern.match(code, at, end)
        first = False
        if not call:
            return options if not code[at:end].strip() else None
        read = lexical.arguments(code, lexical.skip_space(code, call.end()))
        if not read:
            return None
        spans, at = read
        if call[1] == "dtype" and len(spans) == 1:
            options = changed(options, dtype=spans[0])
        elif call[1] == "device" and spans:
            options = changed(options, device=_device(work, spans))
        elif (call[1] == "layout" and work.plain(spans[0]).endswith("Strided")) or (
            call[1] == "requires_grad" and (work.plain(spans[0]) == "false")
        ):
            continue
        else:
            return None
    return options


def _device(work: Work, spans: list[Span]) -> tuple[str | Span, ...]:
    text = work.plain(spans[0])
    if len(spans) == 1 and (text.endswith(".device()") or text.startswith("torch::stable::Device(")):
        return (spans[0],)
    if len(spans) == 1 and re.fullmatch(r"[A-Za-z_]\w*", text):
        return (spans[0],)
    return (f"{_STABLE}Device(", Span(spans[0].start, spans[-1].end), ")")


def _variable(work: Work, name: str, at: int, depth: int) -> Options | None:
    """A variable that holds options, a dtype or a tensor's options."""
    region = work.tensors.function_at(at)
    if region is None or _assigned_again(work, name, Span(*region)):
        return None
    found: re.Match[str] | None = None
    for match in _DECLARATION.finditer(work.code, region[0], at):
        found = match if match[1] == name else found
    dtype = re.compile(rf"\bScalarType\s*(?:const\s*)?&?\s*{re.escape(name)}\b").search(work.code, region[0], at)
    if dtype and not found:
        return Options(dtype=Span(at, at + len(name)))
    if not found:
        return None
    end = work.code.find(";", found.end()) if found[2] == "=" else lexical.closing(work.code, found.end(2) - 1)
    if not found.end() <= end <= at:
        return None
    value = lexical.trim(work.code, found.end(), end)
    if _DTYPE.search(work.plain(value)) and "options" not in work.plain(value) and "dtype(" not in work.plain(value):
        return Options(dtype=Span(at, at + len(name)))
    inner = read_options(work, value, depth + 1)
    return changed(inner, variable=name, declared=found.start()) if inner else None


def _assigned_again(work: Work, name: str, region: Span) -> bool:
    """Whether a variable of options gets other ones later, so that its declaration does not say what it holds."""
    assigned = re.compile(rf"(?:^|[;{{}}])\s*{re.escape(name)}\s*=(?!=)").search(work.code, *region)
    return bool(assigned)


def factory(work: Work, hit: Hit) -> Answer:
    """empty, zeros, ones, full, the _like ones and the new_ members."""
    if work.shared.keep_options:
        return kept(work, hit)
    name = hit.name.rpartition("::")[2]
    member = name.startswith("new_")
    if name in ("options", "TensorOptions", "dtype", "device", "layout", "requires_grad", "pinned_memory"):
        return None
    if name == "fill_":
        return _filled(work, hit)
    if name.endswith("_like") or name not in _MAKERS:
        return (
            rename(work, hit)
            if name != "empty_like" or _single(work, hit)
            else "empty_like with options changes strides"
        )
    read = work.call(hit.end)
    if not read or not read[0]:
        return "the call is not readable"
    spans, _, end = read
    target: Span | None = None
    start = hit.start
    if member:
        target, star = work.receiver(hit.start)
        if star:
            return "called through a pointer"
        start = target.start
    takes_value = name in ("full", "new_full")
    count = 2 if takes_value else 1
    if takes_value and len(spans) > 1 and not through_double(work, spans[1]):
        return "the value may be an int64 that a double does not hold"
    if len(spans) > count + (2 if name == "empty" else 1):
        return "more arguments than sizes and options"
    memory_format = spans[count + 1] if len(spans) > count + 1 else None
    read_as = read_options(work, spans[count]) if len(spans) > count else Options()
    if read_as is None:
        return "these options are not readable: write dtype and device out"
    options = read_as
    if target is not None:
        options = changed(options, like=options.like or target)
    value: str | Span = spans[1] if takes_value else {"zeros": "0", "ones": "1"}.get(name.removeprefix("new_"), "")
    if (
        takes_value
        and options.like is None
        and options.dtype is None
        and not re.search(r"\.|f\Z", work.plain(spans[1]))
    ):
        return "full without a dtype takes that of the value, which here may be an integer"
    _remember(work, options)
    return _made(work, hit, Span(start, end), name.removeprefix("new_"), spans[0], value, options, memory_format)


def _filled(work: Work, hit: Hit) -> Answer:
    """``at::fill_(t, value)``"""
    read = work.call(hit.end)
    if read and len(read[0]) == 2 and not through_double(work, read[0][1]):
        return replace(hit.start, hit.end, f"{wrapped.NAMESPACE}::fill_", rule=hit.rule.code)
    return rename(work, hit)


_MAKERS = frozenset(("empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_full", "new_ones"))


def _single(work: Work, hit: Hit) -> bool:
    read = work.call(hit.end)
    return bool(read) and len(read[0]) == 1  # type: ignore[index]


def _made(
    work: Work,
    hit: Hit,
    whole: Span,
    name: str,
    sizes: Span,
    value: str | Span,
    options: Options,
    memory_format: Span | None,
) -> Edit | str:
    rule = hit.rule.code
    like = options.like
    dtype: tuple[str | Span, ...] = (options.dtype,) if options.dtype else ()
    if like is not None and name in ("empty", "zeros") and memory_format is None:
        parts: list[str | Span] = [f"{_STABLE}new_{name}(", like, ", ", sizes]
        if options.device:
            parts += [", ", *(dtype or ("std::nullopt",)), ", std::nullopt, ", *options.device]
        elif dtype:
            parts += [", ", *dtype]
        return replace(*whole, *parts, ")", rule=rule)
    device = options.device
    if like is not None:
        if not named(work, like):
            return "name the tensor first: dtype and device are asked of it"
        dtype = dtype or (like, ".scalar_type()")
        device = device or (like, ".device()")
    parts = [f"{_STABLE}{'empty' if name == 'empty' else 'full'}(", sizes]
    if name != "empty":
        parts += [", ", value]
    if dtype or device:
        parts += [", ", *(dtype or ("std::nullopt",))]
    if device:
        parts += [", std::nullopt, ", *device]
    if memory_format is not None:
        parts += [*([", std::nullopt"] * (1 if device else 3 if dtype else 4)), ", ", memory_format]
    return replace(*whole, *parts, ")", rule=rule)


def _remember(work: Work, options: Options) -> None:
    """Count a use of an options variable, whose declaration goes once all are gone."""
    if options.variable:
        used = work.scratch.setdefault("options", {})
        used[(options.variable, options.declared)] = used.get((options.variable, options.declared), 0) + 1


def declarations(work: Work) -> list[Edit]:
    """Declarations of options variables that no code uses any more."""
    edits: list[Edit] = []
    for (name, declared), count in work.scratch.get("options", {}).items():
        region = work.tensors.function_at(declared)
        end = work.code.find(";", declared)
        if region is None or end < 0:
            continue
        pattern = rf"\b{re.escape(name)}\b"
        uses = len(re.findall(pattern, work.code[end : region[1]]))
        in_macro = any(re.search(pattern, work.code[start:stop]) for _, start, stop in work.source.defines)
        if uses == count and not in_macro:
            edits.append(replace(*whole_line(work, declared, end + 1), rule="TYP025"))
    return edits


def kept(work: Work, hit: Hit) -> Answer:
    """Options that stay a value of their own, and the calls that get it: through the header of wrappers."""
    name = hit.name.rpartition("::")[2]
    if name == "options":
        return wrapped.member(work, hit, name)
    if name == "__dtype" or name not in NAMES | {"layout", "requires_grad", "pinned_memory"}:
        return f"{name} has no wrapper"
    if name in ("layout", "requires_grad", "pinned_memory"):
        return replace(hit.start, hit.end, f"{wrapped.NAMESPACE}::TensorOptions().{name}", rule=hit.rule.code)
    if name in ("TensorOptions", "dtype", "device"):
        return replace(hit.start, hit.end, f"{wrapped.NAMESPACE}::{name}", rule=hit.rule.code)
    read = work.call(hit.end)
    if not read or len(read[0]) > (4 if name in ("full", "new_full", "full_like", "from_blob") else 3):
        return "more arguments than sizes and options"
    if name == "from_blob" and any(re.match(r"\[|.*(?:delete|free)", work.plain(span)) for span in read[0][2:]):
        return "a deleter needs torch 2.11: torch::stable::from_blob"
    if any(re.match(r"(?:std::)?nullopt\b", work.plain(span)) for span in read[0]):
        return "write dtype and device as options"
    if isinstance(hit.match, Method):
        return wrapped.member(work, hit, name)
    return replace(hit.start, hit.end, f"{wrapped.NAMESPACE}::{name}", rule=hit.rule.code)


_KEPT = re.compile(rf"\b{wrapped.NAMESPACE}\s*::\s*(?:TensorOptions|options|dtype|device)\b")


def _is_kept(work: Work, span: Span) -> bool:
    """Whether an argument is options that stayed a value."""
    text = work.plain(span)
    if _KEPT.search(text):
        return True
    region = work.tensors.function_at(span.start)
    name = re.escape(text)
    typed, deduced = rf"TensorOptions\s*(?:const\s*)?&?\s*{name}\b", rf"\bauto\s*&?\s*{name}\s*=[^;]*{_KEPT.pattern}"
    return (
        text.isidentifier() and region is not None and bool(re.compile(f"{typed}|{deduced}").search(work.code, *region))
    )


def zeros_like(work: Work, hit: Hit) -> Answer:
    """``zeros_like(t)``: empty_like, then zero_, which keeps the strides."""
    if work.shared.keep_options:
        return kept(work, hit)
    read = work.call(hit.end)
    if not read or len(read[0]) != 1:
        return "zeros_like with options changes the dtype: say whether the strides matter"
    spans, _, end = read
    statement = re.compile(r"(?:\A|[;{}])\s*(?:[\w:]+(?:\s*&)?)\s+(\w+)\s*=\s*\Z").search(
        work.code, max(0, hit.start - 200), hit.start
    )
    after = lexical.skip_space(work.code, end)
    empty: list[str | Span] = [f"{_STABLE}empty_like(", spans[0], ")"]
    if statement and work.code[after : after + 1] == ";" and "\\\n" not in work.text[hit.start - 80 : end]:
        begin = work.text.rfind("\n", 0, hit.start) + 1
        indent = re.match(r"[ \t]*", work.text[begin:]).group()  # type: ignore[union-attr]
        zero = f";{work.newline}{indent}{_STABLE}zero_({statement[1]});"
        return replace(hit.start, after + 1, *empty, zero, rule=hit.rule.code)
    return replace(hit.start, end, "[&] { auto zeros = ", *empty, f"; {_STABLE}zero_(zeros); return zeros; }}()",
                   rule=hit.rule.code)  # fmt: skip


def from_blob(work: Work, hit: Hit) -> Answer:
    """``from_blob(pointer, {sizes}, options)``: the strides of a contiguous tensor are written out."""
    if work.shared.keep_options:
        return kept(work, hit)
    read = work.call(hit.end)
    if not read or not 2 <= len(read[0]) <= 3:
        return "strides, device and dtype have to be said; a deleter needs torch 2.11"
    spans, _, end = read
    options = read_options(work, spans[2]) if len(spans) > 2 else Options()
    sizes = spans[1]
    if options is None or work.code[sizes.start] != "{":
        return "the sizes are not a list, so that their strides are not known here"
    dims = [work.word(span) for span in lexical.split(work.code, sizes.start + 1, sizes.end - 1)]
    if any(re.search(r"[(+-]", dim.replace(".size(", "")) for dim in dims) or (
        options.like and not named(work, options.like)
    ):
        return "the sizes are not plain: write the strides"
    strides = [" * ".join(dims[index + 1 :]) or "1" for index in range(len(dims))]
    dtype: list[str | Span] = ["torch::headeronly::ScalarType::Float"]
    device: list[str | Span] = [f"{_STABLE}Device(torch::headeronly::DeviceType::CPU)"]
    if options.like is not None:
        dtype, device = [options.like, ".scalar_type()"], [options.like, ".device()"]
    dtype = [options.dtype] if options.dtype else dtype
    device = list(options.device) or device
    _remember(work, options)
    parts = [f"{_STABLE}from_blob(", spans[0], ", ", sizes, f", {{{', '.join(strides)}}}, ", *device, ", ", *dtype, ")"]
    return replace(hit.start, end, *parts, rule=hit.rule.code)


def converted(work: Work, hit: Hit) -> Answer:
    """``t.to(..)``, whose argument may be options."""
    read = work.call(hit.end)
    if read and len(read[0]) == 1 and hit.name == "to":
        options = read_options(work, read[0][0])
        if options and options.like is not None and named(work, options.like):
            target, star = work.receiver(hit.start)
            dtype: list[str | Span] = [options.dtype] if options.dtype else [options.like, ".scalar_type()"]
            device: list[str | Span] = list(options.device) or [options.like, ".device()"]
            _remember(work, options)
            parts = [f"{_STABLE}to({star}", target, ", ", *dtype, ", std::nullopt, ", *device, ")"]
            return replace(target.start, read[2], *parts, rule=hit.rule.code)
    if work.shared.kind == "options" and not work.shared.keep_options:
        return None
    if read and read[0] and hit.name == "to" and _is_kept(work, read[0][0]):
        return wrapped.member(work, hit, "to")
    return rename(work, hit)


def pad(work: Work, hit: Hit) -> Answer:
    """``pad`` and ``sub``, the latter exact for integers too."""
    return wrapped.wrapped(work, hit) if hit.name == "sub" else rename(work, hit)


HANDLERS: dict[str, Handler] = {
    "converted": converted,
    "from_blob": from_blob,
    "factories": factory,
    "zeros_like": zeros_like,
    "pad": pad,
}
