"""Which expressions are tensors: declarations and what follows from them, read without a compiler.

Knowledge is by function: a name means the last declaration before its use in the same outermost function body
(parameters included), else a member or a global. What cannot be decided is not called a tensor.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from functools import cached_property

from abiding_abi import lexical
from abiding_abi.lint.vocabulary import Declaration, Kind, Vocabulary
from abiding_abi.rules.stable import NOT_TENSORS, TENSOR_LISTS
from abiding_abi.source import Source

_DECLARATOR = r"\s*(?:const\b|__restrict__\b)?\s*[*&]*\s*(?:const\b\s*)?([A-Za-z_]\w*)\s*(?=([;,=)({:\[]))"
_OTHER_TYPE = re.compile(r"(?:\b([A-Za-z_]\w*)|(>))(?:\s*[*&]+\s*|\s+)(?:(?:const|__restrict__|__restrict)\s+)?\Z")
_LISTS = frozenset(("TensorList", "tensor_list", "variable_list", "auto"))
_MORE = re.compile(r"\s*,\s*[&*]?\s*([A-Za-z_]\w*)\s*(?=[,;=({])")
_NOT_TYPES = frozenset(
    (
        *("and", "case", "class", "co_return", "default", "define", "delete", "else", "enum", "extern", "goto"),
        *("if", "include", "inline", "namespace", "new", "not", "operator", "or", "private", "public"),
        *("return", "static", "struct", "template", "throw", "typedef", "typename", "union", "using", "while"),
    )
)
_BRACES = re.compile(r"[{}]")
_STATEMENT = re.compile(r"[()\[\]{};]")
_SCOPE = re.compile(r"(?:\b(?:namespace|class|struct|union|enum)\b[^;{}()]*|\bextern\s*\"[^\"]*\"\s*)\Z")
_TENSOR_TEMPLATE = re.compile(
    r"\b(vector|array|ArrayRef|HeaderOnlyArrayRef|optional|List|initializer_list|reference_wrapper)\s*<"
)
_ALIAS = re.compile(
    r"\busing\s+(\w+)\s*=\s*(?:at|torch|c10)\s*::\s*(?:stable\s*::\s*)?Tensor\s*;|"
    r"\btypedef\s+(?:at|torch|c10)\s*::\s*(?:stable\s*::\s*)?Tensor\s+(\w+)\s*;"
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z")
_CAST = re.compile(r"(?:std\s*::\s*)?(?:move|forward|as_const)\b")


class Tensors:
    """The tensors of one file."""

    def __init__(self, source: Source, shared: Vocabulary | None = None, *, bare: bool = True) -> None:
        self._bare = bare
        self.code = source.code
        self._macros = [(start, end) for _, start, end in source.defines]
        self.shared = shared or Vocabulary()
        self._depth = 0
        self._other: dict[str, list[Declaration]] = {}

    @cached_property
    def types(self) -> set[str]:
        """Names that mean the tensor type, without namespaces."""
        found = {m[1] or m[2] for m in _ALIAS.finditer(self.code)} if "Tensor" in self.code else set()
        return found | {"Tensor"} | self.shared.types

    @cached_property
    def functions(self) -> list[tuple[int, int]]:
        """Outermost function bodies: start of the signature's line and end of the body."""
        found: list[tuple[int, int]] = []
        outer = 0
        start = -1
        stack: list[bool] = []
        last_end = 0
        for match in _BRACES.finditer(self.code):
            if match.group() == "{":
                if outer:
                    stack.append(False)
                    outer += 1
                    continue
                scope = bool(_SCOPE.search(self.code, max(last_end, match.start() - 300), match.start()))
                stack.append(scope)
                if not scope:
                    outer, start = 1, last_end
                last_end = match.end()
            elif stack:
                if not stack.pop():
                    outer -= 1
                    if not outer:
                        found.append((start, match.end()))
                        last_end = match.end()
                else:
                    last_end = match.end()
            elif not outer:
                last_end = match.end()
        if outer:
            found.append((start, len(self.code)))
        return found

    def function_at(self, at: int) -> tuple[int, int] | None:
        """The outermost function around an offset."""
        starts = self._starts
        index = bisect_right(starts, at) - 1
        if index >= 0 and self.functions[index][1] > at:
            return self.functions[index]
        return None

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.functions]

    @cached_property
    def declarations(self) -> dict[str, list[Declaration]]:
        """Declarations of tensors, lists of them and auto, by name and in order."""
        found: dict[str, list[Declaration]] = defaultdict(list)
        code = self.code
        if "Tensor" not in code and not self.shared.members and not self.shared.functions:
            return found
        for pattern, kind in self._patterns:
            for match in pattern.finditer(code):
                if code[match.start() - 1 : match.start()].isalnum() or code[match.start() - 1 : match.start()] == "_":
                    continue
                self._declare(match, kind, found)
        for declarations in found.values():
            declarations.sort(key=lambda declaration: declaration.at)
        return found

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Kind]]:
        lists = ("TensorList", "tensor_list", "variable_list")
        words: list[tuple[str, Kind]] = [*((name, "tensor") for name in sorted(self.types)), ("auto", "auto")]
        words += [(name, "list") for name in lists]
        return [(re.compile(rf"{name}\b(>*){_DECLARATOR}"), kind) for name, kind in words if name in self.code]

    def _declare(self, match: re.Match[str], kind: Kind, found: dict[str, list[Declaration]]) -> None:
        code, name, follows = self.code, match[2], match[3]
        value: lexical.Span | None = None
        if name in _NOT_TYPES or (code[match.start() - 2 : match.start()] == "::" and kind == "auto"):
            return
        if kind in ("tensor", "list") and not self._is_ours(match.start()):
            kind = "other"
        elif match[1]:
            kind = self._template_kind(match.end(1) - 1) if kind == "tensor" else "other"
        elif kind == "auto" and follows in "=:":
            begin = lexical.skip_space(code, match.end() + 1)
            value = lexical.Span(begin, _statement_end(code, begin))
        declaration = Declaration(name, kind, match.start(2), value, follows == ":", follows == "(", follows in ",)")
        found[name].append(declaration)
        if kind in ("tensor", "list", "optional") and follows in ",=;({":
            self._more(match, declaration, found)

    def _is_ours(self, at: int) -> bool:
        """Whether the type's name is torch's: unqualified, or in a namespace of torch."""
        end = lexical.back_over_space(self.code, at)
        if self.code[end - 2 : end] != "::":
            return self._bare or self.code[at : at + 6] != "Tensor"
        space = _IDENTIFIER.search(self.code, max(0, end - 40), lexical.back_over_space(self.code, end - 2))
        return space is None or space.group() in ("at", "torch", "c10", "stable")

    def _shadows(self, name: str) -> list[Declaration]:
        """Declarations of a name with any other type."""
        if name not in self._other:
            pattern = re.compile(rf"{re.escape(name)}\b\s*(?=[;,=)({{:\[])")
            self._other[name] = [
                Declaration(name, "other", match.start())
                for match in pattern.finditer(self.code)
                if self._is_declared(match.start())
            ]
        return self._other[name]

    def _is_declared(self, at: int) -> bool:
        code = self.code
        if code[at - 1 : at].isalnum() or code[at - 1 : at] == "_":
            return False
        before = _OTHER_TYPE.search(code, max(0, at - 60), at)
        if not before:
            return False
        if before[1] is None:
            return "Tensor" not in code[max(0, at - 60) : at] or self._template_kind(before.start(2)) == "other"
        return before[1] not in _NOT_TYPES and before[1] not in self.types and before[1] not in _LISTS

    def _more(self, match: re.Match[str], first: Declaration, found: dict[str, list[Declaration]]) -> None:
        """Further declarators of the same statement: ``Tensor a = f(x), b;``."""
        code, at = self.code, match.end()
        for _ in range(20):
            if code[at : at + 1] == "=":
                end = _statement_end(code, at + 1)
                at = _declarator_end(code, at + 1, end)
            elif code[at : at + 1] in ("(", "{"):
                close = lexical.closing(code, at)
                if close < 0:
                    return
                at = lexical.skip_space(code, close + 1)
            more = _MORE.match(code, at)
            if not more:
                return
            found[more[1]].append(Declaration(more[1], first.kind, more.start(1)))
            at = more.end()

    def _template_kind(self, at: int) -> Kind:
        start = lexical.opening_angle(self.code, at)
        if start < 0:
            return "other"
        inner = self.code[start + 1 : at]
        if not any(re.search(rf"\b{name}\b", inner) for name in self.types):
            return "other"
        head = _TENSOR_TEMPLATE.search(self.code, max(0, start - 24), start + 1)
        if not head or head.end() != start + 1:
            return "other"
        return {"optional": "optional", "reference_wrapper": "other"}.get(head[1], "list")  # type: ignore[return-value]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What this file tells the others."""
        result = Vocabulary(set(self.types))
        for name, declarations in self.declarations.items():
            for declaration in declarations:
                if declaration.kind not in ("tensor", "list", "optional"):
                    continue
                if declaration.called:
                    result.functions.setdefault(name, declaration.kind)
                elif self.function_at(declaration.at) is None and not declaration.listed:
                    result.members.setdefault(name, declaration.kind)
        return result

    def lookup(self, name: str, at: int) -> Kind:
        """What a name means at an offset."""
        region = self.function_at(at)
        if region is None and any(start <= at < end for start, end in self._macros):
            kinds = {d.kind for d in self.declarations.get(name, ())}
            return "tensor" if kinds == {"tensor"} else "other"
        best: Declaration | None = None
        for declaration in self.declarations.get(name, ()):
            if declaration.at >= at:
                break
            inside = region is not None and region[0] <= declaration.at < region[1]
            if inside or (self.function_at(declaration.at) is None and not declaration.listed):
                best = declaration if inside or best is None or not _inside(best, region) else best
        if best is not None or name in self.shared.members:
            for declaration in self._shadows(name):
                if (best is None or best.at < declaration.at) and declaration.at < at and _inside(declaration, region):
                    return "other"
        if best is None:
            return self.shared.members.get(name, "other")
        if best.kind != "auto":
            return best.kind
        if best.value is None or self._depth > 12:
            return "other"
        self._depth += 1
        try:
            kind = self.infer(*best.value)
        finally:
            self._depth -= 1
        if best.ranged:
            return "tensor" if kind == "list" else "other"
        return kind

    def infer(self, start: int, end: int) -> Kind:
        """What an expression is."""
        code = self.code
        start, end = lexical.trim(code, start, end)
        if start >= end or self._depth > 12:
            return "other"
        self._depth += 1
        try:
            return self._infer(code, start, end)
        finally:
            self._depth -= 1

    def _infer(self, code: str, start: int, end: int) -> Kind:
        if code[start] == "*":
            return "tensor" if self.infer(start + 1, end) == "optional" else "other"
        for operator in "?", "+", "-", "*", "/":
            if operator in code[start:end]:
                parts = lexical.split(code, start, end, operator)
                if len(parts) > 1 and not any(code[p.start : p.start + 1] == ">" for p in parts):
                    if operator == "?":
                        branches = lexical.split(code, *parts[1], ":")
                        return self.infer(*branches[0]) if branches else "other"
                    return "tensor" if any(self.infer(*p) == "tensor" for p in parts if p.start < p.end) else "other"
        first = lexical.receiver(code, end)
        if first > start:
            return "other"
        last = code[end - 1]
        if last == ")":
            return self._call(code, start, end)
        if last == "]":
            kind = self.infer(start, lexical.opening(code, end - 1))
            return "tensor" if kind in ("tensor", "list") else "other"
        if last == "}":
            return "other"
        word = _IDENTIFIER.search(code, start, end)
        if not word:
            return "other"
        if word.start() == start:
            return self.lookup(word.group(), start)
        before = code[lexical.back_over_space(code, word.start()) - 1]
        if before in ".>":
            return self.shared.members.get(word.group()) or self.vocabulary.members.get(word.group(), "other")
        return "other"

    def _call(self, code: str, start: int, end: int) -> Kind:
        open_at = lexical.opening(code, end - 1)
        if open_at <= start:
            return self._parenthesized(code, open_at + 1, end - 1) if open_at == start else "other"
        name_end = lexical.back_over_space(code, open_at)
        if code[name_end - 1] == ">":
            angle = lexical.opening_angle(code, name_end - 1)
            name_end = lexical.back_over_space(code, angle) if angle > start else name_end
        word = _IDENTIFIER.search(code, start, name_end)
        if not word:
            return "other"
        name = word.group()
        before = lexical.back_over_space(code, word.start())
        if before > start and (code[before - 1] == "." or code[before - 2 : before] == "->"):
            arrow = code[before - 1] != "."
            kind = self.infer(start, before - (2 if arrow else 1))
            if kind == "tensor" or (kind == "optional" and arrow):
                if name in TENSOR_LISTS:
                    return "list"
                return "other" if name in NOT_TENSORS else "tensor"
            if kind == "optional" and name in ("value", "value_or"):
                return "tensor"
            if kind == "list" and name in ("at", "front", "back"):
                return "tensor"
            return "other"
        head = code[start : word.start()].replace(" ", "")
        if head.startswith(("at::", "torch::", "::at::", "::torch::", "abi_ops::")):
            return _library_result(head.lstrip(":"), name)
        if _CAST.fullmatch(head + name):
            return self.infer(open_at + 1, end - 1)
        if name in self.types:
            return "tensor"
        return self.shared.functions.get(name) or self.vocabulary.functions.get(name, "other")

    def _parenthesized(self, code: str, start: int, end: int) -> Kind:
        """An expression in parentheses, where a ``<`` is a comparison."""
        compared = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:[<>]=?|[=!]=)\s").match(code, start, end)
        if compared and self.lookup(compared[1], start) == "tensor":
            return "tensor"
        return self.infer(start, end)

    def is_value(self, end: int, at: int) -> bool:
        """Whether what ends at ``end`` is a value rather than a type: no word, a number, or a declared name."""
        word = _IDENTIFIER.search(self.code, max(0, end - 60), end)
        if not word or word.group()[0].isdigit():
            return True
        region = self.function_at(at)
        declared = [*self.declarations.get(word.group(), ()), *self._shadows(word.group())]
        return any(_inside(declaration, region) and declaration.at < at for declaration in declared)

    def is_tensor(self, start: int, end: int, arrow: bool = False) -> bool:
        """Whether the receiver in front of ``.`` (or ``->``) is a tensor."""
        kind = self.infer(start, end)
        return kind == "tensor" or (arrow and kind == "optional")


def _inside(declaration: Declaration, region: tuple[int, int] | None) -> bool:
    return region is not None and region[0] <= declaration.at < region[1]


def _library_result(head: str, name: str) -> Kind:
    """The result of a function of torch by its name."""
    space = head.split("::")[1] if head.count("::") > 1 else ""
    if space not in ("", "stable", "native", "nn", "linalg", "special", "indexing") or name[:1].isupper():
        return "other"
    if name in TENSOR_LISTS - {"where"}:
        return "list"
    if name in ("dtype", "device", "get_num_threads", "parallel_for", "elementSize", "toString", "ceil_div", "layout"):
        return "other"
    return "other" if name in NOT_TENSORS or name.startswith(("is", "get", "check")) else "tensor"


def _statement_end(code: str, at: int) -> int:
    """The end of the expression that starts at ``at``: its ``;``, or the bracket that closes around it."""
    depth = 0
    for match in _STATEMENT.finditer(code, at, min(len(code), at + 20_000)):
        char = match.group()
        if char in "([{":
            depth += 1
        elif char in ")]}":
            if not depth:
                return match.start()
            depth -= 1
        elif not depth:
            return match.start()
    return at


def _declarator_end(code: str, at: int, end: int) -> int:
    parts = lexical.split(code, at, end)
    return parts[0].end if parts else end
