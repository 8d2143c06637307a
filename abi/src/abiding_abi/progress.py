"""Progress on a terminal's last line; nothing where standard error is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_INTERVAL = 0.1


@contextmanager
def progress(verb: str, least: int = 200) -> Iterator[Callable[[int, int], None] | None]:
    """A function of how many of how many files are done, shown where there are at least ``least``."""
    if not sys.stderr.isatty():
        yield None
        return
    last = 0.0
    shown = False

    def tell(done: int, total: int) -> None:
        nonlocal last, shown
        now = time.monotonic()
        if total >= least and now - last >= _INTERVAL:
            last, shown = now, True
            print(f"\r{verb} {done} of {total} files", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
