"""Processes over shared memory: values against torch.distributed, every kind of fault, and the reset."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from abiding import Communicator, reduce_rms, reference
from abiding.communicator import DTYPES
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.ranks import run_processes

TIMEOUT_S = 1.0
GRACE_S = 10.0


# --- functions that run in every process ------------------------------------------------------------------------------


def random_calls(rank: int, ranks: int, calls: int, seed: int) -> None:
    """Random operators, sizes, dtypes and delays on two communicators, in batches of twenty back-to-back calls.

    The values are small integers, so every sum is exact. One torch.distributed all-reduce per batch gives the
    expected sums.
    """
    same, own = random.Random(seed), random.Random(1000 * seed + rank)
    rng = torch.Generator().manual_seed(1000 * seed + rank)
    with Communicator(timeout_s=30.0) as first, Communicator(timeout_s=30.0, max_bytes=4096) as second:
        for batch in range(calls // 20):
            summed: list[Tensor] = []
            checks: list[Callable[[Tensor, str], None]] = []
            for _ in range(20):
                comm, dtype = same.choice([first, first, second]), same.choice(DTYPES)
                if own.random() < 0.02:
                    time.sleep(own.random() * 3e-3)
                if same.random() < 0.6:
                    count = same.choice([0, 1, 2, 7, 64, same.randrange(1000), same.randrange(9000), 40_000])
                    x = torch.randint(-9, 10, (count,), generator=rng).to(dtype)
                    summed.append(x.double())
                    out = comm.all_reduce(x, x if same.random() < 0.3 else None)
                    checks.append(partial(assert_sum, out))
                    continue
                tokens, q, kv = same.randrange(6), same.randrange(1, 40), same.randrange(20)
                rows = torch.randint(-9, 10, (tokens, q + 2 * kv), generator=rng).to(dtype)
                wq, wk = torch.ones(q, dtype=dtype), torch.ones(kv, dtype=dtype)
                parts = rows.split([q, kv, kv], 1)[:2] if same.random() < 0.5 else (rows[:, :q],)
                outs = (
                    reduce_rms.qk_norm(rows, wq, wk, comm)
                    if len(parts) == 2
                    else (reduce_rms.rms_norm(rows[:, :q], wq, comm),)
                )
                for part, out in zip(parts, outs, strict=True):
                    summed.append(part.double().square().sum(1))
                    checks.append(partial(assert_normalized, out, part, ranks))
            totals = torch.cat(summed)
            dist.all_reduce(totals)
            for number, (total, check) in enumerate(zip(totals.split([len(x) for x in summed]), checks, strict=True)):
                check(total, f"rank {rank}, batch {batch}, sum {number}")
        first.check()
        second.check()


def assert_sum(out: Tensor, total: Tensor, name: str) -> None:
    assert_bitwise_equal(out, total.to(out.dtype), name)


def assert_normalized(out: Tensor, part: Tensor, ranks: int, squares: Tensor, name: str) -> None:
    scale = 1 / torch.sqrt(squares / max(ranks * part.shape[1], 1) + 1e-6)
    assert_close(out, part.double() * scale[:, None], ulps=2, name=name)


def caught(call: Callable[[], Any]) -> str:
    """The error of a call that must fail, within the timeout and a grace period."""
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as error:
        call()
    assert time.monotonic() - begin < TIMEOUT_S + GRACE_S
    return str(error.value)


def fails(*args: Any) -> Any:
    raise RuntimeError("out of luck\nand more")


def recovers(comm: Communicator) -> None:
    """Reset on all ranks; then sums are correct again, whatever was left in the workspaces."""
    assert comm.state == "stopped"
    dist.barrier()
    comm.reset()
    assert (comm.state, comm.fault) == ("ready", None)
    for count in (1, 3000, 70_000):
        x = torch.full((count,), float(comm.rank + 1))
        assert_bitwise_equal(comm.all_reduce(x), torch.full((count,), comm.ranks * (comm.ranks + 1) / 2))


def faults(rank: int) -> dict[str, list[str]]:
    """Three ranks go through every fault that leaves all alive; returns the errors of each rank by scenario."""
    errors: dict[str, list[str]] = {}
    x = torch.ones(1000)
    with Communicator(timeout_s=TIMEOUT_S) as comm:
        comm.all_reduce(x)

        # Rank 1 does not call in time; when it calls later, it gets the fault of the others.
        if rank == 1:
            time.sleep(TIMEOUT_S + 0.5)
        errors["absent"] = [caught(lambda: comm.all_reduce(x)), caught(lambda: comm.all_reduce(x)), caught(comm.check)]
        recovers(comm)

        # Two concurrent threads of rank 0, which the other ranks, being late, keep inside their calls.
        if rank == 0:
            thread_errors: list[str] = []
            threads = [
                threading.Thread(target=lambda: thread_errors.append(caught(lambda: comm.all_reduce(x)))) for _ in "ab"
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            errors["threads"] = thread_errors
        else:
            time.sleep(0.3)
            errors["threads"] = [caught(lambda: comm.all_reduce(x))]
        recovers(comm)

        # Rank 2 does not reset with the others: they raise, and a second attempt of all ranks succeeds.
        if rank == 2:
            time.sleep(2 * TIMEOUT_S + 0.5)
        errors["reset"] = [caught(lambda: comm.all_reduce(x))]
        if rank != 2:
            errors["reset"].append(caught(comm.reset))
        recovers(comm)

        # Rank 2 fails in the middle of a reset: the others stay stopped until all ranks have completed one.
        errors["half a reset"] = []
        with pytest.MonkeyPatch.context() as patch:
            if rank == 2:
                patch.setattr(comm._memory, "clear", fails)
            errors["half a reset"].append(caught(comm.reset))
        if rank != 2:
            errors["half a reset"] += [caught(lambda: comm.all_reduce(x)), str(comm.fault)]
            assert comm.state == "stopped"
        dist.barrier()
        comm.reset()
        assert comm.fault is None
        assert float(comm.all_reduce(x)[0]) == 3
    assert comm.state == "closed"
    return errors


def killed(rank: int) -> tuple[str, str, float, list[str]]:
    """Rank 1 is killed in the middle of its calls; returns the errors of the others and the memory still mapped."""
    comm = Communicator(timeout_s=30.0)
    x = torch.ones(50_000)
    if rank == 1:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
    begin = time.monotonic()
    error = caught(lambda: [comm.all_reduce(x) for _ in range(1_000_000)])
    with pytest.raises(RuntimeError) as gone:
        comm.reset()
    comm.close()
    elapsed = time.monotonic() - begin
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "abiding (deleted)" in line]
    return error, str(gone.value), elapsed, maps


def lifecycle(rank: int) -> None:
    """The state, routes and errors of a communicator from its construction until after close()."""
    with pytest.raises(ValueError, match=r"max_bytes is \[10, 11\] on the ranks; expected the same on all"):
        Communicator(max_bytes=10 + rank)
    with Communicator(max_bytes=100) as comm:
        assert repr(comm) == f"Communicator(rank {rank} of 2, cpu, ready)"
        assert comm.explain(torch.ones(25)).backend == "abiding"
        for x, reason in (
            (torch.ones(26), "larger than max_bytes"),
            (torch.ones(3, dtype=torch.int64), "dtype"),
            (torch.ones(3, dtype=torch.float64), "dtype"),
            (torch.ones(4, 4)[:, :2], "gaps or overlaps"),
            (torch.ones(2, 1).expand(2, 3), "gaps or overlaps"),
        ):
            route = comm.explain(x)
            assert route.backend == "torch.distributed"
            assert reason in route.reason
            assert_bitwise_equal(comm.all_reduce(x), 2 * x.contiguous())
            out = torch.zeros_like(x, memory_format=torch.contiguous_format)
            assert comm.all_reduce(x, out) is out
            assert_bitwise_equal(out, 2 * x.contiguous())
            with pytest.raises(TypeError, match="out has dtype float16; expected dtype"):
                comm.all_reduce(x, torch.zeros(x.shape, dtype=torch.float16))
        comm.check()
        comm.reset()
    comm.close()
    assert comm.state == "closed"
    assert comm.fault is None
    for call in (
        lambda: comm.all_reduce(torch.ones(3)),
        lambda: comm.all_reduce(torch.ones(99)),
        comm.check,
        comm.reset,
    ):
        with pytest.raises(RuntimeError, match="communicator is closed; expected an open one"):
            call()
    with torch.inference_mode(), Communicator() as comm:
        assert_bitwise_equal(comm.all_reduce(torch.ones(5)), torch.full((5,), 2.0))
        made_outside = comm
        with torch.inference_mode(False):
            assert_bitwise_equal(made_outside.all_reduce(torch.ones(5)), torch.full((5,), 2.0))
    assert not any("abiding (deleted)" in line for line in Path("/proc/self/maps").read_text().splitlines())


def subgroups(rank: int) -> None:
    """Disjoint groups, and a group that this process is not in."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with Communicator(groups[rank % 2]) as comm, Communicator() as everyone:
        assert (comm.rank, comm.ranks) == (rank // 2, 2)
        x = torch.full((5,), float(10**rank))
        assert_bitwise_equal(comm.all_reduce(x), torch.full((5,), 101.0 if rank % 2 == 0 else 1010.0))
        assert_bitwise_equal(everyone.all_reduce(x), torch.full((5,), 1111.0))
        assert_bitwise_equal(reference.all_reduce.all_reduce(x, comm), comm.all_reduce(x))
    with pytest.raises(ValueError, match="this process is not in group"):
        Communicator(groups[1 - rank % 2])


def without_peer_memory(rank: int, broken: str) -> tuple[str, list[str]]:
    """A step of the setup fails on rank 1: all ranks go through torch.distributed."""
    from abiding import _peer_memory

    if broken in ("host", "kind"):
        setattr(_peer_memory, f"_{broken}", lambda *_: f"{broken} {rank}")
    elif rank == 1:
        setattr(_peer_memory.PeerMemory, broken, (lambda self: None) if broken == "send_probe" else fails)
    with warnings.catch_warnings(record=True) as caught_warnings:
        warnings.simplefilter("always")
        comm = Communicator()
    with comm:
        x = torch.full((3, 8), rank + 1.0)
        route = comm.explain(x)
        assert route.backend == "torch.distributed"
        assert_bitwise_equal(comm.all_reduce(x), torch.full((3, 8), 3.0))
        rows = torch.cat([x, x], 1)
        q, k = reduce_rms.qk_norm(rows, torch.ones(8), torch.ones(4), comm)
        for out in (q, k, reduce_rms.rms_norm(x, torch.ones(8), comm)):
            assert_close(out, torch.full(out.shape, (rank + 1.0) / 2.5**0.5), ulps=4)
        with pytest.raises(ValueError, match=r"qk_norm: qkv has shape \[3, 15\]; expected 16 columns, q's 8"):
            reduce_rms.qk_norm(rows[:, 1:], torch.ones(8), torch.ones(4), comm)
        with pytest.raises(ValueError, match=r"rms_norm: weight has shape \[1, 8\]; expected 1 dimensions"):
            reduce_rms.rms_norm(x, torch.ones(1, 8), comm)
        assert comm.state == "ready"
        comm.check()
        comm.reset()
    ours = [one for one in caught_warnings if "abiding" in str(one.message)]
    assert all(one.filename == __file__ for one in ours), "the warning points to the line that makes the communicator"
    return route.reason, [str(one.message) for one in ours]


def compiled(rank: int, backend: str) -> None:
    """Calls inside a compiled function stay in order, with one compilation for all sizes."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend(backend)
    with Communicator() as comm, Communicator() as second:
        weight = torch.ones(8, requires_grad=True)

        def step(x: Tensor) -> tuple[Tensor, ...]:
            once = comm.all_reduce(x * 2) + 1
            comm.all_reduce(x)  # the result is unused, but other ranks wait for the call
            twice = second.all_reduce(once)
            out = torch.zeros_like(x)
            comm.all_reduce(x, out)
            return once, twice, out, reduce_rms.rms_norm(x, weight, comm)

        function = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
        compilations = []
        for rows in (4, 5, 9):
            x = torch.full((rows, 8), rank + 1.0)
            for actual, expected in zip(function(x), step(x), strict=True):
                assert_bitwise_equal(actual, expected)
                assert not actual.requires_grad
            compilations.append(counter.frame_count)
        assert compilations == compilations[:1] * 3, "another number of rows compiles again"
        comm.check()


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "calls"), [(2, 2000), (3, 1200), (4, 800)])
def test_random_calls_agree_with_torch_distributed(ranks: int, calls: int) -> None:
    run_processes(random_calls, ranks, ranks, calls, ranks)


def test_every_fault_reaches_all_ranks_and_reset_recovers() -> None:
    errors = run_processes(faults, 3)
    for rank, scenarios in enumerate(errors):
        for scenario, texts in scenarios.items():
            for text in texts:
                assert text.startswith("abiding::"), (rank, scenario, text)
    absent = [text for scenarios in errors for text in scenarios["absent"]]
    assert all("all_reduce: this communicator has stopped: rank 1 did not send in time" in text for text in absent)
    assert len(errors[0]["threads"]) == 2
    for scenarios in errors:
        assert all("rank 0 made two calls at once" in text for text in scenarios["threads"])
    for rank in (0, 1):
        assert "abiding::reset: rank 2 is missing after 2 s" in errors[rank]["reset"][1]
        assert "abiding::reset: rank 2 is missing after 1 s" in errors[rank]["half a reset"][0]
        assert all("not all ranks have finished" in text for text in errors[rank]["half a reset"][1:])
    assert "abiding::reset: out of luck" in errors[2]["half a reset"][0]


def test_a_killed_rank_is_named_and_its_memory_is_freed() -> None:
    results = run_processes(killed, 3, may_die={1})
    assert results[1] is None
    for rank in (0, 2):
        error, reset, elapsed, maps = results[rank]
        assert "all_reduce: this communicator has stopped: rank 1 is gone" in error
        assert "abiding::reset: rank 1 is gone; expected a new Communicator of the ranks that are left" in reset
        assert elapsed < 10, "the end of a process is seen at once"
        assert maps == []


def test_lifecycle() -> None:
    run_processes(lifecycle, 2)


def test_subgroups() -> None:
    run_processes(subgroups, 4)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("host", "the ranks are on several hosts"),
        ("kind", "the ranks are on devices of several kinds: kind 0, kind 1"),
        ("allocate", "rank 1 failed to allocate shared memory (out of luck)"),
        ("open", "rank 1 failed to map its peers' memory (out of luck)"),
        ("init", "rank 1 failed to register its peers' memory (out of luck)"),
        ("send_probe", "rank 0 failed to see its peers' writes (nothing has arrived from ranks [1])"),
    ],
)
def test_without_peer_memory_torch_distributed_serves_all_calls(broken: str, reason: str) -> None:
    results = run_processes(without_peer_memory, 2, broken)
    assert all(found.startswith(reason) for found, _ in results)
    assert results[0][0] == results[1][0]
    assert len(results[0][1]) == (0 if broken in ("host", "kind") else 1), (
        "rank 0 warns once if nothing ruled peer memory out"
    )
    assert results[1][1] == []


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "inductor":
        request.getfixturevalue("inductor_on_cpu")
    run_processes(compiled, 2, backend, timeout_s=150)


# --- one contract on every route --------------------------------------------------------------------------------------
