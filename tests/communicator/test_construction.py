"""Making a communicator: whatever goes wrong, nothing stays; whatever the process's defaults are, it is the same."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from abiding import Communicator, _host_barrier, _peer_memory, communicator
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import run_processes

raw = torch.ops.abiding_custom_ar


def held() -> tuple[int, int]:
    """How many mappings and descriptors of shared memory this process has."""
    maps = Path("/proc/self/maps").read_text().count("memfd:abiding")
    names = []
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            names.append(os.readlink(file))
    return maps, sum("memfd:abiding" in name for name in names)


# --- a failure at each step -------------------------------------------------------------------------------------------

STEPS = [
    "allocate",
    "allocate_barrier_table",
    "open",
    "init",
    "configure",
    "send_probe",
    "check_probes",
    "clear",
]


class Injected(BaseException):
    """Passes every ``except Exception``, as KeyboardInterrupt does."""


def fails_at(rank: int, step: str, when: str, error: type[BaseException]) -> tuple[int, int]:
    """Rank 0's step raises, before or after its work; the others get an error, or are served without peer memory."""
    original = getattr(_peer_memory.PeerMemory, step)

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if when == "after":
            original(self, *args, **kwargs)
        raise error("out of luck")

    if rank == 0:
        setattr(_peer_memory.PeerMemory, step, failing)
    with warnings.catch_warnings(), contextlib.suppress(Exception, Injected):
        warnings.simplefilter("ignore")
        comm = Communicator(timeout_s=5)
        assert issubclass(error, Exception), "rank 0 is not there any more"
        assert_bitwise_equal(comm.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
        assert comm.unavailable_reason is not None
        assert "out of luck" in comm.unavailable_reason
        comm.close()
    if rank == 0 and not issubclass(error, Exception):
        dist.destroy_process_group()  # as the end of the process would: the other one's gather fails
    return held()


@pytest.mark.parametrize("error", [RuntimeError, ValueError, Injected])
@pytest.mark.parametrize("step", STEPS)
def test_nothing_stays_after_a_failure(step: str, error: type[BaseException]) -> None:
    for when in ("before", "after"):
        assert run_processes(fails_at, 2, step, when, error) == [(0, 0)] * 2, when


@pytest.mark.parametrize("step", ["allocate", "init", "configure"])
def test_nothing_stays_of_one_rank(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, before = getattr(_peer_memory.PeerMemory, step), held()

    def failing(*args: Any) -> Any:
        original(*args)
        raise Injected

    monkeypatch.setattr(_peer_memory.PeerMemory, step, failing)
    with pytest.raises(Injected):
        Communicator(device="cpu")
    assert held() == before


def test_nothing_stays_if_the_last_tensor_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    before = held()

    def failing(*args: Any) -> Any:
        raise Injected

    monkeypatch.setattr(communicator.Communicator, "_set_peer_memory", failing)
    with pytest.raises(Injected):
        Communicator(device="cpu")
    assert held() == before


@pytest.mark.parametrize("timeout_s", [1e9, 1e10, float("inf"), -1.0])
def test_nothing_stays_after_a_bad_argument(timeout_s: float) -> None:
    before = held()
    for _ in range(3):
        with pytest.raises(ValueError, match="Communicator: timeout_s is"):
            Communicator(device="cpu", timeout_s=timeout_s)
    assert held() == before


def dies_meanwhile(rank: int) -> tuple[int, int]:
    if rank == 1:
        _peer_memory.PeerMemory.open = lambda *_: os._exit(0)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        Communicator(timeout_s=5)
    return held()


def test_nothing_stays_if_a_peer_dies() -> None:
    assert run_processes(dies_meanwhile, 2, may_die={1})[0] == (0, 0)


def interrupted_anywhere(rank: int) -> tuple[int, tuple[int, int]]:
    """One signal at a random instant of each of many constructions; returns how many it ended, and what stays."""
    rng, ended, stays = random.Random(0), 0, held()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for _ in range(3):  # the first one imports more
        begin = time.perf_counter()
        Communicator(device="cpu").close()
    usual = time.perf_counter() - begin
    for _ in range(400):
        comm = None
        try:
            signal.setitimer(signal.ITIMER_REAL, usual * rng.uniform(0.01, 1.2))
            comm = Communicator(device="cpu")
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            ended += 1
        if comm is not None:
            comm.close()
    assert held() == stays
    return ended, held()


def test_nothing_stays_after_ctrl_c_at_any_instant() -> None:
    ended, stays = run_processes(interrupted_anywhere, 1)[0]
    assert ended > 20
    assert stays == (0, 0)


# --- defaults of the process ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def surroundings(kind: str) -> Iterator[None]:
    """The process's defaults, changed in one way."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if kind == "meta context":
        with torch.device("meta"):
            yield
    elif kind == "default device":
        torch.set_default_device("meta")
        yield
        torch.set_default_device(None)
    elif kind == "default dtype":
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
    elif kind == "fake":
        with FakeTensorMode():
            yield
    elif kind == "inference":
        with torch.inference_mode():
            yield
    else:
        with torch.overrides.BaseTorchFunctionMode():
            yield


KINDS = ["meta context", "default device", "default dtype", "fake", "inference", "function mode"]


def made_within(rank: int, kind: str) -> tuple[str | None, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with surroundings(kind):
            comm = Communicator(device="cpu", timeout_s=20)
    with comm:
        assert_bitwise_equal(comm.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
        with surroundings(kind):
            comm.check()
            comm.reset()
        assert_bitwise_equal(comm.all_reduce(torch.ones(3)), torch.full((3,), 2.0))
    return comm.unavailable_reason, [str(one.message) for one in caught if "abiding" in str(one.message)]


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_the_process_do_not_matter(kind: str) -> None:
    assert run_processes(made_within, 2, kind) == [(None, [])] * 2


# --- what the surroundings deny ---------------------------------------------------------------------------------------


def denied(rank: int, what: str) -> tuple[str | None, float]:
    """One look-up fails on rank 1 alone: all ranks go on without peer memory, for one reason."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise {"_host": PermissionError(13, "Permission denied", "/proc/sys/kernel/random/boot_id")}.get(
            what, IndexError("no such device")
        )

    if rank == 1:
        setattr(_peer_memory, what, fail)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        comm = Communicator(timeout_s=20)
    with comm:
        return comm.unavailable_reason, float(comm.all_reduce(torch.ones(3))[0])


@pytest.mark.parametrize("what", ["_host", "_identity", "_lacking", "_kind", "_tensor", "_bytes"])
def test_all_ranks_fall_back_together(what: str) -> None:
    (one, total), other = run_processes(denied, 2, what)
    assert (one, total) == other
    assert one is not None
    assert re.search("rank 1 failed to .*(Permission denied|no such device)", one)
    assert total == 2.0


def out_of_descriptors() -> tuple[list[int], tuple[int, int]]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    return taken, limits


def cannot_look(rank: int) -> str:
    """Rank 0 waits, in a call and in a reset, without a descriptor to look up anything with."""
    with Communicator(timeout_s=20) as comm:
        comm.all_reduce(torch.ones(3))
        dist.barrier()
        taken, limits = out_of_descriptors() if rank == 0 else ([], None)
        if rank == 1:
            time.sleep(1)
        total = comm.all_reduce(torch.ones(3))
        if rank == 1:
            time.sleep(1)
        comm.reset()
        alive = _host_barrier.has_ended(os.getpid()), _host_barrier.has_ended(2**22 + 1)
        for file in taken:
            os.close(file)
        if limits:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert_bitwise_equal(total, torch.full((3,), 2.0))
        assert alive == (False, True)
    return "ok"


def test_a_rank_that_cannot_be_looked_up_has_not_ended() -> None:
    assert run_processes(cannot_look, 2) == ["ok"] * 2


def test_errors_of_the_system_name_cause_and_remedy() -> None:
    expected = {
        "EMFILE": "Too many open files; expected a free descriptor of this process",
        "EMFILE open": "Too many open files; expected a free descriptor of this process",
        "EPERM": "Operation not permitted; expected processes of one user, and a sandbox",
        "EFBIG": "cannot be (shared|mapped): .*; expected less, or more memory",
        "ENOENT": "No such file or directory; expected a running process of this container",
    }
    program = Path(__file__).parent / "denied_memory.py"
    result = subprocess.run(
        [sys.executable, str(program), *expected], capture_output=True, text=True, check=False, timeout=60
    )
    lines = result.stdout.splitlines()
    assert len(lines) == len(expected), (lines, result.stderr)
    for (cause, text), line in zip(expected.items(), lines, strict=True):
        assert re.search(text, line), (cause, line)


# --- the default device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backends", "device"),
    [
        ("cpu:gloo,cuda:nccl", "cuda"),
        ("cuda:nccl", "cuda"),
        ("cpu:gloo", "cpu"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:mynccl", "cpu"),
    ],
)
def test_the_default_device_is_what_the_group_serves(
    backends: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "undefined")
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert communicator._default_device(None, 2).type == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert communicator._default_device(None, 2).type == "cpu"
