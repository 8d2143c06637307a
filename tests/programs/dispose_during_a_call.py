"""Disposes of a communicator, and frees its memory, while another thread waits in a call of it."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
import torch

import abiding  # noqa: F401  (registers the operators)

raw = torch.ops.abiding_custom_ar


def mapped() -> int:
    return sum("abiding (deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines())


workspaces = [raw.allocate_shared_memory_and_handle(raw.meta_size())[0] for _ in range(2)]
fa = raw.init_custom_ar(workspaces, torch.empty(0, dtype=torch.uint8), 0, True)
raw.configure(fa, 1.0, 128)
x = torch.ones(1000)
errors: list[str] = []


def call() -> None:
    try:
        raw.all_reduce(fa, x, x, 0, 0)
    except RuntimeError as error:
        errors.append(str(error))


thread = threading.Thread(target=call)
thread.start()
header_bytes = 64 << 10
while ctypes.c_uint32.from_address(workspaces[1] + header_bytes).value == 0:
    pass  # until rank 0 has sent its first word to rank 1

raw.dispose(fa)
for workspace in workspaces:
    raw.free_shared_buffer(workspace)
assert mapped() == 2, "the call that waits has its memory"
# A handle is refused as soon as it is disposed of.
with pytest.raises(RuntimeError, match="expected the handle of a communicator that is open"):
    raw.all_reduce(fa, x, x, 0, 0)
assert thread.is_alive()
thread.join()
assert "rank 1 did not send in time" in errors[0], errors
assert mapped() == 0, "the last call gives the memory back"
print("done")
