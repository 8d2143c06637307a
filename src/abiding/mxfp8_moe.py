"""MXFP8 mixture of experts: quantizer, grouped GEMM, and the MoE layer that they make.

In MXFP8 an element is one e4m3 byte, and each scale block of 32 elements along a row (an MX block) has one UE8M0 scale,
a power of two in one byte; an element stands for ``e4m3 * 2^(code - 127)``. The GEMMs here compute, on any GPU, what
Blackwell's tensor cores compute: both operands become bfloat16, which holds such a number exactly for codes 3 to 246,
products are summed in float32, and each sum is rounded once.

Scales are stored in tiles of 128 rows by 4 codes, 512 bytes each: torch's ``SWIZZLE_32_4_4``, cuBLAS's ``VEC32_UE8M0``.
:func:`swizzle_scales` makes them from the plain ``[N, K / 32]`` of a checkpoint, once, at load. They are ``uint8`` or
``float8_e8m0fnu``; any shape over dense memory is accepted, since the layout has none of its own.

Offsets assign rows to experts. They are int32 and are read on the device, so nothing here waits for it: either
``expert_offsets[E + 1]``, where each expert's rows start, with the total last, or ``offs[E]``, where they end, as
torch's grouped GEMMs take them. A range that leads outside of the tensors counts as empty. Rows of no expert are
neither read nor written. ``ABIDING_CHECK_INDICES=1`` turns offsets outside of the tensors and experts that do not exist
into errors, and weights that mode "fp8" cannot multiply, which costs a synchronization on a GPU.

All functions take CPU and CUDA tensors (compute capability >= 8.0), row strides in multiples of 16 bytes, up to 1024
experts, and N and K in multiples of 32. They work under ``torch.compile(fullgraph=True)`` and in CUDA graphs, and
launch on the current stream. None is differentiable.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from abiding._api import call, check_shape, check_tensor
from abiding._fakes import register_fake, writes_in_place

BLOCK = 32  # elements per scale block
TILE_ROWS = 128  # rows per tile of scales

Activation = Literal["silu", "swiglu_oai", "none"]
Mode = Literal["w8a8", "w8a16", "fp8"]
Compute = Literal["exact", "fp8"]

_ops = torch.ops.abiding
_ACTIVATIONS, _COMPUTES = get_args(Activation), get_args(Compute)  # in the order of the operators' numbers
_NAMES = {"input": "x", "a_scales": "a.scales", "weight_scales": "weight_scale"}


class Rebased(NamedTuple):
    """What :func:`rebase` did, in tensors of no dimensions on the device of the weights, so that nothing waits."""

    changed: Tensor
    """int64: elements whose value changed, of all."""
    left: Tensor
    """int64: rows that were left as they were. Weights that have any cannot run in mode "fp8"."""
    rms: Tensor
    """float64: the root mean square of the changes, relative to that of the weights; NaN elements aside."""
    worst_row: Tensor
    """int64: the row ``e * N + n`` that changed most, relative to itself; -1 if none did."""
    worst_rms: Tensor
    """float64: the same number as ``rms``, of that row."""


class MXFP8(NamedTuple):
    """Quantized rows.

    ``data`` is float8_e4m3fn ``[M, K]``. ``scales`` is uint8 ``[R, align(K / 32, 4)]`` in 128x4 tiles: the rows of each
    expert are padded to a multiple of 128.
    """

    data: Tensor
    scales: Tensor


def quantize(
    x: Tensor, expert_offsets: Tensor | None = None, *, offs: Tensor | None = None, rowwise: bool = False
) -> MXFP8:
    r"""Quantize rows to MXFP8, with the scales of each expert in whole tiles.

    With amax the largest magnitude of a scale block, ignoring NaN, the scale is the smallest :math:`2^{code - 127}`
    that is at least amax / 448, so that no finite element saturates; an element is ``e4m3(x * 2^(127 - code))``,
    rounded to nearest even. Zeros keep their sign, and a scale block of zeros has code 0. A NaN is byte 0x7F, and a
    scale block of NaN alone has code 255. An infinity saturates to +-448, and its scale block has code 254. This is the
    rule of NVIDIA's hardware, called RCEIL in torchao.

    Args:
        x: ``[M, K]`` bfloat16 or float16.
        expert_offsets: ``[E + 1]`` int32, where each expert's rows start, and the total. Default one expert.
        offs: ``[E]`` int32, where each expert's rows end; given instead of ``expert_offsets``.
        rowwise: whether a row has one code, by its largest magnitude, as ``grouped_mm(compute="fp8")`` takes it. It is
            MXFP8 like any other, with equal codes.

    Returns:
        Data ``[M, K]``, and scales of ``R = (M + 127 * E) // 128 * 128`` rows, enough for any distribution of rows over
        experts. Scale bytes that belong to no element are zero; data of rows of no expert are uninitialized.

    Raises:
        TypeError: the dtype of an argument is not accepted, or an argument is not a tensor.
        ValueError: the device, shape, strides, alignment or value of an argument is not accepted.
    """
    check_shape("quantize", "x", x, ("M", "K"))
    offsets, ends = _offsets("quantize", expert_offsets, offs)
    m, k = x.shape
    experts = 1 if offsets is None else max(offsets.numel() - (0 if ends else 1), 1)
    data = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(
        (m + (TILE_ROWS - 1) * experts) // TILE_ROWS * TILE_ROWS,
        _aligned(-(-k // BLOCK), 4),
        dtype=torch.uint8,
        device=x.device,
    )
    names = _NAMES | {"offsets": "offs" if ends else "expert_offsets"}
    call("quantize", names, _ops.mxfp8_quantize.default, x, offsets, ends, rowwise=rowwise, data=data, scales=scales)
    return MXFP8(data, scales)


def round(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Quantize rows to MXFP8 and dequantize them again: ``e4m3 * 2^(code - 127)`` as bfloat16.

    These are the activations of a W8A8 GEMM in the form that is fastest to multiply: ``grouped_mm(round(x), ...)``
    equals ``grouped_mm(quantize(x, ...), ...)`` bit for bit.

    Args:
        x: ``[M, K]`` bfloat16 or float16.
        out: bfloat16 ``[M, K]`` to write to; must not overlap x. Default a new tensor.

    Returns:
        ``out``, or a new tensor. A NaN becomes 0x7FC0; an infinity stays an infinity. With codes below 3 (amax <= 448 *
        2^-125), values are multiples of 2^-133, the spacing of bfloat16's subnormals.

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
    compute: Compute = "exact",
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Grouped GEMM of each expert's rows with its weights: ``out[rows of e] = a[rows of e] @ weight[e].T``.

    Args:
        a: :class:`MXFP8` that was quantized with the same offsets (W8A8), or bfloat16 ``[M, K]`` (W8A16, and W8A8 after
            :func:`round`).
        weight: ``[E, N, K]`` float8_e4m3fn, or uint8 of the same bytes, with K dense; or its transposed view ``[E, K,
            N]``, as torch and vLLM pass it. Strides tell the two apart: the dimension of stride 1 is K.
        weight_scale: its scales in tiles, ``E * align(N, 128) * align(K / 32, 4)`` bytes.
        expert_offsets: ``[E + 1]`` int32, where each expert's rows start, and the total. Default one expert.
        offs: ``[E]`` int32, where each expert's rows end; given instead of ``expert_offsets``.
        compute: "exact", or "fp8" for weights that went through :func:`rebase` and rows of ``quantize(...,
            rowwise=True)`` (bfloat16 rows are quantized so). FP8 tensor cores then add the products of each 128 of K,
            in fewer bits than float32 has; those sums are added in float32, in the order of K, and the total is
            multiplied by the scale of the row and then by that of the weight row. Rows and weight rows whose codes
            differ give NaN. GPUs other than Hopper compute the product of the same operands exactly, and read such rows
            as they are. :func:`implementation` says which it is.
        out_dtype: the dtype of a new result: bfloat16, float16 or float32.
        out: ``[M, N]`` of one of these dtypes to write to; must not overlap a. Rows of no expert are not written.

    Returns:
        ``out``, or a new tensor ``[M, N]``: float32 sums of products of bfloat16 numbers, rounded once. A row's result
        does not depend on the contents of other rows. In a new tensor, rows of no expert are uninitialized. Rows of an
        expert whose scales would lie outside of ``a.scales`` are NaN.

    Raises:
        TypeError, ValueError: as :func:`quantize`.
    """
    function = "grouped_mm"
    if compute not in _COMPUTES:
        raise ValueError(f"{function}: compute is {compute!r}; expected {' or '.join(_COMPUTES)}")
    if compute == "fp8" and not isinstance(a, MXFP8):
        a = _quantized(function, a, expert_offsets, offs)
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
    number = _COMPUTES.index(compute)
    call(function, names, op, data, scales, weight, _codes(weight_scale), offsets, ends, compute=number, out=out)
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
    """A dense layer, which is a grouped GEMM of one expert: ``out = x @ weight.T``.

    Args:
        x: ``[..., K]`` bfloat16.
        weight: ``[N, K]`` float8_e4m3fn, or uint8 of the same bytes, with K dense.
        scale: its scales in tiles, ``align(N, 128) * align(K / 32, 4)`` bytes.
        out: ``[..., N]`` bfloat16, float16 or float32 to write to; must not overlap x. With other than 2 dimensions it
            must be contiguous. Default a new tensor.
        mode: "w8a16" leaves x bfloat16, "w8a8" puts its rows through :func:`round`; "fp8" is :func:`grouped_mm` with
            ``compute="fp8"``, of a weight that went through :func:`rebase`.
        out_dtype: the dtype of a new result: bfloat16, float16 or float32. Default bfloat16.

    Returns:
        ``out``, or a new tensor ``[..., N]``: bit for bit that of :func:`grouped_mm`. There is no bias; add it to the
        result.

    Raises:
        TypeError, ValueError: as :func:`quantize`.
    """
    function = "linear"
    if mode not in get_args(Mode):
        raise ValueError(f"{function}: mode is {mode!r}; expected {' or '.join(get_args(Mode))}")
    check_tensor(function, "x", x)
    check_shape(function, "weight", weight, ("N", "K"))
    n, k = weight.shape
    if x.dim() < 1 or x.size(-1) != k or k == 0:
        raise ValueError(f"{function}: x has shape {list(x.shape)}; expected [..., K] with K = {k}, as weight has")
    if x.dtype != torch.bfloat16:
        raise TypeError(f"{function}: x has dtype {x.dtype}; expected bfloat16")
    if out_dtype not in (None, torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"{function}: out_dtype is {out_dtype}; expected bfloat16, float16 or float32")
    shape = (*x.shape[:-1], n)
    if out is None:
        out = torch.empty(shape, dtype=out_dtype or torch.bfloat16, device=x.device)
    check_shape(function, "out", out, shape)
    if out.dim() != 2 and not out.is_contiguous():
        raise ValueError(f"{function}: out has strides {list(out.stride())}; expected a contiguous tensor")
    rows, result = x.reshape(-1, k), out if out.dim() == 2 else out.view(-1, n)
    codes = None
    if mode == "w8a8":
        rows = round(rows)
    elif mode == "fp8":
        rows, codes = quantize(rows, rowwise=True)
    op = _ops.mxfp8_grouped_mm.default
    names = {"a": "x", "weight_scales": "scale"}
    compute = _COMPUTES.index("fp8" if mode == "fp8" else "exact")
    call(function, names, op, rows, codes, weight[None], _codes(scale), None, False, compute=compute, out=result)
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
    expert_map: Tensor | None = None,
    global_experts: int | None = None,
    swiglu_alpha: float = 1.702,
    swiglu_beta: float = 1.0,
    swiglu_limit: float | None = None,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """An MoE layer: each token through its top-k experts, then the top-k weighted sum of their results.

    For token t and its j-th expert e: ``y[t, j] = activation(x[t] @ w13[e].T) @ w2[e].T``, then
    ``out[t] = sum over j of topk_weights[t, j] * y[t, j]``. In mode "w8a8" the input rows of both GEMMs go through
    :func:`round`; in mode "fp8" they are ``quantize(..., rowwise=True)``, and the GEMMs have ``compute="fp8"``. The
    results of both GEMMs are rounded to bfloat16. The activation is computed in float32 and rounded to bfloat16. The
    weighted sum over j multiplies and adds in float32, in order, without FMA, and is rounded once. So the layer equals,
    bit for bit, the composition of this module's functions on one row per pair of a token and an expert.

    Args:
        x: ``[T, K]`` bfloat16.
        w13: ``[E, 2 * I, K]``, weights as :func:`grouped_mm` takes them: gate rows, then up rows. With activation
            "none", ``[E, I, K]``.
        s13: its scales in tiles.
        w2: ``[E, K, I]``.
        s2: its scales in tiles.
        topk_ids: ``[T, top_k]`` int32 or int64, 1 to 16 experts per token. A negative id is an expert of another rank
            (expert parallelism) and adds nothing, as does an id >= E, unless ``ABIDING_CHECK_INDICES=1`` makes that an
            error. With ``expert_map``, ids are those of all ranks' experts.
        topk_weights: ``[T, top_k]`` float32.
        activation: "silu" is ``g * sigmoid(g) * u``; "swiglu_oai" is ``g * sigmoid(alpha * g) * (u + beta)``, where g
            is the gate, at most ``swiglu_limit``, and u is up, within +-``swiglu_limit``; "none" has no gate.
        mode: "w8a8" quantizes activations to MXFP8, "w8a16" leaves them bfloat16; "fp8" quantizes them with one scale
            per row for FP8 tensor cores, and needs w13 and w2 from :func:`rebase`.
        expert_map: ``[global experts]`` int32 on the device of x: the local expert of each id, or -1 for an expert of
            another rank. Ids outside of the map, and local experts that do not exist, add nothing. Default: ids are
            local.
        global_experts: how many experts the ids are spread over, on all ranks, of which E are here. Default the length
            of ``expert_map``, or E. It is a hint of how many rows to expect, for the choice of the GEMMs' tile shape.
            Give it where ids are -1 for experts of other ranks: a layer is then as fast as its own rows allow.
        swiglu_alpha: of "swiglu_oai", positive.
        swiglu_beta: of "swiglu_oai".
        swiglu_limit: positive. Default 7 for "swiglu_oai", and no limit for "silu"; ``math.inf`` is no limit.
        workspace: scratch memory, uint8, of at least :func:`workspace_bytes`. Default memory from torch's allocator.
        out: bfloat16 ``[T, K]`` to write to; must not overlap x. Default a new tensor.

    Returns:
        ``out``, or a new tensor ``[T, K]``.

    Raises:
        TypeError, ValueError: as :func:`quantize`.

    With E = 0, or where all experts of a token are elsewhere, the result is zero.

    A shared expert is one more expert: append its weights to w13 and w2, its id to every row of topk_ids, and its
    weight (usually 1) to every row of topk_weights.
    """
    function = "moe"
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{function}: activation is {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
    if mode not in get_args(Mode):
        raise ValueError(f"{function}: mode is {mode!r}; expected {' or '.join(get_args(Mode))}")
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
        mode != "w8a16",
        workspace,
        expert_map=expert_map,
        global_experts=global_experts,
        swiglu_alpha=swiglu_alpha,
        swiglu_beta=swiglu_beta,
        swiglu_limit=swiglu_limit,
        compute=_COMPUTES.index("fp8" if mode == "fp8" else "exact"),
        out=out,
    )
    return out


def implementation(
    rows: int,
    experts: int,
    *shapes: tuple[int, int],
    compute: Compute = "exact",
    device: torch.device | str = "cuda",
) -> str:
    """The name of the implementation that grouped GEMMs of such sizes run on.

    Which one it is follows from the device and from sizes alone. ``ABIDING_GROUPED_MM=NAME`` pins one for all calls
    that it can serve: "portable" (every GPU), "sm90", "sm90_fp8" (Hopper); "cpu" and "cpu_fp8" are not to be chosen.

    Args:
        rows: M, the rows of a; for :func:`moe`, the pairs of a token and an expert that are expected here.
        experts: E.
        shapes: N and K of each GEMM. Those of one call get one implementation; a layer has two, ``(2 * I, K), (K, I)``.
        compute: as in :func:`grouped_mm`; "fp8" for mode "fp8".
        device: of the tensors.

    Raises:
        ValueError: an argument is out of range, or the pinned implementation cannot serve such a call.
    """
    if compute not in _COMPUTES:
        raise ValueError(f"implementation: compute is {compute!r}; expected {' or '.join(_COMPUTES)}")
    op = _ops.mxfp8_implementation.default
    n, k = [n for n, _ in shapes], [k for _, k in shapes]
    like = torch.empty(0, device=device)
    name: str = call("implementation", _NAMES, op, like, rows, experts, n, k, _COMPUTES.index(compute))
    return name


def rebase(weight: Tensor, scales: Tensor, *, inplace: bool = False) -> tuple[Tensor, Tensor, Rebased]:
    """Give the scale blocks of each weight row one code: the largest of theirs, to which the bytes of the others move.

    FP8 tensor cores multiply such weights (``compute="fp8"``, mode "fp8"). They are valid MXFP8 with equal codes, which
    everything else here reads as well. Do it once, at load; weights that are rebased already stay as they are.

    An element ``e4m3 * 2^(code - 127)`` becomes the nearest multiple of the new, larger scale, ties to even. e4m3 keeps
    its three mantissa bits over 14 powers of two, so next to nothing changes. Of each row:

    - The largest code is that of the scale blocks that count: not those of zeros (or zeros and NaN), which take any
      code, and not those of code 255. The bytes of the latter become 0x7F, since they are all NaN.
    - Where codes are equal, nothing changes. NaN bytes of a scale block that moves become 0x7F.
    - A row is left as it was, and counted in :attr:`Rebased.left`, if the largest element of a scale block that
      counts would become subnormal, so that even its last bits would get lost: if the code grows by more than 14 where
      that element is 256 to 448 times the scale, and by one less for each power of two that it is below.

    Args:
        weight: ``[E, N, K]`` float8_e4m3fn, or uint8 of the same bytes, with K dense; its transposed view ``[E, K,
            N]``; or ``[N, K]``.
        scales: its scales in tiles, as :func:`swizzle_scales` makes them.
        inplace: whether to write to ``weight`` and ``scales``; nothing is copied then. Default new tensors.

    Returns:
        Weights and scales of the same shapes and dtypes, and what changed.

    Raises:
        TypeError, ValueError: as :func:`quantize`.
    """
    function = "rebase"
    rows = check_tensor(function, "weight", weight)
    rows = rows[None] if rows.dim() == 2 else _by_rows(function, "weight", rows)
    codes = _codes(check_tensor(function, "scales", scales))
    data = rows if inplace else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    new_codes = codes if inplace else torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
    counts = torch.empty(3, dtype=torch.int64, device=rows.device)
    errors = torch.empty(2, dtype=torch.float64, device=rows.device)
    names = {"weight_scales": "scales", "out": "weight", "out_scales": "scales"}
    op = _ops.mxfp8_rebase.default
    call(function, names, op, rows, codes, out=data, out_scales=new_codes, counts=counts, errors=errors)
    report = Rebased(counts[0], counts[1], errors[0], counts[2], errors[1])
    if inplace:
        return weight, scales, report
    data = data[0] if weight.dim() == 2 else data if data.shape == weight.shape else data.transpose(1, 2)
    return data, new_codes.view(scales.dtype), report


def workspace_bytes(tokens: int, top_k: int, experts: int, hidden: int, intermediate: int) -> int:
    """Bytes of workspace that :func:`moe` needs for up to so many tokens: about ``tokens * top_k * (2 * hidden + 6 *
    intermediate)``.

    It takes no tensor that could be traced, so call it outside of compiled functions; ``moe`` without a workspace works
    inside.

    Args:
        tokens: T, rows of x.
        top_k: experts per token.
        experts: E, the local experts.
        hidden: K, columns of x.
        intermediate: I, columns of w2.

    Raises:
        ValueError: an argument is out of range.
    """
    op = _ops.mxfp8_moe_workspace_bytes.default
    size: int = call("workspace_bytes", _NAMES, op, tokens, top_k, experts, hidden, intermediate)
    return size


def swizzle_scales(scales: Tensor) -> Tensor:
    """Scales in tiles of 128 rows by 4 codes, from plain scales.

    Code c of row r goes to byte ``(r // 128 * columns // 4 + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4``,
    with columns = align(K / 32, 4). The bytes that pad rows and columns are zero.

    Args:
        scales: uint8 or float8_e8m0fnu ``[..., N, K / 32]``, as checkpoints store them; any strides.

    Returns:
        ``[..., align(N, 128), align(K / 32, 4)]`` of the same dtype.

    Raises:
        TypeError: scales has another dtype, or is not a tensor.
        ValueError: scales has fewer than 2 dimensions.
    """
    codes = _plain_codes("swizzle_scales", scales)
    rows, columns = codes.shape[-2:]
    padded = torch.nn.functional.pad(codes, (0, -columns % 4, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(-1, (padded.size(-1) // 4, 4)).unflatten(-3, (padded.size(-2) // TILE_ROWS, 4, 32))
    swizzled: Tensor = tiles.movedim(-2, -4).transpose(-3, -2)  # [..., row tile, column tile, 32, 4, 4]
    return swizzled.reshape(padded.shape).view(scales.dtype)


def unswizzle_scales(scales: Tensor, n: int, k: int) -> Tensor:
    """Plain scales of n rows of k elements, from tiles: the inverse of :func:`swizzle_scales`.

    Args:
        scales: uint8 or float8_e8m0fnu ``[..., align(n, 128), align(k / 32, 4)]``.
        n: rows.
        k: elements per row, a multiple of 32.

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


def _quantized(function: str, a: Tensor, expert_offsets: Tensor | None, offs: Tensor | None) -> MXFP8:
    """bfloat16 rows as ``compute="fp8"`` takes them."""
    if check_tensor(function, "a", a).dtype != torch.bfloat16:
        raise TypeError(f"{function}: a has dtype {a.dtype}; expected bfloat16, or MXFP8")
    return quantize(a, expert_offsets, offs=offs, rowwise=True)


def _aligned(size: int, step: int) -> int:
    return -(-size // step) * step


def _offsets(function: str, expert_offsets: Tensor | None, offs: Tensor | None) -> tuple[Tensor | None, bool]:
    """The offsets that were given, and whether they say where rows end."""
    if expert_offsets is not None and offs is not None:
        raise ValueError(f"{function}: expert_offsets and offs are both given; expected one of them")
    return (expert_offsets, False) if offs is None else (offs, True)


def _codes(scales: Tensor) -> Tensor:
    """Scales as uint8: torch 2.10's stable ABI has no float8_e8m0fnu."""
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
    """Weights [E, N, K], given as that or as the transposed view [E, K, N]."""
    check_shape(function, name, weight, ("E", "N", "K"))
    return weight.transpose(1, 2) if weight.stride(2) != 1 and weight.stride(1) == 1 else weight


register_fake("mxfp8_implementation", lambda *args, **kwargs: "")
for _name in (
    "mxfp8_experts_quant",
    "cutlass_mxfp8_grouped_mm",
    "mxfp8_quantize",
    "mxfp8_rebase",
    "mxfp8_round",
    "mxfp8_grouped_mm",
    "mxfp8_moe",
):
    register_fake(_name, writes_in_place)
