"""A call holds its communicator: what other threads dispose of and free meanwhile stays until the call returns."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

DISPOSE_DURING_A_CALL = """
import ctypes, pathlib, threading, torch, abiding

raw = torch.ops.abiding_custom_ar

def mapped():
    return sum("abiding (deleted)" in line for line in pathlib.Path("/proc/self/maps").read_text().splitlines())

workspaces = [raw.allocate_shared_memory_and_handle(raw.meta_size())[0] for _ in range(2)]
fa = raw.init_custom_ar(workspaces, torch.empty(0, dtype=torch.uint8), 0, True)
raw.configure(fa, 1.0, 128)
x, errors = torch.ones(1000), []

def call():
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
try:
    raw.all_reduce(fa, x, x, 0, 0)
except RuntimeError as error:
    assert "expected the handle of a communicator that is open" in str(error), error
else:
    raise AssertionError("a handle is refused as soon as it is disposed of")
assert thread.is_alive()
thread.join()
assert "rank 1 did not send in time" in errors[0], errors
assert mapped() == 0, "the last call gives the memory back"
print("done")
"""


def test_dispose_while_a_call_waits(python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert python(DISPOSE_DURING_A_CALL).stdout == "done\n"
