"""Streams, guards and kernel launches that compile and are wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from abiding_abi import lexical

if TYPE_CHECKING:
    from abiding_abi.lint.engine import Context

Hit = tuple[int, int, str]

_LAUNCH = re.compile(r"<<<")
_GUARD = re.compile(r"DeviceGuard\s*(?=[({])")
_NAMED_GUARD = re.compile(r"\b(?:DeviceGuard|CUDAGuard|OptionalCUDAGuard)\b")
_STABLE = re.compile(r"\btorch\s*::\s*stable\b")
_TENSOR_DATA = re.compile(r"\b(?:mutable_data_ptr|const_data_ptr|data_ptr)\b")
_STREAM_CALL = re.compile(r"\b(?:aoti_torch_get_current_(?:cuda_)?stream|getCurrentStream)\s*(?=\()")


def _launches(context: Context) -> Iterator[tuple[int, int, list[lexical.Span], int]]:
    """Start, end, configuration and the parenthesis of the arguments of every launch."""
    code = context.code
    for match in _LAUNCH.finditer(code):
        end = code.find(">>>", match.end())
        if 0 <= end < match.end() + 2000:
            yield match.start(), end + 3, lexical.split(code, match.end(), end), lexical.skip_space(code, end + 3)


def null_stream(context: Context) -> Iterator[Hit]:
    """A launch on the default stream in a function that handles stable tensors."""
    code = context.code
    if "<<<" not in code or not _STABLE.search(code):
        return
    for start, end, spans, paren in _launches(context):
        if not _on_tensor(context, start, paren):
            continue
        if len(spans) < 4:
            yield start, end, "no stream"
        elif code[slice(*spans[3])] in ("0", "nullptr", "NULL"):
            yield spans[3].start, spans[3].end, "stream 0"


def _on_tensor(context: Context, start: int, paren: int) -> bool:
    """Whether the launch gets a tensor's data: in its arguments, or in the function around it."""
    code = context.code
    close = lexical.closing(code, paren) if code[paren : paren + 1] == "(" else -1
    if close > 0 and _TENSOR_DATA.search(code, paren, close):
        return True
    region = context.tensors.function_at(start)
    return region is not None and bool(_TENSOR_DATA.search(code, region[0], start))


def launch_without_guard(context: Context) -> Iterator[Hit]:
    """A launch on a stable tensor's data in a function without a guard."""
    code = context.code
    if "<<<" not in code or not _STABLE.search(code):
        return
    for start, end, _, paren in _launches(context):
        region = context.tensors.function_at(start)
        if region is None or not _on_tensor(context, start, paren):
            continue
        if not _NAMED_GUARD.search(code, region[0], start) and "Tensor" in code[region[0] : start]:
            yield start, end, ""


def unnamed_guard(context: Context) -> Iterator[Hit]:
    """``DeviceGuard(index);``"""
    code = context.code
    for match in _GUARD.finditer(code):
        if code[match.start() - 1].isalnum():
            continue
        begin = lexical.receiver(code, match.end())
        before = code[lexical.back_over_space(code, begin) - 1 : lexical.back_over_space(code, begin)]
        close = lexical.closing(code, match.end())
        if before in (";", "{", "}", "") and close > 0 and code[lexical.skip_space(code, close + 1)] == ";":
            yield match.start(), match.start() + len("DeviceGuard"), ""


def cpu_guard(context: Context) -> Iterator[Hit]:
    """A stable guard before the question whether the tensor is on the CPU."""
    code = context.code
    if "DeviceGuard" not in code:
        return
    pattern = re.compile(r"\bDeviceGuard\s+\w+\s*[({]\s*(\w+)\s*\.\s*(?:get_device_index|get_device)\s*\(\s*\)\s*[)}]")
    for match in pattern.finditer(code):
        region = context.tensors.function_at(match.start())
        if region is None:
            continue
        question = re.compile(rf"\b{match[1]}\s*\.\s*(?:is_cpu|is_cuda|device)\s*\(\s*\)")
        if question.search(code, match.end(), region[1]) and not question.search(code, region[0], match.start()):
            yield match.start(), match.end(), match[1]


CHECKS: dict[str, Callable[[Context], Iterator[Hit]]] = {
    "null_stream": null_stream,
    "launch_without_guard": launch_without_guard,
    "unnamed_guard": unnamed_guard,
    "cpu_guard": cpu_guard,
}
