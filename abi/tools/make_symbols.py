"""Make `src/abiding_abi/symbols/data.tsv` from the stable headers of several torch releases; the same bytes each time.

    python tools/make_symbols.py [--check]

Each release's headers are preprocessed for each target version, which removes what the target hides, and the rest is
parsed for names that an extension may use. So a name gets two versions: the first release whose headers declare it,
and the oldest torch that a binary which uses it runs on: the lowest target for which the newest headers declare it. A
C function can be in no older torch than the first whose headers declare it, whatever the guards around it say. An
overload that a later release added to a name has a row of its own, with the types of its parameters.

Headers outside torch are replaced by empty files: what the result holds does not depend on this machine's libraries.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tree_sitter_cuda
from tree_sitter import Language, Node, Parser

from abiding_abi.compilers import find_cxx, target_macro
from abiding_abi.headers import Headers, fetch
from abiding_abi.versions import OLDEST, Version, dotted

RELEASES = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
DATA = Path(__file__).resolve().parents[1] / "src/abiding_abi/symbols/data.tsv"
COLUMNS = ("name", "kind", "header", "headers", "runs", "needs", "until")

USED = re.compile(r"torch/(csrc/stable/.+|headeronly/.+|csrc/inductor/aoti_torch/c/(shim|macros)\.h)")
SHIMS = re.compile(
    r"torch/csrc/(stable/c/shim|inductor/aoti_torch/c/shim|inductor/aoti_torch/generated/c_shim_aten)\.h"
)
HIDDEN = re.compile(r"(^|::)(detail|impl|internal|guts|_\w*)(::|$)|(^|::)operator|~|_HOST_DEVICE$")
MACRO = re.compile(r"(STD|STABLE|THO|TORCH|AT|C10|AOTI)_\w+")
INTERNAL_MACRO = re.compile(
    r"_H_?$|_SHIM(_MPS)?$|THO_AP|_AUX$|_TMPL$|PRIVATE|_IMPL_|_DETAIL|_UID$|_CONCATENATE"
    r"|^C10_(ANONYMOUS|UNUSED)|^TORCH_LIBRARY"
)
KEYWORD = re.compile(r"(^|::)(float|double|int|bool|char|std)(::|$)")


@dataclass(frozen=True, order=True)
class Symbol:
    """One name, as one release's headers declare it."""

    name: str
    kind: str
    header: str


def preprocessed(headers: Headers, target: Version | None, cuda: bool) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(file, text) of torch's own lines after the preprocessor, and the macros that torch's headers define."""
    include = headers.include
    files = sorted(p.relative_to(include).as_posix() for p in include.rglob("*.h"))
    wanted = [name for name in files if USED.fullmatch(name) and "cpu/vec" not in name]
    with tempfile.TemporaryDirectory() as scratch:
        for path in include.rglob("*.h"):
            for name in re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text()):
                if not (include / name).exists():
                    stub = Path(scratch, "stubs", name)
                    stub.parent.mkdir(parents=True, exist_ok=True)
                    stub.touch()
        unit = Path(scratch, "all.cpp")
        unit.write_text("".join(f"#include <{name}>\n" for name in wanted))
        command = [find_cxx() or "g++", "-std=c++20", "-E", "-dD", "-w", "-nostdinc", "-nostdinc++", "-x", "c++"]
        command += ["-I", str(include), "-I", f"{scratch}/stubs", "-DTORCH_STABLE_ONLY"]
        command += ["-D__CUDACC__", "-DUSE_CUDA"] if cuda else []
        command += [f"-DTORCH_TARGET_VERSION={target_macro(target)}"] if target else []
        done = subprocess.run([*command, str(unit)], capture_output=True, text=True, check=True)
    texts: dict[str, list[str]] = {}
    macros: dict[str, str] = {}
    current = ""
    for line in done.stdout.splitlines():
        if marker := re.match(r'# \d+ "([^"]*)"', line):
            path = Path(marker[1])
            current = path.relative_to(include).as_posix() if path.is_relative_to(include) else ""
        elif not current:
            continue
        elif define := re.match(r"#define (\w+)", line):
            macros.setdefault(define[1], current)
        elif not line.startswith("#"):
            texts.setdefault(current, []).append(line)
    return [(name, "\n".join(lines)) for name, lines in texts.items()], macros


def declared(headers: Headers, target: Version | None, cuda: bool) -> set[Symbol]:
    """The names that an extension may use."""
    found: set[Symbol] = set()
    again: dict[str, str] = {}
    texts, macros = preprocessed(headers, target, cuda)
    parser = Parser(Language(tree_sitter_cuda.language()))
    for header, text in texts:
        code = re.sub(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|\b__(?:host|device|forceinline)__\b", " ", text)
        tree = parser.parse(re.sub(r"\[\[[^]]*\]\]", " ", code).encode())
        shim = bool(SHIMS.fullmatch(header))
        for whole, kind in names(tree.root_node, "", shim):
            name, _, source = whole.partition("=")
            if source:
                again[source] = name
            if KEYWORD.search(name):
                continue
            if not HIDDEN.search(name.removeprefix("torch::stable::accelerator")) and (shim or "::" in name):
                found.add(Symbol(name, kind, header))
    # Header-only names are declared in c10 and brought to torch::headeronly, which is the name to use, by using.
    for symbol in sorted(found):
        parts = symbol.name.split("::")
        for depth in range(2, len(parts) + 1):
            if alias := again.get("::".join(parts[:depth])):
                found.add(Symbol("::".join([alias, *parts[depth:]]), symbol.kind, symbol.header))
    for symbol in [s for s in found if s.name.startswith("c10::")]:
        if any(s.name == symbol.name.replace("c10::", "torch::headeronly::", 1) for s in found):
            found.discard(symbol)
    for name, header in macros.items():
        if MACRO.fullmatch(name) and not INTERNAL_MACRO.search(name):
            found.add(Symbol(name, "macro", header))
    return found


def names(node: Node, space: str, shim: bool) -> Iterator[tuple[str, str]]:
    """Names that this part of a header declares: qualified name and kind."""
    for child in node.named_children:
        kind = child.type
        if kind == "namespace_definition":
            name = child.child_by_field_name("name")
            body = child.child_by_field_name("body")
            if body:
                yield from names(body, _joined(space, _text(name)), shim)
        elif kind in ("linkage_specification", "declaration_list", "template_declaration", "export_declaration"):
            yield from names(child, space, shim)
        elif kind in ("class_specifier", "struct_specifier", "enum_specifier"):
            yield from _type(child, space)
        elif kind in ("function_definition", "declaration", "field_declaration"):
            for inner in child.named_children:
                if inner.type in ("class_specifier", "struct_specifier", "enum_specifier"):
                    yield from _type(inner, space)
            yield from _declarators(child, space, shim)
        elif kind in ("alias_declaration", "type_definition"):
            name = child.child_by_field_name("name") or child.child_by_field_name("declarator")
            if name and re.fullmatch(r"\w+", _text(name)):
                yield _joined(space, _text(name)), "type"
        elif kind == "using_declaration" and "namespace" not in _text(child).split():
            source = _text(child).removeprefix("using").rstrip(";").strip()
            yield f"{_joined(space, source.split('::')[-1])}={source}", "type"


_FUNCTIONS = ("function_definition", "declaration")


def _type(node: Node, space: str) -> Iterator[tuple[str, str]]:
    name, body = node.child_by_field_name("name"), node.child_by_field_name("body")
    if not name or not body or not re.fullmatch(r"\w+", _text(name)):
        return
    whole = _joined(space, _text(name))
    yield whole, "type"
    if node.type == "enum_specifier":
        for item in body.named_children:
            if item.type == "enumerator" and (label := item.child_by_field_name("name")):
                yield _joined(whole, _text(label)), "constant"
        return
    public = node.type == "struct_specifier"
    for member in body.children:
        if member.type == "access_specifier":
            public = _text(member).startswith("public")
        elif public and member.type in (*_FUNCTIONS, "field_declaration", "template_declaration"):
            inner = (c for c in member.named_children if c.type in _FUNCTIONS)
            target = next(inner, member) if member.type == "template_declaration" else member
            for name_, kind in _declarators(target, whole, False):
                if name_.partition("(")[0] != _joined(whole, _text(name)) and kind in ("function", "overload"):
                    yield name_, "member" if kind == "function" else kind


def _declarators(node: Node, space: str, shim: bool) -> Iterator[tuple[str, str]]:
    for child in node.children_by_field_name("declarator"):
        inner: Node | None = child
        function = False
        while inner and inner.type not in ("identifier", "field_identifier", "qualified_identifier"):
            function |= inner.type == "function_declarator"
            inner = inner.child_by_field_name("declarator") or next(
                (c for c in inner.named_children if c.type.endswith(("declarator", "identifier"))), None
            )
        if inner and re.fullmatch(r"\w+", _text(inner)):
            if function:
                yield _joined(space, _text(inner)), "shim" if shim and not space else "function"
                if space.startswith("torch::stable"):
                    yield f"{_joined(space, _text(inner))}({_parameters(child)})", "overload"
            elif not shim:
                yield _joined(space, _text(inner)), "constant"


def _parameters(declarator: Node) -> str:
    """The types of a function's parameters, without their names and defaults."""
    lists = [c for c in declarator.named_children if c.type == "parameter_list"]
    if not lists:
        return next((_parameters(c) for c in declarator.named_children if c.type.endswith("declarator")), "")
    types = []
    for parameter in lists[0].named_children:
        whole = parameter.child_by_field_name("type")
        inner = parameter.child_by_field_name("declarator")
        sign = "".join(re.findall(r"^[&*]+", _text(inner)))
        const = "const " if any(_text(c) == "const" for c in parameter.children) else ""
        types.append(re.sub(r"\b(?:torch|stable|headeronly)::", "", const + _text(whole) + sign))
    return re.sub(r"\s*([<>,&*])\s*", r"\1", " ".join(", ".join(types).split())).replace(",", ", ")


def _text(node: Node | None) -> str:
    return node.text.decode() if node and node.text else ""


def _joined(space: str, name: str) -> str:
    return f"{space}::{name}" if space and name else space or name


def added_overloads(by_release: dict[Version, set[Symbol]]) -> set[str]:
    """Overloads by which a name grew in some release; one that took another's place is a change of that one."""
    added: set[str] = set()
    before: dict[str, set[str]] = {}
    for _, symbols in sorted(by_release.items()):
        now: dict[str, set[str]] = {}
        for symbol in symbols:
            if symbol.kind == "overload":
                now.setdefault(symbol.name.partition("(")[0], set()).add(symbol.name)
        for name, overloads in now.items():
            if name in before and len(overloads) > len(before[name]):
                added |= overloads - before[name]
        before |= now
    newest = {s.name for s in by_release[max(by_release)]}
    return added & newest


def make() -> str:
    """The whole file."""
    releases = [fetch(release, lambda text: print(text, file=sys.stderr)) for release in RELEASES]
    newest = releases[-1]
    by_release = {h.version: declared(h, None, True) for h in releases}
    host = {h.version: {s.name for s in declared(h, None, False)} for h in releases}
    targets = [(OLDEST[0], minor) for minor in range(OLDEST[1], newest.version[1] + 1)]
    by_target = {t: {s.name for s in declared(newest, t, True)} for t in targets}
    first: dict[str, Version] = {}
    last: dict[str, Version] = {}
    for version, symbols in sorted(by_release.items()):
        for symbol in symbols:
            first.setdefault(symbol.name, version)
            last[symbol.name] = version
    chosen: dict[str, Symbol] = {}
    for _, symbols in sorted(by_release.items()):
        chosen |= {s.name: s for s in sorted(symbols, reverse=True)}  # the newest header that declares it
    lines = ["\t".join(COLUMNS)]
    added = added_overloads(by_release)
    for name, symbol in sorted(chosen.items()):
        if symbol.kind == "overload" and name not in added:
            continue
        runs = next((t for t in targets if name in by_target[t]), max(first[name], OLDEST))
        if symbol.kind == "shim":
            runs = max(runs, first[name], OLDEST)
        on_host = any(name in names_ for names_ in host.values()) and "/cuda/" not in symbol.header
        needs = "" if on_host else "cuda"
        until = "" if last[name] == newest.version else dotted(last[name])
        lines.append("\t".join((name, symbol.kind, symbol.header, dotted(first[name]), dotted(runs), needs, until)))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the file would change")
    arguments = parser.parse_args()
    text = make()
    if arguments.check:
        if DATA.read_text() != text:
            raise SystemExit(f"{DATA} differs from what the headers give; run tools/make_symbols.py")
        return
    DATA.write_text(text)
    print(f"{text.count(chr(10)) - 1} symbols in {DATA}")


if __name__ == "__main__":
    main()
