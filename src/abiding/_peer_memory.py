"""The peer memory of a communicator: what each rank owns and maps, and how all ranks set it up together."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import _library
from abiding._host_barrier import MAX_RANKS, HostBarrier, Step

_raw = torch.ops.abiding_custom_ar


@dataclass
class PeerMemory:
    """A rank's own workspace and its mappings of the other ranks' workspaces.

    :meth:`release` frees every part, however far the setup got.
    """

    device: torch.device
    handle: int = -1
    own: int = 0
    opened: list[int] = field(default_factory=list)
    barrier_table: int = 0
    owns_barrier_table: bool = False
    barrier: HostBarrier | None = None
    max_ctas: int = 128
    rank_data: Tensor | None = None

    def allocate(self) -> bytes:
        """Allocate this rank's workspace; returns the memory handle by which the other ranks map it."""
        size = _raw.meta_size()
        with self.current_device():
            if self.device.type == "cuda":
                self.own, handle = _raw.allocate_shared_buffer_and_handle(size)
            else:
                self.own, handle = _raw.allocate_shared_memory_and_handle(size)
        return _bytes(handle)

    def allocate_barrier_table(self) -> bytes:
        """Allocate the table of the host barrier; returns its memory handle."""
        self.barrier_table, handle = _raw.allocate_shared_memory_and_handle(HostBarrier.BYTES)
        self.owns_barrier_table = True
        return _bytes(handle)

    def open(self, handles: Sequence[bytes | None], barrier_table: bytes | None) -> list[int]:
        """Map the other ranks' memory (None stands for this rank's own); returns the addresses of all workspaces."""
        if barrier_table is not None:
            self.barrier_table = _raw.open_mem_handle(_tensor(barrier_table))
        addresses = []
        with self.current_device():
            for handle in handles:
                if handle is None:
                    addresses.append(self.own)
                else:
                    addresses.append(_raw.open_mem_handle(_tensor(handle)))
                    self.opened.append(addresses[-1])
        return addresses

    def init(self, addresses: Sequence[int], rank: int, pids: Sequence[int] = ()) -> None:
        """Register the workspaces of all ranks as a communicator; `pids` are given if every rank is a process."""
        with self.current_device(), torch.inference_mode(False):
            self.rank_data = torch.empty(0, dtype=torch.uint8, device=self.device)
            self.handle = _raw.init_custom_ar(list(addresses), self.rank_data, rank, True)
        if self.barrier_table:
            self.barrier = HostBarrier(self.barrier_table, rank, pids)

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

    def release(self) -> None:
        """Unmap and free all memory."""
        self.barrier = None
        with self.current_device():
            if self.handle != -1:
                _raw.dispose(self.handle)
            for address in self.opened:
                _raw.close_mem_handle(address)
            if self.own:
                _raw.free_shared_buffer(self.own)
        if self.barrier_table:
            (_raw.free_shared_buffer if self.owns_barrier_table else _raw.close_mem_handle)(self.barrier_table)
        self.handle, self.own, self.opened, self.barrier_table = -1, 0, [], 0

    def current_device(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


class NoPeerMemoryError(Exception):
    """Why the ranks have no peer memory; raised on all ranks with the same text."""


def connect(
    group: dist.ProcessGroup | None, rank: int, ranks: int, device: torch.device, max_bytes: int
) -> tuple[PeerMemory | None, str | None]:
    """Set up the peer memory of a group; collective. Returns it, or None and the reason why there is none.

    If the ranks' hosts, GPUs or kernels rule peer memory out, the reason says so. If nothing rules it out and a step
    fails all the same, rank 0 also warns.
    """
    memory = PeerMemory(device)
    if ranks == 1:
        if reason := _lacking(device):
            return None, reason
        memory.allocate()
        memory.init([memory.own], 0)
        return memory, None
    steps = _CollectiveSteps(group, ranks)
    try:
        memory.max_ctas = _agree_on_max_ctas(steps, device, max_bytes)
    except NoPeerMemoryError as error:
        return None, str(error)
    try:
        _set_up(steps, memory, rank)
    except NoPeerMemoryError as error:
        memory.release()
        reason = f"{error}, though nothing rules shared memory out"
        if rank == 0:
            warnings.warn(f"abiding.Communicator uses torch.distributed for all messages: {reason}", stacklevel=3)
        return None, reason
    return memory, None


class _CollectiveSteps:
    """Steps that all ranks take together; afterwards each rank knows the outcome on every other one."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: int) -> None:
        self._group, self._ranks = group, ranks

    def gather(self, value: Any) -> list[Any]:
        """All-gather a Python object."""
        values: list[Any] = [None] * self._ranks
        # In inference mode gloo refuses the tensors that carry the objects.
        with torch.inference_mode(False):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def run(self, name: str, step: Callable[[], Any]) -> list[Any]:
        """Run a step on all ranks and gather the results; if it fails on one rank, all raise NoPeerMemoryError."""
        try:
            outcome: tuple[Any, str | None] = step(), None
        except (RuntimeError, OSError) as error:
            outcome = None, str(error).partition("\n")[0]
        outcomes = self.gather(outcome)
        for rank, (_, complaint) in enumerate(outcomes):
            if complaint is not None:
                raise NoPeerMemoryError(f"rank {rank} failed to {name} ({complaint})")
        return [value for value, _ in outcomes]


def _agree_on_max_ctas(steps: _CollectiveSteps, device: torch.device, max_bytes: int) -> int:
    """Check that the ranks' hosts and devices allow peer memory; returns how many CTAs a kernel of a rank may have."""
    mine = _host(), _identity(device), _lacking(device), _kind(device), max_bytes
    hosts, devices, lacking, kinds, limits = zip(*steps.gather(mine), strict=True)
    if len(set(limits)) > 1:
        raise ValueError(f"Communicator: max_bytes is {list(limits)} on the ranks; expected the same on all")
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
    unreachable = [other for other, uuid in enumerate(devices) if not _peer_connected(device, uuid)]
    for one, others in enumerate(steps.gather(unreachable)):
        if others:
            raise NoPeerMemoryError(f"the GPUs of ranks {one} and {others[0]} are not peer-connected")
    return ctas_per_rank(max(map(devices.count, devices)))


def _set_up(steps: _CollectiveSteps, memory: PeerMemory, rank: int) -> None:
    handles = steps.run("allocate shared memory", memory.allocate)
    tables = steps.run("allocate shared memory", memory.allocate_barrier_table if rank == 0 else bytes)
    theirs = [None if other == rank else handle for other, handle in enumerate(handles)]
    pids = steps.gather(os.getpid())
    addresses: list[int] = []
    barrier_table = None if rank == 0 else tables[0]
    steps.run("map its peers' memory", lambda: addresses.extend(memory.open(theirs, barrier_table)))
    steps.run("register its peers' memory", lambda: memory.init(addresses, rank, pids))
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
