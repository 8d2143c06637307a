"""DeepSeek V4's fused MLA prologue: what stands between the projections and sparse attention, in one launch.

For each token: every head of Q gets RMSNorm without weight and RoPE on its last 64 dimensions; the (already
normalised) KV row gets the same RoPE, is quantised to e4m3 with one UE8M0 scale for 64 values, and goes to its slot
of a paged cache.

A cache is ``uint8[pages, ...]`` whose pages lie ``cache.stride(0)`` bytes apart. A page of ``block_size`` tokens
begins with ``block_size`` records of 576 bytes (448 e4m3 values, then 64 RoPE values of 16 bits), followed by
``block_size`` groups of 8 bytes (7 UE8M0 codes and a zero): 584 bytes a token. Bytes behind those are never touched.
This is the record that FlashMLA reads for DeepSeek V4 ("MODEL1", ``fp8_ds_mla`` in vLLM).

Indices that only the device knows never lead outside the tensors: a row whose slot is negative or too large is not
inserted, a row whose position lies outside ``cos_sin`` is not inserted and its Q is NaN. ``ABIDING_CHECK_INDICES=1``
turns those (negative slots aside) into errors, at the price of a synchronisation on a GPU.

All functions accept bfloat16 and float16 rows, int32 and int64 indices, CPU and CUDA tensors (compute capability >=
8.0), work under ``torch.compile(fullgraph=True)`` and in CUDA graphs, and launch on the current stream. None is
differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abiding._api import call, check_shape, check_tensor
from abiding._fakes import register_fake, writes_in_place

HEAD_DIM = 512
ROPE_DIM = 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
TOKEN_BYTES = 584  # a token's share of a cache page

_ops = torch.ops.abiding
_PUBLIC_NAMES = {
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


def page_bytes(block_size: int, multiple: int = 576) -> int:
    """Bytes of a cache page for ``block_size`` tokens, rounded up to ``multiple`` (576 is what FlashMLA asks for)."""
    return -(-block_size * TOKEN_BYTES // multiple) * multiple


def qnorm_rope_kv_insert(
    q: Tensor,
    kv: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    block_size: int,
    eps: float = 1e-6,
    padded_heads: int | None = None,
    apply_q_norm: bool = True,
    apply_q_rope: bool = True,
    zero_padding: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    r"""Normalise and rotate Q; rotate, quantise and insert KV, in one launch.

    With :math:`r = 1/\sqrt{\mathrm{mean}(x^2) + \epsilon}` a head ``x`` of Q becomes ``rope(x * r)``, in float32,
    rounded once. A KV row becomes ``rope(kv)`` rounded to its dtype; its first 448 values are quantised in blocks of
    64 with ``scale = 2^ceil(log2(max(amax, 1e-4) / 448))``, its last 64 are stored as they are.

    Args:
        q: ``[T, H, 512]`` bfloat16 or float16, rows dense and 16-byte aligned, any row strides. Not modified unless
            ``out`` is q.
        kv: ``[T, 512]`` of q's dtype, already normalised.
        cache: ``uint8[pages, ...]`` as in the module's description, written in place; 8-byte aligned, page stride >=
            584 * block_size.
        slots: ``[T' <= T]`` int32 or int64: ``page * block_size + index``; rows with a negative slot and rows from T'
            on are not inserted.
        positions: ``[T]`` int32 or int64, rows of ``cos_sin``.
        cos_sin: ``[P, 64]`` float32, 32 cosines and then 32 sines for each position; pair j is
            ``(x[448 + 2j], x[449 + 2j])``.
        block_size: tokens of a cache page.
        eps: added to the mean square, inside the root.
        padded_heads: heads of the result, >= H; the added ones are zero. Default H.
        apply_q_norm: normalise Q; off where the norm is folded in elsewhere.
        apply_q_rope: rotate Q.
        zero_padding: write the zeros of the padding heads; False skips those bytes where ``out`` holds zeros already.
        out: ``[T, padded_heads, 512]`` of q's dtype to write to, possibly q itself. Default a new tensor.

    Returns:
        ``out``, or a new tensor ``[T, padded_heads, 512]``.

    Raises:
        TypeError: an argument has a dtype that is not accepted, or is not a tensor.
        ValueError: an argument's device, shape, strides, alignment or value is not accepted.
    """
    function = "qnorm_rope_kv_insert"
    check_shape(function, "q", q, ("T", "H", HEAD_DIM))
    if out is not None:
        check_shape(
            function, "out", out, (q.size(0), "padded_heads" if padded_heads is None else padded_heads, HEAD_DIM)
        )
    else:
        padded_heads = q.size(1) if padded_heads is None else padded_heads
        if not q.size(1) <= padded_heads < 2**31:
            raise ValueError(
                f"{function}: padded_heads is {padded_heads}; expected at least the {q.size(1)} heads of q, below 2^31"
            )
        out = q.new_empty(q.size(0), padded_heads, HEAD_DIM)
    call(
        function,
        _PUBLIC_NAMES,
        _ops.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out,
        q,
        kv,
        cache,
        slots,
        positions,
        cos_sin,
        eps,
        block_size,
        apply_q_norm,
        apply_q_rope,
        zero_padding,
        out=out,
    )
    return out


def insert_kv(kv: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor, *, block_size: int) -> None:
    """The KV side of :func:`qnorm_rope_kv_insert` alone: rotate, quantise and insert rows.

    Args:
        kv: ``[T, 512]`` bfloat16 or float16, already normalised.
        cache: ``uint8[pages, ...]``, written in place.
        slots: ``[T' <= T]`` int32 or int64.
        positions: ``[T]`` int32 or int64.
        cos_sin: ``[P, 64]`` float32.
        block_size: tokens of a cache page.

    Raises:
        TypeError, ValueError: as :func:`qnorm_rope_kv_insert`.
    """
    op = _ops.fused_deepseek_v4_kv_rope_quant_insert.default
    call("insert_kv", _PUBLIC_NAMES, op, kv, cache, slots, positions, cos_sin, block_size)


def gather_kv(cache: Tensor, slots: Tensor, *, block_size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Read cache rows back: ``e4m3 * 2^(code - 127)`` rounded to ``dtype``, then the 64 RoPE values.

    Args:
        cache: ``uint8[pages, ...]`` as :func:`insert_kv` wrote it.
        slots: ``[n]`` int32 or int64; rows of slots that are negative or too large come back as zeros.
        block_size: tokens of a cache page.
        dtype: bfloat16 or float16, the dtype that the rows were inserted with.

    Returns:
        ``[n, 512]`` of ``dtype``. A block whose code is 255, and a value whose byte is 0x7F or 0xFF, read as NaN.

    Raises:
        TypeError, ValueError: as :func:`qnorm_rope_kv_insert`.
    """
    check_tensor("gather_kv", "cache", cache)
    check_shape("gather_kv", "slots", slots, ("n",))
    if dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"gather_kv: dtype is {dtype}; expected torch.bfloat16 or torch.float16")
    out = torch.empty(slots.size(0), HEAD_DIM, dtype=dtype, device=cache.device)
    call("gather_kv", _PUBLIC_NAMES, _ops.deepseek_v4_gather_kv.default, cache, slots, block_size, out=out)
    return out


def qnorm_rope_full_cache_bf16_insert(
    q: Tensor,
    kv: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    eps: float = 1e-6,
) -> None:
    """Normalise and rotate Q in place; rotate KV and insert it unquantised.

    Args:
        q: ``[T, H, 512]`` bfloat16, rewritten in place.
        kv: ``[T, 512]`` bfloat16, already normalised.
        cache: ``bfloat16[pages, block_size, 512]``, rows dense, any page and row strides.
        slots, positions, cos_sin, eps: as :func:`qnorm_rope_kv_insert`.

    Raises:
        TypeError, ValueError: as :func:`qnorm_rope_kv_insert`.
    """
    op = _ops.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert.default
    check_shape("qnorm_rope_full_cache_bf16_insert", "cache", cache, ("pages", "block_size", HEAD_DIM))
    call(
        "qnorm_rope_full_cache_bf16_insert",
        _PUBLIC_NAMES,
        op,
        q,
        kv,
        cache,
        slots,
        positions,
        cos_sin,
        eps,
        cache.size(1),
    )


def qnorm_rope_full_cache_fp8_insert(
    q: Tensor,
    kv: Tensor,
    cache: Tensor,
    slots: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    kv_scale: Tensor,
    q_scale_inv: Tensor,
    eps: float = 1e-6,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise and rotate Q to e4m3; rotate KV and insert it as e4m3, each with one scale for the whole tensor.

    Both are rounded once, from float32: Q after ``* q_scale_inv``, KV after ``* (1 / kv_scale)``; both saturate at
    +-448.

    Args:
        q: ``[T, H, 512]`` bfloat16 or float16.
        kv: ``[T, 512]`` of q's dtype, already normalised.
        cache: ``float8_e4m3fn`` or ``uint8`` ``[pages, block_size, 512]``, rows dense, any page and row strides.
        slots, positions, cos_sin, eps: as :func:`qnorm_rope_kv_insert`.
        kv_scale: one float32 on the device, what a cached value is multiplied with when it is read.
        q_scale_inv: one float32 on the device, what Q is multiplied with.
        out: ``float8_e4m3fn`` or ``uint8`` ``[T, H, 512]`` to write to. Default a new float8_e4m3fn tensor.

    Returns:
        ``out``, or a new tensor ``float8_e4m3fn[T, H, 512]``.

    Raises:
        TypeError, ValueError: as :func:`qnorm_rope_kv_insert`.
    """
    function = "qnorm_rope_full_cache_fp8_insert"
    check_shape(function, "q", q, ("T", "H", HEAD_DIM))
    check_shape(function, "cache", cache, ("pages", "block_size", HEAD_DIM))
    if out is None:
        out = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    op = _ops.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert.default
    call(
        function,
        _PUBLIC_NAMES,
        op,
        q,
        kv,
        out,
        cache,
        slots,
        positions,
        cos_sin,
        kv_scale,
        q_scale_inv,
        eps,
        cache.size(1),
    )
    return out


def _quant_insert_result(
    q_in: Tensor,
    kv: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
) -> Tensor:
    return q_in.new_empty(q_in.size(0), q_head_padded, HEAD_DIM)


register_fake("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert", _quant_insert_result)
register_fake("fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert.out", writes_in_place)
register_fake("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert", writes_in_place)
register_fake("fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert", writes_in_place)
register_fake("fused_deepseek_v4_kv_rope_quant_insert", writes_in_place)
register_fake("deepseek_v4_gather_kv", writes_in_place)
