"""Call every wrapper of a built test library and compare with torch's own operator; run under one torch release.

PYTHONPATH=<a torch> python wrapper_cases.py LIBRARY SCHEMAS.json
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import torch
from torch._prims_common import suggest_memory_format as suggested

X = torch.tensor([[0.5, -1.5, 2.25, 0.75], [3.0, 0.25, -0.5, 1.5], [1.0, 2.0, -3.0, 0.125]])
Y = X.flip(0) + 2.5
P = X.abs() + 0.5  # positive
SQUARE = X[:3, :3] + 3 * torch.eye(3)
INTS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
MASK = X > 0.6
INDEX = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 0]])
COMPLEX = torch.complex(X, Y)

ARGUMENTS: dict[str, list[list[Any]]] = {
    "all": [[MASK]], "any": [[MASK]], "bincount": [[INTS[0]]], "bitwise_not": [[INTS], [MASK]],
    "bmm": [[X[None], Y.T[None].contiguous()]], "mm": [[X, Y.T]], "matmul": [[X, Y.T], [X, Y[0]]], "mv": [[X, Y[0]]],
    "dot": [[X[0], Y[0]]], "outer": [[X[0], Y[1]]], "broadcast_tensors": [[[X, Y[0]]]],
    "broadcast_to": [[X[0], [5, 4]]],
    "can_cast": [[torch.float32, torch.int64], [torch.int64, torch.float32]], "cat": [[[X, Y]], [[X, Y], 1]],
    "chunk": [[X, 2, 1]], "clamp": [[X, Y - 2, None], [X, None, Y - 3], [X, Y - 3, Y - 2]], "conj": [[COMPLEX]],
    "cross": [[SQUARE, X[:3, 1:], 1]], "cumprod": [[X, 1]], "cumsum": [[X, 0], [INTS, 1], [X, 1, torch.float64]],
    "diff": [[INTS, 1, 0], [X, 2, 1]], "div.Tensor_mode": [[X, Y, "floor"]], "expand": [[X[:1], [5, -1]]],
    "expand_as": [[X[:1], Y]], "flip": [[X, [0, 1]]], "gather": [[X, 1, INDEX]], "index.Tensor": [
        [X, [None, INDEX[0, :2]]], [X, [torch.tensor([0, 2]), torch.tensor([1, 1])]], [X, [MASK]]],
    "hstack": [[[X, Y]]], "vstack": [[[X, Y]]], "stack": [[[X, Y]], [[X, Y], -1]], "imag": [[COMPLEX]],
    "real": [[COMPLEX]], "index_copy_": [[X, 0, torch.tensor([2, 0]), Y[:2]]],
    "index_put": [[X, [torch.tensor([0, 2])], Y[:2]]], "index_put_": [
        [X, [torch.tensor([0, 2])], Y[:2]], [X, [None, torch.tensor([1, 1])], Y[:, :2], True]],
    "index_select": [[X, 1, torch.tensor([3, 0])]], "is_nonzero": [[X[0, 0]]], "linalg_inv": [[SQUARE]],
    "log_softmax.int": [[X, 1]], "softmax.int": [[X, 1]], "logsumexp": [[X, [1], True]], "masked_fill.Tensor": [
        [X, MASK, torch.tensor(7.0)]], "masked_fill_.Tensor": [[X, MASK, torch.tensor(7.0)]],
    "masked_scatter_": [[X, MASK, Y]], "masked_select": [[X, MASK]], "mean.dim": [[X, [1], True]],
    "movedim.intlist": [[X, [0], [1]]], "one_hot": [[INTS[0], 6]], "permute": [[X, [1, 0]]], "repeat": [[X, [2, 1]]],
    "repeat_interleave.self_Tensor": [[X, torch.tensor([1, 2, 3]), 0]], "repeat_interleave.self_int": [[X, 2, 1]],
    "reshape_as": [[X, Y.view(4, 3)]], "view_as": [[X, Y.view(2, 6)]], "roll": [[X, [1], [0]]],
    "scatter.src": [[X, 1, INDEX, Y]], "scatter_.src": [[X, 1, INDEX.sort(1).values, Y[:, :1].expand(3, 4)]],
    "scatter_add": [[X, 1, INDEX, Y]], "scatter_add_": [[X, 1, INDEX, Y]],
    "searchsorted.Tensor": [[X.sort(1).values, Y]], "slice.Tensor": [[X, 1, 1, 3], [X, 0, None, None, 2]],
    "split.Tensor": [[X, 2, 1]], "split_with_sizes": [[X, [1, 3], 1]], "std.dim": [[X, [1]]], "sum.dim_IntList": [
        [X, [1]], [INTS, [0, 1], True]], "swapaxes": [[X, 0, 1]], "take": [[X, INDEX]], "topk": [[X, 2, 1]],
    "trace": [[SQUARE]], "unfold": [[X, 1, 2, 1]], "unique_dim": [[X.round(), 0]], "view_as_complex": [
        [X.view(3, 2, 2)]], "view_as_real": [[COMPLEX]], "where.self": [[MASK, X, Y]], "pow.Tensor_Tensor": [[P, Y]],
    "bitwise_and.Tensor": [[INTS, INTS.flip(0)]], "bitwise_or.Tensor": [[INTS, INTS.flip(0)]],
    "bitwise_xor.Tensor": [[INTS, INTS.flip(0)]], "log": [[P]], "log2": [[P]], "log1p": [[P]], "sqrt": [[P]],
    "rsqrt": [[P]], "is_floating_point": [[X], [INTS], [COMPLEX]], "is_complex": [[X], [COMPLEX]],
    "result_type.Tensor": [[X, INTS], [INTS, INTS]], "diagonal": [[X]], "atan2": [[X, Y]], "type_as": [[X, INTS]],
    "prod": [[X]], "amax": [[X, [1]]], "amin": [[X, [1]]], "max.dim": [[X, 1]], "min.dim": [[X, 1]], "all.dim": [
        [MASK, 1]], "any.dim": [[MASK, 1]], "argmax": [[X], [X, 1, True]], "argmin": [[X]], "argsort": [[X, 1]],
    "tile": [[X, [2, 1]]], "transpose_": [[X, 0, 1]], "unsqueeze_": [[X, 0]], "squeeze_": [[X[None]]], "t_": [[X]],
    "mm.out": [[X, Y.T, torch.empty(3, 3)]], "matmul.out": [[X, Y.T, torch.empty(3, 3)]],
    "bmm.out": [[X[None], Y.T[None].contiguous(), torch.empty(1, 3, 3)]], "cat.out": [[[X, Y], 0, torch.empty(6, 4)]],
    "multinomial": [[P, 2]], "resize_": [[X, [2, 2]]],
    "sort": [[X, 1, True]], "unbind.int": [[X, 1]], "log10": [[P]], "asin": [[X / 4]], "acos": [[X / 4]],
    "sqrt_": [[P]], "log_": [[P]], "rsqrt_": [[P]], "lgamma": [[P]], "erfinv": [[X / 4]], "median.dim": [[X, 1, True]],
    "fmod.Tensor": [[X, Y]], "tensor_split.sections": [[X, 3, 1]], "lerp.Tensor": [[X, Y, P]], "cdist": [[X, Y, 1.0]],
    "equal": [[X, X.clone()], [X, Y]], "inverse": [[SQUARE]], "cummax": [[X, 1]], "cummin": [[X, 1]],
    "kthvalue": [[X, 2, 1]], "uniform_": [[X, -1.0, 3.0]], "normal_": [[X, 1.0, 2.0]], "exponential_": [[X, 2.0]],
    "bernoulli_.float": [[X, 0.25]], "as_strided": [[X, [2, 2], [1, 4], 1]], "vdot": [[X[0], Y[0]]],
    "cumsum_": [[X, 1]], "unique_consecutive": [[X.round(), True, True], [X.round(), False, False, 0]],
    "bucketize.Tensor": [[X, Y[:, 0].sort().values]],
}  # fmt: skip
BINARY = {"div.Tensor", "div_.Tensor", "mul.Tensor", "mul_.Tensor", "eq.Tensor", "ne.Tensor", "lt.Tensor", "le.Tensor"}
BINARY |= {"gt.Tensor", "ge.Tensor", "maximum", "minimum", "floor_divide", "remainder.Tensor", "logical_and"}
BINARY |= {"logical_or", "logical_xor"}
NUMBERS: list[tuple[str, list[list[Any]]]] = [
    ("add", [[a, b] for a in (X, INTS, INTS.int(), MASK, X.half()) for b in (2, 2.5, -3)]),
    ("sub", [[a, b] for a in (X, INTS, INTS.int(), MASK, X.half()) for b in (2, 2.5, -3)]),
    ("mul", [[a, b] for a in (X, INTS, INTS.int(), MASK, X.half(), INTS[0, 0].int()) for b in (2, 2.5, -3)]),
    ("div", [[a, b] for a in (X, INTS, X.half()) for b in (2, 2.5, -3)]),
    ("lt", [[a, b] for a in (X, INTS) for b in (2, 2.5)]),
]


def put(a: torch.Tensor, indices: Any, value: Any) -> torch.Tensor:
    a = a.clone()
    a[indices] = value
    return a


NUMBERED = torch.arange(1.0, 7.0)
COMPOSED: dict[str, Any] = {
    "zeros": lambda a: torch.zeros(2, 3, dtype=a.dtype),
    "zeros_default": lambda a: torch.zeros(2),
    "zeros_of_one_size": lambda a: torch.zeros(4, dtype=torch.int32),
    "zeros_chain": lambda a: torch.zeros(2, dtype=torch.half),
    "zeros_typed": lambda a: torch.zeros(2, dtype=torch.int16),
    "empty": lambda a: torch.empty(2, 3, 4, 5, dtype=a.dtype, memory_format=torch.channels_last).zero_(),
    "empty_strided": lambda a: torch.empty_strided((2, 3), (1, 2), dtype=a.dtype).zero_(),
    "ones": lambda a: torch.ones(2, dtype=torch.int64),
    "full": lambda a: torch.full((2,), 2.5, dtype=a.dtype),
    "full_int": lambda a: torch.full((2,), 2),
    "full_bool": lambda a: torch.full((2,), True),
    "full_float": lambda a: torch.full((2,), 2.0),
    "full_exact": lambda a: torch.full((2,), 2**63 - 1),
    "full_half": lambda a: torch.full((2,), 2.5, dtype=a.dtype),
    "full_like_exact": lambda a: torch.full_like(a, 2**53 + 1, dtype=torch.int64),
    "new_full_exact": lambda a: a.new_full((2,), -(2**53) - 1, dtype=torch.int64),
    "fill_": lambda a: torch.empty_like(a).fill_(3),
    "fill_tensor": lambda a: torch.empty_like(a).fill_(torch.tensor(2.5)),
    "rand": lambda a: torch.rand(2, dtype=a.dtype),
    "randn": lambda a: torch.randn(2),
    "randint": lambda a: torch.randint(9, (20,)),
    "randint_low": lambda a: torch.randint(-3, 3, (20,), dtype=a.dtype),
    "randperm": lambda a: torch.randperm(9),
    "eye": lambda a: torch.eye(3),
    "eye_m": lambda a: torch.eye(2, 3, dtype=torch.int64),
    "arange": lambda a: torch.arange(5),
    "arange_none": lambda a: torch.arange(0),
    "arange_from": lambda a: torch.arange(2, 7, dtype=a.dtype),
    "arange_step": lambda a: torch.arange(7, -2, -2, dtype=torch.int32),
    "empty_like": lambda a: torch.empty_like(a, dtype=torch.double).zero_(),
    "empty_like_format": lambda a: torch.empty_like(a, memory_format=torch.contiguous_format).zero_(),
    "zeros_like": torch.zeros_like,
    "zeros_like_double": lambda a: torch.zeros_like(a, dtype=torch.double),
    "ones_like": torch.ones_like,
    "full_like": lambda a: torch.full_like(a, 3, dtype=torch.int64),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "new_empty": lambda a: a.new_empty((2, 2)).zero_(),
    "new_zeros": lambda a: a.new_zeros((2,), dtype=torch.uint8),
    "new_ones": lambda a: a.new_ones((2,)),
    "new_full": lambda a: a.new_full((2, 2), 7.5),
    "to": lambda a: a.to(torch.int64),
    "from_blob": lambda a: NUMBERED.view(2, 3),
    "from_blob_strided": lambda a: NUMBERED.as_strided((2, 2), (1, 3)),
    "tensor": lambda a: torch.tensor([1, 2, 3]),
    "tensor_float": lambda a: torch.tensor([0.5, 0.1]),
    "tensor_vector": lambda a: torch.tensor([0.5, torch.tensor(0.1).item()], dtype=torch.double),
    "tensor_byte": lambda a: torch.tensor([1, 200], dtype=torch.uint8),
    "tensor_bool": lambda a: torch.tensor([True, False]),
    "tensor_number": lambda a: torch.tensor(7),
    "tensor_one": lambda a: torch.tensor(True),
    "tensor_none": lambda a: torch.tensor([], dtype=torch.int64),
    "get_slices": lambda a: a[:2, None, 1:],
    "get_last": lambda a: a[..., -1],
    "get_steps": lambda a: a[-1, ::2],
    "get_mask": lambda a: a[a > 0],
    "get_rows": lambda a: a[None, :, [0, 0]],
    "get_all": lambda a: a[True],
    "get_none": lambda a: a[False, ...],
    "get_by_tensor": lambda a: a[torch.tensor(0)],
    "set_number": lambda a: put(a, (..., slice(0, 1)), 2.5),
    "set_row": lambda a: put(a, (..., slice(1, 2)), torch.tensor([7.0])),
    "set_mask": lambda a: put(a, a > 0, -1),
}


def copies(arguments: list[Any]) -> list[Any]:
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, torch.Tensor):
        try:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        except AssertionError:
            return False
        return True
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


def compare(name: str, ours: Any, theirs: Any, arguments: list[Any], strides: bool = False) -> str | None:
    mine, yours = copies(arguments), copies(arguments)
    out = len(arguments) - 1 if name.endswith(".out") else None
    try:
        torch.manual_seed(0)
        expected = theirs(*yours[:out], out=yours[out]) if out else theirs(*yours)
    except (RuntimeError, TypeError) as error:
        try:
            ours(*mine)
        except RuntimeError:
            return None
        return f"{name}: torch raises {str(error).splitlines()[0]}, the wrapper does not"
    try:
        torch.manual_seed(0)
        result = ours(*mine[:out], out=mine[out]) if out else ours(*mine)
    except (RuntimeError, ValueError) as error:
        return f"{name}: {str(error).splitlines()[0]}"
    if not same(result, expected) or not same(mine, yours):
        return f"{name}({arguments}): {result} is not {expected}"
    if strides and result.stride() != expected.stride():
        return f"{name}: strides {result.stride()} are not {expected.stride()}"
    return None


def mixed(a: torch.Tensor) -> torch.Tensor:
    a += a
    a *= 3
    return 1.5 - -a / (2 * a) + (1 - a) / 4


def bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a &= 6
    a |= b
    a ^= 1
    return (~a & 7) | (b ^ a) ^ (a | 8)


def main() -> None:
    torch.ops.load_library(sys.argv[1])
    schemas: list[str] = json.loads(sys.argv[2])
    problems: list[str | None] = []
    count = 0
    for number, schema in enumerate(schemas):
        name = schema.partition("(")[0].removeprefix("aten::")
        operator, _, overload = name.partition(".")
        theirs = getattr(getattr(torch.ops.aten, operator), overload or "default")
        ours = getattr(torch.ops.abi_ops_test, f"w{number}")
        cases = ARGUMENTS.get(name) or ([[X, Y], [INTS, INTS.flip(1)], [X, INTS]] if name in BINARY else [[X]])
        for arguments in cases:
            count += 1
            problems.append(compare(name, ours, theirs, arguments))
    for name, cases in NUMBERS:
        for tensor, number in cases:
            count += 1
            kind = "float" if isinstance(number, float) else "int"
            problems.append(
                compare(f"{name} with a number", getattr(torch.ops.abi_ops_test, f"{name}_{kind}"),
                        getattr(torch, name), [tensor, number])
            )  # fmt: skip
    for name in ("add", "sub", "add_", "sub_"):
        tensors = [(X, Y), (INTS, INTS.flip(0)), (X, INTS), (INTS, X), (MASK, ~MASK), (X.half(), Y), (X, Y[0]),
                   (X[0], Y), (INTS.int(), INTS), (COMPLEX, X), (INTS, INTS[0].int()), (MASK, INTS)]  # fmt: skip
        for a, b in tensors:
            count += 1
            method = getattr(torch.Tensor, name)
            problems.append(compare(name, getattr(torch.ops.abi_ops_test, name), method, [a, b]))
    for name, method in (("plus", torch.add), ("minus", torch.sub), ("times", torch.mul), ("over", torch.div),
                         ("less", torch.lt)):  # fmt: skip
        for a, b in ((X, Y), (INTS, INTS.flip(0)), (INTS, X)):
            count += 1
            theirs = partial(lambda f, a, b: f(f(a, b), 2), method)
            problems.append(compare(name, getattr(torch.ops.abi_ops_test, name), theirs, [a, b]))
    count += 1
    problems.append(compare("mixed", torch.ops.abi_ops_test.mixed, mixed, [X]))
    for a, b in ((INTS, INTS.flip(0)), (INTS.byte(), INTS.flip(0).byte()), (MASK.int(), INTS.int())):
        count += 1
        problems.append(compare("bits", torch.ops.abi_ops_test.bits, bits, [a, b]))
    for name, theirs in COMPOSED.items():
        for a in (X, X.T.double(), X[None, None]):
            count += 1
            ours = getattr(torch.ops.abi_ops_test, f"composed_{name}")
            problems.append(compare(name, ours, theirs, [a], strides=True))
    formats = [torch.rand(s).permute(p) for s in ((2, 3, 4, 5), (1, 1, 1, 1), (2, 1, 3, 3), (2, 3, 1, 1), (0, 3, 2, 2))
               for p in ((0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1))]  # fmt: skip
    formats += [torch.rand(2, 3, 4, 5, 6).permute(0, 4, 1, 2, 3), torch.rand(2, 3, 4, 5, 6), X, torch.rand(1, 4, 4, 3)]
    formats += [torch.rand(2, 4, 4, 3).permute(0, 3, 1, 2)[:, :1], torch.rand(1, 3, 4, 4).expand(2, 3, 4, 4)]
    if torch.__version__.startswith("2.10"):  # its Python form of the rule differs from C++ where sizes are 1
        formats = [t for t in formats if min(t.shape, default=1) > 1]
    for t in formats:
        count += 1
        theirs = {torch.contiguous_format: 0, torch.channels_last: 2, torch.channels_last_3d: 3}[suggested(t)]
        if torch.ops.abi_ops_test.suggest_memory_format(t) != theirs:
            problems.append(f"suggest_memory_format: {tuple(t.shape)} {t.stride()} is {theirs}")
    count += 3
    pad = torch.nn.functional.pad
    padded = partial(lambda t, p, v: pad(t, p, "constant", v))
    problems.append(compare("constant_pad_nd", torch.ops.abi_ops_test.constant_pad_nd, padded, [X, [1, 2], 7.5]))
    for t, fits in ((X, True), (torch.empty(1, dtype=torch.uint8).expand(1 << 31), False)):
        if torch.ops.abi_ops_test.canUse32BitIndexMath(t) != fits:
            problems.append(f"canUse32BitIndexMath is not {fits}")
    real = [p for p in problems if p]
    print("\n".join(real))
    print(f"{count} calls, {len(real)} differ")
    sys.exit(bool(real))


if __name__ == "__main__":
    main()
