"""Times of the collectives between the ranks, and of the peers, L2-warm.

Each library runs in processes of its own, so that a peer that fails does not affect the others. The functions that take
a rank run in every process and return its times; of these the slowest rank's count.
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
from abiding.testing.cases.reduce_rms import RmsCase, RmsInputs, unfused_qk_norm
from abiding.testing.comparison import assert_close
from abiding.testing.timing import Roofline, Timing, graph_us
from benchmarks.groups.reduce_rms import Spacer
from benchmarks.multi_gpu.checks import RunConfig, rank_context, require_peer_memory
from benchmarks.peers.sglang import SGLang
from benchmarks.peers.vllm import VllmTable, copy_to_address

Times = dict[tuple[str, int], Timing]
"""Timings by mode ("eager" or "graph") and message size in bytes or number of tokens."""
MessageAndCall = tuple[Tensor, Callable[[], Tensor]]
"""A message, and a call that all-reduces it and returns the sum."""

LARGEST = 64 << 20
TOKENS = (1, 16, 64, 128, 256, 1024, 2048, 4096)
_VLLM_LARGEST = 8 << 20
_NODES, _REPETITIONS = 20, 11


def sizes(config: RunConfig, largest: int = LARGEST) -> list[int]:
    """Message sizes in bytes."""
    every = [1 << power for power in range(10, 27) if 1 << power <= largest]
    return [size for size in every if size <= 64 << 10][::3] if config.quick else every


def roofline(rank: int, config: RunConfig) -> Roofline | None:
    """The measured rates of rank 0's device."""
    with rank_context(rank, config, nccl=False) as (device, _):
        return Roofline.measure(device) if rank == 0 else None


def ours(rank: int, config: RunConfig) -> Times:
    """Abiding's kernels, also for messages above the default max_bytes."""
    with (
        rank_context(rank, config, nccl=False) as (device, group),
        Communicator(group, device=device, max_bytes=LARGEST, timeout_s=config.timeout_s) as comm,
    ):
        require_peer_memory(comm)
        times = _time_all_reduce(config, comm.ranks, sizes(config), partial(_of_communicator, comm))
        comm.check()
        return times


def _of_communicator(comm: Communicator, size: int) -> MessageAndCall:
    x = torch.empty(size // 2, dtype=torch.bfloat16, device=comm.device)
    return x, partial(comm.all_reduce, x)


# --- peers ------------------------------------------------------------------------------------------------------------


def torch_distributed(rank: int, config: RunConfig) -> Times:
    """The all-reduce of torch.distributed: NCCL, or gloo between CPU processes."""
    with rank_context(rank, config) as (device, group):
        memory = torch.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)
        # gloo runs on the host and cannot be captured.
        return _of_group(config, group, memory, graphs=group is not None)


def nccl_symmetric(rank: int, config: RunConfig) -> Times:
    """NCCL's all-reduce on messages in a registered symmetric-memory window."""
    with rank_context(rank, config) as (device, group):
        assert group is not None
        backend: Any = group._get_backend(device)
        dist.all_reduce(torch.zeros(1, device=device), group=group)  # creates NCCL's communicator, needed below
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            memory = torch.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)
        backend.register_mem_pool(pool, symm=True)
        times = _of_group(config, group, memory)
        torch.cuda.synchronize(device)
        backend.deregister_mem_pool(pool)
        return times


def _of_group(config: RunConfig, group: dist.ProcessGroup | None, memory: Tensor, *, graphs: bool = True) -> Times:
    def make(size: int) -> MessageAndCall:
        x = memory[: size // 2]

        def call() -> Tensor:
            dist.all_reduce(x, group=group)
            return x

        return x, call

    return _time_all_reduce(config, dist.get_world_size(), sizes(config), make, graphs=graphs)


def symmetric_memory(rank: int, config: RunConfig, name: str) -> Times:
    """An operator of `torch.ops.symm_mem` on messages in symmetric memory."""
    import torch.distributed._symmetric_memory as symmetric

    op = getattr(torch.ops.symm_mem, name)
    with rank_context(rank, config) as (device, group):
        assert group is not None
        memory = symmetric.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)
        symmetric.rendezvous(memory, group.group_name)

        def make(size: int) -> MessageAndCall:
            x = memory[: size // 2]
            return x, partial(op, x, "sum", group.group_name)

        return _time_all_reduce(config, dist.get_world_size(), sizes(config), make)


def vllm(rank: int, config: RunConfig) -> Times:
    """vLLM's kernel. In graphs its messages are in registered buffers. In eager calls, as in the engine, the operator
    first copies the message into a registered buffer."""
    assert config.peer is not None
    torch.ops.load_library(config.peer)
    ops: Any = torch.ops._C_custom_ar
    with rank_context(rank, config, nccl=False) as (device, _), ExitStack() as stack:
        signals = _vllm_shared(ops.meta_size() + _VLLM_LARGEST, rank, stack)
        buffers = _vllm_shared(_VLLM_LARGEST, rank, stack)
        arena = torch.empty(8 << 20, dtype=torch.uint8, device=device)
        handle = ops.init_custom_ar(signals, arena, rank, True)
        stack.callback(ops.dispose, handle)
        ops.register_buffer(handle, buffers)
        torch.cuda.synchronize(device)
        dist.barrier()

        def of_engine(size: int) -> MessageAndCall:
            x = torch.empty(size // 2, dtype=torch.bfloat16, device=device)

            def call() -> Tensor:
                out = torch.empty_like(x)
                ops.all_reduce(handle, x, out, buffers[rank], _VLLM_LARGEST)
                return out

            return x, call

        def make(size: int) -> MessageAndCall:
            out = torch.empty(size // 2, dtype=torch.bfloat16, device=device)
            x = copy_to_address(buffers[rank], torch.zeros_like(out))

            def call() -> Tensor:
                ops.all_reduce(handle, x, out, 0, 0)
                return out

            return x, call

        @contextmanager
        def capture() -> Iterator[None]:
            """Register the graph's buffers after capture, which the operator requires also for registered buffers."""
            yield
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, ops.get_graph_buffer_ipc_meta(handle))
            theirs, offsets = zip(*everyone, strict=True)
            ops.register_graph_buffers(handle, list(theirs), list(offsets))
            torch.cuda.synchronize(device)
            dist.barrier()

        some = sizes(config, _VLLM_LARGEST)
        times = _time_all_reduce(config, dist.get_world_size(), some, make, capture=capture, eager=of_engine)
        torch.cuda.synchronize(device)
        dist.barrier()
        return times


def _vllm_shared(size: int, rank: int, stack: ExitStack) -> list[int]:
    """Allocate IPC memory on every rank; returns the addresses of all ranks' memory in this process."""
    ops: Any = torch.ops._C_custom_ar
    address, handle = ops.allocate_shared_buffer_and_handle(size)
    stack.callback(ops.free_shared_buffer, address)
    handles: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(handles, handle.tolist())
    return [
        address if other == rank else ops.open_mem_handle(torch.tensor(theirs, dtype=torch.uint8))
        for other, theirs in enumerate(handles)
    ]


def sglang(rank: int, config: RunConfig) -> Times:
    """SGLang's kernels, as its own class chooses among them, for all message sizes that it accepts by default."""
    assert config.sglang is not None
    package = SGLang(Path(config.sglang))
    with rank_context(rank, config, nccl=False) as (device, _), package.communicator(device) as comm:
        # One allocation for all sizes: the other ranks map it, so it must stay allocated.
        memory = torch.empty(LARGEST // 2, dtype=torch.bfloat16, device=device)

        def make(size: int) -> MessageAndCall:
            x = memory[: size // 2]
            return x, partial(comm.custom_all_reduce, x)

        @contextmanager
        def capture() -> Iterator[None]:
            """Capture in the class's own context, which registers the graph's buffers when it ends."""
            with comm.capture():
                yield
            dist.barrier()

        some = [size for size in sizes(config) if comm.should_custom_ar(memory[: size // 2])]
        return _time_all_reduce(config, dist.get_world_size(), some, make, capture=capture)


# --- one-shot and two-shot --------------------------------------------------------------------------------------------


def algorithm(rank: int, config: RunConfig, name: str) -> Times:
    """One of our two algorithms, at every size around the crossover."""
    some = [size for power in range(14, 23) for size in (1 << power, 3 << power - 1)]
    with (
        rank_context(rank, config, nccl=False) as (device, group),
        Communicator(group, device=device, timeout_s=config.timeout_s) as comm,
    ):
        require_peer_memory(comm)
        assert comm._memory is not None
        limit = {"one-shot": LARGEST, "two-shot": 0}[name]
        torch.ops.abiding_custom_ar.configure(comm._memory.handle, comm.timeout_s, comm._memory.max_ctas, limit)
        times = _time_all_reduce(config, comm.ranks, some, partial(_of_communicator, comm))
        comm.check()
        return times


def one_shot_limit(one_shot: Sequence[tuple[int, float]], two_shot: Sequence[tuple[int, float]]) -> int | None:
    """The largest size for which to use one-shot, from (bytes, us) of both algorithms; None: use two-shot always.

    It minimizes the sum over all sizes of the chosen algorithm's time relative to the faster one's.
    """
    one, two = dict(one_shot), dict(two_shot)
    both = sorted(one.keys() & two.keys())

    def loss(limit: int) -> float:
        return sum((one[size] if size <= limit else two[size]) / min(one[size], two[size]) for size in both)

    best = min([0, *both], key=loss)
    return best or None


# --- qk_norm ----------------------------------------------------------------------------------------------------------


def qk_norm(rank: int, config: RunConfig) -> Times:
    """Abiding's QK norm."""
    with (
        rank_context(rank, config, nccl=False) as (device, group),
        Communicator(group, device=device, timeout_s=config.timeout_s) as comm,
    ):
        require_peer_memory(comm)
        times = _time_qk_norm(config, rank, device, lambda one: partial(one.run, reduce_rms, comm))
        comm.check()
        return times


def torch_qk_norm(rank: int, config: RunConfig) -> Times:
    """Torch's operators around the group's all-reduce of the sums of squares."""
    with rank_context(rank, config) as (device, group):
        world = dist.get_world_size()
        return _time_qk_norm(
            config, rank, device, lambda one: partial(unfused_qk_norm, one, world, group), graphs=group is not None
        )


def vllm_qk_norm(rank: int, config: RunConfig) -> Times:
    """vLLM's kernel over a workspace as its callers allocate it."""
    assert config.peer is not None
    torch.ops.load_library(config.peer)
    with rank_context(rank, config, nccl=False) as (device, _), ExitStack() as stack:
        empty = VllmTable.buffer(device)
        buffers = _vllm_shared(empty.nbytes, rank, stack)
        copy_to_address(buffers[rank], empty)
        table = VllmTable(buffers, device)
        torch.cuda.synchronize(device)
        dist.barrier()
        times = _time_qk_norm(config, rank, device, lambda one: partial(table.qk_norm, one, rank))
        torch.cuda.synchronize(device)
        dist.barrier()
        return times


def sglang_qk_norm(rank: int, config: RunConfig) -> Times:
    """SGLang's kernel, which works in place."""
    assert config.sglang is not None
    package = SGLang(Path(config.sglang))
    case = RmsCase.minimax_m2(1, dist.get_world_size())
    with (
        rank_context(rank, config, nccl=False) as (device, _),
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

        return _time_qk_norm(config, rank, device, norm)


def _time_qk_norm(
    config: RunConfig,
    rank: int,
    device: torch.device,
    norm: Callable[[RmsInputs], Callable[[], Sequence[Tensor]]],
    *,
    graphs: bool = True,
) -> Times:
    """Time a QK norm; `norm` creates a call from inputs, which returns Q and K.

    As in `benchmarks.reduce_rms`, every call follows a spacer kernel, whose time is subtracted.
    """
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

    points = TOKENS[:2] if config.quick else TOKENS
    times = _time(config, points, make, graphs=graphs)
    alone = _time(config, points[:1], lambda _: spacer, graphs=graphs)
    return {(mode, tokens): timing - alone[mode, points[0]] for (mode, tokens), timing in times.items()}


# --- timing -----------------------------------------------------------------------------------------------------------


def _time_all_reduce(
    config: RunConfig,
    ranks: int,
    some: Sequence[int],
    make: Callable[[int], MessageAndCall],
    *,
    graphs: bool = True,
    capture: Callable[[], AbstractContextManager[object]] = nullcontext,
    eager: Callable[[int], MessageAndCall] | None = None,
) -> Times:
    """Time an all-reduce.

    `make` creates the call to capture, in a context of `capture`; `eager`, by default `make`, creates the eager call.
    """

    def checked(of: Callable[[int], MessageAndCall]) -> Callable[[int], Callable[[], object]]:
        return lambda size: _checked(of(size), ranks)

    others = None if eager is None else checked(eager)
    return _time(config, some, checked(make), graphs=graphs, capture=capture, eager=others)


def _time(
    config: RunConfig,
    points: Sequence[int],
    make: Callable[[int], Callable[[], object]],
    *,
    graphs: bool,
    capture: Callable[[], AbstractContextManager[object]] = nullcontext,
    eager: Callable[[int], Callable[[], object]] | None = None,
) -> Times:
    """Time a call per point, eager and, if `graphs`, replayed; `make` returns calls whose result has been checked."""
    times: Times = {}
    for point in points:
        call = (eager or make)(point)
        times["eager", point] = Timing.of(list(_eager_us(call, config.device, 20 if point <= 1 << 20 else 5)))
        if config.device == "cuda" and graphs:
            call = make(point)
            dist.barrier()
            times["graph", point] = graph_us([call], replays=_REPETITIONS, nodes=_NODES, capture=capture)
    return times


def _checked(made: MessageAndCall, ranks: int) -> Callable[[], Tensor]:
    """Check the call on a message of ones; then set the message to zeros, which stay zeros if the call is in place."""
    x, call = made
    x.fill_(1)
    out = call()
    if not bool((out == ranks).all()):
        raise AssertionError(f"{x.nbytes} bytes of 1 from each of {ranks} ranks sum to {float(out[0])}")
    x.zero_()
    return call


def _eager_us(call: Callable[[], object], device: str, calls: int) -> Iterator[float]:
    """Microseconds per eager call, synchronized after all calls of a repetition."""
    for repetition in range(_REPETITIONS + 2):
        dist.barrier()
        start = time.perf_counter_ns()
        with torch.inference_mode():  # as in engines
            for _ in range(calls):
                call()
        if device == "cuda":
            torch.cuda.synchronize()
        if repetition >= 2:
            yield (time.perf_counter_ns() - start) / 1e3 / calls
