r"""RMSNorm over a width that is sharded across ranks, as in the QK norm of MiniMax M2 under tensor parallelism.

Each rank holds ``d`` of the ``D = ranks * d`` columns. It sums the squares of its own columns, the ranks exchange one
float32 partial sum per token and tensor, and each rank scales its columns:

.. math:: y = x \cdot w / \sqrt{\textstyle\sum_{ranks} \sum_d x^2 / D + \epsilon}

in float32, rounded once. The partial sums are added in rank order, so all ranks scale by the same bits.

Inputs are float32, float16 or bfloat16 on the device of the :class:`abiding.Communicator`, whose documentation says
what all ranks must agree on. The functions launch on the current stream and work under
``torch.compile(fullgraph=True)`` and in CUDA graphs. None is differentiable; weights that require gradients are
accepted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from abiding._api import check_device, check_dtype, check_holds_its_values
from abiding._fakes import register_fake
from abiding.communicator import DTYPES, Communicator, checked

_ops = torch.ops.abiding
_PUBLIC_NAMES = {"input": "x", "weight_q": "wq", "weight_k": "wk"}


def rms_norm(x: Tensor, weight: Tensor, comm: Communicator, *, eps: float = 1e-6) -> Tensor:
    """Normalize rows over the columns of all ranks.

    Args:
        x: ``[T, d]``, this rank's columns, with any row stride. T and d must be the same on all ranks; T may be 0.
        weight: ``[d]`` of x's dtype, this rank's shard.
        comm: the communicator of the ranks.
        eps: added to the mean square, inside the root.

    Returns:
        A new tensor ``[T, d]`` of x's dtype.

    Raises:
        RuntimeError: another rank brings another T, d or dtype, or calls another operator; or the communicator has
            stopped or is closed; the message names the operator and the rank.
        TypeError, ValueError: an argument's dtype, device, shape or strides are not accepted.
    """
    if checked("rms_norm", comm).unavailable_reason is None:
        result: Tensor = comm.run("rms_norm", "x", _PUBLIC_NAMES, _ops.reduce_rms.default, (x, weight), eps)
        return result
    comm.check_device("rms_norm", "x", x)
    _check_arguments("rms_norm", "x", x, {"weight": weight}, eps)
    if weight.numel() != x.size(1):
        raise ValueError(
            f"rms_norm: weight has shape {list(weight.shape)}; expected size {x.size(1)} in dimension 0, "
            "the columns of x"
        )
    return _scaled("rms_norm", [x], [weight], comm, eps)[0]


def qk_norm(qkv: Tensor, wq: Tensor, wk: Tensor, comm: Communicator, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """QK norm: normalize the Q and the K columns of a fused projection, each over all ranks, in one launch.

    Args:
        qkv: ``[T, q + 2 kv]``: a row holds q columns of Q, kv of K, kv of V; any row stride. V is not read.
        wq: ``[q]`` of qkv's dtype, this rank's shard.
        wk: ``[kv]``, likewise. If ranks hold replicas of the same K heads, every replica counts.
        comm: the communicator of the ranks.
        eps: added to the mean squares, inside the root.

    Returns:
        New tensors ``[T, q]`` and ``[T, kv]`` of qkv's dtype.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`rms_norm`.
    """
    if checked("qk_norm", comm).unavailable_reason is None:
        op = _ops.reduce_rms_qk.default
        result: tuple[Tensor, Tensor] = comm.run("qk_norm", "qkv", _PUBLIC_NAMES, op, (qkv, wq, wk), eps)
        return result
    comm.check_device("qk_norm", "qkv", qkv)
    _check_arguments("qk_norm", "qkv", qkv, {"wq": wq, "wk": wk}, eps)
    if qkv.size(1) != wq.numel() + 2 * wk.numel():
        raise ValueError(
            f"qk_norm: qkv has shape {list(qkv.shape)}; expected {wq.numel() + 2 * wk.numel()} columns, q's "
            f"{wq.numel()} and twice k's {wk.numel()}"
        )
    q, k, _ = qkv.split([wq.numel(), wk.numel(), wk.numel()], dim=1)
    q, k = _scaled("qk_norm", [q, k], [wq, wk], comm, eps)
    return q, k


def _check_arguments(function: str, name: str, rows: Tensor, weights: Mapping[str, Tensor], eps: float) -> None:
    """The checks of csrc/reduce_rms/ops.h, in its words, for ranks whose calls do not come to the operator."""
    for each, tensor in ((name, rows), *weights.items()):
        check_holds_its_values(function, each, tensor)
        check_device(function, each, tensor, rows, name)
    check_dtype(function, name, rows, DTYPES)
    if rows.dim() != 2:
        raise ValueError(f"{function}: {name} has shape {list(rows.shape)}; expected 2 dimensions")
    if rows.size(1) > 1 and rows.stride(1) != 1:
        raise ValueError(
            f"{function}: {name} has strides {list(rows.stride())}; expected stride 1 in the last dimension, "
            f"as {name}.contiguous() has"
        )
    for each, weight in weights.items():
        check_dtype(function, each, weight, [rows.dtype], name)
        if weight.dim() != 1:
            raise ValueError(f"{function}: {each} has shape {list(weight.shape)}; expected 1 dimensions")
        if not weight.is_contiguous():
            raise ValueError(
                f"{function}: {each} has shape {list(weight.shape)} and strides {list(weight.stride())}; "
                f"expected a contiguous tensor, as {each}.contiguous() is"
            )
    if not isinstance(eps, int | float):
        raise TypeError(f"{function}: eps is a {type(eps).__name__}; expected a float")
    if not 0 <= eps < math.inf:
        raise ValueError(f"{function}: eps is {eps:g}; expected a finite number, not negative")


def _scaled(
    function: str, parts: list[Tensor], weights: list[Tensor], comm: Communicator, eps: float
) -> tuple[Tensor, ...]:
    """The fallback for ranks without peer memory: plain PyTorch around the communicator's all-reduce."""
    comm.check_open(function)
    widths = " + ".join(str(part.size(1)) for part in parts)
    dtype = str(parts[0].dtype).removeprefix("torch.")
    comm.agree(function, f"{parts[0].size(0)} rows of {widths} {dtype} columns")
    with torch.no_grad():
        # The widths travel with the sums: on GPUs agree() does not compare them.
        sums = [torch.nn.functional.pad(part.float().square().sum(1), (0, 1), value=part.size(1)) for part in parts]
        squares, full_widths = comm.all_reduce(torch.stack(sums)).split([parts[0].size(0), 1], dim=1)
        scales = torch.rsqrt(squares / full_widths.clamp(min=1) + eps)[..., None]
        return tuple(
            (part.float() * scale * weight.float()).to(part.dtype)
            for part, scale, weight in zip(parts, scales, weights, strict=True)
        )


def _empty_qk(qkv: Tensor, q: int, kv: int) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.size(0), q), qkv.new_empty(qkv.size(0), kv)


register_fake("reduce_rms", lambda input, weight, state, comm, eps: input.new_empty(input.shape))
register_fake(
    "reduce_rms_qk",
    lambda qkv, weight_q, weight_k, state, comm, eps: _empty_qk(qkv, weight_q.numel(), weight_k.numel()),
)
register_fake(
    "minimax_allreduce_rms",
    lambda input, norm_weight, workspace, rank, nranks, eps: input.new_empty(input.shape),
)
register_fake(
    "minimax_allreduce_rms_qk",
    lambda qkv, norm_weight_q, norm_weight_k, workspace, q_size, kv_size, rank, nranks, eps: _empty_qk(
        qkv, q_size, kv_size
    ),
)
