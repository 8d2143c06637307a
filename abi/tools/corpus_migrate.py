"""Migrate the corpus and count: findings that are rewritten, and units that then compile untouched by hand.

    python tools/corpus_migrate.py --half development|held-out [--package NAME] [--no-compile]

Migrated copies lie in `.corpus/migrated/`, which git ignores; `results/migrate-<half>.json` gets the totals. A finding
is mechanical unless its site still bears an ABI-TODO. A unit counts as compiled if it compiles against the stable
headers alone, for torch 2.10 or for the target reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from corpus import DEVELOPMENT, HEADERS, HELD_OUT, ROOT, SOURCES, Package, own_files, read_lock, units
from corpus_truth import Tree

from abiding_abi import lint, migrate
from abiding_abi.compilers import CUDA_SUFFIXES, Options
from abiding_abi.headers import Headers, fetch
from abiding_abi.verify import verify
from abiding_abi.versions import dotted


def migrated(package: Package, place: str = "migrated") -> tuple[Package, dict[str, object]]:
    """Copy and migrate a package: the copy and its counts."""
    files = own_files(package.folder, SOURCES + HEADERS)
    config = lint.Config(root=package.folder)
    before = [f for f in lint.run(files, config).findings if f.level == "unstable"] if files else []
    copy = replace(package, half=f"{place}/{package.half}")
    shutil.rmtree(copy.folder, ignore_errors=True)
    copy.folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(package.folder, copy.folder)
    start = time.process_time()
    result = migrate.run(own_files(copy.folder, SOURCES + HEADERS), lint.Config(root=copy.folder))
    took = time.process_time() - start
    migrate.write(result)
    left = Counter(item.rule for file in result.files for item in file.todos)
    counts: dict[str, object] = {"version": package.version, "findings": len(before), "left": sum(left.values())}
    counts |= {"left_by_rule": dict(left.most_common(8)), "cpu_seconds": round(took, 1)}
    return copy, counts


def compiled(
    copy: Package, headers: Headers, timeout: float, cxx_only: bool, first: bool
) -> tuple[int, Counter[str], list[str]]:
    """How many units there are, the torch that those which compile need, and the first error of those that do not."""
    targets: Counter[str] = Counter()
    problems: list[str] = []
    reached = units(copy.folder)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Tree(copy, headers, Path(scratch), Path(scratch))
        python = Path(sysconfig.get_path("include"))
        folders = (*tree.include[:-1], python)  # without the empty stand-ins
        # After the system's folders: some packages have an errno.h or a string.h of their own.
        late = tuple(word for folder in folders for word in ("-idirafter", str(folder)))
        options = Options(timeout=timeout, extra=late)
        for_nvcc = Options(timeout=timeout, include=folders)
        for unit in reached:
            if cxx_only and unit.suffix in CUDA_SUFFIXES:
                continue
            if first and targets:
                break
            result = verify(unit, headers, for_nvcc if unit.suffix in CUDA_SUFFIXES else options, whole=False)
            if result.status == "stable" and result.target:
                targets[dotted(result.target)] += 1
            else:
                error = f"{result.errors[0].line}: {result.errors[0].message[:150]}" if result.errors else result.note
                problems.append(f"{unit.relative_to(copy.folder)}:{error}")
    return len(reached), targets, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=[DEVELOPMENT, HELD_OUT], default=DEVELOPMENT)
    parser.add_argument("--package", action="append", default=[])
    parser.add_argument("--headers", default="2.15.0")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--max-units", type=int, default=1000, help="leave out packages that have more units")
    parser.add_argument("--first", action="store_true", help="of each package, stop at the first unit that compiles")
    parser.add_argument("--cxx-only", action="store_true", help="compile no CUDA units: nvcc takes ten times as long")
    parser.add_argument("--timeout", type=float, default=60)
    arguments = parser.parse_args()
    headers = fetch(arguments.headers, print)
    rows: dict[str, dict[str, object]] = {}
    findings = left = whole = 0
    for package in sorted(read_lock(), key=lambda p: p.units):
        if (
            package.half != arguments.half
            or package.units > arguments.max_units
            or (arguments.package and package.name not in arguments.package)
        ):
            continue
        if not package.folder.is_dir():
            raise SystemExit(f"{package.folder} is missing; run corpus.py fetch --half {arguments.half}")
        copy, counts = migrated(package)
        line = f"{package.name:28} {counts['findings']!s:>6} findings {counts['left']!s:>5} left"
        if not arguments.no_compile:
            total, targets, problems = compiled(copy, headers, arguments.timeout, arguments.cxx_only, arguments.first)
            counts |= {"units": total, "compiled": sum(targets.values()), "targets": dict(targets)}
            whole += bool(targets)
            line += f" {counts['compiled']!s:>4} of {total} units compile{' at least' * arguments.first}"
            if arguments.half == DEVELOPMENT:
                line += "".join(f"\n    {problem}" for problem in problems[:10])
        print(line, flush=True)
        rows[package.name] = counts
        findings, left = findings + int(str(counts["findings"])), left + int(str(counts["left"]))
    share = round(1 - left / max(findings, 1), 4)
    print(
        f"{arguments.half}: {findings - left} of {findings} findings mechanical, {share:.2%}; {whole} packages compile"
    )
    if not arguments.package:
        totals: dict[str, object] = {"half": arguments.half, "findings": findings, "left": left, "mechanical": share}
        if not arguments.no_compile:
            totals |= {"packages_with_compiled_units": whole}
        name = "migrate-share" if arguments.no_compile else "migrate"
        path = ROOT / "results" / f"{name}-{arguments.half}.json"
        command = " ".join(["python", "tools/corpus_migrate.py", *sys.argv[1:]])
        path.write_text(json.dumps({"command": command, **totals, "packages": rows}, indent=1) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
