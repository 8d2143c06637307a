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
from abiding._meeting import MAX_RANKS, Meeting, Step

_raw = torch.ops.abiding_custom_ar


@dataclass
class Link:
    """What a rank holds of the shared memory. Every part is given back by :meth:`release`, however far it got."""

    device: torch.device
    handle: int = -1
    own: int = 0
    opened: list[int] = field(default_factory=list)
    table: int = 0
    table_is_own: bool = False
    meeting: Meeting | None = None
    max_blocks: int = 128
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
        self.table, handle = _raw.allocate_shared_memory_and_handle(Meeting.BYTES)
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
            self.meeting = Meeting(self.table, rank, pids)

    def configure(self, timeout_s: float) -> None:
        _raw.configure(self.handle, timeout_s, self.max_blocks)

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
            text: str = _raw.fault_text(self.handle, look)
        return text or None

    def meet(self, step: Step, number: int, timeout_s: float) -> int:
        """As :meth:`Meeting.meet`; a rank alone, or several in one process, have nobody to wait for."""
        return number if self.meeting is None else self.meeting.meet(step, number, timeout_s)

    def clear(self) -> None:
        with self.current():
            _raw.clear(self.handle)

    def release(self) -> None:
        """Unmap and free everything."""
        self.meeting = None
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


class NoLinkError(Exception):
    """Why there is no shared memory; raised on all ranks with the same text."""


def connect(
    group: dist.ProcessGroup | None, rank: int, ranks: int, device: torch.device, max_bytes: int
) -> tuple[Link | None, str | None]:
    """Build the shared memory of a group, all ranks together: a link, or why there is none.

    Where the ranks' hosts, GPUs or kernels rule it out, that is said by the reason alone. Where the driver promises
    peer access and a step fails all the same, rank 0 also warns.
    """
    link = Link(device)
    if ranks == 1:
        if reason := _lacking(device):
            return None, reason
        link.allocate()
        link.init([link.own], 0)
        return link, None
    together = _Together(group, ranks)
    try:
        link.max_blocks = _agree_on_places(together, device, max_bytes)
    except NoLinkError as error:
        return None, str(error)
    try:
        _build(together, link, rank)
    except NoLinkError as error:
        link.release()
        surprise = f"{error}, though nothing rules shared memory out"
        if rank == 0:
            warnings.warn(f"abiding.Communicator uses torch.distributed for all messages: {surprise}", stacklevel=3)
        return None, surprise
    return link, None


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
        """Every rank's result of a step; NoLinkError on all where it fails on one."""
        try:
            outcome: tuple[Any, str | None] = step(), None
        except (RuntimeError, OSError) as error:
            outcome = None, str(error).partition("\n")[0]
        outcomes = self.gather(outcome)
        for rank, (_, complaint) in enumerate(outcomes):
            if complaint is not None:
                raise NoLinkError(f"rank {rank} failed to {name} ({complaint})")
        return [value for value, _ in outcomes]


def _agree_on_places(together: _Together, device: torch.device, max_bytes: int) -> int:
    """Whether the ranks' hosts and devices allow shared memory; returns how many thread blocks a kernel may have."""
    mine = _host(), _identity(device), _lacking(device), _kind(device), max_bytes
    hosts, devices, lacking, kinds, limits = zip(*together.gather(mine), strict=True)
    if len(set(limits)) > 1:
        raise ValueError(f"Communicator: max_bytes is {list(limits)} on the ranks; expected the same on all")
    if len(hosts) > MAX_RANKS:
        raise NoLinkError(f"the group has more than {MAX_RANKS} ranks")
    if len(set(hosts)) > 1:
        raise NoLinkError("the ranks are on several hosts")
    if any(lacking):
        raise NoLinkError(next(filter(None, lacking)))
    if len(set(kinds)) > 1:  # kernels share out their work by what the GPU has
        raise NoLinkError(f"the ranks are on devices of several kinds: {', '.join(sorted(set(kinds)))}")
    if device.type == "cpu":
        return blocks_of_a_rank(1)
    strangers = [other for other, uuid in enumerate(devices) if not _peer_connected(device, uuid)]
    for one, others in enumerate(together.gather(strangers)):
        if others:
            raise NoLinkError(f"the GPUs of ranks {one} and {others[0]} are not peer-connected")
    return blocks_of_a_rank(max(map(devices.count, devices)))


def _build(together: _Together, link: Link, rank: int) -> None:
    handles = together.take("make shared memory", link.allocate)
    tables = together.take("make shared memory", link.allocate_table if rank == 0 else bytes)
    theirs = [None if other == rank else handle for other, handle in enumerate(handles)]
    pids = together.gather(os.getpid())
    addresses: list[int] = []
    table = None if rank == 0 else tables[0]
    together.take("open its peers' memory", lambda: addresses.extend(link.open(theirs, table)))
    together.take("register its peers' memory", lambda: link.init(addresses, rank, pids))
    together.take("write to its peers' memory", link.send_probe)
    together.take("see its peers' writes", link.check_probes)
    together.take("clear its memory", link.clear)


def blocks_of_a_rank(ranks_on_device: int) -> int:
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
