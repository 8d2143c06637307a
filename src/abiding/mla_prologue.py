"""DeepSeek V4's fused MLA prologue: the steps between the projections and sparse attention, in one launch.

For each token, every head of Q gets RMSNorm without a weight, and RoPE on its last 64 dimensions. The KV row, which is
already normalized, gets the same RoPE, is quantized to e4m3 with one UE8M0 scale per quantization block of 64 values,
and is inserted into its slot of a paged cache.

A cache is ``uint8[pages, ...]`` with ``cache.stride(0)`` bytes from page to page. Each token has a record of 584 bytes:
576 bytes of data (448 e4m3 values, then 64 RoPE values of 16 bits) and 8 bytes of scales (7 UE8M0 codes and a zero). A
page of ``block_size`` tokens holds the data of all its tokens first, then the scales of all. Bytes of a page beyond
``584 * block_size`` are never written. FlashMLA reads this record for DeepSeek V4 ("MODEL1"); vLLM calls it
``fp8_ds_mla``.

Slots and positions, whose values only the device knows, never lead outside of the tensors. A row whose slot is negative
or too large is not inserted. A row whose position lies outside of ``cos_sin`` is not inserted, and its Q is NaN.
``ABIDING_CHECK_INDICES=1`` turns these cases (negative slots excepted) into errors, which costs a synchronization on a
GPU.

All functions accept bfloat16 and float16 rows, int32 and int64 indices, and CPU and CUDA tensors (compute capability >=
8.0). They work under ``torch.compile(fullgraph=True)`` and in CUDA graphs, and launch on the current stream. None is
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
RECORD_BYTES = 584  # per token in a cache page: 576 bytes of data, 8 of scales

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
    """Bytes of a cache page of ``block_size`` tokens, rounded up to ``multiple`` (FlashMLA requires 576)."""
    return -(-block_size * RECORD_BYTES // multiple) * multiple


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
    r"""Apply RMSNorm and RoPE to Q; apply RoPE to KV, quantize and insert it; in one launch.

    With :math:`r = 1/\sqrt{\mathrm{mean}(x^2) + \epsilon}`, a head ``x`` of Q becomes ``rope(x * r)``, computed in
    float32 and rounded once. A KV row becomes ``rope(kv)``, rounded to its dtype. Its first 448 values are quantized in
    quantization blocks of 64 with ``scale = 2^ceil(log2(max(amax, 1e-4) / 448))``; its last 64 are stored unquantized.

    Args:
        q: ``[T, H, 512]`` bfloat16 or float16; rows are dense and, on a GPU, 16-byte aligned, with any row strides. Not
            modified unless ``out`` is q.
        kv: ``[T, 512]`` of q's dtype, already normalized.
        cache: ``uint8[pages, ...]`` as described above, written in place; on a GPU 8-byte aligned; with a page stride
            of at least 584 * block_size.
        slots: ``[T' <= T]`` int32 or int64: ``page * block_size + index in the page``. Rows with a negative slot, and
            rows from T' on, are not inserted.
        positions: ``[T]`` int32 or int64, rows of ``cos_sin``.
        cos_sin: ``[P, 64]`` float32; per position 32 cosines, then 32 sines. Pair j is ``(x[448 + 2j], x[449 + 2j])``.
        block_size: tokens per cache page.
        eps: added to the mean square.
        padded_heads: heads of the result, >= H; the added ones are zero. Default H.
        apply_q_norm: apply RMSNorm to Q; turn it off if the norm was applied elsewhere.
        apply_q_rope: apply RoPE to Q.
        zero_padding: write the zeros of the padding heads. False leaves them as they are, for an ``out`` that already
            holds zeros there.
        out: ``[T, padded_heads, 512]`` of q's dtype to write to; may be q itself. Default a new tensor.

    Returns:
        ``out``, or a new tensor ``[T, padded_heads, 512]``.

    Raises:
        TypeError: the dtype of an argument is not accepted, or an argument is not a tensor.
        ValueError: the device, shape, strides, alignment or value of an argument is not accepted.
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
    """The KV side of :func:`qnorm_rope_kv_insert` alone: apply RoPE, quantize, insert.

    Args:
        kv: ``[T, 512]`` bfloat16 or float16, already normalized.
        cache: ``uint8[pages, ...]``, written in place.
        slots: ``[T' <= T]`` int32 or int64.
        positions: ``[T]`` int32 or int64.
        cos_sin: ``[P, 64]`` float32.
        block_size: tokens per cache page.

    Raises:
        TypeError, ValueError: as :func:`qnorm_rope_kv_insert`.
    """
    op = _ops.fused_deepseek_v4_kv_rope_quant_insert.default
    call("insert_kv", _PUBLIC_NAMES, op, kv, cache, slots, positions, cos_sin, block_size)


def gather_kv(cache: Tensor, slots: Tensor, *, block_size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gather and dequantize cache rows: ``e4m3 * 2^(code - 127)`` rounded to ``dtype``, then the 64 RoPE values.

    Args:
        cache: ``uint8[pages, ...]`` as :func:`insert_kv` wrote it.
        slots: ``[n]`` int32 or int64. Rows of slots that are negative or too large are zeros.
        block_size: tokens per cache page.
        dtype: bfloat16 or float16; the dtype of the rows that were inserted.

    Returns:
        ``[n, 512]`` of ``dtype``. Quantization blocks with code 255, and bytes 0x7F and 0xFF, read as NaN.

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
    """Apply RMSNorm and RoPE to Q in place; apply RoPE to KV and insert it unquantized.

    Args:
        q: ``[T, H, 512]`` bfloat16, updated in place.
        kv: ``[T, 512]`` bfloat16, already normalized.
        cache: ``bfloat16[pages, block_size, 512]``, with dense rows and any page and row strides.
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
    """Apply RMSNorm and RoPE to Q, RoPE to KV; quantize both to e4m3 with one scale per tensor, and insert KV.

    Both are rounded once, from float32: Q after ``* q_scale_inv``, KV after ``* (1 / kv_scale)``. Both saturate at
    +-448.

    Args:
        q: ``[T, H, 512]`` bfloat16 or float16.
        kv: ``[T, 512]`` of q's dtype, already normalized.
        cache: ``float8_e4m3fn`` or ``uint8`` ``[pages, block_size, 512]``, with dense rows, any page and row strides.
        slots, positions, cos_sin, eps: as :func:`qnorm_rope_kv_insert`.
        kv_scale: one float32 on the device; readers multiply cached values by it.
        q_scale_inv: one float32 on the device; Q is multiplied by it.
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
