"""Low-latency all-reduce over peer memory, for the ranks of one host.

A :class:`Communicator` complements a ``torch.distributed`` group. Messages that its kernels support go through peer
memory (CUDA IPC between GPUs, shared memory between CPU processes); all others go through the group itself, behind the
same call. :meth:`Communicator.explain` tells which route a message takes, and why.

The sum is accumulated in float32 in rank order and rounded once, whatever the message size, so all ranks get the same
bits. No wait is unbounded: if a rank does not arrive within the timeout, every other rank raises an error with its
number.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import _api, _library
from abiding._fakes import register_fake, writes_in_place
from abiding._host_barrier import Step
from abiding._peer_memory import PeerMemory, connect

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_ops = torch.ops.abiding
_PUBLIC_NAMES = {"input": "x"}
_CLOSE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Route:
    """Which backend reduces a message, and why."""

    backend: Literal["abiding", "torch.distributed", "copy"]
    reason: str


# Constructed once: the host has a few microseconds per call.
_COPY = Route("copy", "the group has one rank")
_OTHER_DTYPE = Route("torch.distributed", "the dtype is none of float32, float16 and bfloat16")
_TOO_LARGE = Route("torch.distributed", "the message is larger than max_bytes")
_NOT_DENSE = Route("torch.distributed", "the tensor's memory has gaps or overlaps")
_ABIDING = Route("abiding", "the message is dense, of a dtype that is summed in float32, and within max_bytes")


def choose_route(
    *, ranks: int, nbytes: int, dtype: torch.dtype, dense: bool, max_bytes: int, unavailable: str | None
) -> Route:
    """Choose the route of a message. All inputs are the same on all ranks, so all ranks choose the same route.

    Args:
        ranks: world size of the group.
        nbytes, dtype: size and dtype of the message.
        dense: whether the message covers its memory without gaps or overlaps, in any order of strides.
        max_bytes: the communicator's limit.
        unavailable: why the ranks have no peer memory; None if they have.
    """
    if ranks == 1:
        return _COPY
    if unavailable is not None:
        return Route("torch.distributed", unavailable)
    if dtype not in DTYPES:
        return _OTHER_DTYPE
    if nbytes > max_bytes:
        return _TOO_LARGE
    return _ABIDING if dense else _NOT_DENSE


def is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether these sizes and strides cover their memory without gaps or overlaps, in any order of dimensions."""
    if 0 in sizes:
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


class Communicator:
    """The ranks of one host, connected by peer memory beside their ``torch.distributed`` group.

    Construction is collective: all ranks construct the communicator together. As with any collective, all ranks then
    make the same calls with the same sizes, dtypes and strides in the same order. A communicator works in CUDA graphs
    (a replay counts as a call), under ``torch.compile(fullgraph=True)`` and in inference mode. It serves one stream and
    one thread at a time; construct one per stream that overlaps with another.

    After a fault (a timeout, or two concurrent calls) every call raises a RuntimeError that names the operator and the
    rank, until all ranks have called :meth:`reset`. Captured graphs stay valid across a reset.

    Args:
        group: the ranks, at most 16 for peer memory. Default: the default group, or this process alone where
            ``torch.distributed`` is not initialized.
        device: the device of the messages. Default: the current CUDA device if the group has an NCCL backend, or if
            the group has one rank and CUDA kernels are available; otherwise the CPU.
        max_bytes: larger messages go through ``torch.distributed``. Must be the same on all ranks.
        timeout_s: how long a rank waits for another before the call is aborted with a fault.

    Raises:
        ValueError: an argument is out of range or differs between ranks, or this process is not in the group.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        max_bytes: int = 8 << 20,
        timeout_s: float = 300.0,
    ) -> None:
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        self.group = group
        self.rank = 0 if alone else dist.get_rank(group)
        self.ranks = 1 if alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("Communicator: this process is not in group; expected a group that it is a member of")
        self._start(_default_device(group, self.ranks) if device is None else device, max_bytes, timeout_s)
        self._set_peer_memory(*connect(group, self.rank, self.ranks, self.device, max_bytes))

    @classmethod
    def of_peer_memory(
        cls, memory: PeerMemory, rank: int, ranks: int, max_bytes: int, timeout_s: float
    ) -> Communicator:
        """The communicator of a virtual rank: one of several ranks in this process, without a group."""
        self = cls.__new__(cls)
        self.group, self.rank, self.ranks = None, rank, ranks
        self._start(memory.device, max_bytes, timeout_s)
        self._set_peer_memory(memory, None)
        return self

    def _start(self, device: torch.device | str, max_bytes: int, timeout_s: float) -> None:
        if max_bytes < 0:
            raise ValueError(f"Communicator: max_bytes is {max_bytes}; expected at least 0")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"Communicator: timeout_s is {timeout_s}; expected a positive number of seconds")
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"Communicator: device is {device}; expected cpu or cuda")
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device, self.max_bytes, self.timeout_s = device, max_bytes, timeout_s
        self._closed, self._resets = False, 0
        self._interrupted: str | None = None  # the error of a reset that not all ranks have finished

    def _set_peer_memory(self, memory: PeerMemory | None, unavailable: str | None) -> None:
        self._memory, self._unavailable = memory, unavailable
        self._handle = -1 if memory is None else memory.handle
        with torch.inference_mode(False):
            self._token = torch.zeros(1, dtype=torch.int32, device=self.device)
        if memory is not None:
            memory.configure(self.timeout_s)
            self._finalizer = weakref.finalize(self, memory.release)

    # --- all-reduce ---------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum ``x`` over all ranks; float32, float16 and bfloat16 accumulate in float32 in rank order, rounded once.

        Args:
            x: the message, of any size (also empty) and any alignment. A dense order of strides is preserved. Not
                modified unless ``out`` is x.
            out: the output, with the shape, strides and dtype of x; may be x itself. Default: a new tensor.

        Returns:
            ``out``, or a new tensor.

        Raises:
            RuntimeError: the communicator has stopped or is closed; the message names the operator and the rank.
            TypeError, ValueError: an argument's dtype, device or layout is not accepted.
        """
        route = self.explain(x)
        if route.backend == "abiding":
            if out is None:
                result: Tensor = self.run("all_reduce", _PUBLIC_NAMES, _ops.all_reduce.default, (x,))
                return result
            self.run("all_reduce", _PUBLIC_NAMES, _ops.all_reduce.out, (x,), out=out)
            return out
        self._check_open("all_reduce")
        for name, tensor in (("x", x), ("out", x if out is None else out)):
            _api.check_holds_its_values("all_reduce", name, tensor)
        if out is not None and (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"all_reduce: out is {out.dtype}{list(out.shape)} on {out.device}; "
                f"expected {x.dtype}{list(x.shape)} on {x.device} as x"
            )
        with torch.no_grad():
            if route.backend == "copy":
                return x.clone() if out is None else out.copy_(x)
            result = x.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(result, group=self.group)
            return result if out is None else out.copy_(result)

    def explain(self, tensor: Tensor) -> Route:
        """The route that :meth:`all_reduce` takes for this tensor, and why. :func:`choose_route` is the rule."""
        self.check_device("all_reduce", "x", tensor)
        return choose_route(
            ranks=self.ranks,
            nbytes=tensor.numel() * tensor.element_size(),
            dtype=tensor.dtype,
            dense=tensor.is_contiguous() or is_dense(tensor.shape, tensor.stride()),
            max_bytes=self.max_bytes,
            unavailable=self._unavailable,
        )

    @property
    def unavailable_reason(self) -> str | None:
        """Why the ranks have no peer memory, so that ``torch.distributed`` serves all calls; None if they have."""
        return self._unavailable

    def check_device(self, function: str, name: str, tensor: Tensor) -> None:
        """Raise unless ``tensor``, an argument of a public function, is a tensor on the communicator's device."""
        if _api.check_tensor(function, name, tensor).device != self.device:
            raise ValueError(f"{function}: {name} is on {tensor.device}; expected {self.device} as the communicator")

    def run(
        self,
        function: str,
        names: Mapping[str, str],
        op: torch._ops.OpOverload,
        tensors: Sequence[Tensor],
        *rest: object,
        **out: Tensor,
    ) -> Any:
        """Run a collective operator over the peer memory; used by the public modules of the operator groups.

        Args:
            function, names, op: as in :func:`abiding._api.call`.
            tensors: the operator's arguments before ``state`` and ``comm``.
            rest, out: its arguments after those.
        """
        if self._interrupted is not None:
            raise RuntimeError(self._interrupted)
        if torch.is_grad_enabled():
            tensors = [_without_grad(tensor) for tensor in tensors]
            out = {name: _without_grad(tensor) for name, tensor in out.items()}
        try:
            return op(*tensors, self._token, self._handle, *rest, **out)
        except RuntimeError as error:
            self._check_open(function)
            if fault := self.fault:
                raise RuntimeError(fault) from None
            raise _api.translated(error, function, names) from None

    # --- faults -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Literal["ready", "stopped", "closed"]:
        """``stopped`` after a fault, until :meth:`reset`. Does not wait for work that is still queued on the GPU."""
        return "closed" if self._closed else "ready" if self.fault is None else "stopped"

    @property
    def fault(self) -> str | None:
        """The text of the first fault, which names the operator and the rank; None if there was none."""
        return None if self._closed or self._memory is None else self._memory.fault() or self._interrupted

    def check(self) -> None:
        """Synchronize the device, which may take up to the timeout, and raise if any rank has reported a fault.

        An eager call raises by itself; the replay of a CUDA graph cannot.
        """
        self._check_open("check")
        self._synchronize()
        if self._memory is not None and (fault := self._memory.fault(look=True)):
            raise RuntimeError(fault)

    def reset(self) -> None:
        """Bring a stopped communicator back to ``ready``. Collective; harmless if there was no fault.

        Raises:
            RuntimeError: a rank did not arrive within the timeout; the message names it. The call can be repeated.
        """
        self._check_open("reset")
        if self._memory is None:
            return
        self._synchronize()
        self._resets += 1
        try:
            self._resets = self._memory.wait_at_barrier(Step.STOPPED, self._resets, self.timeout_s)
            self._memory.clear()
            self._interrupted = "abiding::reset: not all ranks have finished it; reset() on every rank again"
            self._memory.wait_at_barrier(Step.CLEARED, self._resets, self.timeout_s)
            self._interrupted = None
        except RuntimeError as error:
            raise RuntimeError(f"abiding::reset: {error}; expected all {self.ranks} ranks to call it") from None

    def close(self) -> None:
        """Free the peer memory once all ranks have called it, or after min(timeout_s, 10 s)."""
        if self._closed:
            return
        self._closed = True
        if self._memory is not None:
            with contextlib.suppress(RuntimeError):
                self._synchronize()
                self._memory.wait_at_barrier(Step.CLOSING, 1, min(self.timeout_s, _CLOSE_TIMEOUT_S))
            self._finalizer()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.ranks}, {self.device}, {self.state})"

    def _check_open(self, function: str) -> None:
        if self._closed:
            raise RuntimeError(f"abiding::{function}: communicator is closed; expected an open one")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _without_grad(tensor: Tensor) -> Tensor:
    """The tensor without autograd. torch.no_grad() would do too, but costs twice the rest of a call in this module."""
    return tensor.detach() if isinstance(tensor, Tensor) and tensor.requires_grad else tensor


def _default_device(group: dist.ProcessGroup | None, ranks: int) -> torch.device:
    has_nccl = ranks > 1 and "nccl" in dist.get_backend(group)
    on_gpu = has_nccl or (ranks == 1 and _library.has_cuda_kernels() and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


register_fake("all_reduce", lambda input, state, comm: torch.empty_like(input))
register_fake("all_reduce.out", writes_in_place)
