"""Calls that differ between ranks: an error on every rank that names both calls, and no result made of two calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from abiding import Communicator, _peer_memory, reduce_rms
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.ranks import captured_on_each, on_each, run_processes, virtual_ranks

TIMEOUT_S = 20.0

Results = Sequence[Tensor]
Call = Callable[[Communicator], Results]
Prepare = Callable[[torch.device], Call]
"""Makes the inputs of a call first: with virtual ranks an allocation may wait for a kernel that waits for this rank."""


def summed(count: int, dtype: torch.dtype = torch.float32) -> Prepare:
    def prepare(device: torch.device) -> Call:
        x, out = torch.ones(count, dtype=dtype, device=device), torch.zeros(count, dtype=dtype, device=device)
        return lambda comm: [comm.all_reduce(x, out)]

    return prepare


def summed_in_place(count: int) -> Prepare:
    def prepare(device: torch.device) -> Call:
        x = torch.ones(count, device=device)
        return lambda comm: [comm.all_reduce(x, x)]

    return prepare


def summed_with_gaps(count: int) -> Prepare:
    def prepare(device: torch.device) -> Call:
        x = torch.ones(count, 2, device=device)[:, 0]
        return lambda comm: [comm.all_reduce(x)]

    return prepare


def normed(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Prepare:
    def prepare(device: torch.device) -> Call:
        x = torch.ones(rows, width, dtype=dtype, device=device)
        return lambda comm: [reduce_rms.rms_norm(x, x[0], comm)]

    return prepare


def qk_normed(rows: int, q: int, kv: int) -> Prepare:
    def prepare(device: torch.device) -> Call:
        x = torch.ones(rows, q + 2 * kv, device=device)
        return lambda comm: reduce_rms.qk_norm(x, x[0, :q], x[0, :kv], comm)

    return prepare


# What rank 0 and the last rank call, and how the errors name it.
DIFFERENT: dict[str, tuple[Prepare, str, Prepare, str]] = {
    "one element less": (
        *(summed(1000), "all_reduce with 1000 float32 elements"),
        *(summed(999), "all_reduce with 999 float32 elements"),
    ),
    "another dtype of as many bytes": (
        *(summed(64, torch.float16), "all_reduce with 64 float16 elements"),
        *(summed(64, torch.bfloat16), "all_reduce with 64 bfloat16 elements"),
    ),
    "another dtype of other elements": (
        *(summed(64), "all_reduce with 64 float32 elements"),
        *(summed(128, torch.float16), "all_reduce with 128 float16 elements"),
    ),
    "one CTA and many": (
        *(summed(4), "all_reduce with 4 float32 elements"),
        *(summed(200_000), "all_reduce with 200000 float32 elements"),
    ),
    "one-shot and two-shot": (
        *(summed_in_place(500_000), "all_reduce with 500000 float32 elements"),
        *(summed_in_place(600_000), "all_reduce with 600000 float32 elements"),
    ),
    "two-shot and two-shot": (
        *(summed(900_000), "all_reduce with 900000 float32 elements"),
        *(summed(1_000_000), "all_reduce with 1000000 float32 elements"),
    ),
    "another operator": (
        *(summed(40_000), "all_reduce with 40000 float32 elements"),
        *(normed(3, 8), "rms_norm with 3 rows of 8 float32 columns"),
    ),
    "another norm": (
        *(normed(3, 8), "rms_norm with 3 rows of 8 float32 columns"),
        *(qk_normed(3, 8, 4), r"qk_norm with 3 rows of 8 \+ 4 float32 columns"),
    ),
    "one row less": (
        *(normed(4, 8), "rms_norm with 4 rows of 8 float32 columns"),
        *(normed(3, 8), "rms_norm with 3 rows of 8 float32 columns"),
    ),
    "many rows and few": (
        *(normed(4000, 64), "rms_norm with 4000 rows of 64 float32 columns"),
        *(normed(300, 64), "rms_norm with 300 rows of 64 float32 columns"),
    ),
    "another width": (
        *(qk_normed(5, 1280, 256), r"qk_norm with 5 rows of 1280 \+ 256 float32 columns"),
        *(qk_normed(5, 1152, 256), r"qk_norm with 5 rows of 1152 \+ 256 float32 columns"),
    ),
    "another width of K alone": (
        *(qk_normed(5, 64, 16), r"qk_norm with 5 rows of 64 \+ 16 float32 columns"),
        *(qk_normed(5, 64, 8), r"qk_norm with 5 rows of 64 \+ 8 float32 columns"),
    ),
    "another dtype of a norm": (
        *(normed(5, 64), "rms_norm with 5 rows of 64 float32 columns"),
        *(normed(5, 64, torch.bfloat16), "rms_norm with 5 rows of 64 bfloat16 columns"),
    ),
}


def names_both(last: int, first_words: str, last_words: str) -> str:
    """What the errors of all ranks must match: any of the equal ranks may be the one that is named."""
    pairs = [(rf"[0-{last - 1}]", first_words), (str(last), last_words)]
    texts = (f"rank {a} called {x}, and rank {b} {y}; expected the same call" for (a, x), (b, y) in permutations(pairs))
    return f"this communicator has stopped: ({'|'.join(texts)})"


def recovers(comms: Sequence[Communicator]) -> None:
    for comm in comms:
        comm.reset()
    calls = [summed(3000)(comm.device) for comm in comms]
    for (out,) in on_each(comms, lambda rank, comm: calls[rank](comm)):
        assert_bitwise_equal(out, torch.full_like(out, float(len(comms))))
    assert all(comm.state == "ready" for comm in comms)


def in_process(rank: int, ranks: int) -> dict[str, list[str]]:
    """Every pair of calls, after and before calls that agree; the errors of this rank: of the call, and of the next."""
    errors: dict[str, list[str]] = {}
    with Communicator(timeout_s=TIMEOUT_S) as comm:
        for name, (first, _, last, _) in DIFFERENT.items():
            comm.all_reduce(torch.ones(7))
            begin = time.monotonic()
            errors[name] = []
            for call in (last if rank == ranks - 1 else first, summed(5)):
                with pytest.raises(RuntimeError) as caught:
                    call(comm.device)(comm)
                errors[name].append(str(caught.value))
            assert time.monotonic() - begin < TIMEOUT_S / 2, "no rank waits for words that never come"
            assert comm.state == "stopped"
            dist.barrier()
            comm.reset()
            assert_bitwise_equal(comm.all_reduce(torch.ones(3000)), torch.full((3000,), float(ranks)))
    return errors


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_process_names_both_calls(ranks: int) -> None:
    for rank, errors in enumerate(run_processes(in_process, ranks, ranks)):
        for name, (_, first_words, _, last_words) in DIFFERENT.items():
            for text in errors[name]:
                with pytest.raises(RuntimeError, match=names_both(ranks - 1, first_words, last_words)):
                    raise RuntimeError(f"{text} | {name}, rank {rank}")


def behind(rank: int) -> list[str]:
    """Rank 1 leaves out a call: its next one is another operator."""
    errors = []
    with Communicator(timeout_s=TIMEOUT_S) as comm:
        calls = [normed(3, 8), summed(9), normed(3, 8), summed(9)]
        for call in calls[1:] if rank == 1 else calls:
            with pytest.raises(RuntimeError) as caught:
                call(comm.device)(comm)
            errors.append(str(caught.value))
    return errors


def test_a_rank_that_is_a_call_behind() -> None:
    for errors in run_processes(behind, 2):
        for text in errors:
            assert "all_reduce with 9 float32 elements" in text
            assert "rms_norm with 3 rows of 8 float32 columns" in text


def without_peer_memory(rank: int) -> list[str]:
    """The same through torch.distributed: no peer memory, and messages that take that route with it."""
    errors = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_peer_memory, "_host", lambda *_: f"host {rank}")
        comm = Communicator()
    assert comm.unavailable_reason is not None
    with comm, Communicator(max_bytes=64, timeout_s=TIMEOUT_S) as small:
        for call, at in (
            (summed(100 + rank), comm),
            (summed(100, torch.float16 if rank else torch.bfloat16), comm),
            (normed(3, 8) if rank else summed(9), comm),
            (normed(3, 8 + rank), comm),
            (qk_normed(3, 8, 4 + rank), comm),
            (summed(9, torch.complex64 if rank else torch.uint16), small),
        ):
            with pytest.raises(RuntimeError) as caught:
                call(at.device)(at)
            errors.append(str(caught.value))
            at.reset()
            assert_bitwise_equal(at.all_reduce(torch.ones(50)), torch.full((50,), 2.0))
        # On GPUs the calls are not compared; the true width divides all the same.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Communicator, "agree", lambda *_: None)
            x = torch.full((3, 4 + 4 * rank), 2.0 + rank)
            out = reduce_rms.rms_norm(x, torch.ones(4 + 4 * rank), comm, eps=0.0)
        assert_close(out, x.double() / math.sqrt((4 * 4 + 8 * 9) / 12), ulps=2)
    return errors


def test_calls_through_torch_distributed() -> None:
    expected = [
        ("all_reduce with 101 float32 elements", "all_reduce with 100 float32 elements"),
        ("all_reduce with 100 float16 elements", "all_reduce with 100 bfloat16 elements"),
        ("rms_norm with 3 rows of 8 float32 columns", "all_reduce with 9 float32 elements"),
        ("rms_norm with 3 rows of 9 float32 columns", "rms_norm with 3 rows of 8 float32 columns"),
        ("qk_norm with 3 rows of 8 + 5 float32 columns", "qk_norm with 3 rows of 8 + 4 float32 columns"),
        # With peer memory too, for dtypes that have no number in a tag.
        (
            "all_reduce with 9 complex64 elements through torch.distributed",
            "all_reduce with 9 uint16 elements through torch.distributed",
        ),
    ]
    for errors in run_processes(without_peer_memory, 2):
        for text, (last, first) in zip(errors, expected, strict=True):
            assert f"rank 1 called {last}, and rank 0 {first}; expected the same call on every rank" in text


# Calls of which rank 1's goes through torch.distributed, or both, with max_bytes=400; and how the errors name them.
ROUTES: dict[str, tuple[Prepare, str, Prepare, str]] = {
    "on both sides of max_bytes": (
        *(summed(100), "all_reduce with 100 float32 elements"),
        *(summed(101), "all_reduce with 101 float32 elements through torch.distributed"),
    ),
    "a dtype for each route": (
        *(summed(100), "all_reduce with 100 float32 elements"),
        *(summed(100, torch.int64), "all_reduce with 100 int64 elements through torch.distributed"),
    ),
    "gaps on one rank": (
        *(summed(100), "all_reduce with 100 float32 elements"),
        *(summed_with_gaps(100), "all_reduce with 100 float32 elements through torch.distributed"),
    ),
    "another operator": (
        *(normed(3, 8), "rms_norm with 3 rows of 8 float32 columns"),
        *(summed(101), "all_reduce with 101 float32 elements through torch.distributed"),
    ),
    "both past max_bytes": (
        *(summed(200), "all_reduce with 200 float32 elements through torch.distributed"),
        *(summed(101), "all_reduce with 101 float32 elements through torch.distributed"),
    ),
}


def on_two_routes(rank: int, ranks: int) -> dict[str, str]:
    errors = {}
    with Communicator(max_bytes=400, timeout_s=TIMEOUT_S) as comm:
        for name, (first, _, last, _) in ROUTES.items():
            begin = time.monotonic()
            with pytest.raises(RuntimeError) as caught:
                (last if rank == ranks - 1 else first)(comm.device)(comm)
            errors[name] = str(caught.value)
            with pytest.raises(RuntimeError):
                comm.all_reduce(torch.ones(500))
            assert time.monotonic() - begin < TIMEOUT_S / 2, "no rank waits for words that never come"
            assert comm.state == "stopped"
            comm.reset()
            for count in (100, 101, 99, 300, 301):
                assert_bitwise_equal(comm.all_reduce(torch.ones(count)), torch.full((count,), float(ranks)))
    return errors


@pytest.mark.parametrize("ranks", [2, 3])
def test_calls_on_two_routes(ranks: int) -> None:
    for errors in run_processes(on_two_routes, ranks, ranks):
        for name, (_, first_words, _, last_words) in ROUTES.items():
            with pytest.raises(RuntimeError, match=names_both(ranks - 1, first_words, last_words)):
                raise RuntimeError(errors[name])


def with_every_call_checked(rank: int, kind: str) -> dict[str, str]:
    """Only rank 1 asks for it. No call begins that differs. Ranks on GPUs share one if there are not two."""
    errors = {}
    device = torch.device(kind, rank % torch.cuda.device_count()) if kind == "cuda" else torch.device(kind)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setenv("ABIDING_CHECK_CALLS", "1")
        comm = Communicator(device=device, max_bytes=400, timeout_s=TIMEOUT_S)
    with comm:
        for name, (first, _, last, _) in ROUTES.items():
            with pytest.raises(RuntimeError) as caught:
                (last if rank else first)(comm.device)(comm)
            errors[name] = str(caught.value)
            assert comm.state == "ready"
            for count in (100, 101):
                total = comm.all_reduce(torch.ones(count, device=device))
                assert_bitwise_equal(total, torch.full((count,), 2.0, device=device))
            for call in (normed(3, 8), qk_normed(3, 8, 4)):
                call(comm.device)(comm)
    return errors


def test_every_call_is_checked_where_the_environment_says_so(device: torch.device) -> None:
    """On GPUs nothing else compares calls on different routes."""
    peer, other = "through peer memory", "through torch.distributed"
    for errors in run_processes(with_every_call_checked, 2, device.type):
        for name, last, first in (
            ("on both sides of max_bytes", f"all_reduce with 101 float32 elements {other}",
             f"all_reduce with 100 float32 elements {peer}"),
            ("a dtype for each route", f"all_reduce with 100 int64 elements {other}",
             f"all_reduce with 100 float32 elements {peer}"),
            ("gaps on one rank", f"all_reduce with 100 float32 elements {other}",
             f"all_reduce with 100 float32 elements {peer}"),
            ("another operator", f"all_reduce with 101 float32 elements {other}",
             f"rms_norm with [3, 8] and [8] float32 {peer}"),
            ("both past max_bytes", f"all_reduce with 101 float32 elements {other}",
             f"all_reduce with 200 float32 elements {other}"),
        ):  # fmt: skip
            assert errors[name].endswith(
                f": rank 1 called {last}, and rank 0 {first}; expected the same call on every rank"
            )


def alone_on_a_route(rank: int) -> str | None:
    """Rank 0 makes a call through torch.distributed that rank 1 never makes."""
    with Communicator(max_bytes=0, timeout_s=1.0) as comm:
        comm.all_reduce(torch.ones(9))
        if rank == 1:
            time.sleep(2.5)
            return None
        with pytest.raises(RuntimeError) as caught:
            comm.all_reduce(torch.ones(9))
    return str(caught.value)


def test_no_wait_for_a_call_through_torch_distributed_is_longer_than_the_timeout() -> None:
    error, _ = run_processes(alone_on_a_route, 2)
    assert error.startswith("abiding::all_reduce: this communicator has stopped: rank 1 did not send in time")


# --- virtual ranks on a GPU: a call cannot raise, so it leaves NaN ----------------------------------------------------


def assert_all_nan(results: Sequence[Results]) -> None:
    for rank, outs in enumerate(results):
        for out in outs:
            assert bool(out.isnan().all()), f"rank {rank} has {int((~out.isnan()).sum())} of {out.numel()} values"


def assert_named(comms: Sequence[Communicator], name: str) -> None:
    _, first_words, _, last_words = DIFFERENT[name]
    text = names_both(len(comms) - 1, first_words, last_words)
    for comm in comms:
        with pytest.raises(RuntimeError, match=text):
            comm.check()
        assert comm.state == "stopped"
        with pytest.raises(RuntimeError, match=text):
            comm.all_reduce(torch.ones(5, device=comm.device))


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", DIFFERENT)
def test_on_a_gpu(name: str, ranks: int, cuda: torch.device) -> None:
    first, _, last, _ = DIFFERENT[name]
    with virtual_ranks(ranks, cuda, timeout_s=TIMEOUT_S) as comms:
        equal = [summed(3000)(cuda) for _ in comms]
        different = [(last if rank == ranks - 1 else first)(cuda) for rank in range(ranks)]
        on_each(comms, lambda rank, comm: equal[rank](comm))
        begin = time.monotonic()
        results = on_each(comms, lambda rank, comm: different[rank](comm))
        assert time.monotonic() - begin < TIMEOUT_S / 2, "no rank waits for words that never come"
        assert_all_nan(results)
        assert_named(comms, name)
        recovers(comms)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["one CTA and many", "another operator", "another width", "one row less"])
def test_from_graphs(name: str, cuda: torch.device) -> None:
    """The calls after it in the graph leave NaN too, and after a reset the same graphs mismatch again."""
    first, _, last, _ = DIFFERENT[name]
    with virtual_ranks(2, cuda, timeout_s=TIMEOUT_S) as comms:
        calls = [[summed(70_000)(cuda), (last if rank else first)(cuda), summed(70_000)(cuda)] for rank in range(2)]
        replay, results = captured_on_each(comms, lambda rank, comm: [x for call in calls[rank] for x in call(comm)])
        for _ in range(3):
            replay()
            for outs in results:
                assert_bitwise_equal(outs[0], torch.full_like(outs[0], 2.0))
            assert_all_nan([outs[1:] for outs in results])
            replay()
            assert_all_nan(results)
            assert_named(comms, name)
            recovers(comms)


@pytest.mark.gpu
def test_a_call_in_several_kernels(cuda: torch.device) -> None:
    """The first kernels of both calls have the same size, but the calls do not."""
    with virtual_ranks(2, cuda, max_bytes=1 << 30, timeout_s=TIMEOUT_S) as comms:
        calls = [summed((10 << 20) + rank)(cuda) for rank in range(2)]
        assert_all_nan(on_each(comms, lambda rank, comm: calls[rank](comm)))
        recovers(comms)
