"""Several ranks on one machine: processes with a gloo group, or virtual ranks in this process; waits have timeouts.

A virtual rank is a communicator with a thread (CPU) or a stream (GPU) of its own. Virtual ranks exercise everything
of a kernel except what depends on several processes (memory handles) or several GPUs (NVLink).
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from abiding._peer_memory import PeerMemory, ctas_per_rank
from abiding.communicator import Communicator
from abiding.testing.timing import Timing

T = TypeVar("T")

# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The result of a rank's process, or the text of its error."""

    rank: int
    value: Any = None
    error: str | None = None


class RanksFailedError(AssertionError):
    """Some ranks raised, died or timed out; the message holds the errors of all of them."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = list(outcomes)
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        super().__init__("\n".join(f"rank {outcome.rank} of {len(outcomes)}: {outcome.error}" for outcome in failed))


def run_processes(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout_s: float = 60.0,
    may_die: Collection[int] = (),
    threads: int = 1,
) -> list[Any]:
    """Call ``function(rank, *args)`` in ``ranks`` new processes that form torch.distributed's default group, on gloo.

    Args:
        function: a top-level function; the processes import its module by name, or by its file if it is in no package.
        ranks: number of processes.
        args: picklable arguments.
        timeout_s: then the processes are killed, and those that have not ended count as failed.
        may_die: ranks whose death is not a failure; their result is None.
        threads: torch's intra-op threads per process.

    Returns:
        The result of each rank.

    Raises:
        RanksFailedError: at least one rank failed; holds the errors of all ranks.
    """
    # forkserver: a process that has imported torch once forks the ranks. A CUDA context does not survive a fork: spawn.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        of_tests = {"pytest"} & sys.modules.keys()  # what the modules of tests import would take longer than a fork
        context.set_forkserver_preload(["torch", "torch.distributed", "abiding.testing.ranks", *of_tests])
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        task = (function.__code__.co_filename, function.__module__, function.__qualname__, ranks, args)
        processes, results = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_rank_main, args=(sender, rank, folder, timeout_s, threads, *task), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            results.append(receiver)
        outcomes = [_outcome(rank, receiver, deadline) for rank, receiver in enumerate(results)]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()) if process.is_alive() else None)
            if process.is_alive():
                process.kill()
                process.join(10)  # with a timeout: a process may be stuck in the driver
    if any(outcome.error is not None and outcome.rank not in may_die for outcome in outcomes):
        raise RanksFailedError(outcomes)
    return [outcome.value for outcome in outcomes]


def _outcome(rank: int, receiver: Connection, deadline: float) -> Outcome:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return Outcome(rank, error="did not end in time")
    try:
        value, error = pickle.loads(receiver.recv_bytes())
    except EOFError:
        return Outcome(rank, error="died without a result")
    return Outcome(rank, value, error)


def _rank_main(
    sender: Connection,
    rank: int,
    folder: str,
    timeout_s: float,
    threads: int,
    file: str,
    module: str,
    name: str,
    ranks: int,
    args: tuple[Any, ...],
) -> None:
    """The main function of a rank's process."""
    try:
        torch.set_num_threads(threads)
        init_method, timeout = f"file://{folder}/store", timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", init_method, timeout, world_size=ranks, rank=rank)
        dist.barrier()  # while others still connect, one that ends at once would fail them
        function = getattr(_module(file, module), name)
        outcome = pickle.dumps((function(rank, *args), None))
    except BaseException:
        outcome = pickle.dumps((None, traceback.format_exc()))
    sender.send_bytes(outcome)
    sender.close()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _module(file: str, name: str) -> ModuleType:
    if name in sys.modules or Path(file).with_name("__init__.py").exists():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# --- virtual ranks ----------------------------------------------------------------------------------------------------


def prepare_for_virtual_ranks() -> None:
    """Set the CUDA environment variables that virtual ranks need, unless they are set; before the GPU is first used.

    Virtual ranks wait for each other inside their kernels. So each stream needs a hardware queue of its own, and all
    kernels must be loaded eagerly: lazy loading may wait until no kernel runs, which would deadlock.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


@contextlib.contextmanager
def virtual_ranks(
    ranks: int, device: torch.device | str = "cpu", *, max_bytes: int = 8 << 20, timeout_s: float = 10.0
) -> Iterator[list[Communicator]]:
    """Communicators of ``ranks`` virtual ranks on one device; see :func:`prepare_for_virtual_ranks`."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    memories = [PeerMemory(device, max_ctas=ctas_per_rank(ranks if device.type == "cuda" else 1)) for _ in range(ranks)]
    with contextlib.ExitStack() as stack:
        for memory in memories:
            memory.allocate()
            stack.callback(memory.release)
        for rank, memory in enumerate(memories):
            memory.init([each.own for each in memories], rank)
        if device.type == "cuda":
            stack.callback(torch.cuda.synchronize, device)
        yield [
            Communicator.of_peer_memory(memory, rank, ranks, max_bytes, timeout_s)
            for rank, memory in enumerate(memories)
        ]


def on_each(comms: Sequence[Communicator], call: Callable[[int, Communicator], T]) -> list[T]:
    """Run ``call(rank, communicator)`` for all virtual ranks concurrently: on threads, or on one stream per rank.

    Returns when all have finished, and then raises the error of the lowest rank if any failed.
    """
    return [result for (result,) in calls_on_each(comms, [call])]


def calls_on_each(comms: Sequence[Communicator], calls: Sequence[Callable[[int, Communicator], T]]) -> list[list[T]]:
    """Run ``call(rank, communicator)`` of all calls back to back, for all virtual ranks concurrently: on threads, or on
    one stream per rank.

    Returns the results of each rank when all have finished; raises as :func:`on_each`.
    """
    device = comms[0].device
    if device.type == "cpu":
        with ThreadPoolExecutor(len(comms)) as pool:
            ranks = [
                pool.submit(lambda rank, comm: [call(rank, comm) for call in calls], rank, comm)
                for rank, comm in enumerate(comms)
            ]
        return [future.result() for future in ranks]
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in comms]
    for stream in streams:
        _cache_memory(stream)
        stream.wait_stream(current)
    # The ranks take turns: a stream takes only so many unfinished launches, some tens under compute-sanitizer. Then the
    # host waits, and the calls of other ranks, for which the kernels wait, would never be queued.
    turn = 4
    results: list[list[T]] = [[] for _ in comms]
    for begin in range(0, len(calls), turn):
        for rank, (comm, stream) in enumerate(zip(comms, streams, strict=True)):
            with torch.cuda.stream(stream):
                results[rank] += [call(rank, comm) for call in calls[begin : begin + turn]]
    for stream in streams:
        current.wait_stream(stream)
    torch.cuda.synchronize(device)
    return results


def _cache_memory(stream: torch.cuda.Stream) -> None:
    """Have torch's allocator keep 96 MiB for a stream. Where an allocation waits for running kernels, as it does under
    compute-sanitizer, a rank that allocates while another one's kernel waits for it would never go on."""
    with torch.cuda.stream(stream):
        for size, count in ((1 << 20, 32), (64 << 20, 1)):  # small and large ones come from pools of their own
            _ = [torch.empty(size, dtype=torch.uint8, device=stream.device) for _ in range(count)]


def captured_on_each(
    comms: Sequence[Communicator], call: Callable[[int, Communicator], T]
) -> tuple[Callable[[], object], list[T]]:
    """Capture ``call(rank, communicator)`` in a CUDA graph per virtual rank.

    Returns a function that replays all graphs concurrently and synchronizes, and the results of the captured calls.
    """
    graphs, returned = [], []
    for rank, comm in enumerate(comms):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            returned.append(call(rank, comm))
        graphs.append(graph)
    return partial(on_each, comms, lambda rank, _: graphs[rank].replay()), returned


def virtual_ranks_us(ranks: int, call: Callable[[int], object], *, calls: int = 50, repetitions: int = 9) -> Timing:
    """Time `call(rank)` on the current CUDA device, one stream per rank, until all ranks have finished.

    The calls are queued behind a GPU sleep that is longer than the queueing, so the launch overhead of the host is not
    measured. A repetition is `calls` back-to-back calls of every rank.
    """
    streams = [torch.cuda.Stream() for _ in range(ranks)]
    current = torch.cuda.current_stream()
    samples = []
    for _ in range(repetitions + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000 + 150_000 * ranks * calls)
        start.record()
        for stream in streams:
            stream.wait_stream(current)
        for _ in range(calls):
            for rank, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    call(rank)
        for stream in streams:
            current.wait_stream(stream)
        stop.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(stop) * 1e3 / calls)
    return Timing.of(samples[2:])


def processes_us(call: Callable[[], object], *, calls: int = 20, repetitions: int = 15) -> list[float]:
    """Time a collective call in every process of the default group: microseconds per call, a sample per repetition."""
    samples = []
    for _ in range(repetitions + 2):
        dist.barrier()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter_ns() - start) / 1e3 / calls)
    return samples[2:]
