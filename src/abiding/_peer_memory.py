"""The memory that a communicator's ranks share: how they build it together, and what each of them holds of it."""

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

_FAULTS = {1: "did not send in time", 2: "made two calls at once", 3: "is gone"}
_OPS = ("all_reduce", "rms_norm", "qk_norm")


@dataclass
class PeerMemory:
    """What a rank holds of the shared memory. Every part is given back by :meth:`release`, however far it got."""

    device: torch.device
    handle: int = -1
    own: int = 0
    opened: list[int] = field(default_factory=list)
    table: int = 0
    table_is_own: bool = False
    barrier: HostBarrier | None = None
    max_ctas: int = 128
    rank_data: Tensor | None = None

    def allocate(self) -> bytes:
        """Make the own workspace; returns the handle by which others open it."""
        size = _raw.meta_size()
        with self.current():
            if self.device.type == "cuda":
                self.own, handle = _raw.allocate_shared_buffer_and_handle(size)
            else:
                self.own, handle = _raw.allocate_shared_memory_and_handle(size)
        return _bytes(handle)

    def allocate_table(self) -> bytes:
        """Make the table of the meeting; returns its handle."""
        self.table, handle = _raw.allocate_shared_memory_and_handle(HostBarrier.BYTES)
        self.table_is_own = True
        return _bytes(handle)

    def open(self, handles: Sequence[bytes | None], table: bytes | None) -> list[int]:
        """Map what others have made (None stands for the own one); returns all workspaces' addresses."""
        if table is not None:
            self.table = _raw.open_mem_handle(_tensor(table))
        addresses = []
        with self.current():
            for handle in handles:
                if handle is None:
                    addresses.append(self.own)
                else:
                    addresses.append(_raw.open_mem_handle(_tensor(handle)))
                    self.opened.append(addresses[-1])
        return addresses

    def init(self, addresses: Sequence[int], rank: int, pids: Sequence[int] = ()) -> None:
        """Register the workspaces of all ranks as a communicator; `pids` are those of ranks in other processes."""
        with self.current(), torch.inference_mode(False):
            self.rank_data = torch.empty(0, dtype=torch.uint8, device=self.device)
            self.handle = _raw.init_custom_ar(list(addresses), self.rank_data, rank, True)
        if self.table:
            self.barrier = HostBarrier(self.table, rank, pids)

    def configure(self, timeout_s: float) -> None:
        _raw.configure(self.handle, timeout_s, self.max_ctas)

    def send_probe(self) -> None:
        with self.current():
            _raw.probe_send(self.handle)

    def check_probes(self) -> None:
        """Raise unless what every rank wrote has arrived."""
        with self.current():
            missing = _raw.probe_missing(self.handle)
        if missing:
            raise RuntimeError(f"nothing has arrived from ranks {missing}")

    def fault(self, *, look: bool = False) -> str | None:
        """The first fault in words. ``look``: also for what other ranks found, which waits for a GPU's queued work."""
        with self.current():
            record = _raw.fault(self.handle, look)
        if not record:
            return None
        kind, op, epoch, _, rank, waited_ms, found_by = record
        told = op < 0
        where = "" if told else f" in epoch {epoch}, after {waited_ms / 1e3:g} s"
        return (
            f"abiding::{'check' if told else _OPS[op]}: this communicator has stopped: rank {rank} {_FAULTS[kind]} "
            f"(found by rank {found_by}{where}); reset() it on every rank"
        )

    def wait_at_barrier(self, step: Step, number: int, timeout_s: float) -> int:
        """As :meth:`HostBarrier.wait`; a rank alone, or several in one process, have nobody to wait for."""
        return number if self.barrier is None else self.barrier.wait(step, number, timeout_s)

    def clear(self) -> None:
        with self.current():
            _raw.clear(self.handle)

    def release(self) -> None:
        """Unmap and free everything."""
        self.barrier = None
        with self.current():
            if self.handle != -1:
                _raw.dispose(self.handle)
            for address in self.opened:
                _raw.close_mem_handle(address)
            if self.own:
                _raw.free_shared_buffer(self.own)
        if self.table:
            (_raw.free_shared_buffer if self.table_is_own else _raw.close_mem_handle)(self.table)
        self.handle, self.own, self.opened, self.table = -1, 0, [], 0

    def current(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()


class NoPeerMemoryError(Exception):
    """Why there is no shared memory; raised on all ranks with the same text."""


def connect(
    group: dist.ProcessGroup | None, rank: int, ranks: int, device: torch.device, max_bytes: int
) -> tuple[PeerMemory | None, str | None]:
    """Build the shared memory of a group, all ranks together: a memory, or why there is none.

    Where the ranks' hosts, GPUs or kernels rule it out, that is said by the reason alone. Where the driver promises
    peer access and a step fails all the same, rank 0 also warns.
    """
    memory = PeerMemory(device)
    if ranks == 1:
        if reason := _lacking(device):
            return None, reason
        memory.allocate()
        memory.init([memory.own], 0)
        return memory, None
    together = _Together(group, ranks)
    try:
        memory.max_ctas = _agree_on_places(together, device, max_bytes)
    except NoPeerMemoryError as error:
        return None, str(error)
    try:
        _build(together, memory, rank)
    except NoPeerMemoryError as error:
        memory.release()
        surprise = f"{error}, though nothing rules shared memory out"
        if rank == 0:
            warnings.warn(f"abiding.Communicator uses torch.distributed for all messages: {surprise}", stacklevel=3)
        return None, surprise
    return memory, None


class _Together:
    """Steps that all ranks take, each knowing afterwards how it went on the others."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: int) -> None:
        self._group, self._ranks = group, ranks

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value."""
        values: list[Any] = [None] * self._ranks
        # Under inference mode gloo refuses the tensors that carry the objects.
        with torch.inference_mode(False):
            dist.all_gather_object(values, value, group=self._group)
        return values

    def take(self, name: str, step: Callable[[], Any]) -> list[Any]:
        """Every rank's result of a step; NoPeerMemoryError on all where it fails on one."""
        try:
            outcome: tuple[Any, str | None] = step(), None
        except (RuntimeError, OSError) as error:
            outcome = None, str(error).partition("\n")[0]
        outcomes = self.gather(outcome)
        for rank, (_, complaint) in enumerate(outcomes):
            if complaint is not None:
                raise NoPeerMemoryError(f"rank {rank} failed to {name} ({complaint})")
        return [value for value, _ in outcomes]


def _agree_on_places(together: _Together, device: torch.device, max_bytes: int) -> int:
    """Whether the ranks' hosts and devices allow shared memory; returns how many thread blocks a kernel may have."""
    mine = _host(), _identity(device), _lacking(device), _kind(device), max_bytes
    hosts, devices, lacking, kinds, limits = zip(*together.gather(mine), strict=True)
    if len(set(limits)) > 1:
        raise ValueError(f"Communicator: max_bytes is {list(limits)} on the ranks; expected the same on all")
    if len(hosts) > MAX_RANKS:
        raise NoPeerMemoryError(f"the group has more than {MAX_RANKS} ranks")
    if len(set(hosts)) > 1:
        raise NoPeerMemoryError("the ranks are on several hosts")
    if any(lacking):
        raise NoPeerMemoryError(next(filter(None, lacking)))
    if len(set(kinds)) > 1:  # kernels share out their work by what the GPU has
        raise NoPeerMemoryError(f"the ranks are on devices of several kinds: {', '.join(sorted(set(kinds)))}")
    if device.type == "cpu":
        return ctas_per_rank(1)
    strangers = [other for other, uuid in enumerate(devices) if not _peer_connected(device, uuid)]
    for one, others in enumerate(together.gather(strangers)):
        if others:
            raise NoPeerMemoryError(f"the GPUs of ranks {one} and {others[0]} are not peer-connected")
    return ctas_per_rank(max(map(devices.count, devices)))


def _build(together: _Together, memory: PeerMemory, rank: int) -> None:
    handles = together.take("make shared memory", memory.allocate)
    tables = together.take("make shared memory", memory.allocate_table if rank == 0 else bytes)
    theirs = [None if other == rank else handle for other, handle in enumerate(handles)]
    pids = together.gather(os.getpid())
    addresses: list[int] = []
    table = None if rank == 0 else tables[0]
    together.take("open its peers' memory", lambda: addresses.extend(memory.open(theirs, table)))
    together.take("register its peers' memory", lambda: memory.init(addresses, rank, pids))
    together.take("write to its peers' memory", memory.send_probe)
    together.take("see its peers' writes", memory.check_probes)
    together.take("clear its memory", memory.clear)


def ctas_per_rank(ranks_on_device: int) -> int:
    """Thread blocks that a kernel may have. Where ranks share a GPU, the blocks of all of them must run at once."""
    return 128 // ranks_on_device


def _lacking(device: torch.device) -> str | None:
    return _library.cuda_unavailable_reason() if device.type == "cuda" else None


def _host() -> str:
    """The same for all processes of a running kernel, in containers too."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _identity(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def _kind(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def _peer_connected(device: torch.device, uuid: str) -> bool:
    """What the driver says of a GPU; one that this process cannot see is left to the probe."""
    for index in range(torch.cuda.device_count()):
        if _identity(torch.device("cuda", index)) == uuid:
            return index == device.index or torch.cuda.can_device_access_peer(device, index)
    return True


def _bytes(handle: Tensor) -> bytes:
    return bytes(handle.tolist())


def _tensor(handle: bytes) -> Tensor:
    return torch.tensor(list(handle), dtype=torch.uint8)
