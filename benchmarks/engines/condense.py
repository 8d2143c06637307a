"""Condense what `engine` and `serve` wrote on a GPU, a folder per model, into one file of benchmarks/results/engines.

python -m benchmarks.engines.condense FOLDER... --commit COMMIT --output FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from benchmarks.engines.compare import difference, kernels_of_ours, median
from benchmarks.engines.report import DECODE, NAMES, PREFILL


def condense(folders: list[Path], commit: str, skipped: list[str]) -> dict[str, Any]:
    models = [of_model(folder, skipped) for folder in folders if not (folder / "serve.json").exists()]
    served = [json.loads((folder / "serve.json").read_text()) for folder in folders if (folder / "serve.json").exists()]
    first = json.loads((next(f for f in folders if (f / "stock.json").exists()) / "stock.json").read_text())
    about = {name: first[name] for name in ("gpu", "vllm", "torch")}
    return {
        "engine": "vllm",
        **about,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "models": models,
        "served": served,
    }


def of_model(folder: Path, skipped: list[str]) -> dict[str, Any]:
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    stock = found["stock"]
    noise = max(difference(stock["forced"], stock[name])[0] for name in ("forced_again", "forced_singly"))
    variants = {}
    for variant in (name for name in NAMES if name in found):
        result = found[variant]
        mean, top = difference(stock["forced"], result["forced"])
        row: dict[str, Any] = {
            "mean_difference": round(mean, 5),
            "same_top_1": round(top, 4),
            "load_bytes": result["load_bytes"],
            "kernels": {
                name: dict(zip(("ours", "all"), kernels_of_ours(kernels), strict=True))
                for name, kernels in result.get("kernels", {}).items()
                if name not in skipped
            },
        }
        for kind, name in (DECODE, PREFILL):
            rows = result.get("times", [])
            sizes = [size for size in (rows[0][kind] if rows else []) if f"{kind} {size}" not in skipped]
            row[kind] = {size: round(value, 3) for size in sizes if (value := median(rows, kind, size, name))}
        variants[variant] = row
    return {"model": stock["model"], "noise": round(noise, 5), "variants": variants}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--skip", nargs="*", default=[], help='cases that do not count, such as "decode 256"')
    given = parser.parse_args()
    condensed = condense(given.folders, given.commit, given.skip)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(condensed, indent=1) + "\n")
