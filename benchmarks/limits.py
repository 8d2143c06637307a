"""Measure what limits an MoE layer on this GPU: `python benchmarks/limits.py --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from abiding.testing.benchmarks import limits
from abiding.testing.cases.mxfp8_moe import PERFORMANCE_TOKENS, SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description="Profile a layer's GEMMs with Nsight Compute; sample clock and power.")
    parser.add_argument("--shape", choices=SHAPES, default="minimax-m3-ep8")
    parser.add_argument(
        "--tokens", type=int, nargs="+", choices=PERFORMANCE_TOKENS["uniform"], default=[1, 32, 512, 8192]
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for the JSON file")
    parser.add_argument("--commit", help="commit to record (default: that of the source tree)")
    chosen = parser.parse_args()
    program = Path(__file__).with_name("one_call.py")
    results = limits.measure(chosen.shape, chosen.tokens, program, chosen.commit)
    print(limits.to_markdown(results))
    print(f"Wrote {results.write(chosen.output)}")


if __name__ == "__main__":
    main()
