"""Run GPU tests under compute-sanitizer's memcheck, in sessions side by side, and keep a record of what is clean.

    python tools/memcheck.py [--jobs N] [--size N] [--seconds S] [--record FILE] [PYTEST ARGUMENT ...]

The tool takes a minute and some 10 GB of memory to load all kernels, so a session has several tests. A test is clean if
it passed in a session that came to its end without a report; one that is skipped needs another machine. The record
names each test's outcome and its session's errors; what is clean there is not run again, so a run that is cut off, or a
machine that goes away, costs the sessions that ran then. Exits with 1 unless all tests are clean.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
_GRACE_S = 15.0
"""How long a session may take to end after an interrupt."""


@dataclass(frozen=True)
class Outcome:
    """What became of a test."""

    result: str
    """"passed", "failed", "error", "skipped", or "cut off"."""
    errors: int | None
    """The errors that its session reported; None if the session did not come to its end."""

    @property
    def clean(self) -> bool:
        return self.errors == 0 and self.result == "passed"


def collect(arguments: Sequence[str]) -> list[str]:
    """The ids of the GPU tests that pytest finds with these arguments."""
    command = [*PYTEST, "--collect-only", "-q", "-m", "gpu", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    ids = [line for line in found.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "SKIPPED"))]
    if found.returncode != 0 or not ids:
        raise RuntimeError(f"{' '.join(command)} finds no tests:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    return ids


def run_session(tests: Sequence[str], seconds: float, folder: Path, stop: threading.Event) -> dict[str, Outcome]:
    """Run some tests in one process under the tool. It is interrupted after `seconds`, or once `stop` is set; nothing
    of it is left when this returns."""
    log, output = folder / "memcheck.log", folder / "pytest.log"
    command = ["compute-sanitizer", "--tool", "memcheck", "--log-file", str(log)]
    command += [*PYTEST, "-v", "--timeout", "0", *tests]
    with output.open("w") as file:
        # Where kernels are loaded at their first launch, that waits for those of virtual ranks, which wait for it.
        environment = os.environ | {"CUDA_MODULE_LOADING": "EAGER"}
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not stop.is_set():
        time.sleep(0.1)
    for sign, patience in ((signal.SIGINT, _GRACE_S), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
    return outcomes(tests, output.read_text(errors="replace"), log.read_text(errors="replace") if log.exists() else "")


def outcomes(tests: Sequence[str], shown: str, log: str) -> dict[str, Outcome]:
    """Of each test, from what pytest has shown and the tool has logged."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", log)
    errors = int(summary[1]) if summary else None
    results = {}
    for test in tests:
        found = re.search(rf"^{re.escape(test)} (PASSED|FAILED|ERROR|SKIPPED)\b", shown, flags=re.MULTILINE)
        results[test] = Outcome(found[1].lower() if found else "cut off", errors)
    return results


class Record:
    """The outcomes of tests, in a JSON file; each session's are written when it ends."""

    def __init__(self, path: Path) -> None:
        self.path, self.lock = path, threading.Lock()
        read = json.loads(path.read_text()) if path.exists() else {}
        self.tests = {test: Outcome(**outcome) for test, outcome in read.items()}

    def add(self, tests: dict[str, Outcome]) -> None:
        with self.lock:
            self.tests |= tests
            text = json.dumps({test: asdict(outcome) for test, outcome in sorted(self.tests.items())}, indent=1)
            self.path.write_text(text + "\n")

    def left(self, tests: Sequence[str]) -> list[str]:
        """Those that are not clean."""
        return [test for test in tests if not (test in self.tests and self.tests[test].clean)]


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run GPU tests under compute-sanitizer's memcheck.")
    parser.add_argument("--jobs", type=int, default=4, help="sessions at once (default 4)")
    parser.add_argument("--size", type=int, default=8, help="tests in a session (default 8)")
    parser.add_argument("--seconds", type=float, default=600.0, help="the most that a session may take (default 600)")
    parser.add_argument("--record", type=Path, default=Path("memcheck.json"), help="default memcheck.json")
    chosen, arguments = parser.parse_known_args()
    if shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer is not on the PATH; expected that of the CUDA toolkit")
    record, stop = Record(chosen.record), threading.Event()
    tests = collect(arguments)
    left = record.left(tests)
    sessions = [left[at : at + chosen.size] for at in range(0, len(left), chosen.size)]
    logs = Path(tempfile.mkdtemp(prefix="memcheck-"))
    print(f"{len(left)} of {len(tests)} tests, {len(sessions)} sessions; logs: {logs}", flush=True)

    def run(number: int) -> None:
        if stop.is_set():
            return
        folder = logs / str(number)
        folder.mkdir()
        begin = time.monotonic()
        found = run_session(sessions[number], chosen.seconds, folder, stop)
        record.add(found)
        results = Counter(outcome.result for outcome in found.values())
        errors = next(iter(found.values())).errors
        said = "no summary" if errors is None else f"{errors} errors"
        counts = ", ".join(f"{count} {result}" for result, count in results.items())
        print(f"session {number}: {counts}; {said}; {time.monotonic() - begin:.0f} s", flush=True)

    with ThreadPoolExecutor(chosen.jobs) as pool:
        running = [pool.submit(run, number) for number in range(len(sessions))]
        try:
            for session in running:
                session.result()
        except KeyboardInterrupt:
            stop.set()
    left = record.left(tests)
    print(f"{len(tests) - len(left)} of {len(tests)} tests are clean")
    for test in left:
        print(f"not clean: {test}: {record.tests.get(test, Outcome('not run', None))}")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
