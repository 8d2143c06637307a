"""MXFP8 mixture of experts, in plain PyTorch.

Codes and bytes are a format, so the quantizer is specified to the bit: codes follow the integer rule of
:func:`scale_code`, and scaling by a power of two is exact in float64; so is :func:`rebase`. Sums are float64, rounded
where the kernels round; ``out_dtype=torch.float64`` leaves the result of a GEMM unrounded, and :func:`layer` that of a
whole layer. ``compute="fp8"`` has float32 roundings of its own, which :func:`fp8_product` spells out.

Rows of no expert are zero in a new tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

BLOCK = 32  # elements per scale block
TILE_ROWS = 128  # rows per tile of scales

Activation = Literal["silu", "swiglu_oai", "none"]
Mode = Literal["w8a8", "w8a16", "fp8"]
Compute = Literal["exact", "fp8"]


class MXFP8(NamedTuple):
    """Quantized rows. As :class:`abiding.mxfp8_moe.MXFP8`."""

    data: Tensor
    scales: Tensor


class Rebased(NamedTuple):
    """What a rebase did. As :class:`abiding.mxfp8_moe.Rebased`."""

    changed: Tensor
    left: Tensor
    rms: Tensor
    worst_row: Tensor
    worst_rms: Tensor


def quantize(
    x: Tensor, expert_offsets: Tensor | None = None, *, offs: Tensor | None = None, rowwise: bool = False
) -> MXFP8:
    """Quantize rows, with the scales of each expert in whole tiles. As :func:`abiding.mxfp8_moe.quantize`."""
    m, k = x.shape
    spans = list(_spans(m, expert_offsets, offs))
    scale_rows = (m + (TILE_ROWS - 1) * len(spans)) // TILE_ROWS * TILE_ROWS
    data = torch.zeros(m, k, dtype=torch.uint8, device=x.device)
    scales = torch.zeros(scale_rows, -(-k // BLOCK // 4) * 4, dtype=torch.uint8, device=x.device)
    begin = 0
    for span, end in _scale_ends(spans):
        if end <= scale_rows:
            data[span], codes = quantize_rows(x[span], rowwise)
            scales[begin:end] = swizzle_scales(codes)
        begin = end
    return MXFP8(data.view(torch.float8_e4m3fn), scales)


def round(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Quantize rows and dequantize them again. As :func:`abiding.mxfp8_moe.round`."""
    result = dequantize(*quantize_rows(x))
    return result if out is None else out.copy_(result)


def grouped_mm(
    a: MXFP8 | Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    expert_offsets: Tensor | None = None,
    *,
    offs: Tensor | None = None,
    compute: Compute = "exact",
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Grouped GEMM of each expert's rows with its weights. As :func:`abiding.mxfp8_moe.grouped_mm`."""
    if compute == "fp8" and isinstance(a, Tensor):
        a = quantize(a, expert_offsets, offs=offs, rowwise=True)
    data, scales = (a, None) if isinstance(a, Tensor) else (a.data, a.scales.view(torch.uint8))
    weight = by_rows(weight)
    experts, n, k = weight.shape
    weight_scale = weight_scale.view(torch.uint8).reshape(experts, -(-n // TILE_ROWS) * TILE_ROWS, -1)
    if out is None:
        out = torch.zeros(len(data), n, dtype=out_dtype, device=data.device)
    begin = 0
    for expert, (span, end) in enumerate(_scale_ends(_spans(len(data), expert_offsets, offs))):
        rows, w, w_codes = data[span], weight[expert], unswizzle_scales(weight_scale[expert], n, k)
        codes = torch.full((len(rows), k // BLOCK), 255, dtype=torch.uint8, device=data.device)
        if scales is not None and len(rows) and end <= scales.numel() // scales.shape[-1]:
            codes = unswizzle_scales(scales.reshape(-1, scales.shape[-1])[begin:end], len(rows), k)
        begin = end
        if compute == "fp8":
            out[span] = fp8_product(rows, codes, w, w_codes).to(out.dtype)
            continue
        if scales is not None:
            rows = dequantize(rows, codes)
        out[span] = (rows.double() @ dequantize(w, w_codes).double().T).to(out.dtype)
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    out: Tensor | None = None,
    mode: Mode = "w8a16",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A dense layer. As :func:`abiding.mxfp8_moe.linear`."""
    rows = x.reshape(-1, x.size(-1))
    rows = round(rows) if mode == "w8a8" else rows
    dtype = out_dtype or torch.bfloat16 if out is None else out.dtype
    result = grouped_mm(rows, weight[None], scale, compute="fp8" if mode == "fp8" else "exact", out_dtype=dtype)
    result = result.reshape(*x.shape[:-1], len(weight))
    return result if out is None else out.copy_(result)


def moe(
    x: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: Activation = "silu",
    mode: Mode = "w8a8",
    expert_map: Tensor | None = None,
    global_experts: int | None = None,
    swiglu_alpha: float = 1.702,
    swiglu_beta: float = 1.0,
    swiglu_limit: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """An MoE layer. As :func:`abiding.mxfp8_moe.moe`."""
    exact = layer(
        x,
        w13,
        s13,
        w2,
        s2,
        local_ids(topk_ids, expert_map),
        topk_weights,
        activation=activation,
        mode=mode,
        swiglu_alpha=swiglu_alpha,
        swiglu_beta=swiglu_beta,
        swiglu_limit=swiglu_limit,
    )
    return exact.to(torch.bfloat16) if out is None else out.copy_(exact)


def layer(
    x: Tensor,
    w13: Tensor,
    s13: Tensor,
    w2: Tensor,
    s2: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: Activation,
    mode: Mode,
    swiglu_alpha: float = 1.702,
    swiglu_beta: float = 1.0,
    swiglu_limit: float | None = None,
) -> Tensor:
    """The top-k weighted sums of a layer in float64, unrounded; everything before them is rounded as in the kernels."""
    w13, w2 = by_rows(w13), by_rows(w2)
    rounded = round if mode == "w8a8" else torch.Tensor.clone
    compute: Compute = "fp8" if mode == "fp8" else "exact"
    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(len(w13)):
        token, j = (topk_ids == expert).nonzero(as_tuple=True)
        first, second = ((w[expert : expert + 1], s.reshape(len(w), -1)[expert]) for w, s in ((w13, s13), (w2, s2)))
        gate_up = grouped_mm(rounded(x[token]), *first, compute=compute)
        activated = rounded(activate(gate_up, activation, swiglu_alpha, swiglu_beta, swiglu_limit))
        down = grouped_mm(activated, *second, compute=compute)
        result.index_add_(0, token, topk_weights[token, j, None].double() * down)
    return result


def local_ids(ids: Tensor, expert_map: Tensor | None) -> Tensor:
    """The local expert of each id, or -1."""
    if expert_map is None:
        return ids
    known = (ids >= 0) & (ids < len(expert_map))
    return torch.where(known, expert_map.long()[torch.where(known, ids, 0).long()], -1)


def activate(
    x: Tensor,
    activation: Activation,
    swiglu_alpha: float = 1.702,
    swiglu_beta: float = 1.0,
    swiglu_limit: float | None = None,
) -> Tensor:
    """The activation of gate and up columns [n, 2 I], in float64, rounded to x's dtype: [n, I]. "none" returns x."""
    if activation == "none":
        return x
    gate, up = x.double().chunk(2, dim=1)
    if swiglu_limit is None and activation == "swiglu_oai":
        swiglu_limit = 7.0
    if swiglu_limit is not None:
        gate, up = gate.clamp(max=swiglu_limit), up.clamp(-swiglu_limit, swiglu_limit)
    if activation == "silu":
        return (gate / (1 + torch.exp(-gate)) * up).to(x.dtype)
    return (gate / (1 + torch.exp(-swiglu_alpha * gate)) * (up + swiglu_beta)).to(x.dtype)


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales in tiles, from plain scales. As :func:`abiding.mxfp8_moe.swizzle_scales`."""
    codes = scales.view(torch.uint8)
    rows, columns = codes.shape[-2:]
    padded_rows, padded_columns = -(-rows // TILE_ROWS) * TILE_ROWS, -(-columns // 4) * 4
    tiles = codes.new_zeros(*codes.shape[:-2], padded_rows * padded_columns)
    tiles[..., scale_offset(rows, columns, padded_columns).to(codes.device)] = codes
    return tiles.reshape(*codes.shape[:-2], padded_rows, padded_columns).view(scales.dtype)


def unswizzle_scales(scales: Tensor, n: int, k: int) -> Tensor:
    """Plain scales, from tiles. As :func:`abiding.mxfp8_moe.unswizzle_scales`."""
    codes = scales.view(torch.uint8)
    plain: Tensor = codes.flatten(-2)[..., scale_offset(n, k // BLOCK, codes.shape[-1]).to(codes.device)]
    return plain.view(scales.dtype)


def scale_offset(rows: int, columns: int, padded_columns: int) -> Tensor:
    """The byte offset of each code [rows, columns] in tiles of 128 rows by 4 codes."""
    r, c = torch.arange(rows)[:, None], torch.arange(columns)
    return (r // 128 * (padded_columns // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4


def rebase(weight: Tensor, scales: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor, Rebased]:
    """Give the scale blocks of each weight row one code. As :func:`abiding.mxfp8_moe.rebase`."""
    rows = (by_rows(weight) if weight.dim() == 3 else weight).view(torch.uint8)
    n, k = rows.shape[-2:]
    padded = (*rows.shape[:-2], -(-n // TILE_ROWS) * TILE_ROWS, -(-k // BLOCK // 4) * 4)
    tiles = scales.view(torch.uint8).reshape(padded)
    plain = unswizzle_scales(tiles, n, k)

    # Of each scale block [..., n, k / 32]: its code, and its largest byte. NaN bytes are zeros.
    magnitude = (rows & 0x7F).unflatten(-1, (-1, BLOCK)).int()
    largest = torch.where(magnitude == 0x7F, 0, magnitude).amax(-1)
    codes = plain.int()
    counts = (codes != 255) & (largest > 0)
    top = torch.where(counts, codes, 0).amax(-1, keepdim=True)
    differ = (codes != codes[..., :1]).any(-1, keepdim=True)
    # A shift is too far for a block if its largest byte would fall among the subnormals, whose last bits get lost.
    too_far = (counts & (top - codes >= (largest >> 3).clamp(min=1))).any(-1, keepdim=True)
    moved = differ & ~too_far & (codes != top)
    new_codes = torch.where(moved, top, codes).to(torch.uint8)

    shift = torch.where(moved, (top - codes).clamp(min=0), 0)[..., None].double()
    shifted = rows.view(torch.float8_e4m3fn).double().unflatten(-1, (-1, BLOCK)) * torch.exp2(-shift)
    shifted = torch.where((plain == 255)[..., None], torch.nan, shifted)
    data = shifted.float().to(torch.float8_e4m3fn).view(torch.uint8)
    data = torch.where(shifted.isnan(), 0x7F, data).flatten(-2)
    data = torch.where(moved.repeat_interleave(BLOCK, -1), data, rows)

    values, new_values = exact_values(rows, plain), exact_values(data, new_codes)
    error = (new_values - values).nan_to_num(0).flatten(0, -2).square()
    norm = values.nan_to_num(0).flatten(0, -2).square()
    by_row = (error.sum(-1) / norm.sum(-1)).nan_to_num(0).sqrt()
    worst = by_row.argmax() if by_row.numel() else torch.zeros((), dtype=torch.int64, device=rows.device)
    worst_rms = by_row[worst] if by_row.numel() else error.sum()
    report = Rebased(
        changed=(error != 0).sum(),
        left=(differ & too_far).sum(),
        rms=(error.sum() / norm.sum()).nan_to_num(0).sqrt(),
        worst_row=torch.where(worst_rms > 0, worst, -1),
        worst_rms=worst_rms,
    )
    codes = tiles.flatten(-2).clone()
    codes[..., scale_offset(n, k // BLOCK, padded[-1]).to(codes.device)] = new_codes
    new_scales = codes.view(scales.shape).view(scales.dtype)
    new_weight = data.view(weight.dtype)
    new_weight = new_weight if new_weight.shape == weight.shape else new_weight.transpose(1, 2)
    if inplace:
        weight.view(torch.uint8).copy_(new_weight.view(torch.uint8))
        scales.view(torch.uint8).copy_(new_scales.view(torch.uint8))
        return weight, scales, report
    return new_weight, new_scales, report


def fp8_product(rows: Tensor, codes: Tensor, weight: Tensor, weight_codes: Tensor) -> Tensor:
    """Rows [m, k] times weights [n, k] as FP8 tensor cores compute them, [m, n] float32.

    The sum of the products of bytes is a float32 (here its exact value rounded once; a tensor core adds with fewer
    bits), is multiplied by the scale of the row and rounded, then by that of the weight row and rounded.
    """
    a, w = (t.contiguous().view(torch.float8_e4m3fn).double() for t in (rows, weight))
    return (a @ w.T).float() * row_scale(codes)[:, None] * row_scale(weight_codes)


def row_scale(codes: Tensor) -> Tensor:
    """The float32 scale of each row of codes [n, k / 32]: NaN where they differ."""
    is_nan = (codes != codes[:, :1]).any(1) | (codes[:, 0] == 255)
    return torch.where(is_nan, torch.nan, torch.exp2(codes[:, 0].double() - 127)).float()


def exact_values(data: Tensor, codes: Tensor) -> Tensor:
    """e4m3 bytes [..., k] with codes [..., k / 32], in float64, which holds them all."""
    scale = torch.where(codes == 255, torch.nan, torch.exp2(codes.double() - 127))
    values: Tensor = data.view(torch.float8_e4m3fn).double().unflatten(-1, (-1, BLOCK)) * scale[..., None]
    return values.flatten(-2)


def quantize_rows(x: Tensor, rowwise: bool = False) -> tuple[Tensor, Tensor]:
    """The e4m3 bytes [n, k] and codes [n, k / 32] of rows, which are equal along a row if ``rowwise``."""
    k = x.size(1)
    blocks = x.double().unflatten(1, (-1, k if rowwise else BLOCK))
    amax = torch.where(blocks.isnan(), 0, blocks).abs().amax(-1)
    code = torch.where(blocks.isnan().all(-1), 255, scale_code(amax))
    scaled = blocks * torch.exp2(127 - code.double())[..., None]
    data = scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn).view(torch.uint8)
    codes = code.to(torch.uint8).expand(-1, k // BLOCK).contiguous()
    return torch.where(blocks.isnan(), 0x7F, data).flatten(1), codes


def scale_code(amax: Tensor) -> Tensor:
    """The smallest code with amax <= 448 * 2^(code - 127), from the bits of a float32: 448 = 1.75 * 2^8."""
    bits = amax.float().contiguous().view(torch.int32)
    code = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    return torch.where(amax.isinf(), 254, code.clamp(min=0))


def dequantize(data: Tensor, codes: Tensor) -> Tensor:
    """e4m3 bytes [n, k] with codes [n, k / 32], as bfloat16. The product of value and scale is exact in float32 unless
    it overflows, so the result is rounded once."""
    scale = torch.where(codes == 255, torch.nan, torch.exp2(codes.double() - 127)).float()
    values = data.view(torch.float8_e4m3fn).float().unflatten(1, (-1, BLOCK)) * scale[..., None]
    rounded: Tensor = values.flatten(1).to(torch.bfloat16)
    return rounded.masked_fill_(rounded.isnan(), torch.nan)  # a single NaN pattern


def by_rows(weight: Tensor) -> Tensor:
    """Weights [E, N, K], given as that or as the transposed view [E, K, N]; the dimension of stride 1 is K."""
    return weight.transpose(1, 2) if weight.stride(2) != 1 and weight.stride(1) == 1 else weight


def _spans(m: int, expert_offsets: Tensor | None, offs: Tensor | None) -> Iterator[slice]:
    """The rows of each expert; empty if the offsets lead outside."""
    if expert_offsets is None and offs is None:
        yield slice(0, m)
        return
    edges = expert_offsets.tolist() if expert_offsets is not None else [0, *(offs.tolist() if offs is not None else [])]
    for begin, end in itertools.pairwise(edges):
        yield slice(begin, end) if 0 <= begin <= end <= m else slice(0, 0)


def _scale_ends(spans: list[slice] | Iterator[slice]) -> Iterator[tuple[slice, int]]:
    """The rows of each expert, and the row at which its scales end."""
    end = 0
    for span in spans:
        end += -(-(span.stop - span.start) // TILE_ROWS) * TILE_ROWS
        yield span, end
