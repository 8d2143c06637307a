"""Inputs of the DeepSeek V4 MLA prologue: `REGULAR[0].make("cuda", seed=0).run(abiding.mla_prologue)`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from abiding.mla_prologue import HEAD_DIM, NOPE_DIM, RECORD_BYTES, ROPE_DIM, page_bytes
from abiding.reference.mla_prologue import QUANT_BLOCK
from abiding.testing.cases import describe
from abiding.testing.guarded import GuardedTensor, guarded

Values = Literal["normal", "zero", "tiny", "subnormal", "huge", "nan", "inf", "bits", "every_amax"]
Kind = Literal["decode", "prefill", "random"]

_SPECIAL_VALUES: tuple[Values, ...] = ("zero", "tiny", "subnormal", "huge", "nan", "inf", "bits")


@dataclass(frozen=True)
class PrologueCase:
    """Sizes, layouts and contents of one call; the defaults are those of production."""

    tokens: int
    heads: int = 1
    padded_heads: int | None = None
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    inserted: int | None = None
    """Length of `slots`; by default the number of tokens."""
    skipped: float = 0.0
    """Fraction of negative slots."""
    wild: float = 0.0
    """Fraction of tokens whose slot lies outside of the cache, or whose position outside of the table."""
    page_stride: int | None = None
    """Bytes from page to page; by default the smallest multiple of 576 that holds a page."""
    index_dtype: torch.dtype = torch.int64
    position_dtype: torch.dtype | None = None
    """By default `index_dtype`, the dtype of the slots."""
    q_stride: int | None = None
    """Elements from token to token; the gaps hold NaN."""
    kv_stride: int | None = None
    offset_bytes: int = 0
    """Offset of q and kv from a 64-byte boundary; the cache, which needs only 8-byte alignment, has half of it."""
    max_position: int = 4096
    eps: float = 1e-6
    values: Values = "normal"
    kind: Kind = "random"
    """decode: one page per token; prefill: consecutive slots of permuted pages; random: any slots."""

    def __str__(self) -> str:
        return describe(self)

    @property
    def out_heads(self) -> int:
        """Heads of the output, padding included."""
        return self.heads if self.padded_heads is None else self.padded_heads

    @property
    def bytes(self) -> int:
        """Bytes of the roofline bound: q in, padded q out, kv in and its cache record out, cos/sin row, slot,
        position."""
        values = (self.heads + self.out_heads + 1) * HEAD_DIM * self.dtype.itemsize
        return self.tokens * (values + RECORD_BYTES + 4 * ROPE_DIM + 2 * self.index_dtype.itemsize)

    def make(self, device: torch.device | str = "cpu", seed: int = 0, *, guards: bool = True) -> PrologueInputs:
        """Random inputs and a poisoned cache; with `guards`, between canaries."""
        rng = torch.Generator(device).manual_seed(seed)
        inserted = self.tokens if self.inserted is None else self.inserted
        slots, pages = _slots(self, inserted, rng)
        positions = _positions(self, rng)
        limit, capacity = torch.iinfo(torch.int32).max, pages * self.block_size
        _mark(slots, self.skipped, [-1, -2, -torch.iinfo(self.index_dtype).max], rng)
        _mark(slots, self.wild / 2, [capacity, capacity + 1, limit], rng)
        _mark(positions, self.wild / 2, [-1, self.max_position, limit, -limit], rng)

        shape = (pages, self.block_size * RECORD_BYTES)
        stride = self.page_stride or page_bytes(self.block_size)
        if guards:
            layout = {"offset_bytes": self.offset_bytes // 2, "margin": min(stride, 1 << 20)}
            guard = guarded(shape, torch.uint8, device, strides=(stride, 1), **layout, name="cache")
            cache = guard.tensor
        else:
            guard = None
            cache = torch.zeros(pages, stride, dtype=torch.uint8, device=device)[:, : shape[1]]
        return PrologueInputs(
            case=self,
            q=_strided(_values(self, (self.tokens, self.heads, HEAD_DIM), rng), self.q_stride, self.offset_bytes),
            kv=_strided(_values(self, (self.tokens, HEAD_DIM), rng), self.kv_stride, self.offset_bytes),
            cache=cache,
            slots=slots.to(self.index_dtype),
            positions=positions.to(self.position_dtype or self.index_dtype),
            cos_sin=cos_sin_table(self.max_position, torch.device(device)),
            guard=guard,
        )


@dataclass(frozen=True)
class PrologueInputs:
    """The arguments of one call, named as in `abiding.mla_prologue.qnorm_rope_kv_insert`."""

    case: PrologueCase
    q: Tensor
    kv: Tensor
    cache: Tensor
    slots: Tensor
    positions: Tensor
    cos_sin: Tensor
    guard: GuardedTensor | None = None

    @property
    def storage(self) -> Tensor:
        """The cache and, if it is guarded, what lies around it."""
        return self.cache if self.guard is None else self.guard.storage

    def run(self, api: Any, **options: Any) -> Tensor:
        """Call `api.qnorm_rope_kv_insert`; `api` is `abiding.mla_prologue` or its reference."""
        arguments = (self.q, self.kv, self.cache, self.slots, self.positions, self.cos_sin)
        case = self.case
        given = {"block_size": case.block_size, "eps": case.eps, "padded_heads": case.padded_heads} | options
        result: Tensor = api.qnorm_rope_kv_insert(*arguments, **given)
        return result

    def clone(self) -> PrologueInputs:
        """The same call with a copy of the cache."""
        if self.guard is None:
            return replace(self, cache=self.cache.clone())
        guard = self.guard.clone()
        return replace(self, cache=guard.tensor, guard=guard)

    def check(self) -> None:
        """Raise AssertionError if a byte outside of the pages was written."""
        if self.guard is not None:
            self.guard.check()


@lru_cache(maxsize=4)
def cos_sin_table(positions: int, device: torch.device) -> Tensor:
    """[positions, 64] float32: 32 cosines, then 32 sines, of base 10000."""
    frequency = 10000.0 ** (-torch.arange(0, ROPE_DIM, 2, dtype=torch.float32, device=device) / ROPE_DIM)
    angle = torch.arange(positions, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def _slots(case: PrologueCase, inserted: int, rng: torch.Generator) -> tuple[Tensor, int]:
    """Distinct slots, and a number of pages that is one more than they need."""
    device, block_size = rng.device, case.block_size
    if case.kind == "decode":
        pages = inserted + 1
        page = torch.randperm(pages, generator=rng, device=device)[:inserted]
        return page * block_size + torch.randint(block_size, (inserted,), generator=rng, device=device), pages
    pages = -(-inserted // block_size) + 1
    if case.kind == "prefill":
        page = torch.randperm(pages, generator=rng, device=device)
        token = torch.arange(inserted, device=device)
        return page[token // block_size] * block_size + token % block_size, pages
    return torch.randperm(pages * block_size, generator=rng, device=device)[:inserted], pages


def _positions(case: PrologueCase, rng: torch.Generator) -> Tensor:
    if case.kind != "prefill":
        positions = torch.randint(case.max_position, (case.tokens,), generator=rng, device=rng.device)
        if case.tokens:
            positions[-1] = case.max_position - 1
        return positions
    first = torch.randint(max(case.max_position - case.tokens, 0) + 1, (1,), generator=rng, device=rng.device)
    return (first + torch.arange(case.tokens, device=rng.device)) % case.max_position


def _mark(indices: Tensor, fraction: float, values: list[int], rng: torch.Generator) -> None:
    """Overwrite a random `fraction` of the indices with `values`, in turn."""
    count = math.ceil(fraction * indices.numel())
    if count:
        chosen = torch.randperm(indices.numel(), generator=rng, device=rng.device)[:count]
        indices[chosen] = torch.tensor(values, device=indices.device).repeat(count)[:count]


def _strided(dense: Tensor, row_stride: int | None, offset_bytes: int) -> Tensor:
    """The same values with `row_stride` elements from row to row and NaN in the gaps."""
    if row_stride is None and not offset_bytes:
        return dense
    strides = (row_stride or math.prod(dense.shape[1:]), *dense.stride()[1:])
    first = offset_bytes // dense.element_size()
    size = first + dense.shape[0] * strides[0] + HEAD_DIM
    storage = torch.full((size,), math.nan, dtype=dense.dtype, device=dense.device)
    return storage.as_strided(dense.shape, strides, first).copy_(dense)


def _values(case: PrologueCase, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    dtype, device, is_q = case.dtype, rng.device, len(shape) == 3
    finite = torch.finfo(dtype)

    def chance(p: float) -> Tensor:
        return torch.rand(shape, generator=rng, device=device) < p

    x = torch.randn(shape, generator=rng, dtype=dtype, device=device)
    if case.values == "zero":
        return torch.zeros_like(x).copysign_(x)
    if case.values == "tiny":
        return x * 1e-6
    if case.values == "subnormal":
        bits = torch.randint(128 if dtype == torch.bfloat16 else 1024, shape, generator=rng, device=device)
        return bits.to(torch.int16).view(dtype).copysign_(x)
    if case.values == "huge":
        # The squares of a row of q must sum to a finite float32.
        limit = min(finite.max, 2.0**56) if is_q else finite.max
        return (torch.rand(shape, generator=rng, device=device) * limit).to(dtype).copysign_(x)
    if case.values in ("nan", "inf"):
        special = math.nan if case.values == "nan" else math.inf
        x = torch.where(chance(0.01), torch.full_like(x, special).copysign_(x), x)
        x[:1] = special
        return x
    if case.values == "bits" and not is_q:
        return torch.randint(-(1 << 15), 1 << 15, shape, generator=rng, device=device).to(torch.int16).view(dtype)
    if case.values == "every_amax" and not is_q:
        return _every_amax(x, rng)
    return x


def _every_amax(x: Tensor, rng: torch.Generator) -> Tensor:
    """Rows whose quantization blocks have, in ascending order, every finite magnitude of the dtype as their amax."""
    blocks = x[:, :NOPE_DIM].reshape(-1, QUANT_BLOCK)
    bits = torch.arange(blocks.shape[0], device=x.device).clamp(max=finite_magnitudes(x.dtype) - 1)
    largest = bits.to(torch.int16).view(x.dtype)
    smaller = torch.rand(blocks.shape, generator=rng, device=x.device) * largest[:, None].float()
    blocks = smaller.to(x.dtype).copysign_(blocks)
    place = torch.randint(QUANT_BLOCK, (blocks.shape[0], 1), generator=rng, device=x.device)
    blocks.scatter_(1, place, largest[:, None].copysign(blocks[:, :1]))
    return torch.cat((blocks.reshape(-1, NOPE_DIM), x[:, NOPE_DIM:]), dim=1)


def finite_magnitudes(dtype: torch.dtype) -> int:
    """The number of finite values >= 0 of a 16-bit float."""
    return 0x7F80 if dtype == torch.bfloat16 else 0x7C00


def _every_amax_case(dtype: torch.dtype) -> PrologueCase:
    blocks_per_row = NOPE_DIM // QUANT_BLOCK
    return PrologueCase(tokens=-(-finite_magnitudes(dtype) // blocks_per_row), dtype=dtype, values="every_amax")


_REGULAR_BATCHES: tuple[tuple[int, Kind, float], ...] = ((1, "decode", 0.0), (33, "decode", 0.1), (130, "prefill", 0.0))

REGULAR = [
    PrologueCase(tokens, heads, padded, kind=kind, skipped=skipped)
    for heads, padded in ((16, None), (16, 64), (64, None), (128, None))
    for tokens, kind, skipped in _REGULAR_BATCHES
]

ODD = [
    PrologueCase(5, 1, 20, block_size=1),
    PrologueCase(7, 3, 20, block_size=2, index_dtype=torch.int32),
    PrologueCase(9, 17, 64, block_size=3, dtype=torch.float16, index_dtype=torch.int32, position_dtype=torch.int64),
    PrologueCase(11, 17, 128, block_size=16, position_dtype=torch.int32, kind="prefill"),
    PrologueCase(300, 1, block_size=256, kind="prefill"),
    PrologueCase(13, 20, dtype=torch.float16, offset_bytes=16),
    PrologueCase(10, 3, 4, q_stride=4 * HEAD_DIM, kv_stride=3 * HEAD_DIM),
    PrologueCase(10, 16, 64, q_stride=16 * HEAD_DIM + 8, kv_stride=HEAD_DIM + 8, offset_bytes=16),
    PrologueCase(40, 3, block_size=16, page_stride=4 * page_bytes(16)),
    PrologueCase(40, 3, block_size=16, page_stride=16 * RECORD_BYTES),
    PrologueCase(8, 2, block_size=3, page_stride=3 * RECORD_BYTES + 8, offset_bytes=16),
    PrologueCase(130, 2, page_stride=149_760, kind="prefill", skipped=0.05),
    PrologueCase(17, 8, 16, inserted=12),
    PrologueCase(17, 8, 16, inserted=1, skipped=1.0),
    PrologueCase(17, 8, 16, inserted=0),
    PrologueCase(29, 5, 8, skipped=0.5, index_dtype=torch.int32),
    PrologueCase(29, 5, 8, skipped=1.0),
    PrologueCase(21, 4, max_position=1 << 20),
    PrologueCase(6, 2, max_position=1),
    PrologueCase(6, 2, eps=0.1),
    PrologueCase(1023, 1),
    PrologueCase(1025, 2, 3, kind="prefill"),
]

CORNER = [
    PrologueCase(0, 16, 64),
    PrologueCase(4, 0),
    PrologueCase(4, 0, 8),
    PrologueCase(0, 0),
    *(
        PrologueCase(9, 3, 4, values=values, dtype=dtype)
        for values in _SPECIAL_VALUES
        for dtype in (torch.bfloat16, torch.float16)
    ),
    PrologueCase(9, 3, values="zero", eps=0.0),
    PrologueCase(40, 3, wild=0.4),
    PrologueCase(40, 3, wild=0.4, skipped=0.3, index_dtype=torch.int32, inserted=30),
    _every_amax_case(torch.bfloat16),
    _every_amax_case(torch.float16),
]

PERFORMANCE = [
    PrologueCase(tokens, heads, padded, max_position=65536, kind="decode" if tokens <= 64 else "prefill")
    for heads, padded in ((16, None), (16, 64), (64, None), (128, None))
    for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384)
]
