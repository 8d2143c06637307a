"""MXFP8 mixture of experts: quantiser, grouped product, and the layer that they make.

MXFP8 is one e4m3 byte an element and one UE8M0 scale (a power of two, in a byte) for 32 of them along a row; an
element stands for ``e4m3 * 2^(code - 127)``. Products here are those of Blackwell's tensor cores on any GPU: both
operands become bfloat16, which holds such a number exactly for codes 3 to 246, products are summed in float32, and a
sum is rounded once.

Scales lie in tiles of 128 rows by 4 codes, 512 bytes each: what torch calls ``SWIZZLE_32_4_4`` and cuBLAS
``VEC32_UE8M0``. :func:`swizzle_scales` makes them from the plain ``[N, K / 32]`` of a checkpoint, once, at load. They
are ``uint8`` or ``float8_e8m0fnu``, of any shape over dense memory: a layout has no shape of its own.

How rows belong to experts is read on the device, so nothing here waits for it. Offsets are int32, either
``expert_offsets[E + 1]``, where each expert's rows start and the total last, or ``offs[E]``, where they end, as torch's
grouped products take them. A range that leads outside the tensors is empty. Rows of no expert are neither read nor
written. ``ABIDING_CHECK_INDICES=1`` turns offsets outside the tensors and experts that do not exist into errors, at the
price of a synchronisation on a GPU.

All functions take CPU and CUDA tensors (compute capability >= 8.0), rows of any stride that is a multiple of 16 bytes,
up to 1024 experts, N and K in multiples of 32; they work under ``torch.compile(fullgraph=True)`` and in CUDA graphs,
and launch on the current stream. None is differentiable.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from abiding._api import call, check_shape, check_tensor
from abiding._fakes import register_fake, writes_in_place

BLOCK = 32
TILE_ROWS = 128

Activation = Literal["silu", "swiglu_oai", "none"]
Mode = Literal["w8a8", "w8a16"]

_ops = torch.ops.abiding
_ACTIVATIONS = ("silu", "swiglu_oai", "none")  # in the order of the operator's numbers
_NAMES = {"input": "x", "a_scales": "a.scales", "weight_scales": "weight_scale"}


class MXFP8(NamedTuple):
    """Quantised rows.

    ``data`` is float8_e4m3fn ``[M, K]``. ``scales`` is uint8 ``[R, align(K / 32, 4)]`` in 128x4 tiles: each group's
    rows padded to a multiple of 128, one group after the other.
    """

    data: Tensor
    scales: Tensor


def quantize(x: Tensor, expert_offsets: Tensor | None = None, *, offs: Tensor | None = None) -> MXFP8:
    r"""Quantise rows to MXFP8, each expert's scales in whole tiles.

    With amax a block's largest magnitude, NaN aside, the scale is the least :math:`2^{code - 127}` of at least
    amax / 448 (so that no finite element saturates), and an element ``e4m3(x * 2^(127 - code))``, to nearest even.
    Zeros keep their sign, a block of zeros has code 0; a NaN is byte 0x7F, and a block of nothing else has code 255;
    beside an infinity, which saturates to +-448, the code is 254. This is the rule of NVIDIA's hardware and torchao's
    RCEIL.

    Args:
        x: ``[M, K]`` bfloat16 or float16.
        expert_offsets: ``[E + 1]`` int32, where each expert's rows start, and the total. Default one expert.
        offs: ``[E]`` int32, where they end, instead.

    Returns:
        Data ``[M, K]``, and scales of ``R = floor128(M + 127 * E)`` rows, enough however rows are spread. Scale bytes
        that belong to no element are zero; data of rows of no expert are left as memory was.

    Raises:
        TypeError: an argument has a dtype that is not accepted, or is not a tensor.
        ValueError: an argument's device, shape, strides, alignment or value is not accepted.
    """
    check_shape("quantize", "x", x, ("M", "K"))
    offsets, ends = _offsets("quantize", expert_offsets, offs)
    rows, width = x.shape
    groups = 1 if offsets is None else max(offsets.numel() - (0 if ends else 1), 1)
    data = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(
        (rows + (TILE_ROWS - 1) * groups) // TILE_ROWS * TILE_ROWS,
        _aligned(-(-width // BLOCK), 4),
        dtype=torch.uint8,
        device=x.device,
    )
    names = _NAMES | {"offsets": "offs" if ends else "expert_offsets"}
    call("quantize", names, _ops.mxfp8_quantize.default, x, offsets, ends, data=data, scales=scales)
    return MXFP8(data, scales)


def round(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rows holding exactly what :func:`quantize` keeps of them: ``e4m3 * 2^(code - 127)`` as bfloat16.

    What a W8A8 product has for activations, in the form that is fastest to multiply with: ``grouped_mm(round(x), ...)``
    equals ``grouped_mm(quantize(x, ...), ...)`` bit for bit.

    Args:
        x: ``[M, K]`` bfloat16 or float16.
        out: bfloat16 ``[M, K]`` to write to, apart from x. Default a new tensor.

    Returns:
        ``out``, or a new tensor. A NaN reads back as 0x7FC0, an infinity as one. Codes below 3 (amax <= 448 * 2^-125)
        leave multiples of 2^-133, bfloat16's least step.

    Raises:
        TypeError, ValueError: as :func:`quantize`.
    """
    check_shape("round", "x", x, ("M", "K"))
    if out is None:
        out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    call("round", _NAMES, _ops.mxfp8_round.default, x, out=out)
    return out


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
    """Multiply each expert's rows with its weights: ``out[rows of e] = a[rows of e] @ weight[e].T``.

    Args:
        a: :class:`MXFP8` of the same offsets (W8A8), or bfloat16 ``[M, K]`` (W8A16, and W8A8 by way of :func:`round`).
        weight: ``[E, N, K]`` float8_e4m3fn, or uint8 of the same bytes, K dense; or the view ``[E, K, N]`` of that
            which ``weight.transpose(1, 2)`` makes, as torch and vLLM pass it. Which one it is, strides say: a last
            dimension of stride 1 is K.
        weight_scale: its scales in tiles, ``E * align(N, 128) * align(K / 32, 4)`` bytes.
        expert_offsets: ``[E + 1]`` int32, where each expert's rows start, and the total. Without any, E is 1.
        offs: ``[E]`` int32, where they end, instead.
        out_dtype: bfloat16, float16 or float32, of a new result.
        out: ``[M, N]`` of one of those to write to, apart from a. Rows of no expert are left as they are.

    Returns:
        ``out``, or a new tensor ``[M, N]``: float32 sums of products of bfloat16 numbers, rounded once. A row's result
        does not depend on what other rows hold. Rows of no expert are left as memory was; those of an expert whose
        scales would lie outside of ``a.scales`` are NaN.

    Raises:
        TypeError, ValueError: as :func:`quantize`.
    """
    function = "grouped_mm"
    data, scales = (a.data, _codes(a.scales)) if isinstance(a, MXFP8) else (a, None)
    check_shape(function, "a", data, ("M", "K"))
    weight = _by_rows(function, "weight", weight)
    offsets, ends = _offsets(function, expert_offsets, offs)
    if out is None:
        if out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise TypeError(f"{function}: out_dtype is {out_dtype}; expected bfloat16, float16 or float32")
        out = torch.empty(data.size(0), weight.size(1), dtype=out_dtype, device=data.device)
    names = _NAMES | {"offsets": "offs" if ends else "expert_offsets"}
    op = _ops.mxfp8_grouped_mm.default
    call(function, names, op, data, scales, weight, _codes(weight_scale), offsets, ends, out=out)
    return out


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
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A layer of experts: each token through its top-k, the results weighted and summed.

    For token t and its j-th expert e, with h its row of x: ``h = act(h @ w13[e].T) @ w2[e].T``, then
    ``out[t] = sum over j of topk_weights[t, j] * h``. In "w8a8" mode both products have rows that went through
    :func:`round`. Both are rounded to bfloat16; the activation runs in float32 and is rounded to bfloat16; the sum over
    j is one of float32 products and additions, none fused, in order, rounded once. So the layer equals, bit for bit,
    the composition of this module's functions on as many rows as there are pairs of a token and an expert.

    Args:
        x: ``[T, K]`` bfloat16.
        w13: ``[E, 2 * I, K]`` as :func:`grouped_mm` takes weights, gate rows first, then up rows; with activation
            "none" ``[E, I, K]``.
        s13: its scales in tiles.
        w2: ``[E, K, I]``.
        s2: its scales in tiles.
        topk_ids: ``[T, top_k]`` int32 or int64, 1 to 16 experts a token. Negative ones are elsewhere (expert
            parallelism) and add nothing; so do those from E on, unless ``ABIDING_CHECK_INDICES=1`` makes them an error.
        topk_weights: ``[T, top_k]`` float32.
        activation: "silu" is ``gate * sigmoid(gate) * up``; "swiglu_oai" is ``g * sigmoid(1.702 * g) * (u + 1)`` with
            g = min(gate, 7) and u = up in [-7, 7]; "none" has no gate.
        mode: "w8a8" quantises activations as Blackwell's products do; "w8a16" leaves them bfloat16.
        workspace: uint8, at least :func:`workspace_bytes`; its contents mean nothing. Default memory of torch's.
        out: bfloat16 ``[T, K]`` to write to, apart from x. Default a new tensor.

    Returns:
        ``out``, or a new tensor ``[T, K]``.

    Raises:
        TypeError, ValueError: as :func:`quantize`.

    A shared expert is one more expert: stack its weights onto w13 and w2, its number onto every row of topk_ids, and
    its weight (mostly 1) onto topk_weights.
    """
    function = "moe"
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{function}: activation is {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
    if mode not in ("w8a8", "w8a16"):
        raise ValueError(f"{function}: mode is {mode!r}; expected w8a8 or w8a16")
    check_shape(function, "x", x, ("T", "K"))
    if out is None:
        out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    call(
        function,
        _NAMES,
        _ops.mxfp8_moe.default,
        x,
        _by_rows(function, "w13", w13),
        _codes(s13),
        _by_rows(function, "w2", w2),
        _codes(s2),
        topk_ids,
        topk_weights,
        _ACTIVATIONS.index(activation),
        mode == "w8a8",
        workspace,
        out=out,
    )
    return out


def workspace_bytes(tokens: int, top_k: int, experts: int, hidden: int, intermediate: int) -> int:
    """Bytes of a workspace for :func:`moe` on up to so many tokens: about ``tokens * top_k * (2 * hidden + 6 *
    intermediate)``.

    It has no tensor to trace, so call it outside of compiled functions; ``moe`` without a workspace works in them.

    Args:
        tokens: T, rows of x.
        top_k: experts a token.
        experts: E, those of the weights.
        hidden: K, columns of x.
        intermediate: I, columns of w2.

    Raises:
        ValueError: an argument is out of its range.
    """
    op = _ops.mxfp8_moe_workspace_bytes.default
    size: int = call("workspace_bytes", _NAMES, op, tokens, top_k, experts, hidden, intermediate)
    return size


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales in tiles of 128 rows by 4 codes, from plain ones.

    Code c of row r goes to byte ``(r // 128 * columns // 4 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4``,
    with columns = align(K / 32, 4); bytes of rows and codes that are not there are zero.

    Args:
        scales: uint8 or float8_e8m0fnu ``[..., N, K / 32]``, as checkpoints have them, any strides.

    Returns:
        ``[..., align(N, 128), align(K / 32, 4)]`` of the same dtype.

    Raises:
        TypeError: the dtype is another, or scales is not a tensor.
        ValueError: it has fewer than 2 dimensions.
    """
    codes = _plain_codes("swizzle_scales", scales)
    rows, columns = codes.shape[-2:]
    padded = torch.nn.functional.pad(codes, (0, -columns % 4, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(-1, (padded.size(-1) // 4, 4)).unflatten(-3, (padded.size(-2) // TILE_ROWS, 4, 32))
    swizzled: Tensor = tiles.movedim(-2, -4).transpose(-3, -2)  # [..., row tile, column tile, 32, 4, 4]
    return swizzled.reshape(padded.shape).view(scales.dtype)


def unswizzle_scales(scales: Tensor, n: int, k: int) -> Tensor:
    """Plain scales of n rows of k elements, from tiles: what :func:`swizzle_scales` was given.

    Args:
        scales: uint8 or float8_e8m0fnu ``[..., align(n, 128), align(k / 32, 4)]``.
        n: rows.
        k: elements of a row, a multiple of 32.

    Returns:
        ``[..., n, k / 32]`` of the same dtype.

    Raises:
        TypeError: as :func:`swizzle_scales`.
        ValueError: scales has another shape.
    """
    codes = _plain_codes("unswizzle_scales", scales)
    rows, columns = _aligned(n, TILE_ROWS), _aligned(-(-k // BLOCK), 4)
    if codes.shape[-2:] != (rows, columns):
        raise ValueError(
            f"unswizzle_scales: scales has shape {list(codes.shape)}; expected [..., {rows}, {columns}] for {n} rows "
            f"of {k}"
        )
    tiles = codes.flatten(-2).unflatten(-1, (rows // TILE_ROWS, columns // 4, 32, 4, 4))
    plain: Tensor = tiles.transpose(-3, -2).movedim(-4, -2).reshape(codes.shape)
    return plain[..., :n, : -(-k // BLOCK)].contiguous().view(scales.dtype)


def _aligned(size: int, step: int) -> int:
    return -(-size // step) * step


def _offsets(function: str, expert_offsets: Tensor | None, offs: Tensor | None) -> tuple[Tensor | None, bool]:
    """The offsets given, and whether they are ends."""
    if expert_offsets is not None and offs is not None:
        raise ValueError(f"{function}: expert_offsets and offs are both given; expected one of them")
    return (expert_offsets, False) if offs is None else (offs, True)


def _codes(scales: Tensor) -> Tensor:
    """The bytes of scales: torch 2.10's stable ABI does not know their own dtype."""
    is_e8m0 = isinstance(scales, Tensor) and scales.dtype == torch.float8_e8m0fnu
    return scales.view(torch.uint8) if is_e8m0 else scales


def _plain_codes(function: str, scales: Tensor) -> Tensor:
    codes = _codes(check_tensor(function, "scales", scales))
    if codes.dtype != torch.uint8:
        raise TypeError(f"{function}: scales has dtype {scales.dtype}; expected uint8 or float8_e8m0fnu")
    if codes.dim() < 2:
        raise ValueError(f"{function}: scales has shape {list(codes.shape)}; expected at least 2 dimensions")
    return codes


def _by_rows(function: str, name: str, weight: Tensor) -> Tensor:
    """Weights as [E, N, K], of that or of a transposed view."""
    check_shape(function, name, weight, ("E", "N", "K"))
    return weight.transpose(1, 2) if weight.stride(2) != 1 and weight.stride(1) == 1 else weight


for _name in (
    "mxfp8_experts_quant",
    "cutlass_mxfp8_grouped_mm",
    "mxfp8_quantize",
    "mxfp8_round",
    "mxfp8_grouped_mm",
    "mxfp8_moe",
):
    register_fake(_name, writes_in_place)
