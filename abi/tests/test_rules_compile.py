"""Each rule's replacement over the matrix of header releases: both versions of the table are asked of compilers.

With the headers that the rule names, and with all newer ones, the replacement compiles for the oldest torch that the
rule names. With older headers, or for an older torch, it does not: otherwise the table would promise too little.
The same is asked of what migrate makes of each rule's example, and there the includes are migrate's own as well.
Sources of one release and target share a compilation, each in a namespace of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from abiding_abi import headers, migrate, rules, wrappers
from abiding_abi.compilers import Options, compile_stable, find_cxx, find_nvcc
from abiding_abi.lint import Config
from abiding_abi.migrate.helpers import HELPERS
from abiding_abi.rules import Rule
from abiding_abi.versions import OLDEST, Version, dotted, parse
from examples import GENERATED, REWRITTEN, after, before

RELEASES = {h.version: h for h in headers.cached() if h.version >= OLDEST}
NVCC = re.compile(r"__global__|gpuAtomicAdd|RestrictPtrTraits|headeronly/cuda/|<<<")
CHECKED = [rule for rule in rules.table() if rule.after and rule.level != "note"]
HOST = [rule for rule in CHECKED if not NVCC.search(rule.after)]
DEVICE = [rule for rule in CHECKED if NVCC.search(rule.after)]
REWRITTEN_HOST = [rule for rule in (*REWRITTEN, *GENERATED) if not NVCC.search(rule.after)]
PARTS = 6
CUBLAS = "typedef struct cublasContext* cublasHandle_t;"  # as cublas_v2.h has it, which not every toolkit brings

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        len(RELEASES) < 2 or not find_cxx(), reason="needs g++ and headers of two releases in the cache"
    ),
]


@cache
def rewritten(rule: Rule) -> str:
    """What migrate makes of a rule's example."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.cu" if rule in DEVICE else "a.cpp")
        path.write_text(before(rule))
        text = migrate.run([path], Config(root=path.parent)).files[0].after.decode()
    return text.replace("#include <cublas_v2.h>", CUBLAS)


def includes(text: str) -> tuple[str, ...]:
    """A source's include lines."""
    return tuple(line for line in text.splitlines() if line.startswith("#include"))


def compiled(
    chosen: Iterable[Rule], release: Version, target: Version, folder: Path, text_of: Callable[[Rule], str] = after
) -> dict[str, str]:
    """The codes whose source does not compile, with the first error."""
    include = RELEASES[release].include
    (folder / wrappers.HEADER_NAME).write_text(wrappers.header())
    failed: dict[str, str] = {}
    heads: dict[str, None] = {}
    bodies: list[str] = []
    owner: dict[int, str] = {}
    for rule in chosen:
        lines = text_of(rule).splitlines()
        own = includes(text_of(rule))
        absent = [p for p in re.findall(r"<(torch/[^>]+)>", "\n".join(own)) if not (include / p).exists()]
        if absent:
            failed[rule.code] = f"no {absent[0]}"
            continue
        heads |= dict.fromkeys(own)
        start = len(bodies)
        bodies += [f"#undef {name.upper()}" for name in HELPERS]  # the guards of an earlier namespace
        bodies += [f"namespace {rule.code} {{", *(line for line in lines if not line.startswith("#include")), "}"]
        owner |= dict.fromkeys(range(start, len(bodies)), rule.code)
    source = folder / f"{dotted(release)}-{dotted(target)}.cpp"
    source.write_text("\n".join([*heads, *bodies]) + "\n")
    for error in compile_stable(source, include, target, Options(extra=("-fmax-errors=0",))):
        assert error.line > len(heads), f"{error.message}: not in any rule's example"
        failed.setdefault(owner[error.line - len(heads) - 1], error.message)
    return failed


@pytest.mark.parametrize("release", sorted(RELEASES), ids=dotted)
def test_replacements_compile_with_the_headers_that_the_table_names_and_no_older(
    release: Version, tmp_path: Path
) -> None:
    wrong: dict[str, str] = {}
    for target in sorted({parse(rule.runs) for rule in HOST}):
        if target > release:
            continue
        chosen = [rule for rule in HOST if parse(rule.runs) == target]
        failed = compiled(chosen, release, target, tmp_path)
        for rule in chosen:
            if parse(rule.headers) <= release and rule.code in failed:
                wrong[rule.code] = f"does not compile: {failed[rule.code]}"
            elif parse(rule.headers) > release and rule.code not in failed:
                wrong[rule.code] = f"compiles before torch {rule.headers}"
    assert wrong == {}


def test_replacements_do_not_compile_for_an_older_torch_than_the_table_names(tmp_path: Path) -> None:
    newest = max(RELEASES)
    late = [rule for rule in HOST if parse(rule.runs) > OLDEST]
    assert late
    for target in sorted({parse(rule.runs) for rule in late}):
        chosen = [rule for rule in late if parse(rule.runs) == target]
        failed = compiled(chosen, newest, (target[0], target[1] - 1), tmp_path)
        assert {rule.code for rule in chosen} == set(failed)


@pytest.mark.parametrize("release", sorted(RELEASES), ids=dotted)
def test_what_migrate_writes_compiles(release: Version, tmp_path: Path) -> None:
    failed: dict[str, str] = {}
    for target in sorted({parse(rule.runs) for rule in REWRITTEN_HOST}):
        fit = [r for r in REWRITTEN_HOST if parse(r.runs) == target <= release and parse(r.headers) <= release]
        failed |= compiled(fit, release, target, tmp_path, rewritten)
    assert failed == {}


@pytest.mark.parametrize("part", range(PARTS))
def test_what_migrate_writes_compiles_with_its_own_includes_alone(part: int, tmp_path: Path) -> None:
    sets = sorted({(includes(rewritten(rule)), parse(rule.runs)) for rule in REWRITTEN_HOST})
    failed: dict[str, str] = {}
    for lines, target in sets[part::PARTS]:
        same = [r for r in REWRITTEN_HOST if (includes(rewritten(r)), parse(r.runs)) == (lines, target)]
        failed |= compiled(same, max(RELEASES), target, tmp_path, rewritten)
    assert failed == {}


@pytest.mark.skipif(not find_nvcc(), reason="no nvcc")
@pytest.mark.parametrize("rule", DEVICE, ids=lambda rule: rule.code)
def test_device_code_compiles_by_nvcc(rule: Rule, tmp_path: Path) -> None:
    source = tmp_path / "a.cu"
    source.write_text(rewritten(rule) if rule in REWRITTEN else after(rule))
    for release in {min(v for v in RELEASES if v >= parse(rule.headers)), max(RELEASES)}:
        assert compile_stable(source, RELEASES[release].include, parse(rule.runs)) == []


def test_every_rule_that_is_rewritten_is_compiled() -> None:
    """The rules without an example of both sides are the ones that a person decides or that have no C++ to compile."""
    mechanical = {rule.code for rule in rules.table() if rule.kind == "mechanical" and rule.level == "unstable"}
    assert mechanical <= {rule.code for rule in (*REWRITTEN_HOST, *DEVICE)}


def test_what_is_left_out_has_no_replacement_in_cpp() -> None:
    assert {rule.kind for rule in rules.table() if not rule.after and rule.level == "unstable"} <= {"decide", "context"}
    assert len(HOST) + len(DEVICE) >= 148
