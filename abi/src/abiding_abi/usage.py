"""What code does with a pointer or a tensor: written through, only read, or not to be known from here.

Pointers, accessors and tensors are followed through local names and into the project's own functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING

from abiding_abi import fields, lexical, signatures
from abiding_abi.expressions import callee_start, enclosing_call, is_unary, occurrences, whole_choice, whole_sum
from abiding_abi.lexical import Span
from abiding_abi.signatures import Function
from abiding_abi.source import Source

if TYPE_CHECKING:
    from abiding_abi.lint.project import Project


class Use(IntEnum):
    """In the order in which one use of several counts."""

    CONST = 0
    """Read, and a pointer to const will do."""
    READ = 1
    """Read, through something that is declared without const."""
    UNKNOWN = 2
    WRITTEN = 3


_ASSIGN = re.compile(r"\s*(?:(?:[-+*/%&|^]|<<|>>)?=(?!=)|\+\+|--)")
_CONSTANT = re.compile(r"k[A-Z]")
_STEP = re.compile(r"\s*(?:\+\+|--|[-+]=)")
_INPLACE = re.compile(r"\s*(?:\.|->)\s*((?!requires_grad_|__)[a-z]\w*_)\s*(?=[(<])")
_POINTER = re.compile(
    r"\s*(?:\.|->)\s*(?:template\s+)?(data_ptr|mutable_data_ptr|data|accessor|packed_accessor(?:32|64)?)\b"
)
_MEMBER = re.compile(r"\s*(?:\.|->)\s*(?:template\s+)?([A-Za-z_]\w*)")
_CALLED_MEMBER = re.compile(r"(?:\.|->)\s*(\w+)\s*\Z")
_DECLARED = re.compile(r"(?:^|[;{}(,])\s*((?:[\w:<>,\s]|\*|&)*?[\w>*&]\s*[*&\s]\s*)?([A-Za-z_]\w*)\s*(?:=|\{|\()\s*\Z")
_VIEWS = frozenset(
    (
        "view",
        "reshape",
        "select",
        "narrow",
        "slice",
        "transpose",
        "t",
        "permute",
        "squeeze",
        "unsqueeze",
        "expand",
        "flatten",
        "contiguous",
        "as_strided",
        "detach",
        "to",
        "index",
        "view_as",
        "expand_as",
        "diagonal",
        "unfold",
        "data",
        "value",
        "movedim",
        "unbind",
        "split",
        "chunk",
        "toType",
    )
)
_WRITE_FIRST = re.compile(
    r"(?:(?:gpu|fast)?[aA]tomic\w*|memset|memcpy|memmove|std::(?:fill|fill_n|memset|memcpy)|fill|cudaMemset(?:Async)?|"
    r"cudaMemcpy(?:Async)?|std::iota)\Z"
)
_READ_FIRST = re.compile(r"__ldg|__ldc[agsv]|__ldlu")
_CUB = re.compile(r"(?:\w+::)*cub::Device(?:Segmented)?(RadixSort|Scan|Reduce|Histogram)::")
_CAST = re.compile(r"\b(?:reinterpret_cast|static_cast|const_cast)\s*<([^<>]*(?:<[^<>]*>)?[^<>]*)>\s*\Z")
_C_CAST = re.compile(r"\(\s*((?:const\s+)?[A-Za-z_][\w:<>]*(?:\s+const)?\s*\*+)\s*\)\s*\Z")
_KEYWORDS = frozenset(
    ("if", "while", "for", "switch", "return", "sizeof", "assert", "printf", "decltype", "static_assert")
)
_ASKS = frozenset(("device_of", "CUDAGuard", "OptionalCUDAGuard", "DeviceGuard", "guard", "device_guard", "TensorArg"))
_AUTO = re.compile(r"\bauto\s*&{0,2}\s*\w+\s*=\Z")
_DEPTH = 8


class Usage:
    """Answers for the sources of one run, remembered."""

    def __init__(self, project: Project, sources: Iterable[Source]) -> None:
        self.project = project
        self.sources = list(sources)
        self._functions: dict[str, list[Function]] = {}
        self._parameters: dict[tuple[str, int, int, bool], Use] = {}
        self._fields = fields.Fields(self)

    def functions(self, name: str) -> list[Function]:
        """Every declaration and definition of a function in the run."""
        last = name.rpartition("::")[2].strip()
        if last not in self._functions:
            self._functions[last] = [f for source in self.sources for f in signatures.find(source, last)]
        return self._functions[last]

    def parameter(self, name: str, index: int, count: int, tensor: bool) -> Use:
        """What a function of the project does with its argument."""
        found = [f for f in self.functions(name) if len(f.parameters) >= count > index]
        bodies = [f for f in found if f.body]
        if not found:
            return Use.UNKNOWN
        kind = found[0].parameters[index].type
        if "*" in kind and re.search(r"\bconst\b[^*]*\*", kind):
            return Use.CONST
        if "*" not in kind and "ccessor" not in kind and not tensor and "Tensor" not in kind:
            return Use.READ
        if not bodies:
            return Use.UNKNOWN
        use = Use.READ
        for function in bodies:
            key = (str(function.source.path), function.open, index, tensor)
            if key not in self._parameters:
                self._parameters[key] = Use.READ
                parameter = function.parameters[index]
                follow = self.tensor if "Tensor" in parameter.type and "ccessor" not in parameter.type else self.pointer
                assert function.body
                self._parameters[key] = (
                    follow(function.source, function.body, parameter.name, 0) if parameter.name else Use.READ
                )
            use = max(use, self._parameters[key])
        return use

    def pointer(self, source: Source, region: Span, name: str, depth: int = 0) -> Use:
        """What a region does with a pointer or accessor of that name."""
        use = Use.CONST
        for start, end in occurrences(source.code, region, name):
            use = max(use, self.pointer_use(source, region, start, end, depth))
            if use == Use.WRITTEN:
                break
        return use

    def pointer_use(self, source: Source, region: Span, start: int, end: int, depth: int = 0) -> Use:
        """What one use of a pointer or accessor, an expression from ``start`` to ``end``, does with it."""
        code = source.code
        before = lexical.back_over_space(code, start)
        at = end
        indexed = False
        while code[lexical.skip_space(code, at) : lexical.skip_space(code, at) + 1] == "[":
            close = lexical.closing(code, lexical.skip_space(code, at))
            if close < 0:
                return Use.UNKNOWN
            at, indexed = close + 1, True
        star = code[before - 1 : before] == "*" and is_unary(code, before - 1)
        if indexed or star:
            member = re.compile(r"(?:\s*\.\s*\w+)+(?!\s*\()").match(code, at)
            at = member.end() if member else at
            if star and re.compile(r"\s*(?:\+\+|--)").match(code, at):
                at = re.compile(r"\s*(?:\+\+|--)").match(code, at).end()  # type: ignore[union-attr]
            if _ASSIGN.match(code, at) or code[before - 2 : before] in ("++", "--"):
                return Use.WRITTEN
            if indexed and code[before - 1 : before] == "&" and code[before - 2 : before - 1] != "&":
                return self.consumer(source, region, before - 1, at, depth)
            if indexed and self._bound(code, before, at):
                return self.consumer(source, region, start, at, depth)
            return Use.CONST
        if _STEP.match(code, end) or code[before - 2 : before] in ("++", "--"):
            return Use.CONST  # it moves the pointer, and touches nothing
        return self.consumer(source, region, start, end, depth)

    def _bound(self, code: str, before: int, at: int) -> bool:
        """Whether an element is bound to a name (a row of an accessor), or passed on."""
        follows = code[lexical.skip_space(code, at) : lexical.skip_space(code, at) + 1]
        return follows == ";" and bool(_AUTO.search(code, max(0, before - 60), before))

    def consumer(self, source: Source, region: Span, start: int, end: int, depth: int = 0) -> Use:
        """What happens to the value of an expression that yields a pointer or an accessor."""
        code = source.code
        if depth > _DEPTH:
            return Use.UNKNOWN
        cast = _C_CAST.search(code, max(0, start - 80), start)
        if cast:
            if re.search(r"\bconst\b", cast[1]):
                return Use.CONST
            return max(Use.READ, self.consumer(source, region, cast.start(), end, depth + 1))
        left, right = whole_sum(code, start, end)
        follows = lexical.skip_space(code, right)
        if re.compile(r"(?:\.|->)\s*(?:size|stride)s?\b").match(code, follows):
            return Use.CONST
        if code[follows : follows + 1] == "[":
            return self.pointer_use(source, region, left, right, depth + 1)
        if code[follows : follows + 2] in ("==", "!=", "&&", "||") or code[follows : follows + 1] == "?":
            return Use.CONST
        choice = whole_choice(code, left, right)
        if choice != (left, right):
            return min(Use.UNKNOWN, self.consumer(source, region, *choice, depth + 1))  # only one of the two is taken
        before = lexical.back_over_space(code, left)
        follows = lexical.skip_space(code, right)
        char = code[before - 1 : before]
        if char == "=" and code[before - 2 : before - 1] not in "=!<>+-*/":
            return self._assigned(source, region, before - 1, right, depth)
        if char in "(," or (char == "{" and code[follows : follows + 1] in ",}"):
            return self._passed(source, region, left, right, depth)
        if code[max(0, before - 6) : before].endswith("return"):
            return Use.UNKNOWN
        return Use.CONST if code[before - 2 : before] in ("==", "!=", "&&") else Use.UNKNOWN

    def _assigned(self, source: Source, region: Span, equals: int, end: int, depth: int) -> Use:
        declared = _DECLARED.search(source.code, max(0, equals - 300), equals + 1)
        if not declared:
            member = fields.TARGET.search(source.code, max(0, equals - 120), equals + 1)
            found = self._fields.use(member[1]) if member else None
            return Use.UNKNOWN if found is None else max(Use.READ, found)
        kind, name = declared[1] or "", declared[2]
        if re.search(r"\bconst\b[^*]*\*", kind) or re.search(r"\bconst\s+auto\s*\*", kind):
            return Use.CONST
        stop = region.end
        use = self.pointer(source, Span(end, stop), name, depth + 1)
        if kind.strip() and "auto" not in kind and use == Use.CONST:
            return Use.READ
        return use

    def _passed(self, source: Source, region: Span, start: int, end: int, depth: int) -> Use:
        call = enclosing_call(source.code, start)
        if call is None:
            return Use.UNKNOWN
        callee, index, count, paren, close = call
        cast = _CAST.search(source.code, max(0, paren - 120), paren)
        if cast:
            if re.search(r"\bconst\b", cast[1]):
                return Use.CONST
            return max(Use.READ, self.consumer(source, region, cast.start(), close + 1, depth + 1))
        if callee in _KEYWORDS or not callee:
            if callee or source.code[lexical.back_over_space(source.code, paren) - 1] in "=(,*&?:+-;{":
                return self.consumer(source, region, paren, close + 1, depth + 1) if not callee else Use.CONST
            return Use.UNKNOWN
        if _WRITE_FIRST.fullmatch(callee):
            return Use.WRITTEN if index == 0 else Use.READ
        if _READ_FIRST.fullmatch(callee):
            return Use.CONST
        if callee in ("Load", "Store") and index == 0:  # members of cub::BlockLoad and its kin
            return Use.CONST if callee == "Load" else Use.WRITTEN
        if cub := _CUB.match(callee):
            return _cub(cub[1], index)
        if callee in ("std::copy", "std::move") and index < 2:
            return Use.CONST
        if "ccessor" in callee:
            return max(Use.READ, self.consumer(source, region, callee_start(source.code, paren), close + 1, depth + 1))
        return self.parameter(callee, index, count, tensor=False)

    def tensor(self, source: Source, region: Span, name: str, depth: int = 0) -> Use:
        """What a region does with a tensor of that name."""
        use = Use.READ
        for start, end in occurrences(source.code, region, name):
            use = max(use, self._tensor_use(source, region, start, end, depth))
            if use == Use.WRITTEN:
                break
        return use

    def _tensor_use(self, source: Source, region: Span, start: int, end: int, depth: int) -> Use:
        code = source.code
        if depth > _DEPTH:
            return Use.UNKNOWN
        if _INPLACE.match(code, end):
            return Use.WRITTEN
        pointer = _POINTER.match(code, end)
        if pointer:
            at = lexical.skip_space(code, pointer.end())
            if code[at : at + 1] == "<":
                at = lexical.skip_space(code, lexical.closing_angle(code, at) + 1)
            close = lexical.closing(code, at) if code[at : at + 1] == "(" else -1
            return self.consumer(source, region, start, close + 1, depth + 1) if close > 0 else Use.UNKNOWN
        member = _MEMBER.match(code, end)
        if member:
            if member[1] not in _VIEWS:
                return Use.READ
            at = lexical.skip_space(code, member.end())
            close = lexical.closing(code, at) if code[at : at + 1] == "(" else -1
            return self._tensor_use(source, region, start, close + 1, depth + 1) if close > 0 else Use.UNKNOWN
        at = lexical.skip_space(code, end)
        if code[at : at + 1] == "[":
            close = lexical.closing(code, at)
            if close > 0 and _ASSIGN.match(code, close + 1):
                return Use.WRITTEN
            return self._tensor_use(source, region, start, close + 1, depth + 1) if close > 0 else Use.UNKNOWN
        if re.compile(r"\s*[-+*/]=").match(code, end):
            return Use.WRITTEN
        choice = whole_choice(code, start, end)
        if choice != (start, end):
            return min(Use.UNKNOWN, self._tensor_use(source, region, *choice, depth + 1))
        before = lexical.back_over_space(code, start)
        char = code[before - 1 : before]
        if char == "=" and code[before - 2 : before - 1] not in "=!<>":
            declared = _DECLARED.search(code, max(0, before - 300), before)
            if declared and code[at : at + 1] in ";,":
                return self.tensor(source, Span(end, region.end), declared[2], depth + 1)
            return Use.READ
        if char in "(,{" and code[at : at + 1] in ",)}":
            return self._tensor_passed(source, region, start, depth)
        return Use.READ

    def _tensor_passed(self, source: Source, region: Span, start: int, depth: int) -> Use:
        call = enclosing_call(source.code, start)
        if call is None:
            return Use.READ
        callee, index, count, paren, close = call
        if not callee and count == 1 and source.code[lexical.back_over_space(source.code, paren) - 1] in "=(,;{?:":
            return self._tensor_use(source, region, paren, close + 1, depth + 1)
        last = callee.rpartition("::")[2]
        from abiding_abi.wrappers import NAMES  # here, since lint of a few files has to start at once

        of_tensor = _CALLED_MEMBER.search(source.code, max(0, paren - 80), paren)
        if of_tensor and of_tensor[1] in NAMES and not of_tensor[1].endswith("_"):
            return Use.READ  # an argument of t.matmul and its kin
        if not callee or callee in _KEYWORDS or last in _ASKS or last.isupper() or _CONSTANT.match(last):
            return Use.READ
        if callee.startswith(("at::", "torch::", "std::", "c10::")):
            if last in ("zero_", "fill_", "copy_") and index == 0:
                return Use.WRITTEN
            out = last.endswith("_out") or (last.endswith("_") and not last.endswith("__"))
            if out and index == 0:
                return Use.WRITTEN
            return Use.UNKNOWN if last == "move" else Use.READ
        return self.parameter(callee, index, count, tensor=True)


def _cub(algorithm: str, index: int) -> Use:
    """What ``cub::Device...`` does with its argument: scratch memory and its size come first, then data."""
    if index < 2:
        return Use.WRITTEN
    if algorithm == "RadixSort":
        return Use.CONST if index % 2 == 0 else Use.WRITTEN
    return Use.CONST if index == 2 else Use.WRITTEN
