"""ATen's argument checks: TensorArg, CheckedFrom, checkAllSameGPU and their kin."""

from __future__ import annotations

import re

from abiding_abi import lexical
from abiding_abi.lexical import Span
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate.edits import replace
from abiding_abi.migrate.simple import whole_line
from abiding_abi.migrate.work import Answer, Handler, Work

_DECLARED = re.compile(r"\bTensorArg\b([^;]*);")
_SAME = {
    "GPU": ("{0}.is_cuda() && {1}.is_cuda() && {0}.get_device_index() == {1}.get_device_index()", "on one GPU"),
    "Type": ("{0}.scalar_type() == {1}.scalar_type()", "of one dtype"),
}


def checks(work: Work, hit: Hit) -> Answer:
    """A declaration of arguments, or a check of them."""
    if hit.name == "CheckedFrom":
        return replace(hit.start, hit.end, "const char*", rule=hit.rule.code)
    if hit.name == "TensorArg":
        return _declaration(work, hit)
    found = re.fullmatch(r"check(?:All)?Same(GPU|Type)", hit.name)
    if not found:
        return "write the check with STD_TORCH_CHECK"
    return _check(work, hit, found[1])


def _declaration(work: Work, hit: Hit) -> Answer:
    """The tensors stand in the checks themselves, so that their wrappers go."""
    end = work.code.find(";", hit.end)
    region = work.tensors.function_at(hit.start)
    if end < 0 or region is None or not _tensors(work, Span(region[0], end + 1)):
        return "write the check with STD_TORCH_CHECK"
    return replace(*whole_line(work, hit.start, end + 1), rule=hit.rule.code)


def _tensors(work: Work, region: Span) -> dict[str, str]:
    """Names of TensorArgs and the tensors that they hold."""
    found: dict[str, str] = {}
    for statement in _DECLARED.finditer(work.code, region.start, region.end):
        for span in lexical.split(work.code, statement.start(1), statement.end(1)):
            one = re.match(r"(\w+)\s*[{(]\s*(\w+)\s*,", work.code[slice(*span)])
            if one:
                found[one[1]] = one[2]
    return found


def _check(work: Work, hit: Hit, kind: str) -> Answer:
    read = work.call(hit.end)
    region = work.tensors.function_at(hit.start)
    if not read or len(read[0]) < 2 or region is None:
        return "not readable"
    spans, _, end = read
    listed = spans[1:]
    if len(listed) == 1 and work.code[listed[0].start] == "{":
        listed = lexical.split(work.code, listed[0].start + 1, listed[0].end - 1)
    tensors = _tensors(work, Span(region[0], hit.start))
    names = [tensors.get(work.word(span), "") for span in listed]
    if not all(names) or len(names) < 2:
        return "the tensors are not named here"
    condition, what = _SAME[kind]
    both = " && ".join(condition.format(names[0], other) for other in names[1:])
    parts: list[str | Span] = [f"STD_TORCH_CHECK({both}, ", spans[0], f', ": expected {", ".join(names)} {what}")']
    return replace(hit.start, end, *parts, rule=hit.rule.code)


HANDLERS: dict[str, Handler] = {"argument_checks": checks}
