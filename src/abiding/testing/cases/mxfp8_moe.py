"""Inputs of MXFP8 mixture of experts, for grouped GEMMs and for whole layers:
`LAYERS[0].make("cuda", seed=0).run(abiding.mxfp8_moe)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from abiding.mxfp8_moe import BLOCK, MXFP8, Activation, Mode, rebase, swizzle_scales, unswizzle_scales
from abiding.testing.cases import describe

Values = Literal["normal", "zero", "tiny", "huge", "nan", "inf", "bits"]
Form = Literal["starts", "ends", "whole"]
Routing = Literal["uniform", "zipf", "one"]


@dataclass(frozen=True)
class GemmCase:
    """A grouped GEMM: rows of several experts, to be quantized and multiplied."""

    sizes: tuple[int, ...]
    """Rows of each expert."""
    n: int
    k: int
    values: Values = "normal"
    weights: Values = "normal"
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    form: Form = "starts"
    before: int = 0
    """Rows of no expert before those of the first expert (form "starts")."""
    behind: int = 0
    """Rows of no expert after those of the last expert."""
    gap: int = 0
    """Elements between rows, in multiples of 16."""
    transposed: bool = False
    """Whether weights are the transposed view [E, K, N]."""

    def __str__(self) -> str:
        return describe(self)

    @property
    def rows(self) -> int:
        return self.before + sum(self.sizes) + self.behind

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> GemmInputs:
        """Random inputs."""
        rng = torch.Generator(device).manual_seed(seed)
        ends = self.before + torch.tensor(self.sizes, device=device).cumsum(0)
        starts = torch.cat([torch.full_like(ends[:1], self.before), ends])
        weight, scales, codes = expert_weights(len(self.sizes), self.n, self.k, rng, self.weights)
        return GemmInputs(
            case=self,
            x=strided(activations(self.values, (self.rows, self.k), self.dtype, rng), self.gap),
            weight=weight.transpose(1, 2) if self.transposed else weight,
            weight_scale=scales,
            codes=codes,
            expert_offsets=starts.int() if self.form == "starts" else None,
            offs=ends.int() if self.form == "ends" else None,
        )


@dataclass(frozen=True)
class GemmInputs:
    """The arguments of one grouped GEMM, named as in `abiding.mxfp8_moe.grouped_mm`."""

    case: GemmCase
    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    codes: Tensor
    """The plain scales of the weights."""
    expert_offsets: Tensor | None
    offs: Tensor | None

    def quantize(self, api: Any, rowwise: bool = False) -> MXFP8:
        """Call `api.quantize`; `api` is `abiding.mxfp8_moe` or its reference."""
        result: MXFP8 = api.quantize(self.x, self.expert_offsets, offs=self.offs, rowwise=rowwise)
        return result

    def rebased(self) -> GemmInputs:
        """The same with rebased weights."""
        weight, scales, _ = rebase(self.weight, self.weight_scale)
        n, k = self.case.n, self.case.k
        return replace(self, weight=weight, weight_scale=scales, codes=unswizzle_scales(scales, n, k))

    def run(self, api: Any, a: MXFP8 | Tensor, **options: Any) -> Tensor:
        """Call `api.grouped_mm` on activations `a` that were made from `x`."""
        given = {"offs": self.offs, "out_dtype": self.case.out_dtype} | options
        result: Tensor = api.grouped_mm(a, self.weight, self.weight_scale, self.expert_offsets, **given)
        return result

    def live(self) -> Tensor:
        """A mask of the rows that belong to an expert."""
        row = torch.arange(self.case.rows, device=self.x.device)
        return (row >= self.case.before) & (row < self.case.rows - self.case.behind)


@dataclass(frozen=True)
class LayerCase:
    """Sizes, routing and mode of a layer. Weights are rebased for mode "fp8"."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    routing: Routing = "uniform"
    """uniform: tokens choose independently; zipf: the i-th most popular expert gets 1/i of the first one's tokens; one:
    all tokens choose the same experts."""
    elsewhere: float = 0.0
    """Fraction of pairs of a token and an expert whose expert is on another rank (id -1)."""
    activation: Activation = "silu"
    mode: Mode = "w8a8"
    index_dtype: torch.dtype = torch.int64
    values: Values = "normal"
    name: str = ""
    global_experts: int | None = None
    """Experts of all ranks that tokens choose among, if this rank holds only `experts` of them: the others' ids are -1.
    This rank is the one that holds the first choice of token 0, so that even a single token has something to do."""

    def __str__(self) -> str:
        return describe(self)

    def make(self, device: torch.device | str = "cpu", seed: int = 0) -> LayerInputs:
        """Random inputs."""
        rng = torch.Generator(device).manual_seed(seed)
        width = self.intermediate if self.activation == "none" else 2 * self.intermediate
        w13, s13, _ = expert_weights(self.experts, width, self.hidden, rng)
        w2, s2, _ = expert_weights(self.experts, self.hidden, self.intermediate, rng)
        if self.mode == "fp8":
            for weight in ((w13, s13), (w2, s2)):
                rebase(*weight, inplace=True)
        x = activations(self.values, (self.tokens, self.hidden), torch.bfloat16, rng)
        ids, weights = self.route(rng)
        return LayerInputs(self, x, w13, s13, w2, s2, ids, weights)

    def route(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Expert ids and weights [tokens, top_k]; the weights of a token sum to 1."""
        experts = self.global_experts or self.experts
        shape, device = (self.tokens, experts), rng.device
        noise = -(-torch.rand(shape, generator=rng, device=device).clamp(min=1e-9).log()).clamp(min=1e-9).log()
        if self.routing == "zipf":
            rank = torch.randperm(experts, generator=rng, device=device) + 1
            noise = noise - rank.log()
        elif self.routing == "one" and self.tokens:
            noise = noise[:1].expand(shape)
        ids = noise.topk(self.top_k).indices
        logits = torch.randn(ids.shape, generator=rng, device=device)
        away = torch.rand(ids.shape, generator=rng, device=device) < self.elsewhere
        if self.global_experts:
            ids = ids - ids[:1, :1] // self.experts * self.experts
            away |= (ids < 0) | (ids >= self.experts)
        return ids.masked_fill(away, -1).to(self.index_dtype), logits.softmax(-1)


@dataclass(frozen=True)
class LayerInputs:
    """The arguments of one layer, named as in `abiding.mxfp8_moe.moe`."""

    case: LayerCase
    x: Tensor
    w13: Tensor
    s13: Tensor
    w2: Tensor
    s2: Tensor
    topk_ids: Tensor
    topk_weights: Tensor

    def run(self, api: Any, **options: Any) -> Tensor:
        """Call `api.moe`; `api` is `abiding.mxfp8_moe` or its reference."""
        arguments = (self.x, self.w13, self.s13, self.w2, self.s2, self.topk_ids, self.topk_weights)
        given = {"activation": self.case.activation, "mode": self.case.mode} | options
        if self.case.global_experts:
            given = {"global_experts": self.case.global_experts} | given
        result: Tensor = api.moe(*arguments, **given)
        return result


def rotated_ids(ids: Tensor, experts: int, index: int, count: int) -> Tensor:
    """Ids for the `index`-th of `count` calls, each with experts that earlier calls did not use, as far as there are
    any, so that their weights are L2-cold. Experts of other ranks stay there."""
    return torch.where(ids < 0, ids, (ids + index * max(1, experts // count)) % experts)


def expert_weights(
    experts: int, n: int, k: int, rng: torch.Generator, values: Values = "normal"
) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 weights [experts, n, k], their scales in tiles, and the plain codes [experts, n, k / 32].

    "normal" weights have a standard deviation near 1 / 32 in all scale blocks. "bits" are random bytes, with codes that
    keep sums finite and some codes 255. Other values mix in special ones.
    """
    device = rng.device
    shape = (experts, n, k // BLOCK)
    weight = torch.empty(experts, n, k, dtype=torch.uint8, device=device)
    if values == "bits":
        weight.random_(0, 256, generator=rng)
        codes = torch.randint(0, 200, shape, generator=rng, dtype=torch.uint8, device=device)
        codes[:, ::5, 0] = 255
    else:
        for expert in weight:  # one at a time: a whole layer in float32 would not fit in memory
            normal = torch.randn(expert.shape, generator=rng, device=device) * 128
            expert.copy_(normal.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
        low = {"tiny": 0, "huge": 235}.get(values, 113)
        codes = torch.randint(low, low + 5, shape, generator=rng, dtype=torch.uint8, device=device)
    if values == "zero":
        weight &= 0x80
    if values == "nan":
        weight.view(-1)[:: 5 * k + 7] = 0x7F
        codes[:, 1::3, -1] = 255
        codes[:, 2::3, codes.size(-1) // 2] = 255
    return weight.view(torch.float8_e4m3fn), swizzle_scales(codes), codes


def activations(values: Values, shape: tuple[int, int], dtype: torch.dtype, rng: torch.Generator) -> Tensor:
    """Activations; special values are mixed in so that scale blocks with and without them are neighbors."""
    x = torch.randn(shape, generator=rng, device=rng.device)
    if values == "bits":
        bits = torch.randint(-(1 << 15), 1 << 15, shape, generator=rng, device=rng.device)
        return bits.to(torch.int16).view(dtype)
    if values == "zero":
        x = x * 0  # zeros of either sign
    elif values == "tiny":
        x = x * 2.0 ** (-124 if dtype == torch.bfloat16 else -22)
    elif values == "huge":
        x = (x / 4).clamp(-1, 1) * torch.finfo(dtype).max
    elif values in ("nan", "inf"):
        chosen = torch.rand(shape, generator=rng, device=rng.device) < 0.02
        x = torch.where(chosen, math.nan if values == "nan" else torch.copysign(torch.tensor(math.inf), x), x)
        x[1::4, :BLOCK] = math.nan if values == "nan" else math.inf
    return x.to(dtype)


def strided(dense: Tensor, gap: int) -> Tensor:
    """The same rows with NaN in the gaps between them."""
    if not gap:
        return dense
    storage = torch.full((len(dense), dense.size(1) + gap), math.nan, dtype=dense.dtype, device=dense.device)
    storage[:, : dense.size(1)] = dense
    return storage[:, : dense.size(1)]


REGULAR = [
    GemmCase((7, 0, 33, 1), 128, 256),
    GemmCase((130, 128, 5), 256, 128, out_dtype=torch.float32),
    GemmCase((1,) * 16, 384, 512),
    GemmCase((64, 200), 512, 384, out_dtype=torch.float16),
]

ODD = [
    GemmCase((3,), 32, 32),
    GemmCase((3, 1, 0), 32, 96, form="ends"),
    GemmCase((17, 5), 96, 32, out_dtype=torch.float32),
    GemmCase((9, 140), 160, 96, transposed=True),
    GemmCase((2, 129), 96, 160, out_dtype=torch.float16),
    GemmCase((31, 8), 224, 160, gap=16, before=5, behind=3),
    GemmCase((6,), 64, 64, form="whole"),
    GemmCase((300,), 32, 160, form="whole", out_dtype=torch.float32),
    GemmCase((0, 0, 5), 128, 128, form="ends", behind=2),
    GemmCase((4, 4), 32, 32, dtype=torch.float16),
    GemmCase((1, 0) * 40, 64, 96),
    GemmCase((150, 0, 170), 160, 96),
    GemmCase((0, 300, 0, 320), 96, 160),
    GemmCase((20, 70), 1056, 64, gap=48),
    GemmCase((5, 11), 64, 2080),
    # Few rows of a long K: on Hopper stream-K hands parts of tiles over within a cluster.
    GemmCase((1, 0, 2, 1), 160, 2048, out_dtype=torch.float32),
    GemmCase((1, 2), 32, 4192, form="ends"),
    # Several tile widths, and more tiles than SMs.
    GemmCase((700, 449, 33, 225), 1440, 160),
    GemmCase((3,) * 1024, 32, 64),
    GemmCase((41,) * 1024, 32, 32),
    GemmCase((141,) * 513, 32, 32),
]

TILES = [
    # Rows per expert that have tiles of every width that a tile shape of the Hopper GEMM has; tests/mxfp8_moe/
    # test_plan.py holds that. But for the first, stream-K, there are more K tiles than stages.
    GemmCase((9, 1, 0, 2, 1), 96, 2048),
    GemmCase((8, 9, 17, 25, 0, 33, 1, 1, 1, 1), 160, 672, gap=32),
    GemmCase((16, 17, 33, 49, 64, 5), 160, 1056, out_dtype=torch.float32),
    GemmCase((20, 64, 90, 128), 288, 544, out_dtype=torch.float16),
    GemmCase((30, 64, 96, 128, 160, 192), 96, 608),
    GemmCase((32, 64, 96, 128, 160, 192, 224, 256), 160, 416, gap=16),
    # Whole and broken halves of tiles, and a row more than a tile has.
    GemmCase((192, 96, 97, 193, 30), 224, 288, gap=16, out_dtype=torch.float16),
    GemmCase((64, 256, 129, 320), 288, 160, before=3, behind=7),
]

CORNER = [
    GemmCase((0,), 64, 64),
    GemmCase((0, 0), 64, 64, form="ends"),
    GemmCase((0,), 64, 64, form="whole"),
    GemmCase((1,) + (0,) * 1023, 32, 32),
    GemmCase((0,) * 9 + (70,), 64, 64),
    *(
        GemmCase((9, 6), 64, 160, values=values, dtype=dtype, out_dtype=torch.float32)
        for values in ("zero", "tiny", "huge", "nan", "inf", "bits")
        for dtype in (torch.bfloat16, torch.float16)
    ),
    *(
        GemmCase((9, 6), 96, 96, weights=weights, out_dtype=out_dtype)
        for weights in ("zero", "tiny", "huge", "nan", "bits")
        for out_dtype in (torch.bfloat16, torch.float16, torch.float32)
    ),
    *(
        GemmCase(rows, 160, k, weights=weights)
        for weights in ("tiny", "huge", "nan", "bits")
        for rows, k in (
            ((1, 2), 128),
            ((9, 6), 128),
            ((25, 14), 160),
            ((60, 30), 96),
            ((120, 110), 128),
            ((300, 9), 96),
        )
    ),
]

LAYERS = [
    LayerCase(5, 64, 96, 4, 2),
    LayerCase(33, 128, 64, 8, 3, mode="w8a16"),
    LayerCase(17, 96, 160, 5, 5, "zipf", activation="swiglu_oai", index_dtype=torch.int32),
    LayerCase(9, 160, 32, 6, 1, "zipf", activation="swiglu_oai", mode="w8a16"),
    LayerCase(200, 64, 64, 16, 16, activation="none"),
    LayerCase(150, 64, 96, 8, 1, "one", mode="w8a16", activation="none"),
    LayerCase(40, 64, 64, 4, 4, "one"),
    LayerCase(23, 96, 64, 4, 3, elsewhere=0.4),
    LayerCase(3, 64, 64, 4, 2, elsewhere=1.0, index_dtype=torch.int32),
    LayerCase(0, 64, 64, 4, 2),
    LayerCase(1, 256, 128, 3, 1),
    LayerCase(12, 64, 64, 4, 2, values="zero"),
    LayerCase(12, 64, 64, 4, 2, values="nan"),
    LayerCase(8300, 32, 32, 9, 8, "zipf", elsewhere=0.1),  # many steps per warp in the routing kernel
    # Every tile shape of the Hopper GEMM.
    LayerCase(3, 1024, 128, 4, 2),
    LayerCase(7, 2048, 256, 8, 3, activation="swiglu_oai", elsewhere=0.3),
    LayerCase(2, 4096, 128, 5, 4, mode="w8a16"),
    LayerCase(13, 4096, 128, 4, 1),
    LayerCase(20, 96, 128, 4, 1, activation="swiglu_oai"),
    LayerCase(40, 160, 384, 4, 2, "zipf"),
    LayerCase(21, 64, 256, 2, 1, mode="w8a16", activation="swiglu_oai"),
    LayerCase(100, 160, 128, 4, 2, values="nan"),
    LayerCase(120, 96, 384, 4, 2, "zipf", mode="w8a16"),
    LayerCase(250, 64, 128, 4, 2, activation="swiglu_oai"),
    LayerCase(240, 160, 384, 4, 2, "zipf", mode="w8a16"),
    LayerCase(400, 160, 128, 4, 2, "zipf"),
    LayerCase(640, 64, 256, 4, 2, "zipf", mode="w8a16", activation="swiglu_oai"),
    # One scale per row; with few rows per expert, and with many.
    LayerCase(5, 64, 96, 4, 2, mode="fp8"),
    LayerCase(17, 96, 160, 5, 5, "zipf", activation="swiglu_oai", mode="fp8", index_dtype=torch.int32),
    LayerCase(200, 192, 32, 16, 16, activation="none", mode="fp8"),
    LayerCase(23, 416, 288, 4, 3, mode="fp8", elsewhere=0.4),
    LayerCase(3, 64, 64, 4, 2, mode="fp8", elsewhere=1.0),
    LayerCase(0, 64, 64, 4, 2, mode="fp8"),
    LayerCase(1, 256, 128, 3, 1, mode="fp8"),
    LayerCase(12, 160, 64, 4, 2, mode="fp8", values="nan"),
    LayerCase(12, 160, 64, 4, 2, mode="fp8", values="inf"),
    LayerCase(250, 512, 384, 4, 2, "zipf", activation="swiglu_oai", mode="fp8"),
    LayerCase(700, 160, 128, 4, 2, mode="fp8"),
]

SHAPES = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "minimax-m2": (3072, 1536, 256, 8),
    "wide-ep8": (6144, 2048, 32, 8),
    "minimax-m3-tp8": (6144, 384, 128, 4),
    "minimax-m3-ep8": (6144, 3072, 16, 4),
}
"""Hidden size, intermediate size, experts and top-k of models' MoE layers, or of one rank's part of them."""

PERFORMANCE_TOKENS: dict[Routing, tuple[int, ...]] = {
    "uniform": (1, 3, 8, 11, 32, 48, 100, 128, 256, 512, 2048, 8192),
    "zipf": (32, 512, 8192),
}
FP8_TOKENS = (384, 1000, 3000)
"""Further numbers of tokens of uniform routing, in mode "fp8" alone."""


def _performance_cases() -> Iterator[LayerCase]:
    for name, shape in SHAPES.items():
        for routing, all_tokens in PERFORMANCE_TOKENS.items():
            for tokens in sorted((*all_tokens, *(FP8_TOKENS if routing == "uniform" else ()))):
                mode: Mode = "fp8" if tokens in FP8_TOKENS else "w8a8"
                yield LayerCase(tokens, *shape, routing, mode=mode, name=name)


PERFORMANCE = list(_performance_cases())
PERFORMANCE += [
    replace(case, name=f"{case.name}-real", global_experts=8 * case.experts)
    for case in PERFORMANCE
    if case.name.endswith("-ep8") and case.routing == "uniform" and case.tokens not in FP8_TOKENS
]
"""Besides SHAPES, whose pairs are all here: "wide-ep8-real" and "minimax-m3-ep8-real", where tokens choose among the
experts of 8 ranks, so that about seven eighths of the pairs are elsewhere. Cases of mode "fp8" are timed in that mode
alone, all others in every mode."""


def performance_case(shape: str, tokens: int) -> LayerCase:
    """The case of PERFORMANCE with uniform routing."""
    return next(case for case in PERFORMANCE if (case.name, case.tokens, case.routing) == (shape, tokens, "uniform"))
