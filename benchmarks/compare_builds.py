"""Two builds of abiding, timed by turns on one machine: what a change gains, or costs.

    python -m benchmarks.compare_builds OLD NEW GROUP [--op OP] [--at POINT ...] [--rounds 3]

OLD and NEW are wheels, folders that hold the package `abiding` with its binaries, or "installed": what the interpreter
imports. Each build has a process of its own that makes the group's cases as `python -m benchmarks` does, without peers.
Each case is timed in one process and then, while that one waits, in the other; which one begins is left to chance. So
both meet the same board in the same state: clock and power drift, and times of different runs tell little.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Protocol

INSTALLED = "installed"
NAMES = ("OLD", "NEW")


@dataclass(frozen=True)
class Time:
    """The time of a case in one build."""

    op: str
    row: str
    point: str
    """The case's place on its operator's axis."""
    us: float

    @property
    def case(self) -> tuple[str, str, str]:
        return self.op, self.row, self.point


class Timed(Protocol):
    """What times a group's cases one after the other."""

    name: str

    def next(self) -> Time | None:
        """The time of the next case; None behind the last one."""
        ...


# --- a build's process ------------------------------------------------------------------------------------------------


class _Finder(MetaPathFinder):
    """Finds `abiding` in one folder, before what an editable installation has put in front of sys.path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "abiding":
            return None
        return PathFinder.find_spec(name, [str(self.folder)] if path is None else path, target)


def serve(build: str, group: str, ops: Sequence[str], at: Sequence[int]) -> None:
    """For each line of stdin time the group's next case and write it to stdout as JSON, or null behind the last one;
    then they begin again. Whatever else writes to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if build != INSTALLED:
        sys.meta_path.insert(0, _Finder(Path(build)))
    import torch

    from benchmarks.groups import prepared

    benchmark, settings = prepared(group, ops=ops, at=at)
    cases = benchmark.measure(settings)
    for _ in sys.stdin:
        torch.manual_seed(0)  # the same data in both builds
        case = next(cases, None)
        if case is None:
            cases = benchmark.measure(settings)
        row = case and f"{benchmark.row(case)}, {case.cache_state}"
        answer = case and [case.op, row, str(case.params[benchmark.axis_of(case.op)]), case.us]
        print(json.dumps(answer), file=answers, flush=True)


class Build:
    """A build in its process."""

    def __init__(self, name: str, build: str, group: str, ops: Sequence[str] = (), at: Sequence[int] = ()) -> None:
        self.name = name
        # `serve` says where `abiding` comes from, so this process must not have imported it before.
        program = "import json, sys; from benchmarks.compare_builds import serve; serve(*json.loads(sys.argv[1]))"
        command = [sys.executable, "-c", program, json.dumps([build, group, ops, at])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def next(self) -> Time | None:
        """The time of the next case; None behind the last one.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print("next", file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with status {self.process.wait()}; see its output")
        answer = json.loads(line)
        return None if answer is None else Time(*answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


# --- both -------------------------------------------------------------------------------------------------------------


def compare(builds: Sequence[Timed], rounds: int) -> dict[tuple[str, str, str], list[tuple[float, ...]]]:
    """The times of each case, in the order of `builds`, once per round.

    Raises:
        RuntimeError: a process has ended, or the builds do not make the same cases, or none.
    """
    found = defaultdict(list)
    for _ in range(rounds):
        while True:
            times: dict[str, Time | None] = {}
            for build in random.sample(builds, len(builds)):
                times[build.name] = build.next()
            first, *rest = made = [times[build.name] for build in builds]
            if any((one and one.case) != (first and first.case) for one in rest):
                raise RuntimeError(f"the builds make different cases: {made}")
            if first is None:
                break
            found[first.case].append(tuple(one.us for one in made if one))
            shown = ", ".join(f"{build.name} {one.us:.2f}" for build, one in zip(builds, made, strict=True) if one)
            print(f"{' '.join(first.case)}: {shown} µs", file=sys.stderr, flush=True)
    if not found:
        raise RuntimeError("the builds make no such cases: see --op and --at")
    return found


def to_markdown(found: dict[tuple[str, str, str], list[tuple[float, ...]]]) -> str:
    """A table with a line per case: the median times, and that of the ratios of each round; then the geometric mean of
    the ratios of each operator."""
    from benchmarks.tables import table

    lines, ratios = [], defaultdict(list)
    for (op, row, point), rounds in found.items():
        ratio = statistics.median(new / old for old, new in rounds)
        ratios[op].append(ratio)
        old, new = (statistics.median(times) for times in zip(*rounds, strict=True))
        lines.append([op, row, point, f"{old:.2f}", f"{new:.2f}", f"{ratio:.3f}"])
    means = (f"`{op}` {math.exp(statistics.fmean(map(math.log, some))):.3f}" for op, some in ratios.items())
    about = f"NEW / OLD, geometric mean over cases: {', '.join(means)}."
    return table(["operator", "", "", "OLD, µs", "NEW, µs", "NEW / OLD"], lines) + "\n\n" + about


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_builds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("group", metavar="GROUP")
    parser.add_argument("--op", action="append", default=[], help="only this operator; repeatable")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[], help="only these points of the tables' axis (tokens, bytes)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is timed (default 3)")
    chosen = parser.parse_args(arguments)
    from benchmarks.groups import GROUPS

    ops = GROUPS[chosen.group].ops if chosen.group in GROUPS else ()
    if not ops:
        parser.error(f"GROUP is {chosen.group!r}; expected one of {list(GROUPS)}")
    if unknown := sorted(set(chosen.op) - set(ops)):
        parser.error(f"--op is {unknown[0]!r}; expected one of {list(ops)}")
    with ExitStack() as stack:
        builds = []
        for name, given in zip(NAMES, (chosen.old, chosen.new), strict=True):
            try:
                folder = _folder(given, stack)
            except ValueError as error:
                parser.error(f"{name} is {given!r}; {error}")
            builds.append(Build(name, folder, chosen.group, chosen.op, chosen.at))
            stack.callback(builds[-1].close)
        try:
            print(to_markdown(compare(builds, chosen.rounds)))
        except RuntimeError as error:
            print(f"compare_builds: {error}", file=sys.stderr)
            return 1
    return 0


def _folder(given: str, stack: ExitStack) -> str:
    if given == INSTALLED:
        return given
    path = Path(given)
    if path.suffix == ".whl" and path.is_file():
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        zipfile.ZipFile(path).extractall(folder)
        return folder
    if not (path / "abiding" / "__init__.py").is_file():
        raise ValueError(f'expected a wheel, a folder that holds the package abiding, or "{INSTALLED}"')
    return str(path.resolve())


if __name__ == "__main__":
    sys.exit(main())
