"""DeepSeek V4's fused MLA prologue, in plain PyTorch.

Arithmetic on Q is float64 (:func:`qnorm_rope` returns it unrounded). Cache bytes are a format that others read, so
their arithmetic is specified to the last rounding: RoPE is two fused multiply-adds in float32, K is rounded to its own
dtype, and scales follow the integer rule of :func:`quant_block_exponent`.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_DIM, ROPE_DIM = 512, 64
NOPE_DIM = HEAD_DIM - ROPE_DIM
QUANT_BLOCK = 64  # values per scale
TOKEN_DATA_BYTES = 576  # 448 e4m3 values and 64 RoPE values of 16 bits
TOKEN_SCALE_BYTES = 8  # 7 UE8M0 codes and a zero
MIN_EXPONENT = -22  # the scale exponent of quantization blocks with amax <= 1e-4


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
    """Q: RMSNorm, RoPE. KV: RoPE, quantize, insert. As :func:`abiding.mla_prologue.qnorm_rope_kv_insert`."""
    tokens, heads, _ = q.shape
    normed = qnorm_rope(q, positions, cos_sin, eps=eps, apply_q_norm=apply_q_norm, apply_q_rope=apply_q_rope)
    insert_kv(kv, cache, slots, positions, cos_sin, block_size=block_size)
    if out is None:
        out = q.new_empty(tokens, heads if padded_heads is None else padded_heads, HEAD_DIM)
    out[:, :heads] = normed.to(q.dtype)
    if zero_padding:
        out[:, heads:] = 0
    return out


def insert_kv(kv: Tensor, cache: Tensor, slots: Tensor, positions: Tensor, cos_sin: Tensor, *, block_size: int) -> None:
    """Apply RoPE to KV rows, quantize and insert them. As :func:`abiding.mla_prologue.insert_kv`."""
    tokens, slots, position = _inserted(slots, positions, cos_sin, capacity=cache.shape[0] * block_size)
    rounded = round_row(rotate(kv[tokens].float(), position, cos_sin), kv.dtype)
    codes, values = quantize(rounded[:, :NOPE_DIM].float())
    token_data = torch.cat([values, rounded[:, NOPE_DIM:].contiguous().view(torch.uint8)], dim=1)
    data, scales = _record_views(cache, block_size)
    page, index = slots // block_size, slots % block_size
    data[page, index] = token_data
    scales[page, index] = torch.nn.functional.pad(codes, (0, 1))


def gather_kv(cache: Tensor, slots: Tensor, *, block_size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gather and dequantize cache rows. As :func:`abiding.mla_prologue.gather_kv`."""
    slots = slots.long()
    present = (slots >= 0) & (slots < cache.shape[0] * block_size)
    data, scales = _record_views(cache, block_size)
    page, index = slots[present] // block_size, slots[present] % block_size
    token_data, codes = data[page, index], scales[page, index][:, : NOPE_DIM // QUANT_BLOCK]
    nope = token_data[:, :NOPE_DIM].view(torch.float8_e4m3fn).double().unflatten(1, (-1, QUANT_BLOCK))
    scale = torch.where(codes == 255, torch.nan, torch.exp2(codes.double() - 127))
    out = torch.zeros(len(slots), HEAD_DIM, dtype=dtype, device=cache.device)
    out[present] = torch.cat(
        [(nope * scale[..., None]).flatten(1).float().to(dtype), token_data[:, NOPE_DIM:].contiguous().view(dtype)],
        dim=1,
    )
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
    """Q in place, and KV into a bfloat16 cache. As :func:`abiding.mla_prologue.qnorm_rope_full_cache_bf16_insert`."""
    q.copy_(qnorm_rope(q, positions, cos_sin, eps=eps))
    pages, block_size, _ = cache.shape
    tokens, slots, position = _inserted(slots, positions, cos_sin, capacity=pages * block_size)
    cache[slots // block_size, slots % block_size] = round_row(rotate(kv[tokens].float(), position, cos_sin), kv.dtype)


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
    """Q to e4m3, and KV into an e4m3 cache. As :func:`abiding.mla_prologue.qnorm_rope_full_cache_fp8_insert`."""
    encoded = encode_e4m3((qnorm_rope(q, positions, cos_sin, eps=eps) * q_scale_inv.double()).float())
    pages, block_size, _ = cache.shape
    tokens, slots, position = _inserted(slots, positions, cos_sin, capacity=pages * block_size)
    row = rotate(kv[tokens].float(), position, cos_sin) * kv_scale.float().reciprocal()
    cache.view(torch.uint8)[slots // block_size, slots % block_size] = encode_e4m3(row)
    if out is None:
        out = torch.empty(q.shape, dtype=torch.float8_e4m3fn, device=q.device)
    out.view(torch.uint8).copy_(encoded)
    return out


def qnorm_rope(
    q: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    *,
    eps: float,
    apply_q_norm: bool = True,
    apply_q_rope: bool = True,
) -> Tensor:
    """RMSNorm per head, without a weight, and RoPE of Q[T, H, 512], in float64 and not yet rounded."""
    x = q.double()
    if apply_q_norm:
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    if apply_q_rope:
        valid = (positions >= 0) & (positions < len(cos_sin))
        x = x.masked_fill(~valid[:, None, None], torch.nan)
        if len(cos_sin):
            position = torch.where(valid, positions, 0).long()
            x = rotate(x, position[:, None].expand(q.shape[:2]), cos_sin)
    return x


def rotate(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Interleaved (GPT-J style) RoPE of the last 64 of 512 dimensions, with the row of ``cos_sin`` at each position.

    In float32: ``fma(e, c, -(o * s))`` and ``fma(e, s, o * c)``. float64 holds the product of two float32 numbers
    exactly, so each fma is one float64 addition, rounded to float32.
    """
    cos, sin = cos_sin[positions.long()].to(x.dtype).chunk(2, dim=-1)
    even, odd = x[..., NOPE_DIM::2], x[..., NOPE_DIM + 1 :: 2]
    wide_even = even.double() * cos.double() - (odd * sin).double()
    wide_odd = even.double() * sin.double() + (odd * cos).double()
    rotated = torch.stack([wide_even, wide_odd], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([x[..., :NOPE_DIM], rotated], dim=-1)


def round_row(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 row rounded to nearest even, with every NaN as the positive quiet NaN (0x7FC0, in float16 0x7E00)."""
    return torch.where(x.isnan(), torch.tensor(torch.nan, dtype=dtype, device=x.device), x.to(dtype))


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """UE8M0 codes [n, 7] and e4m3 bytes [n, 448] of float32 values [n, 448], one scale per 64 values."""
    blocks = x.unflatten(1, (-1, QUANT_BLOCK))
    exponent = quant_block_exponent(torch.where(blocks.isnan(), 0, blocks).abs().amax(-1))
    scaled = blocks.double() * torch.exp2(-exponent.double())[..., None]
    return (exponent + 127).to(torch.uint8), encode_e4m3(scaled.float()).flatten(1)


def quant_block_exponent(amax: Tensor) -> Tensor:
    """The smallest e >= -22 with amax <= 448 * 2^e, from the bits of a float32 amax; an infinite one counts as 2^128.

    It is ceil(log2(max(amax, 1e-4) / 448)) without a logarithm: 448 = 1.75 * 2^8.
    """
    bits = amax.float().contiguous().view(torch.int32)
    return ((bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).int()).clamp(min=MIN_EXPONENT)


def encode_e4m3(x: Tensor) -> Tensor:
    """Bytes of float8 e4m3fn: round to nearest even, saturate at +-448, NaN to 0x7F."""
    encoded = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(x.isnan(), 0x7F, encoded)


def _inserted(slots: Tensor, positions: Tensor, cos_sin: Tensor, *, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens whose KV is inserted, with their slots and positions."""
    slots, positions = slots.long(), positions[: len(slots)].long()
    keep = (slots >= 0) & (slots < capacity) & (positions >= 0) & (positions < len(cos_sin))
    return keep.nonzero()[:, 0], slots[keep], positions[keep]


def _record_views(cache: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Views of a cache [pages, ...]: token data [pages, block_size, 576] and scale codes [pages, block_size, 8]."""
    pages, stride, offset = cache.shape[0], cache.stride(0), cache.storage_offset()
    data = cache.as_strided((pages, block_size, TOKEN_DATA_BYTES), (stride, TOKEN_DATA_BYTES, 1), offset)
    scales_offset = offset + block_size * TOKEN_DATA_BYTES
    shape, strides = (pages, block_size, TOKEN_SCALE_BYTES), (stride, TOKEN_SCALE_BYTES, 1)
    return data, cache.as_strided(shape, strides, scales_offset)
