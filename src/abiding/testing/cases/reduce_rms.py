"""Test cases of reduce_rms: `REGULAR[0].make(ranks=2)` creates every rank's rows and weights."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from abiding.reference.reduce_rms import normalized
from abiding.testing.cases import describe

ULPS = {torch.float32: 16, torch.float16: 1, torch.bfloat16: 1}
"""Tolerance in units in the last place. float32 results depend on float32 sums of up to 64 000 squares."""
Q_COLUMNS, K_COLUMNS = 6144, 1024
"""Widths of MiniMax M2, all ranks together."""
Values = Literal["normal", "zero", "tiny", "huge", "nan", "inf"]


@dataclass(frozen=True)
class RmsCase:
    """The sizes, layout and values of one call; without `kv` it is a call of `rms_norm` on `q` columns."""

    tokens: int
    q: int = 3072
    kv: int | None = 512
    dtype: torch.dtype = torch.bfloat16
    row_stride: int | None = None
    """In elements; the gaps between rows hold NaN."""
    offset: int = 0
    """Elements from a 64-byte boundary to the first row."""
    eps: float = 1e-6
    values: Values = "normal"

    @staticmethod
    def minimax_m2(tokens: int, ranks: int, dtype: torch.dtype = torch.bfloat16) -> RmsCase:
        """One rank's shard of MiniMax M2's fused QKV rows under tensor parallelism over `ranks`."""
        return RmsCase(tokens, Q_COLUMNS // ranks, K_COLUMNS // ranks, dtype)

    def __str__(self) -> str:
        return describe(self)

    @property
    def columns(self) -> int:
        """Columns of a row, V included."""
        return self.q + 2 * (self.kv or 0)

    @property
    def bytes(self) -> int:
        """Minimum HBM traffic of a rank: Q and K read and written, the weights read."""
        return (self.q + (self.kv or 0)) * self.dtype.itemsize * (2 * self.tokens + 1)

    def make(self, ranks: int, device: torch.device | str = "cpu", seed: int = 0) -> list[RmsInputs]:
        """Random inputs of all ranks; V and the gaps between rows hold NaN."""
        rng = torch.Generator(device).manual_seed(seed)
        shards = [self._rank(rng) for _ in range(ranks)]
        return [RmsInputs(self, *shard, [rows for rows, *_ in shards], rank) for rank, shard in enumerate(shards)]

    def _rank(self, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        stride = self.columns if self.row_stride is None else self.row_stride
        size = self.offset + self.tokens * stride + self.columns
        storage = torch.full((size,), math.nan, dtype=self.dtype, device=rng.device)
        rows = storage.as_strided((self.tokens, self.columns), (stride, 1), self.offset)
        qk_columns = self.q + (self.kv or 0)
        x = torch.randn(self.tokens, qk_columns, generator=rng, device=rng.device)
        if self.values == "zero":
            x = torch.zeros_like(x).copysign_(x)
        elif self.values == "tiny":
            x = x * 1e-4
        elif self.values == "huge":
            # Small enough that the sum of a row's squares stays finite in float32.
            x = x * (2.0**56 if self.dtype != torch.float16 else 2.0**13)
        elif self.values in ("nan", "inf"):
            x[::2, ::37] = math.nan if self.values == "nan" else math.inf
        rows[:, :qk_columns] = x.to(self.dtype)
        weights = [
            torch.randn(width, generator=rng, device=rng.device).to(self.dtype) for width in (self.q, self.kv or 0)
        ]
        return rows, weights[0], None if self.kv is None else weights[1]


@dataclass(frozen=True)
class RmsInputs:
    """One rank's rows and weights, and the rows of all ranks."""

    case: RmsCase
    rows: Tensor
    wq: Tensor
    wk: Tensor | None
    all_rows: list[Tensor]
    rank: int

    def run(self, module: ModuleType, comm: Any) -> list[Tensor]:
        """The results of `module`: :mod:`abiding.reduce_rms`, or another module with the same functions."""
        if self.wk is None:
            return [module.rms_norm(self.rows, self.wq, comm, eps=self.case.eps)]
        return list(module.qk_norm(self.rows, self.wq, self.wk, comm, eps=self.case.eps))

    def expected(self) -> list[Tensor]:
        """The unrounded results, in float64."""
        ends = [0, self.case.q] + ([self.case.q + self.case.kv] if self.case.kv is not None else [])
        parts = [slice(begin, end) for begin, end in itertools.pairwise(ends)]
        weights = [weight for weight in (self.wq, self.wk) if weight is not None]
        return [
            normalized(self.rows[:, part], weight, [rows[:, part] for rows in self.all_rows], eps=self.case.eps)
            for part, weight in zip(parts, weights, strict=True)
        ]


REGULAR = [
    RmsCase.minimax_m2(tokens, ranks, dtype)
    for ranks, dtype in ((2, torch.bfloat16), (4, torch.float16), (8, torch.float32))
    for tokens in (1, 16, 130)
]

ODD = [
    RmsCase(5, 64, 8),
    RmsCase(7, 33, 5),
    RmsCase(9, 1, 1, torch.float32),
    RmsCase(3, 8, 24, torch.float16),
    RmsCase(3, 16000, 3, torch.float32),
    RmsCase(333, 768, 128),
    RmsCase(12, 768, 128, row_stride=2048),
    RmsCase(12, 768, 128, row_stride=1031, offset=3),
    RmsCase(11, 256, None),
    RmsCase(4, 6144, None, torch.float32),
    RmsCase(6, 100, None, torch.float16, row_stride=204, offset=1),
    RmsCase(5, 96, 0),
    RmsCase(5, 0, 96),
    RmsCase(6, 64, 64, eps=0.3),
    RmsCase(4097, 16, 8),
    RmsCase(2100, 768, 128),
    RmsCase(1100, 1536, None, torch.float32),
    RmsCase(700, 520, 24, row_stride=1031, offset=3),
    RmsCase(300, 15000, 3000, torch.float32),
]

CORNER = [
    RmsCase(0),
    RmsCase(0, 64, None),
    *(RmsCase(6, 256, 64, dtype, values="zero") for dtype in (torch.bfloat16, torch.float32)),
    *(RmsCase(6, 256, 64, dtype, values="tiny") for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    *(RmsCase(6, 256, 64, dtype, values="huge") for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    RmsCase(6, 256, 64, values="nan"),
    RmsCase(6, 256, 64, values="inf"),
    RmsCase(6, 64, 8, eps=0.0),
]

PERFORMANCE = [RmsCase.minimax_m2(tokens, ranks) for ranks in (2, 4) for tokens in (1, 16, 128, 1024)]


def unfused_qk_norm(inputs: RmsInputs, ranks: int, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The QK norm without the operator: PyTorch operators around an all-reduce of the sums of squares."""
    case = inputs.case
    parts = [part.float() for part in inputs.rows.split([case.q, case.kv or 0, case.kv or 0], 1)[:2]]
    sums = torch.stack([part.square().sum(1) for part in parts])
    dist.all_reduce(sums, group=group)
    weights = [weight for weight in (inputs.wq, inputs.wk) if weight is not None]
    outs = []
    for part, total, weight in zip(parts, sums, weights, strict=True):
        scale = torch.rsqrt(total / (ranks * part.shape[1]) + case.eps)
        outs.append((part * scale[:, None] * weight.float()).to(case.dtype))
    return outs
