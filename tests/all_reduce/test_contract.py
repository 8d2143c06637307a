"""The all-reduce as PyTorch operators: schemas, fakes, opcheck, graphs, streams; routes, and the host barrier."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import abiding
from abiding import Communicator
from abiding._host_barrier import HostBarrier, Step, has_ended
from abiding._peer_memory import ctas_per_rank
from abiding.communicator import Route, choose_route, is_dense
from abiding.testing.cases.all_reduce import ODD, REGULAR, AllReduceCase
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import calls_on_each, captured_on_each, on_each, virtual_ranks

SCHEMAS = {
    "abiding_custom_ar::init_custom_ar": "(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int",
    "abiding_custom_ar::all_reduce": "(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()",
    "abiding_custom_ar::open_mem_handle": "(Tensor mem_handle) -> int",
    "abiding_custom_ar::dispose": "(int fa) -> ()",
    "abiding_custom_ar::meta_size": "() -> int",
    "abiding_custom_ar::register_buffer": "(int fa, int[] ipc_tensors) -> ()",
    "abiding_custom_ar::get_graph_buffer_ipc_meta": "(int fa) -> (int[], int[])",
    "abiding_custom_ar::register_graph_buffers": "(int fa, int[][] handles, int[][] offsets) -> ()",
    "abiding_custom_ar::allocate_shared_buffer_and_handle": "(int size) -> (int, Tensor)",
    "abiding_custom_ar::free_shared_buffer": "(int ptr) -> ()",
    "abiding::all_reduce": "(Tensor input, Tensor! state, int comm) -> Tensor",
    "abiding::all_reduce.out": "(Tensor input, Tensor! state, int comm, *, Tensor! out) -> ()",
}


def operator(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


# --- the operators ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    expected = torch._C.parse_schema(f"{name}{SCHEMAS[name]}")
    found = operator(name)._schema
    assert str(found) == str(expected)
    for ours, theirs in zip(found.arguments, expected.arguments, strict=True):
        assert (ours.alias_info is not None and ours.alias_info.is_write) == (theirs.alias_info is not None)
        assert not ours.has_default_value()


@pytest.mark.parametrize("shape", [(5, 7), (0,), (3, 0)], ids=str)
def test_opcheck(shape: tuple[int, ...], device: torch.device) -> None:
    with virtual_ranks(1, device) as (comm,):
        x = torch.randn(shape, device=device)
        torch.library.opcheck(torch.ops.abiding.all_reduce.default, (x, comm._token, comm._handle))
        out = torch.zeros_like(x)
        torch.library.opcheck(torch.ops.abiding.all_reduce.out, (x, comm._token, comm._handle), {"out": out})


def test_fake_results_look_like_real_ones(device: torch.device) -> None:
    with virtual_ranks(1, device) as (comm,), FakeTensorMode() as mode:
        for case in (*REGULAR, *ODD):
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                x = case.make(1, device).messages[0].tensor
                real = torch.ops.abiding.all_reduce(x, comm._token, comm._handle)
            fake = torch.ops.abiding.all_reduce(mode.from_tensor(x), mode.from_tensor(comm._token), comm._handle)
            looks = [(out.shape, out.stride(), out.dtype, out.device, out.requires_grad) for out in (fake, real)]
            assert looks[0] == looks[1], str(case)


def test_inputs_may_require_gradients_and_results_do_not(device: torch.device) -> None:
    with virtual_ranks(2, device) as comms:
        x = torch.ones(5, device=device, requires_grad=True)
        for out in on_each(comms, lambda _, comm: comm.all_reduce(x)):
            assert not out.requires_grad
        with virtual_ranks(1, device) as (alone,):
            assert not alone.all_reduce(x).requires_grad


def test_inference_mode(device: torch.device) -> None:
    with virtual_ranks(2, device) as comms:

        def call(rank: int, comm: Communicator) -> torch.Tensor:
            with torch.inference_mode():
                return comm.all_reduce(torch.full((5,), rank + 1.0, device=device))

        for out in on_each(comms, call):
            assert_bitwise_equal(out.clone(), torch.full((5,), 3.0))


# --- routes -----------------------------------------------------------------------------------------------------------


def test_choose_route() -> None:
    usual: dict[str, Any] = {
        "ranks": 4,
        "nbytes": 64,
        "dtype": torch.bfloat16,
        "dense": True,
        "max_bytes": 64,
        "unavailable": None,
    }
    assert choose_route(**usual).backend == "abiding"
    for change, backend, reason in (
        ({"ranks": 1}, "copy", "one rank"),
        ({"ranks": 1, "unavailable": "no kernels", "dtype": torch.int8}, "copy", "one rank"),
        ({"unavailable": "the moon"}, "torch.distributed", "the moon"),
        ({"nbytes": 65}, "torch.distributed", "max_bytes"),
        ({"nbytes": 0}, "abiding", "dense"),
        ({"dtype": torch.float32}, "abiding", "dense"),
        ({"dtype": torch.float16}, "abiding", "dense"),
        ({"dtype": torch.float64}, "torch.distributed", "dtype"),
        ({"dtype": torch.float8_e4m3fn}, "torch.distributed", "dtype"),
        ({"dense": False}, "torch.distributed", "gaps or overlaps"),
    ):
        route = choose_route(**(usual | change))
        assert route.backend == backend
        assert reason in route.reason


def test_is_dense_agrees_with_the_addresses_of_all_elements() -> None:
    base = torch.arange(120).reshape(2, 3, 4, 5)
    views = [base.permute(order) for order in itertools.permutations(range(4))]
    views += [view[:, 1:] for view in views] + [view[..., :1] for view in views] + [view[1] for view in views]
    views += [base[:0], base[None].expand(2, -1, -1, -1, -1), base[:1].expand(3, -1, -1, -1), base[0, 0, 0, ::2]]
    views += [torch.empty(()), base.as_strided((3, 4), (3, 1)), base.as_strided((2, 2), (1, 1))]
    for view in views:
        offsets = view.as_strided(view.shape, view.stride()).storage_offset() + sum(
            (torch.arange(size) * stride).reshape(-1, *[1] * (view.dim() - dim - 1))
            for dim, (size, stride) in enumerate(zip(view.shape, view.stride(), strict=True))
        )
        offsets = torch.as_tensor(offsets).expand(view.shape).flatten()
        expected = not view.numel() or bool((offsets.sort().values - offsets.min() == torch.arange(view.numel())).all())
        assert is_dense(view.shape, view.stride()) == expected, (view.shape, view.stride())


def test_ctas_of_ranks_on_one_gpu_are_co_resident() -> None:
    # A CTA of 1024 threads may occupy a whole SM; an H100 or H200 has 132.
    assert [ctas_per_rank(ranks) for ranks in (1, 2, 4, 8, 16)] == [128, 64, 32, 16, 8]
    assert all(ctas_per_rank(ranks) * ranks <= 132 for ranks in range(2, 17))


def test_one_rank_needs_no_group(device: torch.device) -> None:
    with Communicator(device=device) as comm:
        assert (comm.rank, comm.ranks, comm.state) == (0, 1, "ready")
        for x in (torch.arange(5), torch.randn(3, 4)[:, ::2], torch.ones(3, dtype=torch.float8_e4m3fn)):
            x = x.to(device)
            assert comm.explain(x) == Route("copy", "the group has one rank")
            assert_bitwise_equal(comm.all_reduce(x), x)
            out = torch.zeros_like(x)
            assert comm.all_reduce(x, out) is out
            assert_bitwise_equal(out, x)
            assert comm.all_reduce(x, x) is x
        comm.check()
        comm.reset()
    assert Communicator().device.type == ("cuda" if abiding.has_cuda_kernels() else "cpu")


# --- the host barrier -------------------------------------------------------------------------------------------------


@pytest.fixture
def barriers() -> list[HostBarrier]:
    table = torch.zeros(HostBarrier.BYTES // 8, dtype=torch.int64)
    made = [HostBarrier(table.data_ptr(), rank, [os.getpid()] * 3) for rank in range(3)]
    made[0].table = table  # type: ignore[attr-defined]  # keeps it alive
    return made


def test_barrier_completes_at_the_largest_number(barriers: list[HostBarrier]) -> None:
    """Also after waits that have timed out, whose ranks bring larger numbers."""
    with pytest.raises(RuntimeError, match=r"ranks 1, 2 are missing after 0\.01 s"):
        barriers[0].wait(Step.STOPPED, 1, 0.01)
    with pytest.raises(RuntimeError, match="rank 2 is missing"):
        barriers[1].wait(Step.STOPPED, 1, 0.01)
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda r=r, n=n: numbers.append(barriers[r].wait(Step.STOPPED, n, 20)))
        for r, n in enumerate((2, 2, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers == [2, 2, 2]


def test_a_rank_that_timed_out_has_not_arrived(barriers: list[HostBarrier]) -> None:
    for rank in (0, 1):
        with pytest.raises(RuntimeError, match="missing"):
            barriers[rank].wait(Step.CLEARED, 1, 0.01)
    with pytest.raises(RuntimeError, match="ranks 0, 1 are missing"):
        barriers[2].wait(Step.CLEARED, 1, 0.01)


def test_a_rank_whose_process_has_ended_is_named_at_once() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    while not has_ended(child.pid):
        pass
    table = torch.zeros(HostBarrier.BYTES // 8, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="rank 1 is gone"):
        HostBarrier(table.data_ptr(), 0, [os.getpid(), child.pid]).wait(Step.STOPPED, 1, 100)
    child.wait()
    assert has_ended(child.pid)
    assert not has_ended(os.getpid())


# --- driven by an engine ----------------------------------------------------------------------------------------------


def test_an_engines_class_may_drive_the_raw_operators(device: torch.device) -> None:
    """The calls of vLLM's CustomAllreduce in their order, including the registration of buffers."""
    ops, ranks, max_bytes = torch.ops.abiding_custom_ar, 2, 1 << 20
    allocate = ops.allocate_shared_buffer_and_handle if device.type == "cuda" else ops.allocate_shared_memory_and_handle
    meta = [allocate(ops.meta_size() + max_bytes) for _ in range(ranks)]
    staging = [allocate(max_bytes) for _ in range(ranks)]
    assert all(handle.dtype == torch.uint8 and handle.device.type == "cpu" for _, handle in meta + staging)
    rank_data = [torch.empty(8 << 20, dtype=torch.uint8, device=device) for _ in range(ranks)]
    handles = [ops.init_custom_ar([address for address, _ in meta], rank_data[r], r, True) for r in range(ranks)]
    for fa in handles:
        ops.register_buffer(fa, [address for address, _ in staging])
        ops.configure(fa, 10.0, 32)
        assert ops.fault(fa) == []
    xs = [torch.randn(1000, device=device).bfloat16() for _ in range(ranks)]
    outs = [torch.empty_like(x) for x in xs]

    class Rank(Communicator):
        def __init__(self, rank: int) -> None:
            self.rank, self.device = rank, device

    def call(rank: int, _: Any) -> None:
        ops.all_reduce(handles[rank], xs[rank], outs[rank], staging[rank][0], max_bytes)
        ops.all_reduce(handles[rank], outs[rank], outs[rank], 0, 0)

    on_each([Rank(r) for r in range(ranks)], call)
    expected = (xs[0].float() + xs[1].float()).bfloat16() * 2
    for fa, out in zip(handles, outs, strict=True):
        assert_bitwise_equal(out, expected)
        assert ops.get_graph_buffer_ipc_meta(fa) == ([], [])
        ops.register_graph_buffers(fa, [[], []], [[], []])
        ops.dispose(fa)
    for address, _ in meta + staging:
        ops.free_shared_buffer(address)


# --- GPU --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("count", [1000, 400_000])
def test_cuda_graph(ranks: int, count: int, cuda: torch.device) -> None:
    """One graph per rank with several calls, replayed on other messages, before and after a reset."""
    with virtual_ranks(ranks, cuda) as comms:
        case = AllReduceCase((count,))
        static = case.make(ranks, cuda)

        def call_twice(rank: int, comm: Communicator) -> Tensor:
            once = comm.all_reduce(static.messages[rank].tensor)
            static.outs[rank].tensor.copy_(once)
            return comm.all_reduce(once)

        replay_all, twice = captured_on_each(comms, call_twice)
        for seed in range(1, 6):
            fresh = case.make(ranks, cuda, seed)
            for old, new in zip(static.messages, fresh.messages, strict=True):
                old.tensor.copy_(new.tensor)
            replay_all()
            for comm, out, second in zip(comms, static.outs, twice, strict=True):
                comm.check()
                assert_bitwise_equal(out.tensor, fresh.expected, f"replay {seed}")
                assert_bitwise_equal(second, twice[0], f"replay {seed}, second call")
            if seed == 3:
                for comm in comms:
                    comm.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_many_calls(ranks: int, cuda: torch.device) -> None:
    """Back-to-back calls of changing sizes: none is lost or mixed up with the next."""
    with virtual_ranks(ranks, cuda) as comms:
        sizes = [8, 4096, 120_000, 1, 33_000, 512]
        messages = [
            [torch.full((size,), float(rank + i), device=cuda) for i, size in enumerate(sizes)] for rank in range(ranks)
        ]
        outs = [[torch.empty_like(x) for x in row] for row in messages]

        def call(size: int, rank: int, comm: Communicator) -> None:
            comm.all_reduce(messages[rank][size], outs[rank][size])

        for _ in range(20):
            calls_on_each(comms, [partial(call, size) for size in range(len(sizes))] * 20)
        for rank, comm in enumerate(comms):
            comm.check()
            for i, out in enumerate(outs[rank]):
                assert_bitwise_equal(out, torch.full_like(out, ranks * (ranks - 1) / 2 + ranks * i))


@pytest.mark.gpu
def test_a_rank_that_never_comes_stops_the_others(cuda: torch.device) -> None:
    with virtual_ranks(3, cuda, timeout_s=0.5) as comms:
        x = torch.ones(1000, device=cuda)
        out = torch.zeros_like(x)
        for comm in comms[:2]:
            with torch.cuda.stream(torch.cuda.Stream()):
                comm.all_reduce(x, out)
        for comm in comms[:2]:
            with pytest.raises(RuntimeError, match="all_reduce: this communicator has stopped: rank 2 did not send"):
                comm.check()
            assert comm.state == "stopped"
            with pytest.raises(RuntimeError, match="rank 2 did not send in time"):
                comm.all_reduce(x)
        assert bool(out.isnan().all())
        comms[2].all_reduce(x, out)
        with pytest.raises(RuntimeError, match="rank 2 did not send in time"):
            comms[2].check()
        assert bool(out.isnan().all())
        for comm in comms:
            comm.reset()
            assert comm.state == "ready"
        for out in on_each(comms, lambda _, comm: comm.all_reduce(x)):
            assert_bitwise_equal(out, torch.full_like(out, 3.0))


def test_check_reports_the_fault_of_another_rank_without_a_call(device: torch.device) -> None:
    with virtual_ranks(2, device, timeout_s=0.3) as comms:
        x = torch.ones(1000, device=device)
        comms[1].check()

        def call_and_check() -> None:
            comms[0].all_reduce(x)
            comms[0].check()

        with pytest.raises(RuntimeError, match="rank 1 did not send in time"):
            call_and_check()
        with pytest.raises(RuntimeError, match=r"rank 1 did not send in time \(found by rank 0\)"):
            comms[1].check()
        for comm in comms:
            comm.reset()
            comm.check()
        for out in on_each(comms, lambda _, comm: comm.all_reduce(x)):
            assert_bitwise_equal(out, torch.full_like(out, 2.0))


@pytest.mark.gpu
def test_concurrent_calls_on_two_streams_are_detected(cuda: torch.device) -> None:
    with virtual_ranks(2, cuda, timeout_s=2.0) as comms:
        x = torch.ones(1000, device=cuda)
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream()):
                comms[0].all_reduce(x)
        with pytest.raises(RuntimeError, match="this communicator has stopped"):
            comms[0].check()
        for comm in comms:
            comm.reset()
        for out in on_each(comms, lambda _, comm: comm.all_reduce(x)):
            assert_bitwise_equal(out, torch.full_like(out, 2.0))
