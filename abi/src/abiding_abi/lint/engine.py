"""Matching the rule table against one file."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache, cached_property, lru_cache

from abiding_abi import lexical
from abiding_abi.lint.facts import SPACES, Facts, declared_types
from abiding_abi.lint.project import Project
from abiding_abi.lint.tensors import Tensors
from abiding_abi.rules import Check, Include, Level, Macro, Match, Method, Name, Rule, table
from abiding_abi.rules.stable import C10_NAMES, MACROS, MEMBERS, STABLE_SPACES
from abiding_abi.source import Source

_QUALIFIED = re.compile(r"::\s*([A-Za-z_]\w*(?:\s*::\s*[A-Za-z_]\w*)*)")
_MEMBER = re.compile(r"(\.|->)\s*(?:template\s+)?([A-Za-z_]\w*)\s*(?=([(<;,)=.\[]))")
_WORD = re.compile(r"\b[A-Za-z_]\w*")
_DIRECTIVE_WORD = re.compile(r"#[ \t]*(?:define|undef|ifdef|ifndef)[ \t]+\Z|\bdefined[ \t]*\(?[ \t]*\Z")
# Words that other libraries use too: without qualification they prove nothing.
_COMMON = frozenset(
    (
        *("Context", "Error", "Event", "IndexError", "Layout", "Library", "List", "NotImplementedError"),
        *("Stream", "TypeError", "ValueError", "autograd", "complex", "cuda", "detail", "device", "dispatch"),
        *("dtype", "indexing", "jit", "layout", "make_optional", "native", "nullopt", "optional"),
        *("requires_grad", "state", "string_view", "vec"),
    )
)
_FACTORIES = frozenset(
    (
        *("arange", "empty", "empty_like", "empty_strided", "eye", "from_blob", "full", "full_like"),
        *("linspace", "ones", "ones_like", "rand", "randint", "randn", "randperm", "zeros", "zeros_like"),
    )
)


@dataclass(frozen=True)
class Hit:
    """One place at which a rule matches."""

    rule: Rule
    start: int
    end: int
    match: Match
    name: str
    """The name that matched, without its namespace."""
    level: Level
    detail: str = ""


@dataclass(frozen=True)
class _Index:
    names: dict[str, list[tuple[Rule, Name]]]
    open_names: list[tuple[str, Rule, Name]]
    macros: dict[str, tuple[Rule, Macro]]
    open_macros: list[tuple[str, Rule, Macro]]
    methods: dict[str, tuple[Rule, Method]]
    includes: list[tuple[Rule, Include]]
    checks: list[tuple[Rule, Check]]
    macro_pattern: re.Pattern[str]
    fallback: tuple[Rule, Name]


@cache
def index() -> _Index:
    """The rule table arranged for look-ups."""
    names: dict[str, list[tuple[Rule, Name]]] = defaultdict(list)
    open_names: list[tuple[str, Rule, Name]] = []
    macros: dict[str, tuple[Rule, Macro]] = {}
    open_macros: list[tuple[str, Rule, Macro]] = []
    methods: dict[str, tuple[Rule, Method]] = {}
    includes: list[tuple[Rule, Include]] = []
    checks: list[tuple[Rule, Check]] = []
    fallback: tuple[Rule, Name] | None = None
    for rule in table():
        for match in rule.match:
            if isinstance(match, Name):
                for name in match.names:
                    if name == "*":
                        fallback = rule, match
                    elif name.endswith("*"):
                        open_names.append((name[:-1], rule, match))
                    else:
                        names[name].append((rule, match))
            elif isinstance(match, Macro):
                for name in match.names:
                    if name.endswith("*"):
                        open_macros.append((name[:-1], rule, match))
                    else:
                        macros.setdefault(name, (rule, match))
            elif isinstance(match, Method):
                for name in match.names:
                    methods.setdefault(name, (rule, match))
            elif isinstance(match, Include):
                includes.append((rule, match))
            else:
                checks.append((rule, match))
    assert fallback
    open_macros.sort(key=lambda item: -len(item[0]))
    heads = {re.escape(name) for name, _, _ in open_macros}
    heads |= {re.escape(name) + r"\b" for name in macros if not name.startswith(tuple(n for n, _, _ in open_macros))}
    pattern = re.compile(rf"(?:{'|'.join(sorted(heads, key=len, reverse=True))})\w*")
    return _Index(names, open_names, macros, open_macros, methods, includes, checks, pattern, fallback)


class Context:
    """One file under examination, and what the project knows about it."""

    def __init__(self, project: Project, source: Source) -> None:
        self.project = project
        self.source = source
        self.code = source.code

    @cached_property
    def facts(self) -> Facts:
        """Using directives, aliases and macros that the file sees."""
        return self.project.facts(self.source)

    @cached_property
    def tensors(self) -> Tensors:
        """Which expressions are tensors."""
        return self.project.tensors(self.source)


def scan(context: Context) -> list[Hit]:
    """Every match in a file, in order; at one place the first rule counts."""
    from abiding_abi.lint import checks

    hits: list[Hit] = [
        *_includes(context),
        *_qualified(context),
        *_macros(context),
        *_members(context),
        *_bare(context),
    ]
    taken = {hit.start for hit in hits}
    for rule, match in index().checks:
        for start, end, detail in checks.CHECKS[match.name](context):
            if rule.level != "unstable" or start not in taken:
                taken.add(start)
                hits.append(Hit(rule, start, end, match, match.name, rule.level, detail))
    hits.sort(key=lambda hit: (hit.start, hit.rule.code))
    return hits


def _includes(context: Context) -> Iterator[Hit]:
    for line in context.source.includes:
        if line.path.startswith(("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/")):
            continue
        found = _include_rule(line.path)
        if found and not context.project.included_locally(context.source, line.path):
            rule, match = found
            if line.path.startswith("pybind11/") and not _knows_torch(context):
                continue
            yield Hit(rule, line.start, line.end, match, line.path, rule.level)


def _knows_torch(context: Context) -> bool:
    """Whether the file or its headers include anything of torch: a module without tensors may keep pybind11."""
    files = context.project.closure(context.source)
    return any(line.path.startswith(("torch/", "ATen/", "c10/")) for file in files for line in file.includes)


@lru_cache(maxsize=4096)
def _include_rule(path: str) -> tuple[Rule, Include] | None:
    for rule, match in index().includes:
        if any(path == pattern or ("*" in pattern and fnmatch(path, pattern)) for pattern in match.paths):
            return rule, match
    return None


def _qualified(context: Context) -> Iterator[Hit]:
    code = context.code
    aliases = context.facts.aliases
    spaces = {*SPACES, "caffe2", *aliases}
    for match in _QUALIFIED.finditer(code):
        before = lexical.back_over_space(code, match.start())
        space, path = _last_word(code, before), match[1]
        start, inner = before - len(space), match.start(1)
        if not space and code[before - 1 : before] != ">":
            space, _, path = path.partition("::")
            space, start, inner = space.strip(), match.start(), inner + len(space) + 2
            path = path.lstrip()
        if space not in spaces or not path or (code[start - 2 : start] == "::" and start != match.start()):
            continue
        if space in aliases:
            space, _, outer = aliases[space].partition("::")
            path = f"{outer}::{path}" if outer else path
        hit = _named(context, space, path, start, inner, match.end())
        if hit:
            yield hit


def _named(context: Context, space: str, path: str, start: int, inner: int, end: int) -> Hit | None:
    parts = [part.strip() for part in path.split("::")] if ":" in path else [path]
    if space == "torch" and parts[0] in STABLE_SPACES:
        return None
    for count in range(len(parts), 0, -1):
        name = "::".join(parts[:count])
        for rule, match in index().names.get(name, ()):
            if space not in match.spaces or not _call_fits(match.called, context.code, end, count == len(parts)):
                continue
            stop = end if count == len(parts) else _path_end(context.code, inner, parts[:count])
            level: Level = "note" if space in match.legal else rule.level
            return Hit(rule, start, stop, match, name, level)
    for prefix, rule, match in index().open_names:
        if path.replace(" ", "").startswith(prefix) and space in match.spaces:
            return Hit(rule, start, end, match, path, rule.level)
    if space == "caffe2" or (space in ("c10", "at") and (parts[0] in C10_NAMES or "::".join(parts[:2]) in C10_NAMES)):
        return None
    rule, fallback = index().fallback
    return Hit(rule, start, end, fallback, path, rule.level)


def _path_end(code: str, at: int, parts: list[str]) -> int:
    pattern = r"\s*::\s*".join(map(re.escape, parts))
    match = re.compile(pattern).match(code, at)
    return match.end() if match else at + len(parts[0])


def _call_fits(called: bool | None, code: str, end: int, last: bool) -> bool:
    if called is None:
        return True
    follows = last and code[lexical.skip_space(code, end) : lexical.skip_space(code, end) + 1] == "("
    return follows == called


def _macros(context: Context) -> Iterator[Hit]:
    code = context.code
    for match in index().macro_pattern.finditer(code):
        name = match.group()
        before = code[max(0, match.start() - 2) : match.start()]
        if before[-1:].isalnum() or before[-1:] == "_":
            continue
        if name in context.facts.macros or before.endswith((".", "::", "->")) or _stable_macro(name):
            continue
        if (
            "#" in code[max(0, match.start() - 24) : match.start()]
            or "defined" in code[max(0, match.start() - 12) : match.start()]
        ) and _DIRECTIVE_WORD.search(code, max(0, match.start() - 24), match.start()):
            continue
        found = index().macros.get(name) or next(
            ((rule, macro) for prefix, rule, macro in index().open_macros if name.startswith(prefix)), None
        )
        if found:
            yield Hit(found[0], match.start(), match.end(), found[1], name, found[0].level)


@cache
def _stable_macro(name: str) -> bool:
    return name in MACROS or any(name.startswith(m[:-1]) for m in MACROS if m.endswith("*"))


def _members(context: Context) -> Iterator[Hit]:
    code = context.code
    if not any("Tensor" in source.code for source in context.project.closure(context.source)):
        return
    methods = index().methods
    tensors = context.tensors
    known: set[str] | None = None
    for match in _MEMBER.finditer(code):
        name = match[2]
        entry = methods.get(name)
        if entry is None and name in MEMBERS:
            continue
        called = match[3] in "(<"
        if entry is not None and (entry[1].called is not None and entry[1].called != called):
            continue
        dot = match.start()
        arrow = match[1] == "->"
        if entry is not None and entry[1].distinct:
            yield Hit(entry[0], match.start(2), match.end(2), entry[1], name, entry[0].level)
            continue
        if known is None:
            known = {n for n, ds in tensors.declarations.items() if any(d.kind != "other" for d in ds)}
            known |= set(tensors.shared.members) | set(tensors.shared.functions)
        end = lexical.back_over_space(code, dot)
        last = code[end - 1 : end]
        if last not in ")]>}":
            word = _last_word(code, end)
            if word not in known:
                continue
        elif entry is None and not name.endswith("_"):
            continue
        if not tensors.is_tensor(lexical.receiver(code, dot), dot, arrow):
            continue
        if entry is not None:
            yield Hit(entry[0], match.start(2), match.end(2), entry[1], name, entry[0].level)
        elif called and name != "type":
            yield from _other_member(match)


def _last_word(code: str, end: int) -> str:
    at = end
    while at > 0 and (code[at - 1].isalnum() or code[at - 1] == "_"):
        at -= 1
    return code[at:end]


def _other_member(match: re.Match[str]) -> Iterator[Hit]:
    for rule, check in index().checks:
        if check.name == "other_member":
            yield Hit(rule, match.start(2), match.end(2), check, match[2], rule.level)


def _bare(context: Context) -> Iterator[Hit]:
    facts = context.facts
    if not facts.prefixes and not facts.names:
        return
    code = context.code
    candidates: dict[str, str] = dict(facts.names)
    for prefix in facts.prefixes:
        for name in index().names:
            if name.startswith(prefix) and "::" not in name[len(prefix) :]:
                candidates.setdefault(name[len(prefix) :], name)
    types = {name for source in context.project.closure(context.source) for name in declared_types(source)}
    for name in (types | facts.macros | _COMMON) - set(facts.names):
        candidates.pop(name, None)
    if not candidates:
        return
    for match in _WORD.finditer(code):
        word = match.group()
        path = candidates.get(word)
        if path is None:
            continue
        before = code[lexical.back_over_space(code, match.start()) - 2 : lexical.back_over_space(code, match.start())]
        if before.endswith((".", "::", "->", "~")) or _declares(code, match.start(), match.end()):
            continue
        if word[:1].islower() and word[:1] != "k" and not _bare_function(context, word, match.end()):
            continue
        spaces = ("at", "torch", "c10")
        for rule, entry in index().names.get(path, ()):
            if _call_fits(entry.called, code, match.end(), True) and any(space in entry.spaces for space in spaces):
                level: Level = "note" if entry.legal else rule.level
                yield Hit(rule, match.start(), match.end(), entry, path, level)
                break
        else:
            if word in facts.names and path not in index().names:
                rule, entry = index().fallback
                yield Hit(rule, match.start(), match.end(), entry, path, rule.level)


def _declares(code: str, start: int, end: int) -> bool:
    """Whether the word is the name being declared (``at::Tensor empty;``) or a using declaration's own."""
    before = lexical.back_over_space(code, start)
    if re.search(r"\b(?:namespace|using|class|struct|enum|define)\Z", code[max(0, before - 10) : before]):
        return True
    word = _last_word(code, before)
    named = bool(word) and word not in (
        "return",
        "else",
        "case",
        "throw",
        "in",
        "and",
        "or",
        "not",
        "const",
        "co_return",
    )
    return (
        named
        and code[start].islower()
        and code[lexical.skip_space(code, end) : lexical.skip_space(code, end) + 1] == "("
    )


def _bare_function(context: Context, word: str, end: int) -> bool:
    code = context.code
    at = lexical.skip_space(code, end)
    if code[at : at + 1] != "(":
        return False
    vocabulary = context.tensors
    if word in vocabulary.vocabulary.functions or word in vocabulary.shared.functions:
        return False
    if word in context.facts.names or word in _FACTORIES or word.startswith(("getCurrent", "getStream", "device_of")):
        return True
    read = lexical.arguments(code, at)
    if not read:
        return False
    return any(context.tensors.infer(*span) in ("tensor", "list") for span in read[0])
