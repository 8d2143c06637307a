"""Checks that need more than a name; the rule table refers to them by theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from abiding_abi import lexical
from abiding_abi.lint import boxing_checks, launch_checks

if TYPE_CHECKING:
    from abiding_abi.lint.engine import Context

Hit = tuple[int, int, str]
Checker = Callable[["Context"], Iterator[Hit]]

POINTER_TYPES = frozenset(
    (
        "float",
        "double",
        "int",
        "int32_t",
        "int64_t",
        "int16_t",
        "int8_t",
        "uint8_t",
        "uint16_t",
        "uint32_t",
        "uint64_t",
        "bool",
        "short",
        "char",
        "signed char",
        "unsigned char",
        "scalar_t",
        "unsigned",
        "unsigned int",
        "long",
    )
)
"""Types with which data_ptr<T> keeps its meaning; int64_t is long on 64-bit Linux."""
FOREIGN_TYPES = frozenset(
    (
        "long long",
        "unsigned long long",
        "half",
        "__half",
        "nv_half",
        "half2",
        "__half2",
        "nv_bfloat16",
        "__nv_bfloat16",
        "__nv_fp8_e4m3",
        "__nv_fp8_e5m2",
        "float2",
        "float4",
        "int4",
        "uint4",
        "int2",
        "uint2",
        "nv_bfloat162",
        "__nv_bfloat162",
        "cuFloatComplex",
        "cuDoubleComplex",
        "cuComplex",
        "void",
    )
)
_DATA = re.compile(r"(?:\.|->)\s*(?:template\s+)?(data_ptr|data)\s*(?=<)")
_USING = re.compile(r"using\s+namespace\s+(?:::\s*)?(?:at|c10|torch)\b(?:\s*::\s*(?!stable|headeronly)\w+)*\s*;")
_TYPE_MEMBER = re.compile(r"(?:\.|->)\s*(type)\s*\(\s*\)")
_CONTIGUOUS = re.compile(r"(?:\.|->)\s*(is_contiguous)\s*\(\s*(?!\))")
_OPERATOR = re.compile(r"\b([A-Za-z_]\w*)\s*([-+*/]=?|[<>=!]=|&(?=\s*[\w(])(?!&)|[|^](?=\s*\w))(?![>&|+\-])")
_RIGHT = re.compile(r"[\w)\]]\s*([-+/])\s*([A-Za-z_]\w*)\b(?!\s*(?:[.\[(]|->|::))")
_FACTOR = re.compile(r"[\w)\]]\s*(\*)\s*([A-Za-z_]\w*)\b(?!\s*(?:[.\[(]|->|::))")
_RESULT = re.compile(r"\)\s*([-+*/])(?![-+*/=>])\s*[\w(]")
_SECOND_INDEX = re.compile(r"[\])]\s*(\[)")
_OPERAND = re.compile(r"[\w)\]]\s*([-+*/])\s*((?:(?:at|torch)::)?[A-Za-z_]\w*)\s*(?=[.(])")
_DEVICE = re.compile(r"device\s*\(\s*\)\s*\.\s*(is_(?!cuda\b|cpu\b)\w+|str|has_index|supports_\w+)\s*(?=\()")
_INDEX = re.compile(r"\b([A-Za-z_]\w*)\s*(\[)")
_VERSION = re.compile(r"\bTORCH_VERSION(?:_MAJOR|_MINOR|_PATCH)?\b")
_DEFINES_VERSION = {"torch/headeronly/version.h", *(f"torch/csrc/stable/{n}.h" for n in ("library", "ops", "tensor"))}
_ATOMIC = re.compile(
    r"(?<!::)\bgpuAtomic(?:Add|AddNoReturn|Max|Min|Mul)\b|\bfastAtomicAdd\b|\bfastSpecializedAtomicAdd\b"
)
_LOOP = re.compile(r"(?:CUDA_KERNEL_LOOP(?:_TYPE)?|GET_BLOCKS|CUDA_NUM_THREADS)\b")
_PYBIND = re.compile(r"\b(py|pybind11)\s*::\s*\w+")
_NEW_ZEROS = re.compile(r"new_zeros\s*(?=\()")
_MESSAGE = re.compile(r"(?:STD_TORCH_CHECK|TORCH_CHECK|AT_ASSERTM|AT_CHECK|TORCH_INTERNAL_ASSERT|AT_ERROR)\s*(?=\()")
_SHOWN = re.compile(r"(?:\.|->)\s*(?:sizes|strides|device|options|layout)\s*\(\s*\)\Z")
_WRAP = re.compile(r"THO_DISPATCH_V2\s*(?=\()")


def data_pointer(context: Context) -> Iterator[Hit]:
    """``t.data_ptr<T>()`` with a type that the stable tensor knows."""
    for start, end, kind in _pointers(context):
        if kind not in FOREIGN_TYPES:
            yield start, end, kind


def foreign_pointer(context: Context) -> Iterator[Hit]:
    """``t.data_ptr<T>()`` with a type that only torch's own headers knew."""
    for start, end, kind in _pointers(context):
        if kind in FOREIGN_TYPES:
            yield start, end, kind


def _pointers(context: Context) -> Iterator[Hit]:
    code = context.code
    for match in _DATA.finditer(code):
        angle = lexical.closing_angle(code, match.end())
        if angle < 0:
            continue
        kind = " ".join(code[match.end() + 1 : angle].split())
        after = lexical.skip_space(code, angle + 1)
        if code[after : after + 1] == "(":
            yield match.start(1), match.end(1), kind.removeprefix("const ")


def using_directive(context: Context) -> Iterator[Hit]:
    """``using namespace at;``"""
    for match in _USING.finditer(context.code):
        yield match.start(), match.end(), ""


def type_member(context: Context) -> Iterator[Hit]:
    """``t.type()``"""
    for match in _TYPE_MEMBER.finditer(context.code):
        if _tensor_before(context, match.start()):
            yield match.start(1), match.end(1), ""


def contiguous_format(context: Context) -> Iterator[Hit]:
    """``t.is_contiguous(format)``"""
    for match in _CONTIGUOUS.finditer(context.code):
        if _tensor_before(context, match.start()):
            yield match.start(1), match.end(1), ""


def _tensor_before(context: Context, at: int) -> bool:
    arrow = context.code[at : at + 2] == "->"
    return context.tensors.is_tensor(lexical.receiver(context.code, at), at, arrow)


def _named_tensors(context: Context) -> set[str]:
    kinds = ("tensor", "auto")
    found = context.tensors.declarations.items()
    names = {name for name, all_of in found if any(d.kind in kinds and not d.called for d in all_of)}
    return names | {name for name, kind in context.tensors.shared.members.items() if kind == "tensor"}


def _whole(code: str, at: int) -> bool:
    """Whether a word begins at ``at``; patterns do not ask it themselves, since a literal beginning is faster."""
    before = code[at - 1 : at]
    return not (before.isalnum() or before in ("_", ":"))


def _mentions_tensors(context: Context) -> bool:
    return "Tensor" in context.code


def tensor_index(context: Context) -> Iterator[Hit]:
    """``t[i]``"""
    if not _mentions_tensors(context):
        return
    names = _named_tensors(context)
    for match in _INDEX.finditer(context.code):
        if match[1] not in names or _is_member(context.code, match.start()):
            continue
        if context.tensors.lookup(match[1], match.start()) == "tensor":
            yield match.start(2), match.end(2), match[1]
    yield from _indexed_element(context)


def _indexed_element(context: Context) -> Iterator[Hit]:
    code = context.code
    for match in _SECOND_INDEX.finditer(code):
        at = match.start(1)
        start = lexical.receiver(code, at)
        if context.tensors.infer(start, match.start() + 1) == "tensor":
            yield at, at + 1, ""


def _is_member(code: str, at: int) -> bool:
    end = lexical.back_over_space(code, at)
    return code[end - 1 : end] == "." or code[max(0, end - 2) : end] in ("->", "::")


def tensor_arithmetic(context: Context) -> Iterator[Hit]:
    """``t + u``, unless the header of wrappers brings the operators."""
    if not _mentions_tensors(context):
        return
    signs = frozenset("&|^%") if _has_operators(context) else None
    code = context.code
    names = _named_tensors(context)
    for match in _OPERATOR.finditer(code):
        if match[1] not in names or _is_member(code, match.start()):
            continue
        if context.tensors.lookup(match[1], match.start()) != "tensor":
            continue
        if match[2] == "*" and not _is_operand(code, match.end()):
            continue
        if signs and match[2] not in signs:
            continue
        yield match.start(2), match.end(2), match[1]
    if signs:
        return
    for match in _RIGHT.finditer(code):
        if match[2] in names and context.tensors.lookup(match[2], match.start(2)) == "tensor":
            yield match.start(1), match.end(1), match[2]
    for match in _FACTOR.finditer(code):
        if match[2] not in names or not context.tensors.is_value(match.start() + 1, match.start(2)):
            continue
        if context.tensors.lookup(match[2], match.start(2)) == "tensor":
            yield match.start(1), match.end(1), match[2]
    for match in _OPERAND.finditer(code):
        if match[2] not in names and not match[2].startswith(("at::", "torch::")):
            continue
        end = lexical.postfix_end(code, match.start(2))
        if context.tensors.is_value(match.start() + 1, match.start(2)) and (
            context.tensors.infer(match.start(2), end) == "tensor"
        ):
            yield match.start(1), match.end(1), match[2]
    for match in _RESULT.finditer(code):
        start = lexical.receiver(code, match.start() + 1)
        if start < match.start() and context.tensors.infer(start, match.start() + 1) == "tensor":
            yield match.start(1), match.end(1), ""


def _has_operators(context: Context) -> bool:
    return any(line.path.endswith("abi_ops.h") for s in context.project.closure(context.source) for line in s.includes)


def device_member(context: Context) -> Iterator[Hit]:
    """``t.device().is_meta()``"""
    if "device" in context.code:
        for match in _DEVICE.finditer(context.code):
            yield match.start(1), match.end(1), ""


def _is_operand(code: str, at: int) -> bool:
    """Whether what follows a ``*`` is a factor, not a declared pointer."""
    follows = re.compile(r"\s*[\w(.]+\s*([;,)=]?)").match(code, at)
    return bool(follows) and not (follows[1] in "=," and code[at - 2 : at - 1] == " ")  # type: ignore[index]


def zeros_like_strides(context: Context) -> Iterator[Hit]:
    """``new_zeros(t, t.sizes())``"""
    code = context.code
    for match in _NEW_ZEROS.finditer(code):
        read = lexical.arguments(code, match.end())
        if read and len(read[0]) >= 2:
            first, second = code[slice(*read[0][0])], "".join(code[slice(*read[0][1])].split())
            if second == f"{first}.sizes()":
                yield match.start(), match.end(), first


def atomic_add(context: Context) -> Iterator[Hit]:
    """ATen's atomics, unless the file includes the header-only ones."""
    if any(line.path.startswith("torch/headeronly/cuda/") for line in context.source.includes):
        return
    if "gpuAtomic" not in context.code and "AtomicAdd" not in context.code:
        return
    for match in _ATOMIC.finditer(context.code):
        if _whole(context.code, match.start()) and not _is_project(context, match.group()):
            yield match.start(), match.end(), ""


def torch_version(context: Context) -> Iterator[Hit]:
    """Macros of torch's version, unless a header of the stable API defines them here."""
    if "TORCH_VERSION" not in context.code:
        return
    included = {line.path for source in context.project.closure(context.source) for line in source.includes}
    if included & _DEFINES_VERSION:
        return
    for match in _VERSION.finditer(context.code):
        yield match.start(), match.end(), ""


def kernel_loop(context: Context) -> Iterator[Hit]:
    """ATen's loop macro, unless the project defines its own."""
    for match in _LOOP.finditer(context.code):
        name = match.group()
        if name in context.facts.macros or _is_project(context, name):
            continue
        if any("KernelUtils" in line.path for s in context.project.closure(context.source) for line in s.includes):
            yield match.start(), match.end(), ""


def _is_project(context: Context, name: str) -> bool:
    definition = re.compile(rf"\b(?:void|int|inline|__device__|constexpr|const)\b[^;{{}}()]*\b{name}\b\s*[(=]")
    return name in context.facts.macros or any(
        name in s.code and definition.search(s.code) for s in context.project.closure(context.source)
    )


def pybind_name(context: Context) -> Iterator[Hit]:
    """Names of pybind11, in a file that torch's headers brought it into."""
    if "py::" not in context.code and "pybind11" not in context.code:
        return
    closure = context.project.closure(context.source)
    own = any(line.path.startswith("pybind11/") for s in closure for line in s.includes)
    torch = any(line.path in ("torch/extension.h", "torch/python.h") for s in closure for line in s.includes)
    if own and not torch:
        return
    modules = _module_bodies(context)
    for match in _PYBIND.finditer(context.code):
        if not any(start <= match.start() < end for start, end in modules):
            if match[1] == "py" and not (torch or "py" in context.facts.pybind):
                continue
            yield match.start(), match.end(), ""


def _module_bodies(context: Context) -> list[tuple[int, int]]:
    code = context.code
    found = []
    for match in re.finditer(r"\bPYBIND11_MODULE\s*\(", code):
        close = lexical.closing(code, match.end() - 1)
        open_at = lexical.skip_space(code, close + 1)
        if close > 0 and code[open_at : open_at + 1] == "{":
            end = lexical.closing(code, open_at)
            found.append((match.start(), end if end > 0 else len(code)))
    return found


def streamed(context: Context) -> Iterator[Hit]:
    """Sizes or a device as a part of a message."""
    code = context.code
    for match in _MESSAGE.finditer(code):
        read = lexical.arguments(code, match.end())
        for span in read[0][0 if code[match.start() : match.end()].startswith("AT_ERROR") else 1 :] if read else ():
            shown = _SHOWN.search(code, span.start, span.end)
            if shown and lexical.receiver(code, shown.start()) <= span.start and _tensor_before(context, shown.start()):
                yield span.start, span.end, code[slice(*span)]


def wrapped_lambda(context: Context) -> Iterator[Hit]:
    """AT_WRAP in THO_DISPATCH_V2."""
    code = context.code
    for match in _WRAP.finditer(code):
        read = lexical.arguments(code, match.end())
        if read and len(read[0]) > 2 and code.startswith("AT_WRAP", read[0][2].start):
            yield read[0][2].start, read[0][2].start + len("AT_WRAP"), ""


def nothing(context: Context) -> Iterator[Hit]:
    """For rules whose places are found elsewhere."""
    return iter(())


CHECKS: dict[str, Checker] = {
    "data_pointer": data_pointer,
    "device_member": device_member,
    "foreign_pointer": foreign_pointer,
    "using_directive": using_directive,
    "type_member": type_member,
    "contiguous_format": contiguous_format,
    "tensor_index": tensor_index,
    "tensor_arithmetic": tensor_arithmetic,
    "zeros_like_strides": zeros_like_strides,
    "atomic_add": atomic_add,
    "torch_version": torch_version,
    "kernel_loop": kernel_loop,
    "pybind_name": pybind_name,
    "streamed": streamed,
    "wrapped_lambda": wrapped_lambda,
    "other_member": nothing,
    "allow_without_reason": nothing,
    "unused_allow": nothing,
    **boxing_checks.CHECKS,
    **launch_checks.CHECKS,
}
