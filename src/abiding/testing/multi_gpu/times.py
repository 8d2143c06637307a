"""How long the collectives take between the ranks, and how long the peers take: one after another, in processes of
their own, so that a peer that fails takes nothing with it. Inputs stay in the caches from call to call.

The functions that take a rank run in every process and return its times; the slowest rank's count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import reduce_rms
from abiding.communicator import Communicator
from abiding.testing.benchmarks.all_reduce import at_address
from abiding.testing.benchmarks.reduce_rms import Spacer, VllmTable, plain
from abiding.testing.cases.reduce_rms import RmsCase, RmsInputs
from abiding.testing.comparison import assert_close
from abiding.testing.multi_gpu.checks import Setting, insist_on_shared_memory, joined
from abiding.testing.multi_gpu.sglang import SGLang
from abiding.testing.timing import Roofline, Timing, graph_us

Times = dict[tuple[str, int], Timing]
"""By "eager" or "graph" and bytes, or tokens."""
Made = tuple[Tensor, Callable[[], Tensor]]
"""A message, and a call that sums it up and returns the sum."""

LARGEST = 64 << 20
TOKENS = (1, 16, 64, 128, 256, 1024, 2048, 4096)
_VLLM_LARGEST = 8 << 20
_NODES, _REPETITIONS = 20, 11


def sizes(setting: Setting, largest: int = LARGEST) -> list[int]:
    """Of the messages, in bytes."""
    every = [1 << power for power in range(10, 27) if 1 << power <= largest]
    return [size for size in every if size <= 64 << 10][::3] if setting.quick else every


def roofline(rank: int, setting: Setting) -> Roofline | None:
    """What the device of rank 0 does on its own."""
    with joined(rank, setting, nccl=False) as (device, _):
        return Roofline.measure(device) if rank == 0 else None


def ours(rank: int, setting: Setting) -> Times:
    """Abiding's kernels, also for messages that a communicator leaves to torch.distributed unless told otherwise."""
    with (
        joined(rank, setting, nccl=False) as (device, group),
        Communicator(group, device=device, max_bytes=LARGEST, timeout_s=setting.timeout_s) as comm,
    ):
        insist_on_shared_memory(comm)
        times = _sums(setting, comm.ranks, sizes(setting), partial(_of_communicator, comm))
        comm.check()
        return times


def _of_communicator(comm: Communicator, size: int) -> Made:
    x = torch.empty(size // 2, dtype=torch.bfloat16, device=comm.device)
    return x, partial(comm.all_reduce, x)


# --- peers ------------------------------------------------------------------------------------------------------------


def torch_distributed(rank: int, setting: Setting) -> Times:
    """The group's own all-reduce: NCCL, or gloo between CPU processes."""
    with joined(rank, setting) as (device, group):
        memory = torch.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)
        # Gloo's goes through the host, which no graph can hold.
        return _of_group(setting, group, memory, graphs=group is not None)


def nccl_symmetric(rank: int, setting: Setting) -> Times:
    """NCCL's all-reduce, its messages in memory that is registered with it as symmetric."""
    with joined(rank, setting) as (device, group):
        assert group is not None
        backend: Any = group._get_backend(device)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # makes NCCL's communicator, which has to exist
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            memory = torch.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)
        backend.register_mem_pool(pool, symm=True)
        times = _of_group(setting, group, memory)
        torch.cuda.synchronize(device)
        backend.deregister_mem_pool(pool)
        return times


def _of_group(setting: Setting, group: dist.ProcessGroup | None, memory: Tensor, *, graphs: bool = True) -> Times:
    def make(size: int) -> Made:
        x = memory[: size // 2]

        def call() -> Tensor:
            dist.all_reduce(x, group=group)
            return x

        return x, call

    return _sums(setting, dist.get_world_size(), sizes(setting), make, graphs=graphs)


def symmetric_memory(rank: int, setting: Setting, name: str) -> Times:
    """An operator of `torch.ops.symm_mem`, its messages in symmetric memory."""
    import torch.distributed._symmetric_memory as symmetric

    op = getattr(torch.ops.symm_mem, name)
    with joined(rank, setting) as (device, group):
        assert group is not None
        memory = symmetric.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(memory, group.group_name)

        def make(size: int) -> Made:
            x = memory[: size // 2]
            return x, partial(op, x, "sum", group.group_name)

        return _sums(setting, dist.get_world_size(), sizes(setting), make)


def vllm(rank: int, setting: Setting) -> Times:
    """vLLM's kernel. In graphs its messages lie in memory that it calls registered. In an eager call, as its engine
    makes them, the operator copies the message there first."""
    assert setting.peer is not None
    torch.ops.load_library(setting.peer)
    ops: Any = torch.ops._C_custom_ar
    with joined(rank, setting, nccl=False) as (device, _), ExitStack() as stack:
        signals = _vllm_shared(ops.meta_size() + _VLLM_LARGEST, rank, stack)
        buffers = _vllm_shared(_VLLM_LARGEST, rank, stack)
        arena = torch.empty(8 << 20, dtype=torch.uint8, device=device)
        handle = ops.init_custom_ar(signals, arena, rank, True)
        stack.callback(ops.dispose, handle)
        ops.register_buffer(handle, buffers)
        torch.cuda.synchronize(device)
        dist.barrier()

        def of_engine(size: int) -> Made:
            x = torch.empty(size // 2, dtype=torch.bfloat16, device=device)

            def call() -> Tensor:
                out = torch.empty_like(x)
                ops.all_reduce(handle, x, out, buffers[rank], _VLLM_LARGEST)
                return out

            return x, call

        def make(size: int) -> Made:
            out = torch.empty(size // 2, dtype=torch.bfloat16, device=device)
            x = at_address(buffers[rank], torch.zeros_like(out))

            def call() -> Tensor:
                ops.all_reduce(handle, x, out, 0, 0)
                return out

            return x, call

        @contextmanager
        def capture() -> Iterator[None]:
            """Gives a graph its peers' addresses: a capture leaves them open, also those of registered buffers."""
            yield
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, ops.get_graph_buffer_ipc_meta(handle))
            theirs, offsets = zip(*everyone, strict=True)
            ops.register_graph_buffers(handle, list(theirs), list(offsets))
            torch.cuda.synchronize(device)
            dist.barrier()

        some = sizes(setting, _VLLM_LARGEST)
        times = _sums(setting, dist.get_world_size(), some, make, capture=capture, eager=of_engine)
        torch.cuda.synchronize(device)
        dist.barrier()
        return times


def _vllm_shared(size: int, rank: int, stack: ExitStack) -> list[int]:
    """Memory of every rank, as addresses here."""
    ops: Any = torch.ops._C_custom_ar
    address, handle = ops.allocate_shared_buffer_and_handle(size)
    stack.callback(ops.free_shared_buffer, address)
    handles: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(handles, handle.tolist())
    return [
        address if other == rank else ops.open_mem_handle(torch.tensor(theirs, dtype=torch.uint8))
        for other, theirs in enumerate(handles)
    ]


def sglang(rank: int, setting: Setting) -> Times:
    """SGLang's kernels, as its own class chooses among them, for all messages that it takes by default."""
    assert setting.sglang is not None
    package = SGLang(Path(setting.sglang))
    with joined(rank, setting, nccl=False) as (device, _), package.communicator(device) as comm:
        # One message for all sizes: the other ranks open its memory, which must not be freed in between.
        memory = torch.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)

        def make(size: int) -> Made:
            x = memory[: size // 2]
            return x, partial(comm.custom_all_reduce, x)

        @contextmanager
        def capture() -> Iterator[None]:
            """Gives a graph its peers' addresses, at the end of the class's own context."""
            with comm.capture():
                yield
            dist.barrier()

        some = [size for size in sizes(setting) if comm.should_custom_ar(memory[: size // 2])]
        return _sums(setting, dist.get_world_size(), some, make, capture=capture)


# --- one-shot and two-shot --------------------------------------------------------------------------------------------


def algorithm(rank: int, setting: Setting, name: str) -> Times:
    """One of our two algorithms at every size around where they change places."""
    some = [size for power in range(14, 23) for size in (1 << power, 3 << power - 1)]
    with (
        joined(rank, setting, nccl=False) as (device, group),
        Communicator(group, device=device, timeout_s=setting.timeout_s) as comm,
    ):
        insist_on_shared_memory(comm)
        assert comm._memory is not None
        limit = {"one-shot": LARGEST, "two-shot": 0}[name]
        torch.ops.abiding_custom_ar.configure(comm._memory.handle, comm.timeout_s, comm._memory.max_ctas, limit)
        times = _sums(setting, comm.ranks, some, partial(_of_communicator, comm))
        comm.check()
        return times


def hand_over(one_shot: Sequence[tuple[int, float]], two_shot: Sequence[tuple[int, float]]) -> int | None:
    """The size up to which one-shot should go, from (bytes, us) of both: the one that costs least, where a size costs
    the time of its algorithm over that of the faster one. None where two-shot is better from the start."""
    one, two = dict(one_shot), dict(two_shot)
    both = sorted(one.keys() & two.keys())

    def loss(limit: int) -> float:
        return sum((one[size] if size <= limit else two[size]) / min(one[size], two[size]) for size in both)

    best = min([0, *both], key=loss)
    return best or None


# --- qk_norm ----------------------------------------------------------------------------------------------------------


def qk_norm(rank: int, setting: Setting) -> Times:
    """Abiding's kernel."""
    with (
        joined(rank, setting, nccl=False) as (device, group),
        Communicator(group, device=device, timeout_s=setting.timeout_s) as comm,
    ):
        insist_on_shared_memory(comm)
        times = _norms(setting, rank, device, lambda one: partial(one.run, reduce_rms, comm))
        comm.check()
        return times


def plain_qk_norm(rank: int, setting: Setting) -> Times:
    """Torch's operators around the group's all-reduce of the sums of squares."""
    with joined(rank, setting) as (device, group):
        world = dist.get_world_size()
        return _norms(setting, rank, device, lambda one: partial(plain, one, world, group), graphs=group is not None)


def vllm_qk_norm(rank: int, setting: Setting) -> Times:
    """vLLM's kernel over a workspace as its callers make it."""
    assert setting.peer is not None
    torch.ops.load_library(setting.peer)
    with joined(rank, setting, nccl=False) as (device, _), ExitStack() as stack:
        empty = VllmTable.buffer(device)
        buffers = _vllm_shared(empty.nbytes, rank, stack)
        at_address(buffers[rank], empty)
        table = VllmTable(buffers, device)
        torch.cuda.synchronize(device)
        dist.barrier()
        times = _norms(setting, rank, device, lambda one: partial(table.qk_norm, one, rank))
        torch.cuda.synchronize(device)
        dist.barrier()
        return times


def sglang_qk_norm(rank: int, setting: Setting) -> Times:
    """SGLang's kernel, which writes over its inputs."""
    assert setting.sglang is not None
    package = SGLang(Path(setting.sglang))
    case = RmsCase.minimax_m2(1, dist.get_world_size())
    with (
        joined(rank, setting, nccl=False) as (device, _),
        package.norm_communicator(device, case, TOKENS[-1]) as comm,
    ):

        def norm(one: RmsInputs) -> Callable[[], Sequence[Tensor]]:
            q, k, _ = one.rows.clone().split([one.case.q, *[one.case.kv or 0] * 2], 1)
            assert one.wk is not None
            norm_in_place = partial(package.qk_norm, comm, q, k, one.wq, one.wk, one.case.eps)

            def call() -> Sequence[Tensor]:
                norm_in_place()
                return q, k

            return call

        return _norms(setting, rank, device, norm)


def _norms(
    setting: Setting,
    rank: int,
    device: torch.device,
    norm: Callable[[RmsInputs], Callable[[], Sequence[Tensor]]],
    *,
    graphs: bool = True,
) -> Times:
    """`norm` makes a call for some inputs, which returns Q and K. It is timed behind an ordinary kernel, as
    `benchmarks.reduce_rms` says, and without that one's time."""
    spacer = Spacer(device)

    def make(tokens: int) -> Callable[[], object]:
        ranks = dist.get_world_size()
        one = RmsCase.minimax_m2(tokens, ranks).make(ranks, device)[rank]
        call = norm(one)
        spacer()
        for out, expected in zip(call(), one.expected(), strict=True):
            assert_close(out, expected, ulps=2, name=f"{tokens} tokens")

        def both() -> None:
            spacer()
            call()

        return both

    points = TOKENS[:2] if setting.quick else TOKENS
    times = _measure(setting, points, make, graphs=graphs)
    alone = _measure(setting, points[:1], lambda _: spacer, graphs=graphs)
    return {(mode, tokens): timing - alone[mode, points[0]] for (mode, tokens), timing in times.items()}


# --- timing -----------------------------------------------------------------------------------------------------------


def _sums(
    setting: Setting,
    ranks: int,
    some: Sequence[int],
    make: Callable[[int], Made],
    *,
    graphs: bool = True,
    capture: Callable[[], AbstractContextManager[object]] = nullcontext,
    eager: Callable[[int], Made] | None = None,
) -> Times:
    """`make` makes the calls in graphs, each captured within a context of `capture`, and, unless `eager` does, those
    without."""

    def checked(of: Callable[[int], Made]) -> Callable[[int], Callable[[], object]]:
        return lambda size: _checked(of(size), ranks)

    others = None if eager is None else checked(eager)
    return _measure(setting, some, checked(make), graphs=graphs, capture=capture, eager=others)


def _measure(
    setting: Setting,
    points: Sequence[int],
    make: Callable[[int], Callable[[], object]],
    *,
    graphs: bool,
    capture: Callable[[], AbstractContextManager[object]] = nullcontext,
    eager: Callable[[int], Callable[[], object]] | None = None,
) -> Times:
    """Of calls for each point, which have been checked when they are made."""
    times: Times = {}
    for point in points:
        call = (eager or make)(point)
        times["eager", point] = Timing.of(list(_eager_us(call, setting.device, 20 if point <= 1 << 20 else 5)))
        if setting.device == "cuda" and graphs:
            call = make(point)
            dist.barrier()
            times["graph", point] = graph_us([call], replays=_REPETITIONS, nodes=_NODES, capture=capture)
    return times


def _checked(made: Made, ranks: int) -> Callable[[], Tensor]:
    """The call, once it has summed ones up. Its message is zeros from then on, which stay zeros in place."""
    x, call = made
    x.fill_(1)
    out = call()
    if not bool((out == ranks).all()):
        raise AssertionError(f"{x.nbytes} bytes of 1 from each of {ranks} ranks sum to {float(out[0])}")
    x.zero_()
    return call


def _eager_us(call: Callable[[], object], device: str, calls: int) -> Iterator[float]:
    """Microseconds a call that the host makes, until the device is done with all of them."""
    for repetition in range(_REPETITIONS + 2):
        dist.barrier()
        start = time.perf_counter_ns()
        with torch.inference_mode():  # as engines call
            for _ in range(calls):
                call()
        if device == "cuda":
            torch.cuda.synchronize()
        if repetition >= 2:
            yield (time.perf_counter_ns() - start) / 1e3 / calls
