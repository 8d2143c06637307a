"""A communicator that is not closed gives its memory back when it is collected, or when the interpreter exits."""

from __future__ import annotations

import gc
from pathlib import Path

from abiding import Communicator


def mappings() -> int:
    return sum("abiding (deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines())


assert mappings() == 0
communicator = Communicator(device="cpu")
assert mappings() == 1
del communicator
gc.collect()
assert mappings() == 0
kept = Communicator(device="cpu")
