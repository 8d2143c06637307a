"""Many back-to-back calls of both collectives, whose results must match recorded (golden) bits.

A :class:`Stress` is one rank's part of a fixed sequence of calls, which all ranks derive from one seed. It launches the
kernels of the collectives and nothing else, so a CUDA graph of it has no copy nodes. Virtual ranks share the GPU's copy
engines, where one rank's copy could queue behind a copy of another rank that waits for this rank: a deadlock.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abiding import reduce_rms
from abiding.communicator import DTYPES, Communicator
from abiding.reference.all_reduce import sum_in_rank_order
from abiding.reference.reduce_rms import normalized
from abiding.testing.cases.reduce_rms import ULPS
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import POISON

Kind = Literal["new", "out", "in_place", "qk_norm", "rms_norm"]
TensorSpec = tuple[tuple[int, ...], torch.dtype, int]
"""A tensor's shape, its dtype, and its offset in elements from a 64-byte boundary."""

LARGEST = 300_001
_KINDS: tuple[Kind, ...] = ("new", "out", "out", "in_place", "qk_norm", "qk_norm", "rms_norm")
_COUNTS = (0, 1, 2, 7, 8, 64, 129, 1000, 1024, 4096, 5120, 8191, 20_000, 33_000, 120_000, LARGEST)


@dataclass(frozen=True)
class Call:
    """A call of the sequence. `shape` is that of the message or of the rows; `q` and `kv` are the widths of a norm."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    q: int = 0
    kv: int = 0

    @property
    def result_shapes(self) -> list[tuple[int, ...]]:
        """One shape per result tensor."""
        if self.kind == "qk_norm":
            return [(self.shape[0], self.q), (self.shape[0], self.kv)]
        return [self.shape]


def plan(calls: int, seed: int, largest: int = LARGEST) -> list[Call]:
    """A random mix of operators, sizes, dtypes and alignments; no message has more than `largest` elements."""
    rng = random.Random(seed)
    counts = [count for count in _COUNTS if count <= largest]
    made = []
    for _ in range(calls):
        kind, dtype, offset = rng.choice(_KINDS), rng.choice(DTYPES), rng.choice((0, 0, 0, 1, 3))
        if kind in ("qk_norm", "rms_norm"):
            tokens, q = rng.choice((0, 1, 1, 2, 5, 16, 33)), rng.choice((1, 33, 256, 1536))
            kv = rng.choice((1, 8, 40, 256)) if kind == "qk_norm" else 0
            made.append(Call(kind, (tokens, q + 2 * kv), dtype, offset, q, kv))
        else:
            made.append(Call(kind, (rng.choice(counts),), dtype, offset))
    return made


class Stress:
    """One rank's inputs and results, with several sets of inputs (variants) that take turns.

    The golden results of a variant are recorded once: :meth:`load`, :meth:`run`, :meth:`collect`,
    :meth:`record_golden`. After any later run, eager or replayed, :meth:`check` compares with them bit for bit.

    Args:
        rank, ranks: this rank, and the world size.
        device: the device of all tensors.
        calls: number of calls per run.
        seed: seed of the sequence, the same on all ranks.
        variants: number of input sets.
        largest: maximum number of elements of a message.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        device: torch.device,
        *,
        calls: int,
        seed: int = 0,
        variants: int = 3,
        largest: int = LARGEST,
    ) -> None:
        self.calls = plan(calls, seed, largest)
        self.variants = variants
        self._rank, self._ranks, self._seed = rank, ranks, seed
        self._inputs = _Arena([(call.shape, call.dtype, call.offset) for call in self.calls], device)
        self._weights = _Arena(
            [((width,), call.dtype, 0) for call in self.calls for width in (call.q, call.kv)], device
        )
        self._results = _Arena(
            [(shape, call.dtype, call.offset) for call in self.calls for shape in call.result_shapes], device
        )
        self._weights.fill(self._random(self._weights, variant=-1, rank=0))
        self._loads = []
        for variant in range(variants):
            self._inputs.fill(self._random(self._inputs, variant, rank))
            self._loads.append(self._inputs.memory.clone())
        self._golden: list[Tensor | None] = [None] * variants
        self._first = [0]  # index of each call's first result
        for call in self.calls:
            self._first.append(self._first[-1] + len(call.result_shapes))

    def load(self, variant: int) -> None:
        """Copy a variant's inputs to where the calls read them, and overwrite the results with a sentinel."""
        self._inputs.memory.copy_(self._loads[variant])
        self._results.memory.fill_(POISON)
        for index, call in enumerate(self.calls):
            if call.kind == "in_place":
                self._results.tensors[self._first[index]].copy_(self._inputs.tensors[index])

    def run(self, comm: Communicator, calls: Iterable[int] | None = None) -> dict[int, Tensor]:
        """Make all calls, or some, in order. Returns the newly allocated results by index, for :meth:`collect`."""
        returned = {}
        for index in range(len(self.calls)) if calls is None else calls:
            call, x, first = self.calls[index], self._inputs.tensors[index], self._first[index]
            wq, wk = self._weights.tensors[2 * index : 2 * index + 2]
            if call.kind == "new":
                returned[first] = comm.all_reduce(x)
            elif call.kind == "out":
                comm.all_reduce(x, self._results.tensors[first])
            elif call.kind == "in_place":
                comm.all_reduce(self._results.tensors[first], self._results.tensors[first])
            elif call.kind == "qk_norm":
                returned[first], returned[first + 1] = reduce_rms.qk_norm(x, wq, wk, comm)
            else:
                returned[first] = reduce_rms.rms_norm(x, wq, comm)
        return returned

    def collect(self, returned: dict[int, Tensor]) -> None:
        """Copy the tensors that a run has returned into the arena of its other results."""
        for index, result in returned.items():
            self._results.tensors[index].copy_(result)

    def record_golden(self, variant: int) -> None:
        """Compare a run's results with the reference (sums bit for bit) and record them as golden for the variant."""
        inputs = [self._random(self._inputs, variant, rank) for rank in range(self._ranks)]
        for index, call in enumerate(self.calls):
            xs = [of_rank[index] for of_rank in inputs]
            name = f"variant {variant}: call {index}, {call}"
            results = self._results.tensors[self._first[index] : self._first[index + 1]]
            if call.kind in ("new", "out", "in_place"):
                assert_bitwise_equal(results[0], sum_in_rank_order(xs), name)
                continue
            ends = (0, call.q, call.q + call.kv)
            for part, result in enumerate(results):
                columns = slice(ends[part], ends[part + 1])
                weight = self._weights.tensors[2 * index + part].cpu()
                rows = [x[:, columns] for x in xs]
                expected = normalized(rows[self._rank], weight, rows, eps=1e-6)
                assert_close(result, expected, ulps=ULPS[call.dtype], name=name)
        self._results.check_gaps(f"variant {variant}")
        self._golden[variant] = self._results.memory.clone()

    def check(self, variant: int, name: str = "run") -> None:
        """Raise AssertionError unless a run's results are bitwise the golden ones and nothing else was written."""
        golden = self._golden[variant]
        assert golden is not None, f"variant {variant} has no golden results"
        if torch.equal(self._results.memory, golden):
            return
        for index, call in enumerate(self.calls):
            for result in range(self._first[index], self._first[index + 1]):
                expected = self._results.view(result, golden)
                assert_bitwise_equal(self._results.tensors[result], expected, f"{name}: call {index}, {call}")
        self._results.check_gaps(name)

    def _random(self, arena: _Arena, variant: int, rank: int) -> list[Tensor]:
        """Random values for an arena's tensors, the same in every process."""
        rng = torch.Generator().manual_seed(1_000_003 * self._seed + 1009 * (variant + 1) + rank)
        values = torch.randn(sum(tensor.numel() for tensor in arena.tensors), generator=rng)
        parts = values.split([tensor.numel() for tensor in arena.tensors])
        return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, arena.tensors, strict=True)]


class _Arena:
    """Tensors in one allocation, separated by guard bytes that no kernel may write."""

    def __init__(self, specs: Sequence[TensorSpec], device: torch.device) -> None:
        self._layout, end = [], 64
        for shape, dtype, offset in specs:
            begin = -(-(end + 1) // 64) * 64 + offset * dtype.itemsize
            end = begin + torch.Size(shape).numel() * dtype.itemsize
            self._layout.append((slice(begin, end), shape, dtype))
        self.memory = torch.full((end + 64,), POISON, dtype=torch.uint8, device=device)
        self.tensors = [self.view(index, self.memory) for index in range(len(specs))]
        self._gaps = torch.ones(self.memory.shape, dtype=torch.bool, device=device)
        for span, *_ in self._layout:
            self._gaps[span] = False

    def view(self, index: int, memory: Tensor) -> Tensor:
        """The tensor of this index in ``memory``, the arena's own or a copy."""
        span, shape, dtype = self._layout[index]
        return memory[span].view(dtype).view(shape)

    def fill(self, values: Iterable[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def check_gaps(self, name: str) -> None:
        overwritten = self._gaps & (self.memory != POISON)
        if bool(overwritten.any()):
            raise AssertionError(f"{name}: {int(overwritten.sum())} bytes between the results were written")
