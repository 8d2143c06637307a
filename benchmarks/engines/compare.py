"""Compare variants of an engine, from the files that ``engine.py`` wrote.

    python -m benchmarks.engines.compare FOLDER STOCK OTHER...

Gate: the mean difference of forced log-probabilities to stock is at most twice what stock differs from itself (the same
texts again, and one by one); where activations are quantized, which stock does not do, at most five times. Greedy
tokens are no gate: stock does not reproduce its own. A variant named "spoilt" must fail the gate by far, and every
variant of ours must have our kernels in its captured graphs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

OURS = ("w8a16", "w8a8", "fp8", "all", "spoilt")
LIMITS = {"off": 2, "w8a16": 2, "all": 2, "w8a8": 5, "fp8": 5}
"""How many times stock's difference from itself a variant may differ."""


def difference(a: list[Any], b: list[Any]) -> tuple[float, float]:
    """The mean difference of log-probabilities, and the share of positions with the same most likely token."""
    pairs = [(x, y) for rows in zip(a, b, strict=True) for x, y in zip(*rows, strict=True)]
    return statistics.fmean(abs(x[0] - y[0]) for x, y in pairs), statistics.fmean(x[1] == y[1] for x, y in pairs)


def kernels_of_ours(kernels: dict[str, Any]) -> tuple[float, float]:
    """How many of a graph's kernels are ours, and how many there are."""
    return sum(count for key, (count, _) in kernels.items() if "abiding" in key), sum(n for n, _ in kernels.values())


def median(rows: list[dict[str, Any]], kind: str, size: str, name: str) -> float | None:
    values = [row[kind][size][name] for row in rows if name in row[kind].get(size, {})]
    return statistics.median(values) if values else None


def main(folder: Path, variants: list[str]) -> int:
    found = {v: json.loads(path.read_text()) for v in variants if (path := folder / f"{v}.json").exists()}
    failures = [f"{variant} has no result" for variant in variants if variant not in found]
    stock = found.get(variants[0])
    if stock is None:
        print(f"{variants[0]} has no result in {folder}")
        return 1
    noise = max(difference(stock["forced"], stock[name])[0] for name in ("forced_again", "forced_singly"))
    print(f"{stock['model']} on {stock['gpu']}, vLLM {stock['vllm']}, torch {stock['torch']}")
    print(f"stock against itself: {noise:.5f}")
    for variant, result in found.items():
        mean, top = difference(stock["forced"], result["forced"])
        load = {name: f"{size / 2**30:.2f} GiB" for name, size in result["load_bytes"].items()}
        active = [job for job, status in result["jobs"].items() if status["state"] == "active"]
        print(f"{variant}: mean difference {mean:.5f}, top-1 {top:.4f}, load {load}, active {active}")
        if variant == "spoilt" and mean < 10 * noise:
            failures.append(f"spoilt differs by {mean:.5f} only: the comparison notices nothing")
        if mean > (limit := LIMITS.get(variant, math.inf)) * noise:
            failures.append(f"{variant} differs from stock by {mean:.5f}, more than {limit} times {noise:.5f}")
        for name, kernels in result.get("kernels", {}).items():
            ours, count = kernels_of_ours(kernels)
            total = sum(time for _, time in kernels.values())
            print(f"   graph of {name}: {ours:g} kernels of ours of {count:g}, {total:.0f} µs")
            if bool(ours) != (variant in OURS):
                failures.append(f"{variant}, {name}: {ours:g} kernels of ours in the captured graph")
        for kind, name in (("decode", "graph_ms"), ("decode", "wall_ms_per_step"), ("prefill", "forward_ms")):
            rows = result.get("times", [])
            sizes = list(rows[0][kind]) if rows else []
            values = {size: median(rows, kind, size, name) for size in sizes}
            base = {size: median(stock.get("times", []), kind, size, name) for size in sizes}
            cells = [f"{s}: {v:.3f} ({v / b:.2f}x)" for s, v in values.items() if v and (b := base[s])]
            if cells:
                print(f"   {kind} {name}: {'  '.join(cells)}")
    for failure in failures:
        print(f"FAILED: {failure}")
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="+", help="the first is what the others are compared with")
    given = parser.parse_args()
    sys.exit(main(given.folder, given.variants))
