"""Well-formed calls of the prologue's operators, and the values of their arguments that must be refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from abiding import mla_prologue
from abiding.testing.guarded import GuardedTensor, guarded
from calls import DEEPER, FLAT, META, Call, Spoil, Spoils, changed, other_dtype, resized, scalar, strided

TOKENS, HEADS, PADDED, BLOCK_SIZE, PAGES, POSITIONS = 4, 3, 5, 4, 3, 32
PAGE = BLOCK_SIZE * 584

QUANT = "fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert"
BF16 = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert"
FP8 = "fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert"
INSERT = "fused_deepseek_v4_kv_rope_quant_insert"
GATHER = "deepseek_v4_gather_kv"

PUBLIC_NAMES = {
    "q_in": "q",
    "k_cache": "cache",
    "slot_mapping": "slots",
    "position_ids": "positions",
    "cos_sin_cache": "cos_sin",
    "q_head_padded": "padded_heads",
    "cache_block_size": "block_size",
    "q_fp8": "out",
    "fp8_scale": "kv_scale",
    "q_fp8_scale_inv": "q_scale_inv",
}


# --- well-formed calls ------------------------------------------------------------------------------------------------


PUBLIC_FUNCTIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    QUANT: (mla_prologue.qnorm_rope_kv_insert, True),
    QUANT + ".out": (mla_prologue.qnorm_rope_kv_insert, True),
    INSERT: (mla_prologue.insert_kv, True),
    GATHER: (mla_prologue.gather_kv, True),
    BF16: (mla_prologue.qnorm_rope_full_cache_bf16_insert, False),
    FP8: (mla_prologue.qnorm_rope_full_cache_fp8_insert, False),
}


def public(call: Call) -> Any:
    function, takes_block_size = PUBLIC_FUNCTIONS[call.op]
    args = {PUBLIC_NAMES.get(name, name): value for name, value in call.args.items()}
    if not takes_block_size:
        args.pop("block_size")
    if call.op == GATHER:
        args["dtype"] = args.pop("out").dtype
    return function(**args)


def well_formed(op: str, device: torch.device | str = "cpu", rng: random.Random | None = None) -> Call:
    """An accepted call; with `rng` its sizes, dtypes, strides and contents vary."""
    vary = rng is not None
    rng = rng or random.Random(0)
    tokens = rng.choice([0, 1, 2, 5, 9]) if vary else TOKENS
    heads = rng.choice([0, 1, 3]) if vary else HEADS
    padded = heads + rng.choice([0, 0, 2]) if vary else PADDED
    block_size = rng.choice([1, 2, 3, 4, 7]) if vary else BLOCK_SIZE
    pages = rng.choice([0, 1, 2, 4]) if vary else PAGES
    positions = rng.choice([1, 5, 32]) if vary else POSITIONS
    row_dtype = rng.choice([torch.bfloat16, torch.float16]) if vary and op != BF16 else torch.bfloat16
    slot_dtype = rng.choice([torch.int32, torch.int64]) if vary else torch.int64
    position_dtype = rng.choice([torch.int32, torch.int64]) if vary else torch.int64
    wild = vary and rng.random() < 0.3

    def gap() -> int:
        return rng.choice([0, 0, 8, 40]) if vary else 0

    def offset(step: int) -> int:
        return step * rng.choice([0, 1, 3]) if vary else 0

    def rows(shape: tuple[int, ...], dtype: torch.dtype, step: int = 8, fill: Tensor | int = 0xFF) -> GuardedTensor:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, size * strides[0] + step // 8 * gap())
        return guarded(shape, dtype, device, strides=strides, fill=fill, offset_bytes=offset(16), margin=512)

    def random_rows(*shape: int) -> GuardedTensor:
        return rows(shape, row_dtype, fill=torch.randn(shape, dtype=row_dtype, device=device))

    def indices(size: int, limit: int, dtype: torch.dtype) -> GuardedTensor:
        least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        odd = [-1, -2, least, most, limit, limit + 1, 1 << 30, -(1 << 30)]
        values = rng.sample(range(limit), min(limit, size))
        values += [-1] * (size - len(values))
        if wild:
            values = [rng.choice(odd) if rng.random() < 0.5 else value for value in values]
        filled = torch.tensor(values, dtype=dtype, device=device)
        return guarded((size,), dtype, device, fill=filled, offset_bytes=offset(dtype.itemsize), margin=512)

    kv = random_rows(tokens, 512)
    inserted = rng.choice([tokens, tokens, tokens // 2, 0]) if vary else tokens
    slots = indices(inserted, pages * block_size, slot_dtype)
    position = indices(tokens, positions, position_dtype)
    if not wild and tokens > positions:  # more tokens than positions: positions may repeat
        position.tensor.clamp_(min=0)
    table = torch.rand(positions, 64, device=device)
    cos_sin = guarded((positions, 64), torch.float32, device, fill=table, offset_bytes=offset(16), margin=512)
    eps = rng.choice([0.0, 1e-6, 0.1]) if vary else 1e-6

    q = random_rows(tokens, heads, 512)
    if op in (BF16, FP8):
        size = 2 if op == BF16 else 1
        dtype = row_dtype if op == BF16 else rng.choice([torch.uint8, torch.float8_e4m3fn]) if vary else torch.uint8
        cache = rows((pages, block_size, 512), dtype, 16 // size)
        rest = {"slot_mapping": slots, "position_ids": position, "cos_sin_cache": cos_sin}
        tensors = {"q": q, "kv": kv, "k_cache": cache, **rest}
        if op == FP8:
            out_dtype = rng.choice([torch.uint8, torch.float8_e4m3fn]) if vary else torch.float8_e4m3fn
            one = torch.tensor([0.5], device=device)
            tensors = {"q": q, "kv": kv, "q_fp8": rows((tokens, heads, 512), out_dtype, 16), "k_cache": cache, **rest}
            for name in ("fp8_scale", "q_fp8_scale_inv"):
                tensors[name] = guarded((1,), torch.float32, device, fill=one, margin=512)
        scalars: dict[str, Any] = {"eps": eps, "cache_block_size": block_size}
    else:
        stride = block_size * 584 + 8 * rng.choice([0, 1, 50]) if vary else PAGE
        width = rng.randint(block_size * 584, stride) if vary else PAGE
        cache = guarded((pages, width), torch.uint8, device, strides=(stride, 1), offset_bytes=offset(8), margin=512)
        if op == GATHER:
            for page in range(pages):  # codes and bytes of every kind
                cache.tensor[page] = torch.randint(0, 256, (width,), dtype=torch.uint8, device=device)
            result = rows((inserted, 512), row_dtype)
            guards = {"k_cache": cache, "slot_mapping": slots, "out": result}
            return Call(op, {**{name: g.tensor for name, g in guards.items()}, "cache_block_size": block_size}, guards)
        tensors = {
            "kv": kv,
            "k_cache": cache,
            "slot_mapping": slots,
            "position_ids": position,
            "cos_sin_cache": cos_sin,
        }
        scalars = {"cache_block_size": block_size}
        if op != INSERT:
            tensors = {"q_in": q, **tensors}
            scalars = {"q_head_padded": padded, "eps": eps, "cache_block_size": block_size}
        if op == QUANT + ".out":
            del scalars["q_head_padded"]
            for flag in ("apply_q_norm", "apply_q_rope", "zero_padding"):
                scalars[flag] = rng.random() < 0.7 if vary else True
            tensors["out"] = random_rows(tokens, padded, 512)
    # 2^20 heads would be accepted, and take gigabytes.
    costly = {"q_head_padded": range(1 << 10, 1 << 40)}
    return Call(op, {**{name: guard.tensor for name, guard in tensors.items()}, **scalars}, tensors, costly=costly)


# --- refused arguments ------------------------------------------------------------------------------------------------

HALF_ROWS: dict[str, Spoil] = {
    "float32": other_dtype(torch.float32),
    "int16": other_dtype(torch.int16),
    "rank - 1": FLAT,
    "rank + 1": DEEPER,
    "meta": META,
}
Q_ROWS: dict[str, Spoil] = {
    **HALF_ROWS,
    "256 dims": resized(d2=256),
    "513 dims": resized(d2=513),
    "last stride 2": strided(HEADS * 1024, 1024, 2),
    "head stride 516": strided(HEADS * 520, 516, 1),
    "token stride 1540": strided(1540, 512, 1),
}
KV_ROWS: dict[str, Spoil] = {
    **HALF_ROWS,
    "other 16-bit dtype": other_dtype(torch.float16),
    "256 dims": resized(d1=256),
    "fewer rows": resized(d0=TOKENS - 1),
    "more rows": resized(d0=TOKENS + 1),
    "last stride 2": strided(1024, 2),
    "row stride 516": strided(516, 1),
}
INDICES: dict[str, Spoil] = {
    "int16": other_dtype(torch.int16),
    "float32": other_dtype(torch.float32),
    "uint8": other_dtype(torch.uint8),
    "rank 0": changed(lambda x: x[0]),
    "rank 2": DEEPER,
    "meta": META,
    "more": resized(d0=TOKENS + 1),
    "stride 2": strided(2),
}
COS_SIN: dict[str, Spoil] = {
    "float64": other_dtype(torch.float64),
    "bfloat16": other_dtype(torch.bfloat16),
    "rank 1": FLAT,
    "rank 3": DEEPER,
    "32 columns": resized(d1=32),
    "row stride 72": strided(72, 1),
    "transposed": strided(1, POSITIONS),
    "meta": META,
}
RECORD_CACHE: dict[str, Spoil] = {
    "int8": other_dtype(torch.int8),
    "bfloat16": other_dtype(torch.bfloat16),
    "rank 1": FLAT,
    "meta": META,
    "short pages": resized(d1=PAGE - 1),
    "short pages far apart": lambda call, name: call.args[name].new_zeros(PAGES, PAGE)[:, :-1],
    "one short page": resized(d0=1, d1=PAGE - 1),
    "empty pages": resized(d1=0),
    "short page stride": lambda call, name: (
        call.args[name].new_zeros(3 * PAGE).as_strided((PAGES, PAGE), (PAGE - 8, 1))
    ),
    "same page": lambda call, name: call.args[name].new_zeros(1, PAGE).expand(PAGES, PAGE),
    "odd page stride": strided(PAGE + 4, 1),
    "spread bytes": strided(2 * PAGE, 2),
    "holes in pages": lambda call, name: call.args[name].new_zeros(PAGES, BLOCK_SIZE, 592)[:, :, :584],
    "transposed": lambda call, name: call.args[name].new_zeros(PAGES, 584, BLOCK_SIZE).transpose(1, 2),
}
ROW_CACHE: dict[str, Spoil] = {
    "float32": other_dtype(torch.float32),
    "int16": other_dtype(torch.int16),
    "rank 2": changed(lambda x: x.reshape(x.shape[0], -1)),
    "rank 4": DEEPER,
    "meta": META,
    "256 dims": resized(d2=256),
    "last stride 2": strided(BLOCK_SIZE * 1024, 1024, 2),
    "odd row stride": strided(BLOCK_SIZE * 520, 516, 1),
    "overlapping rows": strided(BLOCK_SIZE * 512, 256, 1),
    "same page": strided(0, 512, 1),
}
EPS: dict[str, Spoil] = {"nan": scalar(float("nan")), "inf": scalar(float("inf")), "negative": scalar(-1e-6)}
BLOCK_SIZE_SPOILS: dict[str, Spoil] = {
    "zero": scalar(0),
    "negative": scalar(-64),
    "huge": scalar((1 << 63) - 1),
    "least": scalar(-(1 << 63)),
}
OUT: dict[str, Spoil] = {
    **Q_ROWS,
    "other 16-bit dtype": other_dtype(torch.float16),
    "fewer heads": resized(d1=HEADS - 1),
    "fewer tokens": resized(d0=TOKENS - 1),
    "more tokens": resized(d0=TOKENS + 1),
    "overlapping heads": strided(PADDED * 512, 256, 1),
    "overlapping tokens": strided(512, 512, 1),
    "one token expanded": strided(0, 512, 1),
    "shifted q": lambda call, name: shifted(call, 8, (HEADS * 512, 512, 1)),
    "q of other strides": lambda call, name: shifted(call, 0, (HEADS * 512 + 8, 512, 1)),
}
SCALE: dict[str, Spoil] = {
    "float64": other_dtype(torch.float64),
    "bfloat16": other_dtype(torch.bfloat16),
    "two": resized(d0=2),
    "none": resized(d0=0),
    "meta": META,
}
KV_SIDE = {
    "kv": KV_ROWS,
    "slot_mapping": INDICES,
    "position_ids": {**INDICES, "fewer": resized(d0=TOKENS - 1)},
    "cos_sin_cache": COS_SIN,
}


def shifted(call: Call, elements: int, strides: tuple[int, ...]) -> Tensor:
    """An output that overlaps q; q moves into the same memory."""
    memory = torch.zeros(TOKENS * HEADS * 600, dtype=torch.bfloat16, device=call.args["kv"].device)
    call.args["q_in"] = memory.as_strided((TOKENS, HEADS, 512), (HEADS * 512, 512, 1))
    return memory.as_strided((TOKENS, HEADS, 512), strides, elements)


def without(spoils: dict[str, Spoil], *names: str) -> dict[str, Spoil]:
    return {name: spoil for name, spoil in spoils.items() if name not in names}


SPOILS: Spoils = {
    QUANT + ".out": {
        "q_in": Q_ROWS,
        **KV_SIDE,
        "k_cache": RECORD_CACHE,
        "eps": EPS,
        "cache_block_size": BLOCK_SIZE_SPOILS,
        "out": OUT,
    },
    QUANT: {
        "q_in": Q_ROWS,
        **KV_SIDE,
        "k_cache": RECORD_CACHE,
        "eps": EPS,
        "cache_block_size": BLOCK_SIZE_SPOILS,
        "q_head_padded": {
            "too few": scalar(HEADS - 1),
            "none": scalar(0),
            "negative": scalar(-8),
            "huge": scalar(1 << 62),
        },
    },
    INSERT: {
        **KV_SIDE,
        "kv": without(KV_ROWS, "other 16-bit dtype", "fewer rows", "more rows"),
        "k_cache": RECORD_CACHE,
        "cache_block_size": BLOCK_SIZE_SPOILS,
    },
    GATHER: {
        "k_cache": RECORD_CACHE,
        "slot_mapping": without(INDICES, "more"),
        "cache_block_size": BLOCK_SIZE_SPOILS,
        "out": {
            **without(KV_ROWS, "other 16-bit dtype"),
            "overlapping rows": strided(256, 1),
            "one row": strided(0, 1),
        },
    },
    BF16: {
        "q": {
            **Q_ROWS,
            "other 16-bit dtype": other_dtype(torch.float16),
            "overlapping": strided(512, 512, 1),
            "expanded": strided(0, 0, 1),
        },
        **KV_SIDE,
        "k_cache": ROW_CACHE,
        "eps": EPS,
        "cache_block_size": {**BLOCK_SIZE_SPOILS, "other": scalar(BLOCK_SIZE + 1)},
    },
    FP8: {
        "q": Q_ROWS,
        **KV_SIDE,
        "k_cache": {
            **ROW_CACHE,
            "bfloat16": other_dtype(torch.bfloat16),
        },
        "eps": EPS,
        "cache_block_size": {**BLOCK_SIZE_SPOILS, "other": scalar(BLOCK_SIZE + 1)},
        "q_fp8": {
            "bfloat16": other_dtype(torch.bfloat16),
            "int8": other_dtype(torch.int8),
            "rank 2": changed(lambda x: x.reshape(x.shape[0], -1)),
            "more heads": resized(d1=HEADS + 1),
            "fewer heads": resized(d1=HEADS - 1),
            "fewer tokens": resized(d0=TOKENS - 1),
            "overlapping": strided(512, 512, 1),
            "odd head stride": strided(HEADS * 528, 520, 1),
            "meta": META,
        },
        "fp8_scale": SCALE,
        "q_fp8_scale_inv": SCALE,
    },
}
