"""MXFP8 mixture of experts, in plain PyTorch.

Codes and bytes are a format, so the quantizer is specified to the bit: codes follow the integer rule of
:func:`scale_code`, and scaling by a power of two is exact in float64. Sums are float64, rounded where the kernels
round; ``out_dtype=torch.float64`` leaves the result of a GEMM unrounded, and :func:`layer` that of a whole layer.

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
Mode = Literal["w8a8", "w8a16"]


class MXFP8(NamedTuple):
    """Quantized rows. As :class:`abiding.mxfp8_moe.MXFP8`."""

    data: Tensor
    scales: Tensor


def quantize(x: Tensor, expert_offsets: Tensor | None = None, *, offs: Tensor | None = None) -> MXFP8:
    """Quantize rows, with the scales of each expert in whole tiles. As :func:`abiding.mxfp8_moe.quantize`."""
    m, k = x.shape
    spans = list(_spans(m, expert_offsets, offs))
    scale_rows = (m + (TILE_ROWS - 1) * len(spans)) // TILE_ROWS * TILE_ROWS
    data = torch.zeros(m, k, dtype=torch.uint8, device=x.device)
    scales = torch.zeros(scale_rows, -(-k // BLOCK // 4) * 4, dtype=torch.uint8, device=x.device)
    begin = 0
    for span, end in _scale_ends(spans):
        if end <= scale_rows:
            data[span], codes = quantize_rows(x[span])
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
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Grouped GEMM of each expert's rows with its weights. As :func:`abiding.mxfp8_moe.grouped_mm`."""
    data, scales = (a, None) if isinstance(a, Tensor) else (a.data, a.scales.view(torch.uint8))
    weight = by_rows(weight)
    experts, n, k = weight.shape
    weight_scale = weight_scale.view(torch.uint8).reshape(experts, -(-n // TILE_ROWS) * TILE_ROWS, -1)
    if out is None:
        out = torch.zeros(len(data), n, dtype=out_dtype, device=data.device)
    begin = 0
    for expert, (span, end) in enumerate(_scale_ends(_spans(len(data), expert_offsets, offs))):
        rows = data[span]
        if scales is not None and len(rows):
            if end <= scales.numel() // scales.shape[-1]:
                codes = unswizzle_scales(scales.reshape(-1, scales.shape[-1])[begin:end], len(rows), k)
            else:
                codes = torch.full((len(rows), k // BLOCK), 255, dtype=torch.uint8, device=data.device)
            rows = dequantize(rows, codes)
        w = dequantize(weight[expert], unswizzle_scales(weight_scale[expert], n, k))
        out[span] = (rows.double() @ w.double().T).to(out.dtype)
        begin = end
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
    result = grouped_mm(rows, weight[None], scale, out_dtype=out_dtype or torch.bfloat16 if out is None else out.dtype)
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
    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(len(w13)):
        token, j = (topk_ids == expert).nonzero(as_tuple=True)
        gate_up = grouped_mm(rounded(x[token]), w13[expert : expert + 1], s13.reshape(len(w13), -1)[expert])
        activated = rounded(activate(gate_up, activation, swiglu_alpha, swiglu_beta, swiglu_limit))
        down = grouped_mm(activated, w2[expert : expert + 1], s2.reshape(len(w2), -1)[expert])
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


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The e4m3 bytes [n, k] and codes [n, k / 32] of rows."""
    blocks = x.double().unflatten(1, (-1, BLOCK))
    amax = torch.where(blocks.isnan(), 0, blocks).abs().amax(-1)
    code = torch.where(blocks.isnan().all(-1), 255, scale_code(amax))
    scaled = blocks * torch.exp2(127 - code.double())[..., None]
    data = scaled.clamp(-448, 448).float().to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(blocks.isnan(), 0x7F, data).flatten(1), code.to(torch.uint8)


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
