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
import numbers
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import _api, _library
from abiding._fakes import register_fake, writes_in_place
from abiding._host_barrier import Step
from abiding._peer_memory import PeerMemory, connect, own_tensors, refuse_to_copy

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_ALL_REDUCE, _ALL_REDUCE_OUT = torch.ops.abiding.all_reduce.default, torch.ops.abiding.all_reduce.out
_ANNOUNCE_CALL = torch.ops.abiding_custom_ar.announce_call.default
_PUBLIC_NAMES = {"input": "x"}
_CLOSE_TIMEOUT_S = 10.0
_CALL_BYTES = 128  # of the name of a call and its sizes
_MAX_TIMEOUT_S = 1e9  # of the operator configure()


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

    If the ranks' calls differ in operator, dtype or size, every rank gets an error that names both; on a GPU the
    results are NaN, and the next call or :meth:`check` raises. After a fault (that, a timeout, or two concurrent calls)
    every call raises a RuntimeError that names the operator and the rank, until all ranks have called :meth:`reset`.
    Captured graphs stay valid across a reset.

    Between GPUs, calls that go through ``torch.distributed`` on any rank are not compared: that they are equal is a
    precondition, as it is of NCCL. With ``ABIDING_CHECK_CALLS=1`` in the environment of any rank every call is compared
    on the host before it is made, slowly.

    A communicator belongs to the process that made it. In a fork every call raises, and closing it is local. Ctrl-C
    (any signal's handler that raises) ends a wait within about a second, and stops the communicator on all ranks.
    A rank that closes, or leaves ``with`` by an exception, ends the waits of the others: "rank 0 has closed".

    Args:
        group: the ranks, at most 16 for peer memory. Default: the default group, or this process alone where
            ``torch.distributed`` is not initialized.
        device: the device of the messages. Default: the current CUDA device if the group has an NCCL backend, or if
            the group has one rank and CUDA kernels are available; otherwise the CPU.
        max_bytes: larger messages go through ``torch.distributed``. Must be the same on all ranks, whose messages
            must all be larger or none.
        timeout_s: how long a rank waits for another before the call is aborted with a fault; seconds, or a timedelta.

    Raises:
        ValueError: an argument is out of range or differs between ranks, or this process is not in the group.
        TypeError: an argument is of another type; also later, if the communicator is copied, pickled or saved.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        device: torch.device | str | None = None,
        max_bytes: int = 8 << 20,
        timeout_s: float | timedelta = 300.0,
    ) -> None:
        alone = group is None and not (dist.is_available() and dist.is_initialized())
        _check_group(group)
        self.group = group
        self.rank = 0 if alone else dist.get_rank(group)
        self.ranks = 1 if alone else dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("Communicator: this process is not in group; expected a group that it is a member of")
        self._start(_default_device(group, self.ranks) if device is None else device, max_bytes, timeout_s)
        memory = PeerMemory(self.device)
        try:
            with own_tensors():
                unavailable = connect(memory, group, self.rank, self.ranks, self.max_bytes, self.timeout_s)
                self._checks_calls = self.ranks > 1 and _any_rank_checks_calls(group, self.ranks)
            self._set_peer_memory(memory if unavailable is None else None, unavailable)
        except BaseException:  # Ctrl-C, say, or a rank that died
            memory.release()
            raise

    @classmethod
    def of_peer_memory(
        cls, memory: PeerMemory, rank: int, ranks: int, max_bytes: int, timeout_s: float
    ) -> Communicator:
        """The communicator of a virtual rank: one of several ranks in this process, without a group."""
        self = cls.__new__(cls)
        self.group, self.rank, self.ranks = None, rank, ranks
        self._start(memory.device, max_bytes, timeout_s)
        memory.configure(self.timeout_s)
        self._set_peer_memory(memory, None)
        return self

    __reduce_ex__ = refuse_to_copy

    def _start(self, device: torch.device | str, max_bytes: int, timeout_s: float | timedelta) -> None:
        self.device = _checked_device(device)
        self.max_bytes, self.timeout_s = _checked_max_bytes(max_bytes), _checked_timeout_s(timeout_s)
        self._closed, self._resets, self._checks_calls = False, 0, False
        self._pid, self._forks = os.getpid(), _forks
        self._interrupted: str | None = None  # the error of a reset that not all ranks have finished

    def _set_peer_memory(self, memory: PeerMemory | None, unavailable: str | None) -> None:
        self._memory, self._unavailable = memory, unavailable
        self._handle = -1 if memory is None else memory.handle
        # Of a message whose call is made without another look; -1: none is.
        is_plain = memory is not None and self.ranks > 1 and not self._checks_calls
        self._most_bytes = self.max_bytes if is_plain else -1
        with own_tensors():
            self._token = torch.zeros(1, dtype=torch.int32, device=self.device)
        if memory is not None:
            self._finalizer = weakref.finalize(self, memory.release)

    # --- all-reduce ---------------------------------------------------------------------------------------------------

    def all_reduce(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum ``x`` over all ranks; float32, float16 and bfloat16 accumulate in float32 in rank order, rounded once.

        Args:
            x: the message, of any size (also empty) and any alignment. A dense order of strides is preserved, whichever
                route the message takes. Not modified unless ``out`` is x.
            out: the output, with the shape, strides and dtype of x, in memory of its own; may be x itself. If x's
                memory has gaps or overlaps, any strides without overlaps. Default: a new tensor.

        Returns:
            ``out``, or a new tensor.

        Raises:
            RuntimeError: the communicator has stopped or is closed; the message names the operator and the rank.
            TypeError, ValueError: an argument's dtype, device or layout is not accepted.
        """
        result: Tensor
        # The host has a microsecond or two: most calls are made here, and what they need is looked up once. The
        # operator looks at devices and strides itself.
        if (
            isinstance(x, Tensor)
            and x.numel() * x.itemsize <= self._most_bytes
            and x.dtype in DTYPES
            and x.is_contiguous()
            and not (x.requires_grad or getattr(out, "requires_grad", False) or self._interrupted)
        ):
            try:
                if out is None:
                    result = _ALL_REDUCE(x, self._token, self._handle)
                    return result
                _ALL_REDUCE_OUT(x, self._token, self._handle, out=out)
                return out
            except RuntimeError as error:
                self.check_device("all_reduce", "x", x)
                raise self._explained(error, "all_reduce", _PUBLIC_NAMES) from None
        route = self.explain(x)
        if route.backend == "abiding":
            if out is None:
                result = self.run("all_reduce", "x", _PUBLIC_NAMES, _ALL_REDUCE, (x,))
                return result
            self.run("all_reduce", "x", _PUBLIC_NAMES, _ALL_REDUCE_OUT, (x,), out=out)
            return out
        self.check_open("all_reduce")
        for name, tensor in (("x", x), ("out", x if out is None else out)):
            _api.check_holds_its_values("all_reduce", name, tensor)
        if out is not None:
            _check_out(x, out)
        with torch.no_grad():
            if route.backend == "copy":
                return x.clone() if out is None else out.copy_(x)
            self._announce(x)
            self.agree("all_reduce", _call_words(x) + ("" if self._unavailable else " through torch.distributed"))
            result = x.clone()
            # Backends want contiguous tensors; the order of the strides is the same on all ranks.
            flat = result if result.is_contiguous() else result.as_strided((result.numel(),), (1,))
            dist.all_reduce(flat, group=self.group)
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

    def _announce(self, x: Tensor) -> None:
        """Compare an all-reduce through ``torch.distributed`` with calls of ranks that wait for it at peer memory."""
        if self._memory is None or self.device.type != "cpu" or self._checks_calls or torch.compiler.is_compiling():
            return
        try:
            _ANNOUNCE_CALL(self._handle, x)
        except RuntimeError as error:
            raise self._explained(error, "all_reduce", _PUBLIC_NAMES) from None

    def agree(self, function: str, what: str) -> None:
        """Raise on every rank unless all ranks make this call through ``torch.distributed``.

        Peer memory compares the calls itself. NCCL does not, and a comparison on the host waits for the GPU: there only
        ABIDING_CHECK_CALLS=1 asks for it, and then of calls through peer memory too, before either route is taken.
        """
        if not (self._checks_calls or (self.ranks > 1 and self.device.type == "cpu")) or torch.compiler.is_compiling():
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        with own_tensors():
            calls = [""] * self.ranks
            if self._checks_calls:
                dist.all_gather_object(calls, f"{function} with {what}", group=self.group)
            else:  # the other makes two gathers, of pickles and their sizes
                text = f"{function} with {what}".encode()[:_CALL_BYTES].ljust(_CALL_BYTES)
                own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
                gathered = [torch.empty_like(own) for _ in calls]
                dist.all_gather(gathered, own, group=self.group)
                calls = [bytes(one.tolist()).decode().rstrip() for one in gathered]
        for rank, call in enumerate(calls):
            if call != calls[0]:
                raise RuntimeError(
                    f"abiding::{function}: rank {rank} called {call}, and rank 0 {calls[0]}; "
                    "expected the same call on every rank"
                )

    def check_device(self, function: str, name: str, tensor: Tensor) -> None:
        """Raise unless ``tensor``, an argument of a public function, is a tensor on the communicator's device."""
        if _api.check_tensor(function, name, tensor).device != self.device:
            raise ValueError(f"{function}: {name} is on {tensor.device}; expected {self.device} as the communicator")

    def run(
        self,
        function: str,
        first: str,
        names: Mapping[str, str],
        op: torch._ops.OpOverload,
        tensors: tuple[Tensor, ...],
        *rest: object,
        **out: Tensor,
    ) -> Any:
        """Run a collective operator over the peer memory; used by the public modules of the operator groups.

        Args:
            function, names, op: as in :func:`abiding._api.call`.
            first: the function's name of the first tensor, which must be on the communicator's device.
            tensors: the operator's arguments before ``state`` and ``comm``.
            rest, out: its arguments after those.
        """
        if self._interrupted is not None:
            raise RuntimeError(self._interrupted)
        for tensor in (*tensors, *out.values()):
            if getattr(tensor, "requires_grad", False):
                tensors = tuple(_without_grad(tensor) for tensor in tensors)
                out = {name: _without_grad(tensor) for name, tensor in out.items()}
                break
        if self._checks_calls and all(isinstance(tensor, Tensor) for tensor in tensors):
            self.check_open(function)
            self.agree(function, f"{_call_words(*tensors)} through peer memory")
        try:
            return op(*tensors, self._token, self._handle, *rest, **out)
        except RuntimeError as error:
            # Not before the call: the host has a microsecond or two, and the operator looks itself, in other words.
            self.check_device(function, first, tensors[0])
            raise self._explained(error, function, names) from None

    def _explained(self, error: RuntimeError, function: str, names: Mapping[str, str]) -> Exception:
        """What to raise for an operator's error; raises itself if the communicator is closed."""
        self.check_open(function)
        fault = self.fault
        return RuntimeError(fault) if fault else _api.translated(error, function, names)

    # --- faults -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> Literal["ready", "stopped", "closed"]:
        """``stopped`` after a fault, until :meth:`reset`; ``closed`` in a fork, too. Does not wait for the GPU."""
        if self._closed or self._is_fork():
            return "closed"
        return "ready" if self.fault is None else "stopped"

    @property
    def fault(self) -> str | None:
        """The text of the first fault, which names the operator and the rank; None if there was none."""
        if self._closed or self._memory is None or self._is_fork():
            return None
        return self._memory.fault() or self._interrupted

    def check(self) -> None:
        """Synchronize the device, which may take up to the timeout, and raise if any rank has reported a fault.

        An eager call raises by itself; the replay of a CUDA graph cannot.
        """
        self.check_open("check")
        self._synchronize()
        if self._memory is not None and (fault := self._memory.fault(look=True)):
            raise RuntimeError(fault)

    def reset(self) -> None:
        """Bring a stopped communicator back to ``ready``. Collective; harmless if there was no fault.

        Raises:
            RuntimeError: a rank did not arrive within twice the timeout, as long as two ranks' errors may lie apart, or
                has closed or ended; the message names it. The call can be repeated.
        """
        self.check_open("reset")
        if self._memory is None:
            return
        self._synchronize()
        self._resets += 1
        try:
            self._resets = self._memory.wait_at_barrier(Step.STOPPED, self._resets, 2 * self.timeout_s)
            self._memory.clear()
            self._interrupted = "abiding::reset: not all ranks have finished it; reset() on every rank again"
            self._memory.wait_at_barrier(Step.CLEARED, self._resets, self.timeout_s)
            self._interrupted = None
        except RuntimeError as error:
            # A rank that is late may come; one that has left will not.
            may_come = " missing after " in str(error)
            remedy = (
                f"all {self.ranks} ranks to call it" if may_come else "a new Communicator of the ranks that are left"
            )
            raise RuntimeError(f"abiding::reset: {error}; expected {remedy}") from None

    def close(self) -> None:
        """Free the peer memory once all ranks have called it, or after min(timeout_s, 10 s). In a fork: at once."""
        self._close(wait=True)

    def _close(self, *, wait: bool) -> None:
        if self._closed:
            return
        self._closed = True
        memory, limit = self._memory, min(self.timeout_s, _CLOSE_TIMEOUT_S)
        if memory is None:
            return
        if self._is_fork():
            self._finalizer()
        elif self.device.type == "cpu":
            try:
                memory.announce_closed()
                if wait:
                    with contextlib.suppress(RuntimeError):
                        memory.wait_at_barrier(Step.CLOSING, 1, limit)
            finally:
                self._finalizer()
        elif wait:
            self._finalizer.detach()
            memory.release_after_the_others(limit)
        else:
            self._finalizer.detach()
            with contextlib.suppress(RuntimeError):
                memory.announce_closed()
            threading.Thread(target=memory.release_after_the_others, args=(limit,), daemon=True).start()

    def __enter__(self) -> Communicator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close; without a wait for the other ranks if an exception leaves the block."""
        self._close(wait=kind is None)

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.ranks}, {self.device}, {self.state})"

    def check_open(self, function: str) -> None:
        """Raise unless the communicator is open, and was made in this process."""
        if self._closed:
            raise RuntimeError(f"abiding::{function}: communicator is closed; expected an open one")
        if self._is_fork():
            raise RuntimeError(
                f"abiding::{function}: communicator belongs to rank {self.rank}'s process {self._pid}, of which this "
                f"one, {os.getpid()}, is a fork; expected a Communicator that was made in this process"
            )

    def _is_fork(self) -> bool:
        return self._forks != _forks

    def _synchronize(self) -> None:
        if self.device.type == "cpu":
            return
        # In a thread of its own: Ctrl-C would not end the wait of this one. The kernels end when they are told.
        with ThreadPoolExecutor(1) as pool:
            finished = pool.submit(torch.cuda.synchronize, self.device)
            try:
                finished.result()
            except (KeyboardInterrupt, SystemExit):
                if self._memory is not None:
                    self._memory.announce_interrupted()
                raise


_forks = 0  # between this process and the one that imported this module; a compiled function can compare it


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_child=_count_fork)


def checked(function: str, comm: object) -> Communicator:
    """Return a public function's argument ``comm``; TypeError unless it is a Communicator."""
    if not isinstance(comm, Communicator):
        raise TypeError(f"{function}: comm is a {type(comm).__name__}; expected a Communicator")
    return comm


def _any_rank_checks_calls(group: dist.ProcessGroup | None, ranks: int) -> bool:
    """Whether ABIDING_CHECK_CALLS=1 on any rank: a comparison that only some ranks take part in would not end."""
    asked: list[Any] = [None] * ranks
    dist.all_gather_object(asked, os.environ.get("ABIDING_CHECK_CALLS") == "1", group=group)
    return any(asked)


def _call_words(*tensors: Tensor) -> str:
    """Such as "9 float32 elements" of a message, "[3, 8] and [8] float32" of rows and their weights."""
    dtype = str(tensors[0].dtype).removeprefix("torch.")
    if len(tensors) == 1:
        return f"{tensors[0].numel()} {dtype} elements"
    return f"{' and '.join(str(list(tensor.shape)) for tensor in tensors)} {dtype}"


def _check_out(x: Tensor, out: Tensor) -> None:
    """The checks of csrc/all_reduce/ops.h, in its words, for routes that do not come to the operator."""
    function = "all_reduce"
    if out.shape != x.shape:
        raise ValueError(f"{function}: out has shape {list(out.shape)}; expected {list(x.shape)} as x")
    _api.check_dtype(function, "out", out, [x.dtype], "x")
    _api.check_device(function, "out", out, x, "x")
    layout = f"{function}: out has shape {list(out.shape)} and strides {list(out.stride())}; expected "
    if not is_dense(x.shape, x.stride()):
        if _overlaps_itself(out):
            raise ValueError(layout + "memory without overlaps")
        return
    if not is_dense(out.shape, out.stride()):
        raise ValueError(layout + "memory without gaps or overlaps")
    if any(size > 1 and a != b for size, a, b in zip(x.shape, x.stride(), out.stride(), strict=True)):
        raise ValueError(f"{layout}{list(x.shape)} and {list(x.stride())} as x")
    if torch.compiler.is_compiling():  # addresses are not known yet
        return
    begin, end, bytes_ = x.data_ptr(), out.data_ptr(), x.numel() * x.element_size()
    if begin != end and abs(begin - end) < bytes_:
        raise ValueError(f"{function}: out overlaps x; expected memory of its own, or exactly that of x")


def _overlaps_itself(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return False
    span = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1
    ):
        if stride < span:
            return True
        span += stride * (size - 1)
    return False


def _check_group(group: object) -> None:
    if group is None or (
        dist.is_available() and (isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER)
    ):
        return
    raise TypeError(
        f"Communicator: group is a {type(group).__name__}; expected a torch.distributed.ProcessGroup, or None for the "
        "default group"
    )


def _checked_timeout_s(timeout_s: object) -> float:
    if isinstance(timeout_s, timedelta):
        timeout_s = timeout_s.total_seconds()
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, numbers.Real):
        raise TypeError(
            f"Communicator: timeout_s is a {type(timeout_s).__name__}; expected a number of seconds, or a timedelta"
        )
    seconds = float(timeout_s)
    if not 0 < seconds < _MAX_TIMEOUT_S:
        raise ValueError(
            f"Communicator: timeout_s is {seconds}; expected a positive number of seconds, less than {_MAX_TIMEOUT_S:g}"
        )
    return seconds


def _checked_max_bytes(max_bytes: object) -> int:
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, numbers.Integral):
        raise TypeError(
            f"Communicator: max_bytes is a {type(max_bytes).__name__}; expected a number of bytes, such as 8 << 20"
        )
    if max_bytes < 0:
        raise ValueError(f"Communicator: max_bytes is {max_bytes}; expected at least 0")
    return int(max_bytes)


def _checked_device(device: object) -> torch.device:
    try:
        found = torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        kind = ValueError if isinstance(device, (str, torch.device)) else TypeError
        raise kind(f"Communicator: device is {device}; expected cpu or cuda")
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = _library.cuda_unavailable_reason() or "torch sees no GPU"
        raise ValueError(f"Communicator: device is {found}; expected cpu, since {reason}")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"Communicator: device is {found}; expected one of {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def _without_grad(tensor: Tensor) -> Tensor:
    """The tensor without autograd. torch.no_grad() would do too, but costs twice the rest of a call in this module."""
    return tensor.detach() if isinstance(tensor, Tensor) and tensor.requires_grad else tensor


def _default_device(group: dist.ProcessGroup | None, ranks: int) -> torch.device:
    # Not the backend's name: that of a group that was made without one is "undefined".
    has_nccl = ranks > 1 and "cuda:nccl" in dist.get_backend_config(group).split(",")
    on_gpu = (has_nccl or (ranks == 1 and _library.has_cuda_kernels())) and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


register_fake("all_reduce", lambda input, state, comm: torch.empty_like(input))
register_fake("all_reduce.out", writes_in_place)
