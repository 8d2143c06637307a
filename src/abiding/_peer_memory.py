"""The peer memory of a communicator: what each rank owns and maps, and how all ranks set it up together."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from abiding import _library
from abiding._host_barrier import MAX_RANKS, HostBarrier, Step

_raw = torch.ops.abiding_custom_ar


def refuse_to_copy(thing: object, protocol: SupportsIndex) -> NoReturn:
    """The ``__reduce_ex__``, which copies and pickles go through, of what belongs to one process."""
    name = type(thing).__name__
    raise TypeError(
        f"{name}: it belongs to one rank's process and cannot be copied, pickled or saved; "
        f"expected a {name} made in each process, and left out of what is copied or saved"
    )


class PeerMemory:
    """A rank's own workspace and its mappings of the other ranks' workspaces.

    :meth:`release` frees every part, however far the setup got. It belongs to the process that made it: in a fork,
    :meth:`release` gives back the fork's copies and tells nobody.
    """

    def __init__(self, device: torch.device, *, max_ctas: int = 128) -> None:
        self.device, self.max_ctas = device, max_ctas
        self.barrier: HostBarrier | None = None
        self.pid = os.getpid()
        self._allocated: list[tuple[int, Tensor]] = []  # the workspace, then the barrier's table; with their handles
        self._opened: list[int] = []
        self._handles: list[int] = []  # that of the communicator
        self._rank_data: Tensor | None = None

    __reduce_ex__ = refuse_to_copy

    @property
    def handle(self) -> int:
        """The communicator's handle; -1 before :meth:`init`."""
        return self._handles[0] if self._handles else -1

    @property
    def own(self) -> int:
        """The address of this rank's workspace."""
        return self._allocated[0][0]

    def allocate(self) -> bytes:
        """Allocate this rank's workspace; returns the memory handle by which the other ranks map it."""
        on_gpu = self.device.type == "cuda"
        op = _raw.allocate_shared_buffer_and_handle if on_gpu else _raw.allocate_shared_memory_and_handle
        with self.current_device():
            _keep(self._allocated, op, _raw.meta_size())
        return _bytes(self._allocated[-1][1])

    def allocate_barrier_table(self) -> bytes:
        """Allocate the table of the host barrier; returns its memory handle."""
        _keep(self._allocated, _raw.allocate_shared_memory_and_handle, HostBarrier.BYTES)
        return _bytes(self._allocated[-1][1])

    def open(self, handles: Sequence[bytes | None], barrier_table: bytes | None) -> tuple[list[int], int]:
        """Map the other ranks' memory; None stands for this rank's own.

        Returns:
            The addresses of all workspaces, and that of the barrier's table.
        """
        with self.current_device():
            addresses = [self.own if handle is None else self._open(handle) for handle in handles]
        return addresses, self._allocated[1][0] if barrier_table is None else self._open(barrier_table)

    def _open(self, handle: bytes) -> int:
        _keep(self._opened, _raw.open_mem_handle, _tensor(handle))
        return self._opened[-1]

    def init(
        self, addresses: Sequence[int], rank: int, barrier_table: int | None = None, pids: Sequence[int] = ()
    ) -> None:
        """Register the workspaces of all ranks as a communicator; the rest is given if every rank is a process."""
        with self.current_device():
            self._rank_data = torch.empty(0, dtype=torch.uint8, device=self.device)
            _keep(self._handles, _raw.init_custom_ar, list(addresses), self._rank_data, rank, True)
        if barrier_table is not None:
            self.barrier = HostBarrier(barrier_table, rank, pids)

    def configure(self, timeout_s: float) -> None:
        _raw.configure(self.handle, timeout_s, self.max_ctas)

    def send_probe(self) -> None:
        with self.current_device():
            _raw.probe_send(self.handle)

    def check_probes(self) -> None:
        """Raise unless the probe of every rank has arrived in this rank's workspace."""
        with self.current_device():
            missing = _raw.probe_missing(self.handle)
        if missing:
            raise RuntimeError(f"nothing has arrived from ranks {missing}")

    def fault(self, *, look: bool = False) -> str | None:
        """The text of the first fault. ``look`` also reads what other ranks reported, which synchronizes the GPU."""
        with self.current_device():
            text: str = _raw.fault_text(self.handle, look)
        return text or None

    def wait_at_barrier(self, step: Step, number: int, timeout_s: float) -> int:
        """:meth:`HostBarrier.wait`; returns at once for a single rank and for virtual ranks, which have no barrier."""
        return number if self.barrier is None else self.barrier.wait(step, number, timeout_s)

    def clear(self) -> None:
        with self.current_device():
            _raw.clear(self.handle)

    def announce_closed(self) -> None:
        """Tell ranks that wait for this one, in a call or at a barrier, that it has closed."""
        if self.barrier is not None:
            self.barrier.leave()
        with self.current_device():
            _raw.announce_closed(self.handle)

    def announce_interrupted(self) -> None:
        """Stop the communicator on all ranks, since this one was interrupted."""
        with self.current_device():
            _raw.announce_interrupted(self.handle)

    def release(self) -> None:
        """Unmap and free all memory."""
        is_fork = os.getpid() != self.pid
        if self.barrier is not None and not is_fork:
            self.barrier.leave()
        self.barrier = None
        with contextlib.nullcontext() if is_fork else self.current_device():
            while self._handles:
                _raw.dispose(self._handles.pop())
            while self._opened:
                _raw.close_mem_handle(self._opened.pop())
            while self._allocated:
                _raw.free_shared_buffer(self._allocated.pop()[0])

    def release_after_the_others(self, timeout_s: float) -> None:
        """Free all memory once no rank uses it: GPUs may fault on memory that its owner has freed."""
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.device)
            self.wait_at_barrier(Step.CLOSING, 1, timeout_s)
        self.release()

    def current_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


def _keep(kept: list[Any], op: Any, *arguments: Any) -> None:
    """Append what an operator returns to ``kept``.

    No instruction of Python's lies between the two, where Ctrl-C could lose memory that nobody owns yet.
    """
    kept.extend(map(op.default._op, *([argument] for argument in arguments)))


@contextlib.contextmanager
def own_tensors() -> Iterator[None]:
    """The library's own tensors are what it says: no default device, mode or inference mode of the caller's applies."""
    # In inference mode gloo refuses the tensors that carry objects.
    with torch.inference_mode(False), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class NoPeerMemoryError(Exception):
    """Why the ranks have no peer memory; raised on all ranks with the same text."""


def connect(
    memory: PeerMemory, group: dist.ProcessGroup | None, rank: int, ranks: int, max_bytes: int, timeout_s: float
) -> str | None:
    """Set up the peer memory of a group; collective. Returns None, or the reason why there is none.

    If the ranks' hosts, GPUs or kernels rule peer memory out, the reason says so. If nothing rules it out and a step
    fails all the same, rank 0 also warns. After any other error the caller releases the memory.
    """
    if ranks == 1:
        if reason := _lacking(memory.device):
            return reason
        memory.allocate()
        memory.init([memory.own], 0)
        memory.configure(timeout_s)
        return None
    steps = _CollectiveSteps(group, ranks)
    try:
        memory.max_ctas = _agree_on_max_ctas(steps, memory.device, max_bytes)
    except NoPeerMemoryError as error:
        return str(error)
    try:
        _set_up(steps, memory, rank, timeout_s)
    except NoPeerMemoryError as error:
        memory.release()
        reason = f"{error}, though nothing rules shared memory out"
        if rank == 0:
            warnings.warn(f"abiding.Communicator uses torch.distributed for all messages: {reason}", stacklevel=3)
        return reason
    return None


class _CollectiveSteps:
    """Steps that all ranks take together; afterwards each rank knows the outcome on every other one."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: int) -> None:
        self._group, self._ranks = group, ranks

    def gather(self, value: Any) -> list[Any]:
        """All-gather a Python object."""
        values: list[Any] = [None] * self._ranks
        dist.all_gather_object(values, value, group=self._group)
        return values

    def run(self, name: str, step: Callable[[], Any]) -> list[Any]:
        """Run a step on all ranks and gather the results; if it fails on one rank, all raise NoPeerMemoryError."""
        try:
            outcome: tuple[Any, str | None] = step(), None
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            outcome = None, str(error).partition("\n")[0] or type(error).__name__
        outcomes = self.gather(outcome)
        for rank, (_, complaint) in enumerate(outcomes):
            if complaint is not None:
                raise NoPeerMemoryError(f"rank {rank} failed to {name} ({complaint})")
        return [value for value, _ in outcomes]


def _agree_on_max_ctas(steps: _CollectiveSteps, device: torch.device, max_bytes: int) -> int:
    """Check that the ranks' hosts and devices allow peer memory; returns how many CTAs a kernel of a rank may have."""
    limits = steps.gather(max_bytes)
    if len(set(limits)) > 1:
        raise ValueError(f"Communicator: max_bytes is {limits} on the ranks; expected the same on all")
    mine = steps.run(
        "look up its host and device", lambda: (_host(), _identity(device), _lacking(device), _kind(device))
    )
    hosts, devices, lacking, kinds = zip(*mine, strict=True)
    if len(hosts) > MAX_RANKS:
        raise NoPeerMemoryError(f"the group has more than {MAX_RANKS} ranks")
    if len(set(hosts)) > 1:
        raise NoPeerMemoryError("the ranks are on several hosts")
    if any(lacking):
        raise NoPeerMemoryError(next(filter(None, lacking)))
    if len(set(kinds)) > 1:  # ranks must partition the work alike, and the partition depends on the GPU
        raise NoPeerMemoryError(f"the ranks are on devices of several kinds: {', '.join(sorted(set(kinds)))}")
    if device.type == "cpu":
        return ctas_per_rank(1)
    unreachable = steps.run(
        "look up its peers' GPUs",
        lambda: [other for other, uuid in enumerate(devices) if not _peer_connected(device, uuid)],
    )
    for one, others in enumerate(unreachable):
        if others:
            raise NoPeerMemoryError(f"the GPUs of ranks {one} and {others[0]} are not peer-connected")
    return ctas_per_rank(max(map(devices.count, devices)))


def _set_up(steps: _CollectiveSteps, memory: PeerMemory, rank: int, timeout_s: float) -> None:
    handles = steps.run("allocate shared memory", memory.allocate)
    tables = steps.run("allocate shared memory", memory.allocate_barrier_table if rank == 0 else bytes)
    theirs = [None if other == rank else handle for other, handle in enumerate(handles)]
    pids = steps.gather(memory.pid)
    table = None if rank == 0 else tables[0]
    mapped = steps.run("map its peers' memory", lambda: memory.open(theirs, table))[rank]

    def register() -> None:
        addresses, barrier_table = mapped
        memory.init(addresses, rank, barrier_table, pids)
        memory.configure(timeout_s)

    steps.run("register its peers' memory", register)
    steps.run("write to its peers' memory", memory.send_probe)
    steps.run("see its peers' writes", memory.check_probes)
    steps.run("clear its memory", memory.clear)


def ctas_per_rank(ranks_on_device: int) -> int:
    """How many CTAs a kernel may have. If ranks share a GPU, the CTAs of all of them must be co-resident."""
    return 128 // ranks_on_device


def _lacking(device: torch.device) -> str | None:
    return _library.cuda_unavailable_reason() if device.type == "cuda" else None


def _host() -> str:
    """An id of the running operating system: the same for all processes, also across containers."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def _kind(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def _peer_connected(device: torch.device, uuid: str) -> bool:
    """Whether the driver reports peer access. True for a GPU that is not visible to this process: the probe decides."""
    for index in range(torch.cuda.device_count()):
        if _identity(torch.device("cuda", index)) == uuid:
            return index == device.index or torch.cuda.can_device_access_peer(device, index)
    return True


def _bytes(handle: Tensor) -> bytes:
    return bytes(handle.tolist())


def _tensor(handle: bytes) -> Tensor:
    return torch.tensor(list(handle), dtype=torch.uint8)
