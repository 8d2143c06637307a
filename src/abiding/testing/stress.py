"""Many calls of both collectives without a pause, their results held against bits that are known beforehand.

A :class:`Stress` is one rank's share of a fixed sequence of calls, which all ranks derive from one seed. It launches
the collectives' kernels and nothing else, so that a CUDA graph of it holds no copies: virtual ranks share the engine
that makes those, and there one rank's copy may stand in line behind another's that waits for this rank.
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
Place = tuple[tuple[int, ...], torch.dtype, int]
"""A tensor's shape, its dtype, and how many elements after a 64-byte boundary it starts."""

LARGEST = 300_001
_KINDS: tuple[Kind, ...] = ("new", "out", "out", "in_place", "qk_norm", "qk_norm", "rms_norm")
_COUNTS = (0, 1, 2, 7, 8, 64, 129, 1000, 1024, 4096, 5120, 8191, 20_000, 33_000, 120_000, LARGEST)


@dataclass(frozen=True)
class Call:
    """A call of the sequence; `shape` is the message's or the rows', `q` and `kv` are the columns of a norm."""

    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    q: int = 0
    kv: int = 0

    @property
    def results(self) -> list[tuple[int, ...]]:
        """Their shapes."""
        if self.kind == "qk_norm":
            return [(self.shape[0], self.q), (self.shape[0], self.kv)]
        return [self.shape]


def plan(calls: int, seed: int, largest: int = LARGEST) -> list[Call]:
    """A mix of operators, sizes, dtypes and alignments; no message has more than `largest` elements."""
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
    """One rank's inputs and results, with several sets of inputs, the variants, that take turns.

    Every variant is learnt once: :meth:`load`, :meth:`run`, :meth:`collect`, :meth:`learn`. From then on, after any
    run, eager or replayed, :meth:`check` accepts no other bits.

    Args:
        rank, ranks: whose share this is.
        device: where.
        calls: of a run.
        seed: the same on all ranks.
        variants: sets of inputs.
        largest: elements of a message at most.
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
            [(shape, call.dtype, call.offset) for call in self.calls for shape in call.results], device
        )
        self._weights.fill(self._random(self._weights, variant=-1, rank=0))
        self._loads = []
        for variant in range(variants):
            self._inputs.fill(self._random(self._inputs, variant, rank))
            self._loads.append(self._inputs.memory.clone())
        self._expected: list[Tensor | None] = [None] * variants
        self._first = [0]  # the place of each call's first result
        for call in self.calls:
            self._first.append(self._first[-1] + len(call.results))

    def load(self, variant: int) -> None:
        """Bring inputs to where the calls read them, and wipe the results."""
        self._inputs.memory.copy_(self._loads[variant])
        self._results.memory.fill_(POISON)
        for index, call in enumerate(self.calls):
            if call.kind == "in_place":
                self._results.tensors[self._first[index]].copy_(self._inputs.tensors[index])

    def run(self, comm: Communicator, calls: Iterable[int] | None = None) -> dict[int, Tensor]:
        """Make all calls, or some, in their order; what they return in memory of its own, for :meth:`collect`."""
        returned = {}
        for index in range(len(self.calls)) if calls is None else calls:
            call, x, place = self.calls[index], self._inputs.tensors[index], self._first[index]
            wq, wk = self._weights.tensors[2 * index : 2 * index + 2]
            if call.kind == "new":
                returned[place] = comm.all_reduce(x)
            elif call.kind == "out":
                comm.all_reduce(x, self._results.tensors[place])
            elif call.kind == "in_place":
                comm.all_reduce(self._results.tensors[place], self._results.tensors[place])
            elif call.kind == "qk_norm":
                returned[place], returned[place + 1] = reduce_rms.qk_norm(x, wq, wk, comm)
            else:
                returned[place] = reduce_rms.rms_norm(x, wq, comm)
        return returned

    def collect(self, returned: dict[int, Tensor]) -> None:
        """Put what a run has returned beside its other results."""
        for place, result in returned.items():
            self._results.tensors[place].copy_(result)

    def learn(self, variant: int) -> None:
        """Hold a run's results against the reference, sums bit for bit, and take its bits for the variant's."""
        shares = [self._random(self._inputs, variant, rank) for rank in range(self._ranks)]
        for index, call in enumerate(self.calls):
            xs = [share[index] for share in shares]
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
        self._expected[variant] = self._results.memory.clone()

    def check(self, variant: int, name: str = "run") -> None:
        """Raise AssertionError unless a run's results are the variant's, bit for bit, and nothing else was written."""
        expected = self._expected[variant]
        assert expected is not None, f"variant {variant} was not learnt"
        if torch.equal(self._results.memory, expected):
            return
        for index, call in enumerate(self.calls):
            for place in range(self._first[index], self._first[index + 1]):
                same = self._results.view(place, expected)
                assert_bitwise_equal(self._results.tensors[place], same, f"{name}: call {index}, {call}")
        self._results.check_gaps(name)

    def _random(self, arena: _Arena, variant: int, rank: int) -> list[Tensor]:
        """Values for an arena's tensors, the same in every process."""
        rng = torch.Generator().manual_seed(1_000_003 * self._seed + 1009 * (variant + 1) + rank)
        values = torch.randn(sum(tensor.numel() for tensor in arena.tensors), generator=rng)
        parts = values.split([tensor.numel() for tensor in arena.tensors])
        return [part.view(like.shape).to(like.dtype) for part, like in zip(parts, arena.tensors, strict=True)]


class _Arena:
    """Tensors in one piece of memory, with gaps between them that nothing may write."""

    def __init__(self, places: Sequence[Place], device: torch.device) -> None:
        self._places, end = [], 64
        for shape, dtype, offset in places:
            begin = -(-(end + 1) // 64) * 64 + offset * dtype.itemsize
            end = begin + torch.Size(shape).numel() * dtype.itemsize
            self._places.append((slice(begin, end), shape, dtype))
        self.memory = torch.full((end + 64,), POISON, dtype=torch.uint8, device=device)
        self.tensors = [self.view(place, self.memory) for place in range(len(places))]
        self._gaps = torch.ones(self.memory.shape, dtype=torch.bool, device=device)
        for where, *_ in self._places:
            self._gaps[where] = False

    def view(self, place: int, memory: Tensor) -> Tensor:
        """A place's tensor in a copy of the memory."""
        where, shape, dtype = self._places[place]
        return memory[where].view(dtype).view(shape)

    def fill(self, values: Iterable[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def check_gaps(self, name: str) -> None:
        harmed = self._gaps & (self.memory != POISON)
        if bool(harmed.any()):
            raise AssertionError(f"{name}: {int(harmed.sum())} bytes between the results were written")
