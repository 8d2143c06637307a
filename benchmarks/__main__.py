"""The command line `python -m benchmarks`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.groups import GROUPS, run
from benchmarks.result_file import RESULTS


def main(arguments: Sequence[str] | None = None) -> int:
    """Time one group or all; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time kernels on this machine and compare them with the roofline bound and with peers.",
    )
    parser.add_argument("group", nargs="?", choices=GROUPS, help="all of them by default")
    parser.add_argument(
        "--peer", type=Path, action="append", default=[], help="file with a peer's kernels to time too; repeatable"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"a .json file, or a folder for one (default, for whole runs on a GPU: {RESULTS})",
    )
    parser.add_argument("--quick", action="store_true", help="a few sizes only")
    parser.add_argument("--op", action="append", default=[], help="only this operator; repeatable")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[], help="only these points of the tables' axis (tokens, bytes)"
    )
    parser.add_argument("--commit", help="commit to record (default: that of the checkout)")
    chosen = parser.parse_args(arguments)
    if chosen.group is None:
        if chosen.op:
            parser.error(f"--op {chosen.op[0]} without a group; expected the group of the operator as well")
        if chosen.at:
            parser.error(
                f"--at {chosen.at[0]} without a group; expected the group whose tables have such a point as well"
            )
        # One process per group: virtual ranks need settings of CUDA that must be made before its first use.
        given = sys.argv[1:] if arguments is None else arguments
        commands = ([sys.executable, "-m", "benchmarks", group, *given] for group in GROUPS)
        return next(filter(None, (subprocess.run(command).returncode for command in commands)), 0)
    try:
        run(
            chosen.group,
            peers=chosen.peer,
            output=chosen.output,
            quick=chosen.quick,
            ops=chosen.op,
            at=chosen.at,
            commit=chosen.commit,
        )
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
