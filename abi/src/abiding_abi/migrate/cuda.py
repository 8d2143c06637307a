"""Streams and device guards."""

from __future__ import annotations

import re

from abiding_abi import lexical
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate.edits import Edit, replace
from abiding_abi.migrate.helpers import BLAS, PROPERTIES, STREAM
from abiding_abi.migrate.work import Answer, Handler, Work

_GUARD = "torch::stable::accelerator::DeviceGuard"
_STREAM_MEMBER = re.compile(r"\s*\.\s*(stream|synchronize)\s*\(\s*\)")


def streams(work: Work, hit: Hit) -> Answer:
    """The current stream, and variables that hold it."""
    if hit.name.endswith("CUDAStream") and "get" not in hit.name:
        return _stream_type(work, hit)
    if "getCurrent" not in hit.name:
        return "only the current stream has a shim"
    read = work.call(hit.end)
    if not read or len(read[0]) > 1:
        return "not readable"
    spans, _, end = read
    member = _STREAM_MEMBER.match(work.code, end)
    argument: list[str | Span] = [spans[0]] if spans else []
    edits: list[Edit] = []
    if member and member[1] == "stream":
        end = member.end()
    elif member:
        return "wait with cudaStreamSynchronize"
    else:
        edits += _members(work, hit, end)
    edits.append(replace(hit.start, end, f"{STREAM}(", *argument, ")", rule=hit.rule.code))
    return edits


def _members(work: Work, hit: Hit, end: int) -> list[Edit]:
    """``name.stream()`` of the variable that is initialized here."""
    declared = re.compile(r"\bauto\s*&?\s*(\w+)\s*=\s*\Z").search(work.code, max(0, hit.start - 80), hit.start)
    return _unwrap(work, declared[1], end, hit) if declared else []


def _unwrap(work: Work, name: str, at: int, hit: Hit) -> list[Edit]:
    region = work.tensors.function_at(hit.start)
    edits: list[Edit] = []
    pattern = re.compile(rf"\b{re.escape(name)}{_STREAM_MEMBER.pattern}")
    for match in pattern.finditer(work.code, at, region[1] if region else at):
        if match[1] == "stream":
            edits.append(replace(match.start(), match.end(), name, rule=hit.rule.code))
        else:
            edits.append(replace(match.start(), match.end(), f"STD_CUDA_CHECK(cudaStreamSynchronize({name}))",
                                 rule=hit.rule.code))  # fmt: skip
    return edits


def _stream_type(work: Work, hit: Hit) -> Answer:
    """A variable or parameter of the class."""
    edits = [replace(hit.start, hit.end, "cudaStream_t", rule=hit.rule.code)]
    declared = re.compile(r"\s*&?\s*(\w+)\s*[=(){,;]").match(work.code, hit.end)
    if declared:
        edits += _unwrap(work, declared[1], declared.end(1), hit)
    return edits


def guards(work: Work, hit: Hit) -> Answer:
    """``CUDAGuard guard(t.device());``"""
    if hit.name == "device_of":
        return None
    optional = "Optional" in hit.name
    declared = re.compile(r"\s*(\w+)?\s*([({])").match(work.code, hit.end)
    if not declared:
        return "a guard without a device: set it where the device is known"
    open_at = declared.start(2)
    close = lexical.closing(work.code, open_at)
    spans = lexical.split(work.code, open_at + 1, close) if close > 0 else []
    if len(spans) != 1:
        return "not a guard of one device"
    index = _index(work, spans[0])
    if index is None:
        return "the device is not read off a tensor"
    if optional and not _on_cuda(work, hit.start):
        return _optional_guard(work, hit, declared[1], index, close)
    name = declared[1] or "guard"
    gap = " " + name if not declared[1] else ""
    parts: list[str | Span] = [_GUARD, gap, Span(hit.end, open_at), work.code[open_at], *index, work.code[close]]
    return replace(hit.start, close + 1, *parts, rule=hit.rule.code)


def _optional_guard(work: Work, hit: Hit, name: str | None, index: list[str | Span], close: int) -> Answer:
    """A guard that does nothing for a CPU tensor, as OptionalCUDAGuard did."""
    end = lexical.skip_space(work.code, close + 1)
    if not name or len(index) != 2 or index[1] != ".get_device_index()" or work.code[end : end + 1] != ";":
        return "OptionalCUDAGuard did nothing for a CPU tensor, where DeviceGuard raises without an accelerator"
    before = re.compile(r"\bconst\s+\Z").search(work.code, max(0, hit.start - 12), hit.start)
    start = before.start() if before else hit.start
    tensor = index[0]
    parts = [f"std::optional<{_GUARD}> {name}; if (", tensor, f".is_cuda()) {name}.emplace(", *index, ");"]
    return replace(start, end + 1, *parts, rule=hit.rule.code)


def _on_cuda(work: Work, at: int) -> bool:
    """Whether the function handles CUDA tensors alone: it launches kernels, or the file is CUDA."""
    region = work.tensors.function_at(at)
    return work.source.path.suffix in (".cu", ".cuh") or bool(region and "<<<" in work.code[region[0] : region[1]])


def _index(work: Work, span: Span) -> list[str | Span] | None:
    """The device's index in a guard's argument."""
    code = work.code
    text = work.plain(span)
    of = re.compile(r"(?:at\s*::\s*|c10\s*::\s*|torch\s*::\s*)?device_of\s*(?=\()").match(code, span.start, span.end)
    if of:
        read = lexical.arguments(code, of.end())
        return [read[0][0], ".get_device_index()"] if read and len(read[0]) == 1 else None
    cast = re.compile(r"(?:\(\s*(?:char|int8_t|signed char|c10::DeviceIndex)\s*\)|\bstatic_cast\s*<[^<>]*>)\s*").match(
        code, span.start, span.end
    )
    if cast:
        return _index(work, lexical.trim(code, cast.end(), span.end))
    if text.startswith("(") and text.endswith(")"):
        return _index(work, lexical.trim(code, span.start + 1, span.end - 1))
    member = re.compile(
        r"\s*(\.|->)\s*(device|get_device|get_device_index)\s*\(\s*\)(\s*\.\s*index\s*\(\s*\))?\Z"
    ).search(code, span.start, span.end)
    if member:
        target = lexical.receiver(code, member.start(1))
        if target == span.start:
            return [Span(span.start, member.start()), f"{member[1]}get_device_index()"]
    if re.search(r"\bdevice_index\(\)\Z", text):
        return [span]
    if re.fullmatch(r"\w+", text) and not re.search(rf"\bDevice\s+(?:const\s*)?&?\s*{text}\b", code):
        return [span]
    if re.fullmatch(r"\w+", text):
        return [span, ".index()"]
    return None


def blas_handle(work: Work, hit: Hit) -> Answer:
    """The current cuBLAS handle."""
    read = work.call(hit.end)
    if not hit.name.endswith("BlasHandle") or not read or read[0]:
        return "only the cuBLAS handle has a shim"
    return replace(hit.start, read[2], f"{BLAS}()", rule=hit.rule.code)


def device_properties(work: Work, hit: Hit) -> Answer:
    """A device's properties, or what is read of them."""
    name = hit.name.rpartition("::")[2]
    read = work.call(hit.end)
    if not read or name not in ("getCurrentDeviceProperties", "getDeviceProperties", "warp_size"):
        return "ask CUDA's runtime; without a driver it fails where torch answers 0"
    argument: list[str | Span] = [read[0][0]] if read[0] else []
    tail = ")->warpSize" if name == "warp_size" else ")"
    return replace(hit.start, read[2], f"{PROPERTIES}(", *argument, tail, rule=hit.rule.code)


HANDLERS: dict[str, Handler] = {
    "streams": streams,
    "guards": guards,
    "blas_handle": blas_handle,
    "device_properties": device_properties,
}
