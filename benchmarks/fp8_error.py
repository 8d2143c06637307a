"""What `compute="fp8"` costs in accuracy, simulated on a CPU: a table in Markdown.

    python -m benchmarks.fp8_error [--rows 48] [--columns 64]

Three numbers per kind of data and K, each relative to the root mean square of the exact result:

- rebase: products of rebased against products of the given weights, both exact, of unquantized activations;
- sums: FP8 tensor cores against the exact product of the same operands, before the last rounding and after it;
- fp8 / w8a8: how far both are from the float64 product with unquantized activations.

And the same ratio for whole layers. The tensor core is a model (`tensor_core_sum`).
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from abiding.reference import mxfp8_moe as reference

KINDS = ("normal", "student t 2.5", "outlier channels")
WIDTHS = (160, 2048, 6144, 16384)
LAYER = (16, 2048, 768)  # tokens, hidden, intermediate
FRACTION_BITS = 13  # that the tensor core keeps below the first bit of the largest addend
STEP = 32  # K of one wgmma of e4m3
PROMOTED = 128  # K that the tensor core adds before its sums are promoted to float32


def values(kind: str, rows: int, k: int, generator: torch.Generator) -> Tensor:
    """bfloat16 rows; of "outlier channels" 0.5 % of the columns are 30 times as large."""
    x = torch.randn(rows, k, generator=generator)
    if kind == "student t 2.5":
        # Chi-squared with 2.5 degrees of freedom is a gamma distribution, whose sampler takes no generator.
        x = x / torch.distributions.Gamma(1.25, 0.5).sample((rows, k)).div(2.5).sqrt()
    if kind == "outlier channels":
        x[:, torch.randperm(k, generator=generator)[: max(1, k // 200)]] *= 30
    return x.bfloat16()


def weights(kind: str, n: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """MXFP8 weights [1, n, k] and plain codes; outlier channels are those of activations."""
    x = values("normal" if kind == "outlier channels" else kind, n, k, generator) / 32
    data, codes = reference.quantize_rows(x)
    return data[None], codes[None]


def tensor_core_sum(a: Tensor, w: Tensor) -> Tensor:
    """Rows [m, 128 or less] times [n, same], float32: per 32 of K, addends are aligned to the largest and cut off."""
    total = torch.zeros(len(a), len(w), 1, dtype=torch.float64)
    for begin in range(0, a.size(1), STEP):
        products = a[:, None, begin : begin + STEP] * w[None, :, begin : begin + STEP]
        addends = torch.cat([products, total], -1)
        largest = addends.abs().amax(-1, keepdim=True)
        unit = torch.exp2(torch.frexp(largest).exponent.double() - 1 - FRACTION_BITS)
        total = ((addends / unit).trunc().sum(-1, keepdim=True) * unit).double()
    return total[..., 0].float()


def fp8_product(rows: Tensor, codes: Tensor, weight: Tensor, weight_codes: Tensor) -> Tensor:
    """`reference.fp8_product`, with the sums of a tensor core."""
    total = torch.zeros(len(rows), len(weight), dtype=torch.float32)
    for begin in range(0, rows.size(1), PROMOTED):
        part = slice(begin, begin + PROMOTED)
        a, w = (t[:, part].contiguous().view(torch.float8_e4m3fn).double() for t in (rows, weight))
        total += tensor_core_sum(a, w)
    return total * reference.row_scale(codes)[:, None] * reference.row_scale(weight_codes)


def rms(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def product_row(kind: str, k: int, m: int, n: int) -> list[str]:
    generator = torch.Generator().manual_seed(k)
    x = values(kind, m, k, generator)
    weight, plain = weights(kind, n, k, generator)
    rebased, scales, report = reference.rebase(weight, reference.swizzle_scales(plain))
    codes = reference.unswizzle_scales(scales, n, k)
    given, moved = (reference.exact_values(*pair)[0] for pair in ((weight, plain), (rebased, codes)))
    truth = x.double() @ given.T

    data, of_rows = reference.quantize_rows(x)
    w8a8 = reference.exact_values(data, of_rows) @ given.T
    data, of_rows = reference.quantize_rows(x, rowwise=True)
    same_operands = reference.exact_values(data, of_rows) @ moved.T
    fp8 = fp8_product(data, of_rows, rebased[0], codes[0])
    rounded = fp8.bfloat16()
    assert int(report.left) == 0
    return [
        kind,
        str(k),
        f"{float(report.changed) / weight.numel():.1e}",
        f"{rms(x.double() @ moved.T, truth):.1e}",
        f"{rms(fp8, same_operands):.2e}",
        f"{rms(rounded, same_operands):.2e}",
        f"{rms(w8a8, truth):.3%}",
        f"{rms(fp8, truth):.3%}",
        f"{rms(fp8, truth) / rms(w8a8, truth):.3f}",
        f"{rms(rounded, truth) / rms(w8a8.bfloat16(), truth):.3f}",
    ]


def layer_row(kind: str) -> list[str]:
    """A layer of one expert, with the arithmetic of `reference.layer` and the sums of a tensor core."""
    tokens, hidden, intermediate = LAYER
    generator = torch.Generator().manual_seed(0)
    x = values(kind, tokens, hidden, generator)
    first, second = (weights(kind, n, k, generator) for n, k in ((2 * intermediate, hidden), (hidden, intermediate)))
    ids, one = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
    tiles = [(weight, reference.swizzle_scales(codes)) for weight, codes in (first, second)]
    arguments = (x, *tiles[0], *tiles[1], ids, one)
    truth = reference.layer(*arguments, activation="silu", mode="w8a16")
    w8a8 = reference.layer(*arguments, activation="silu", mode="w8a8")

    h = x
    for weight, scales in tiles:
        data, codes, _ = reference.rebase(weight, scales)
        plain = reference.unswizzle_scales(codes, data.size(1), data.size(2))
        h = fp8_product(*reference.quantize_rows(h, rowwise=True), data[0], plain[0]).bfloat16()
        if data.size(2) == hidden:
            h = reference.activate(h, "silu")
    ratio = f"{rms(h, truth) / rms(w8a8, truth):.3f}"
    return [f"{kind}, layer", str(hidden), *[""] * 4, f"{rms(w8a8, truth):.3%}", f"{rms(h, truth):.3%}", "", ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48, help="rows of activations")
    parser.add_argument("--columns", type=int, default=64, help="weight rows")
    options = parser.parse_args()
    torch.manual_seed(0)
    for k in (32, 128):
        a, w = (torch.randn(256, k).clamp(-448, 448).to(torch.float8_e4m3fn).double() for _ in range(2))
        print(f"the model of the tensor core, K = {k}: {rms(tensor_core_sum(a, w), a @ w.T):.1e}")
    heads = "data, K, elements rebase changes, rms of that, sums, sums and bfloat16, w8a8, fp8, fp8 / w8a8, rounded"
    print("\n| " + heads.replace(", ", " | ") + " |")
    print("|" + "---|" * len(heads.split(", ")))
    for kind in KINDS:
        for k in WIDTHS:
            print("| " + " | ".join(product_row(kind, k, options.rows, options.columns)) + " |", flush=True)
        print("| " + " | ".join(layer_row(kind)) + " |", flush=True)


if __name__ == "__main__":
    main()
