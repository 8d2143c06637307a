"""Refused arguments: error types and messages; nothing is written after an error, and never outside of the tensors."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding import mla_prologue, reference
from abiding.testing.cases.mla_prologue import PrologueCase
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import GuardedTensor, guarded

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


@dataclass
class Call:
    """One call of a raw operator: its arguments by name, and the guards of their memory."""

    op: str
    args: dict[str, Any]
    guards: dict[str, GuardedTensor]
    before: dict[str, Tensor] = field(default_factory=dict)

    def raw(self) -> Any:
        packet = getattr(torch.ops.abiding, self.op.removesuffix(".out"))
        if self.op.endswith(".out"):
            return packet.out(**self.args)
        return packet.default(**self.args)

    def public(self) -> Any:
        function, same = PUBLIC_FUNCTIONS[self.op]
        args = {PUBLIC_NAMES.get(name, name): value for name, value in self.args.items()}
        if same:
            args.pop("block_size")
        if self.op == GATHER:
            args["dtype"] = args.pop("out").dtype
        return function(**args)

    def remember(self) -> Call:
        self.before = {name: guard.storage.clone() for name, guard in self.guards.items()}
        return self

    def assert_untouched(self) -> None:
        for name, guard in self.guards.items():
            assert_bitwise_equal(guard.storage, self.before[name], f"{name} after an error")

    def check(self) -> None:
        for guard in self.guards.values():
            guard.check()


PUBLIC_FUNCTIONS: dict[str, tuple[Callable[..., Any], bool]] = {
    QUANT: (mla_prologue.qnorm_rope_kv_insert, False),
    QUANT + ".out": (mla_prologue.qnorm_rope_kv_insert, False),
    INSERT: (mla_prologue.insert_kv, False),
    GATHER: (mla_prologue.gather_kv, False),
    BF16: (mla_prologue.qnorm_rope_full_cache_bf16_insert, True),
    FP8: (mla_prologue.qnorm_rope_full_cache_fp8_insert, True),
}


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
    return Call(op, {**{name: guard.tensor for name, guard in tensors.items()}, **scalars}, tensors)


# --- refused arguments ------------------------------------------------------------------------------------------------

Spoil = Callable[[Call, str], Any]
"""Takes a call and the name of an argument, and returns a value for it that must be refused."""


def other_dtype(dtype: torch.dtype) -> Spoil:
    def spoil(call: Call, name: str) -> Any:
        value = call.args[name]
        return value.to(dtype) if dtype.itemsize != value.element_size() else value.view(dtype)

    return spoil


def shape(change: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda call, name: change(call.args[name])


def scalar(value: Any) -> Spoil:
    return lambda call, name: value


def resized(**sizes: int) -> Spoil:
    """The argument with other sizes (d0=5: five rows), in fresh memory."""

    def spoil(call: Call, name: str) -> Any:
        value = call.args[name]
        wanted = list(value.shape)
        for dim, size in sizes.items():
            wanted[int(dim[1:])] = size
        return torch.zeros(wanted, dtype=value.dtype, device=value.device)

    return spoil


def strided(*strides: int) -> Spoil:
    def spoil(call: Call, name: str) -> Any:
        value = call.args[name]
        span = sum((n - 1) * abs(s) for n, s in zip(value.shape, strides, strict=True)) + 1
        return torch.zeros(span, dtype=value.dtype, device=value.device).as_strided(value.shape, strides)

    return spoil


def misaligned(bytes_: int) -> Spoil:
    def spoil(call: Call, name: str) -> Any:
        value = call.args[name]
        return guarded(value.shape, value.dtype, value.device, strides=value.stride(), offset_bytes=bytes_).tensor

    return spoil


def to_meta(call: Call, name: str) -> Any:
    return call.args[name].to("meta")


FLAT, DEEPER = shape(lambda x: x.reshape(-1)), shape(lambda x: x[None])
HALF_ROWS: dict[str, Spoil] = {
    "float32": other_dtype(torch.float32),
    "int16": other_dtype(torch.int16),
    "rank - 1": FLAT,
    "rank + 1": DEEPER,
    "meta": to_meta,
    "misaligned": misaligned(2),
    "8-byte aligned": misaligned(8),
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
    "rank 0": shape(lambda x: x[0]),
    "rank 2": DEEPER,
    "meta": to_meta,
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
    "meta": to_meta,
    "misaligned": misaligned(4),
}
RECORD_CACHE: dict[str, Spoil] = {
    "int8": other_dtype(torch.int8),
    "bfloat16": other_dtype(torch.bfloat16),
    "rank 1": FLAT,
    "meta": to_meta,
    "misaligned": misaligned(4),
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
    "rank 2": shape(lambda x: x.reshape(x.shape[0], -1)),
    "rank 4": DEEPER,
    "meta": to_meta,
    "256 dims": resized(d2=256),
    "last stride 2": strided(BLOCK_SIZE * 1024, 1024, 2),
    "odd row stride": strided(BLOCK_SIZE * 520, 516, 1),
    "overlapping rows": strided(BLOCK_SIZE * 512, 256, 1),
    "same page": strided(0, 512, 1),
    "misaligned": misaligned(2),
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
    "meta": to_meta,
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


SPOILS: dict[str, dict[str, dict[str, Spoil]]] = {
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
            **without(ROW_CACHE, "misaligned"),
            "misaligned": misaligned(8),
            "bfloat16": other_dtype(torch.bfloat16),
        },
        "eps": EPS,
        "cache_block_size": {**BLOCK_SIZE_SPOILS, "other": scalar(BLOCK_SIZE + 1)},
        "q_fp8": {
            "bfloat16": other_dtype(torch.bfloat16),
            "int8": other_dtype(torch.int8),
            "rank 2": shape(lambda x: x.reshape(x.shape[0], -1)),
            "more heads": resized(d1=HEADS + 1),
            "fewer heads": resized(d1=HEADS - 1),
            "fewer tokens": resized(d0=TOKENS - 1),
            "overlapping": strided(512, 512, 1),
            "misaligned": misaligned(8),
            "odd head stride": strided(HEADS * 528, 520, 1),
            "meta": to_meta,
        },
        "fp8_scale": SCALE,
        "q_fp8_scale_inv": SCALE,
    },
}


def every_spoil() -> Iterator[Any]:
    for op, arguments in SPOILS.items():
        for name, spoils in arguments.items():
            for what, spoil in spoils.items():
                yield pytest.param(op, name, spoil, id=f"{op.removeprefix('fused_deepseek_v4_')}-{name}-{what}")


SPOILED = list(every_spoil())


def mentions(name: str, text: str) -> bool:
    return re.search(rf"\b{name}\b", text) is not None


@pytest.mark.parametrize("op", SPOILS)
def test_the_call_that_gets_spoiled_is_accepted(op: str, device: torch.device) -> None:
    for call in (well_formed(op, device), well_formed(op, device)):
        call.raw()
        call.check()
    well_formed(op, device).public()


@pytest.mark.parametrize(("op", "name", "spoil"), SPOILED)
def test_operator_refuses(op: str, name: str, spoil: Spoil, device: torch.device) -> None:
    call = well_formed(op, device).remember()
    call.args[name] = spoil(call, name)
    with pytest.raises(RuntimeError) as caught:
        call.raw()
    text = str(caught.value)
    first = next((line for line in text.splitlines() if line.startswith("abiding::")), "")
    assert re.match(rf"abiding::{op.removesuffix('.out')}(\.out)?: .+; expected .+", first), text
    blamed = (name, "kv") if name == "q_in" else (name, "q_in", "q") if name in ("kv", "out", "q_fp8") else (name,)
    assert any(mentions(argument, first) for argument in blamed), text
    if name in ("eps", "cache_block_size", "q_head_padded") or "has dtype" in first:
        assert mentions(name, first), text
    call.assert_untouched()


def is_a_public_argument(op: str, name: str) -> bool:
    """gather_kv allocates its own output; the full-cache functions take the block size from their cache."""
    return (op, name) != (GATHER, "out") and not (op in (BF16, FP8) and name == "cache_block_size")


@pytest.mark.parametrize(("op", "name", "spoil"), [p for p in SPOILED if is_a_public_argument(*p.values[:2])])
def test_public_function_refuses(op: str, name: str, spoil: Spoil) -> None:
    call = well_formed(op).remember()
    before = call.args[name]
    call.args[name] = spoil(call, name)
    wrong_dtype = isinstance(before, Tensor) and before.dtype != call.args[name].dtype
    with pytest.raises(TypeError if wrong_dtype else ValueError) as caught:
        call.public()
    text = str(caught.value)
    function = PUBLIC_FUNCTIONS[op][0].__name__
    assert "expected" in text
    assert len(text.splitlines()) == 1, text
    assert mentions(op.removesuffix(".out"), text) or mentions(function, text), (
        f"neither operator nor function named: {text}"
    )
    wanted = PUBLIC_NAMES.get(name, name)
    blamed = {wanted} | ({"kv", "q", "out"} if name in ("q_in", "q", "kv", "out", "q_fp8") else set())
    assert any(mentions(argument, text) for argument in blamed), text
    call.assert_untouched()


@pytest.mark.parametrize("wrong", [None, 3, [1.0, 2.0], "cache"], ids=str)
def test_public_function_refuses_what_is_no_tensor(wrong: Any) -> None:
    for op in SPOILS:
        template = well_formed(op)
        for name, value in template.args.items():
            if not isinstance(value, Tensor) or (wrong is None and name in ("out", "q_fp8")):
                continue
            if not is_a_public_argument(op, name):
                continue
            call = well_formed(op).remember()
            call.args[name] = wrong
            with pytest.raises(TypeError) as caught:
                call.public()
            assert mentions(PUBLIC_NAMES.get(name, name), str(caught.value)), f"{op}, {name}: {caught.value}"
            call.assert_untouched()


def test_public_function_refuses_contradictions() -> None:
    call = well_formed(QUANT + ".out").remember()
    args = {PUBLIC_NAMES.get(name, name): value for name, value in call.args.items()}
    with pytest.raises(ValueError, match=r"padded_heads|out has shape"):
        mla_prologue.qnorm_rope_kv_insert(**args, padded_heads=PADDED + 1)
    with pytest.raises(TypeError, match="dtype"):
        mla_prologue.gather_kv(args["cache"], args["slots"], block_size=BLOCK_SIZE, dtype=torch.float32)
    call.assert_untouched()


# --- index values out of range ----------------------------------------------------------------------------------------

BAD_SLOTS = [PAGES * BLOCK_SIZE, PAGES * BLOCK_SIZE + 1, 1 << 31, 1 << 40, (1 << 63) - 1]
BAD_POSITIONS = [-1, -(1 << 63), POSITIONS, POSITIONS + 1, 1 << 31, 1 << 57, (1 << 63) - 1]


@pytest.mark.parametrize("op", SPOILS)
def test_wild_indices_stay_inside(op: str, device: torch.device) -> None:
    """A row with a bad slot or position is skipped: the cache and the memory around every tensor stay unchanged."""
    slots = [*BAD_SLOTS, -1, -(1 << 63)]
    for index, slot in enumerate(slots):
        call = well_formed(op, device).remember()
        call.args["slot_mapping"].fill_(slot)
        if "position_ids" in call.args:
            call.args["position_ids"][0] = BAD_POSITIONS[index % len(BAD_POSITIONS)]
        call.raw()
        call.check()
        assert_bitwise_equal(call.guards["k_cache"].storage, call.before["k_cache"], "cache")
    for position in BAD_POSITIONS if op != GATHER else []:
        call = well_formed(op, device).remember()
        call.args["position_ids"].fill_(position)
        call.raw()
        call.check()
        assert_bitwise_equal(call.guards["k_cache"].storage, call.before["k_cache"], "cache")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("op", SPOILS)
def test_checked_indices_raise(
    op: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = PAGES * BLOCK_SIZE
    bad = [("slot_mapping", value, limit) for value in BAD_SLOTS]
    if op != GATHER:
        bad += [("position_ids", value, POSITIONS) for value in BAD_POSITIONS]
    for name, value, bound in bad:
        if not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
            continue
        call = well_formed(op, device)
        call.args[name] = call.args[name].to(dtype)
        call.args[name][2] = value
        call.remember()
        monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
        with pytest.raises(RuntimeError) as caught:
            call.raw()
        text = next(line for line in str(caught.value).splitlines() if line.startswith("abiding::"))
        for part in (f"abiding::{op.removesuffix('.out')}", f"{name}[2]", f"{value}", f"{bound}", "expected"):
            assert part in text, (part, text)
        if op != QUANT:
            call.assert_untouched()
        with pytest.raises((RuntimeError, ValueError), match=rf"{PUBLIC_NAMES[name]}.*2.*{value}|{name}.*2.*{value}"):
            call.public()
        for off in ("0", ""):
            monkeypatch.setenv("ABIDING_CHECK_INDICES", off)
            call.raw()


@pytest.mark.parametrize("op", SPOILS)
def test_checked_indices_accept_what_is_legal(op: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
    call = well_formed(op, device)
    call.args["slot_mapping"][:] = torch.tensor([-1, -(1 << 63), PAGES * BLOCK_SIZE - 1, 0])
    if op != GATHER:
        call.args["position_ids"][:] = torch.tensor([0, POSITIONS - 1, 3, 3])
    call.raw()
    call.check()


# --- fuzz -------------------------------------------------------------------------------------------------------------


READ_ONLY = {"q_in", "kv", "slot_mapping", "position_ids", "cos_sin_cache", "fp8_scale", "q_fp8_scale_inv"}


def random_spoil(call: Call, rng: random.Random) -> None:
    """Change some arguments of a call to other values, accepted or not."""
    for name in rng.sample(list(call.args), rng.choice([1, 1, 2, 4]) if len(call.args) >= 4 else 1):
        value = call.args[name]
        if isinstance(value, bool):
            call.args[name] = not value
        elif isinstance(value, float):
            call.args[name] = rng.choice([0.0, -0.0, -1.0, 1e-45, 1e300, float("nan"), float("inf"), 1.0])
        elif isinstance(value, int):
            extremes = [
                0,
                -1,
                1,
                2,
                value + 1,
                value - 1,
                64,
                1 << 20,
                1 << 31,
                1 << 32,
                1 << 40,
                1 << 54,
                (1 << 63) - 1,
                -(1 << 63),
            ]
            # An output of 2^20 heads would be accepted, and takes gigabytes.
            call.args[name] = rng.choice(
                [e for e in extremes if name != "q_head_padded" or e < 1 << 10 or e >= 1 << 40]
            )
        else:
            call.args[name] = random_view(value, rng)


def random_view(x: Tensor, rng: random.Random) -> Tensor:
    def view_as(dtype: torch.dtype) -> Tensor:
        return x.view(dtype) if x.is_contiguous() and x.dim() and x.shape[-1] % dtype.itemsize == 0 else x.to(dtype)

    changes: list[Callable[[], Tensor]] = [
        lambda: x[:0],
        lambda: x[: x.shape[0] // 2],
        lambda: x[1:],
        lambda: x[::2],
        lambda: x[..., :-1],
        lambda: x[..., ::2],
        lambda: x[..., 1:],
        lambda: x.unsqueeze(0),
        lambda: x.unsqueeze(-1),
        lambda: x.flatten(),
        lambda: x.transpose(0, -1),
        lambda: x.flip(0),
        lambda: x[:1].expand_as(x),
        lambda: x.new_zeros(()),
        lambda: x.new_zeros(0),
        lambda: x.new_zeros((*x.shape, 0)),
        lambda: torch.cat([x, x]),
        lambda: view_as(
            rng.choice([torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.bool])
        ),
        lambda: x.to(torch.complex64) if x.is_floating_point() and x.element_size() > 1 else x.to(torch.int16),
        lambda: x.to("meta"),
        lambda: x.as_strided(x.shape, [0] * x.dim(), x.storage_offset()),
        lambda: x.to_sparse() if x.dim() == 1 and x.is_floating_point() and x.element_size() > 1 else x,
    ]
    try:
        return rng.choice(changes)()
    except (RuntimeError, IndexError, ValueError):
        return x


def assert_as_the_reference(call: Call) -> None:
    """Compare what a call wrote with what the reference writes for the same arguments."""
    a = {PUBLIC_NAMES.get(name, name): value for name, value in call.args.items()}
    api = reference.mla_prologue
    if call.op == GATHER:
        expected = api.gather_kv(a["cache"], a["slots"], block_size=a["block_size"], dtype=a["out"].dtype)
        assert_close(a["out"], expected, name="out")
        return
    given = call.guards["k_cache"]
    before = GuardedTensor(given.tensor, call.before["k_cache"], given.start).clone()
    inputs = [a["kv"], before.tensor, a["slots"], a["positions"], a["cos_sin"]]
    if call.op == INSERT:
        api.insert_kv(*inputs, block_size=a["block_size"])
    elif call.op == BF16:
        api.qnorm_rope_full_cache_bf16_insert(a["q"].clone(), *inputs, eps=a["eps"])
    elif call.op == FP8:
        scales = {"kv_scale": a["kv_scale"], "q_scale_inv": a["q_scale_inv"], "eps": a["eps"]}
        api.qnorm_rope_full_cache_fp8_insert(a["q"], *inputs, **scales)
    else:
        flags = {name: a[name] for name in ("apply_q_norm", "apply_q_rope") if name in a}
        expected = api.qnorm_rope_kv_insert(a["q"], *inputs, block_size=a["block_size"], eps=a["eps"], **flags)
        if "out" in a:
            assert_close(a["out"][:, : expected.shape[1]], expected, ulps=1, atol=1e-5, name="out")
    assert_bitwise_equal(given.storage, before.storage, "cache, with what lies around it")


@pytest.mark.parametrize("op", SPOILS)
def test_fuzz(op: str) -> None:
    """Thousands of calls, half of them spoiled: no crash, every error is ours, no byte outside of a tensor changes."""
    rng = random.Random(op)
    refused = 0
    for step in range(2400):
        call = well_formed(op, rng=rng)
        spoil = step % 2 == 1
        if spoil:
            random_spoil(call, rng)
        call.remember()
        try:
            call.raw()
        except (RuntimeError, NotImplementedError) as error:
            refused += 1
            text = str(error)
            if not spoil or not re.search(r"abiding::\w+: .+; expected .+|Could not run 'abiding::", text):
                pytest.fail(f"step {step}: {text}")
            call.assert_untouched()
            continue
        call.check()
        for name in READ_ONLY & set(call.guards):
            assert_bitwise_equal(
                call.guards[name].storage, call.before[name], f"step {step}: {name}, which is only read,"
            )
        if not spoil and step % 10 == 0:
            assert_as_the_reference(call)
    assert 500 < refused < 1200


def test_fuzz_of_index_contents() -> None:
    """Random bits in slots and positions: rows out of range are skipped, as in the reference."""
    rng = random.Random(5)
    for step in range(300):
        case = PrologueCase(
            rng.randint(0, 12),
            2,
            block_size=rng.choice([1, 2, 5]),
            wild=0.7,
            skipped=0.3 * rng.random(),
            max_position=3,
        )
        ours = case.make("cpu", seed=step)
        theirs = ours.clone()
        out = ours.run(mla_prologue)
        theirs.run(reference.mla_prologue)
        ours.check()
        assert_bitwise_equal(ours.storage, theirs.storage, f"step {step}: cache")
        lost = (ours.positions < 0) | (ours.positions >= 3)
        assert bool(out[lost].isnan().all())
        assert not bool(out[~lost].isnan().any())
