"""Several ranks on one machine: processes with a gloo group, or virtual ranks in this process; every wait ends.

A virtual rank is a communicator with a thread (CPU) or a stream (GPU) of its own. They show all that a kernel does
but what lies between processes and between GPUs.
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
    """How a rank's process ended: its result, or the text of its error."""

    rank: int
    value: Any = None
    error: str | None = None


class RanksFailedError(AssertionError):
    """Some ranks raised, died or did not end; the message has all of their errors."""

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
        function: one of a module's top level; it is found again by its file, so that test files need no package.
        ranks: how many processes.
        args: what can be pickled.
        timeout_s: after this long the processes are killed, and those that had not ended count as failed.
        may_die: ranks whose death is no failure; their result is None.
        threads: of torch, in each process.

    Returns:
        What each rank returned.

    Raises:
        RanksFailedError: with the errors of all ranks.
    """
    # A server that has imported everything once forks the ranks; with a GPU in use they start from nothing.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["torch", "torch.distributed", "abiding.testing.ranks"])
    deadline = time.monotonic() + timeout_s
    with tempfile.TemporaryDirectory() as folder:
        work = (function.__code__.co_filename, function.__module__, function.__qualname__, ranks, args)
        processes, results = [], []
        for rank in range(ranks):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(sender, rank, folder, timeout_s, threads, *work), daemon=True
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
                process.join(10)  # not for ever: a process may be stuck in a driver
    if any(outcome.error is not None and outcome.rank not in may_die for outcome in outcomes):
        raise RanksFailedError(outcomes)
    return [outcome.value for outcome in outcomes]


def _outcome(rank: int, receiver: Connection, deadline: float) -> Outcome:
    if not receiver.poll(max(0.0, deadline - time.monotonic())):
        return Outcome(rank, error="did not end in time")
    try:
        value, error = pickle.loads(receiver.recv_bytes())
    except EOFError:
        return Outcome(rank, error="died without a word")
    return Outcome(rank, value, error)


def _serve(
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
    """A rank's process."""
    try:
        torch.set_num_threads(threads)
        meeting_point, timeout = f"file://{folder}/store", timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", meeting_point, timeout, world_size=ranks, rank=rank)
        function = getattr(_module(file, module), name)
        answer = pickle.dumps((function(rank, *args), None))
    except BaseException:
        answer = pickle.dumps((None, traceback.format_exc()))
    sender.send_bytes(answer)
    sender.close()
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _module(file: str, name: str) -> ModuleType:
    if name in sys.modules or Path(file).is_relative_to(Path(__file__).parents[1]):
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
    """Ask CUDA for what virtual ranks need on a GPU, unless the environment says otherwise; before a GPU is first used.

    They wait for each other inside their kernels, so each stream has to have a hardware queue of its own, and all
    kernels are to be loaded from the start: to load one later waits until none runs.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")


@contextlib.contextmanager
def virtual_ranks(
    ranks: int, device: torch.device | str = "cpu", *, max_bytes: int = 8 << 20, timeout_s: float = 10.0
) -> Iterator[list[Communicator]]:
    """Communicators of ``ranks`` ranks that are all in this process, on one device; see
    :func:`prepare_for_virtual_ranks`."""
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
    """Make ``call(rank, communicator)`` for all virtual ranks at once: on threads, or queued on one stream a rank.

    Returns when all are done; an error of the lowest rank is raised then.
    """
    device = comms[0].device
    if device.type == "cpu":
        with ThreadPoolExecutor(len(comms)) as pool:
            calls = [pool.submit(call, rank, comm) for rank, comm in enumerate(comms)]
        return [future.result() for future in calls]
    current = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in comms]
    results = []
    for rank, (comm, stream) in enumerate(zip(comms, streams, strict=True)):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(call(rank, comm))
    for stream in streams:
        current.wait_stream(stream)
    torch.cuda.synchronize(device)
    return results


def captured_on_each(
    comms: Sequence[Communicator], call: Callable[[int, Communicator], T]
) -> tuple[Callable[[], object], list[T]]:
    """Capture ``call(rank, communicator)`` in a CUDA graph for each virtual rank: what replays all graphs at once and
    waits for them, and what the calls returned."""
    graphs, returned = [], []
    for rank, comm in enumerate(comms):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            returned.append(call(rank, comm))
        graphs.append(graph)
    return partial(on_each, comms, lambda rank, _: graphs[rank].replay()), returned


def virtual_ranks_us(ranks: int, call: Callable[[int], object], *, calls: int = 50, repetitions: int = 9) -> Timing:
    """Time `call(rank)` on the current CUDA device, one stream a rank, until all ranks are done.

    Calls are queued in turn behind a sleep that lasts longer than queueing them, so that the host's speed does not
    count. A repetition is `calls` calls of every rank without a pause.
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
    """Microseconds a call of a collective in every process of the default group: a sample a repetition."""
    samples = []
    for _ in range(repetitions + 2):
        dist.barrier()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter_ns() - start) / 1e3 / calls)
    return samples[2:]
