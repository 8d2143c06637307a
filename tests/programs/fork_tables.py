"""Forks while a thread takes the lock of the tables; every fork has tables of its own, and finds the lock free.

The thread calls nothing of torch's, and no process group is here: what their threads hold at a fork, a child inherits
locked, and no library could help that.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

import torch

from abiding import _library

raw = torch.ops.abiding_custom_ar
owns = ctypes.CDLL(str(_library.binaries()[0])).abiding_peer_owns
owns.argtypes, owns.restype = [ctypes.c_int64, ctypes.c_bool, ctypes.c_int64], ctypes.c_bool

address, _ = raw.allocate_shared_memory_and_handle(raw.meta_size())
fa = raw.init_custom_ar([address], torch.empty(0, dtype=torch.uint8), 0, True)
x = torch.ones(3)
stop = threading.Event()


def look_up() -> None:
    while not stop.is_set():
        assert owns(address, False, 1)


def child() -> None:
    signal.alarm(20)  # a lock that nobody will open ends this process
    assert not owns(address, False, 1), "the parent's memory is no fork's"
    own, _ = raw.allocate_shared_memory_and_handle(raw.meta_size())
    handle = raw.init_custom_ar([own], torch.empty(0, dtype=torch.uint8), 0, True)
    raw.all_reduce(handle, x, x, 0, 0)
    raw.dispose(handle)
    raw.free_shared_buffer(own)
    raw.dispose(fa)  # the fork's entry alone
    raw.free_shared_buffer(address)


thread = threading.Thread(target=look_up)
thread.start()
ends = []
for _ in range(100):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop.set()
thread.join()
raw.all_reduce(fa, x, x, 0, 0)
assert owns(address, False, 1)
print({end: ends.count(end) for end in set(ends)})
