"""Results of engines: condense what ``engine.py`` and ``serve.py`` wrote, and write tables and a plot of it.

    python -m benchmarks.engines.report condense FOLDER... --commit COMMIT --output FILE    # of runs on a GPU
    python -m benchmarks.engines.report docs                         # docs/engines_*.md and their plot

Condensed results lie in benchmarks/results/engines/, one file per engine and commit.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines.compare import difference, kernels_of_ours, median
from benchmarks.tables import fill, table, wrap

RESULTS = Path("benchmarks/results/engines")
PLOT = Path("docs/plots/engines_vllm.svg")
NAMES = {
    "stock": "stock (Marlin)",
    "humming": "stock (Humming)",
    "off": "abiding installed, off",
    "w8a16": "**abiding**, w8a16",
    "w8a8": "**abiding**, w8a8",
    "all": "**abiding**, all jobs",
    "spoilt": "spoilt control",
}
DECODE, PREFILL = ("decode", "graph_ms"), ("prefill", "forward_ms")


# --- condensing -------------------------------------------------------------------------------------------------------


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


# --- tables -----------------------------------------------------------------------------------------------------------


def every(engine: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{engine}-*.json"))]
    return sorted(found, key=lambda one: (one["date"], one["commit"]))


def head(result: dict[str, Any]) -> str:
    return (
        f"**{result['gpu']}**, vLLM {result['vllm']}, torch {result['torch']}; commit {result['commit'][:12]}, "
        f"{result['date']}"
    )


def timed(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (model for model in result["models"] if model["variants"]["stock"]["decode"])


def axes_of(stock: dict[str, Any]) -> list[tuple[str, str]]:
    """The kind and the size of each measurement."""
    return [(kind, size) for kind, _ in (DECODE, PREFILL) for size in stock[kind]]


def times_table(result: dict[str, Any]) -> str:
    """Milliseconds of each variant, and the ratio to stock."""
    parts = []
    for model in timed(result):
        stock = model["variants"]["stock"]
        axes = axes_of(stock)
        rows = []
        for name, row in model["variants"].items():
            cells = [NAMES[name]]
            for kind, size in axes:
                value = row[kind].get(size)
                ratio = "" if value is None or name == "stock" else f" ({value / stock[kind][size]:.2f})"
                cells.append("-" if value is None else f"{value:.3g}{ratio}")
            rows.append(cells)
        titles = [f"decode, {size}" if kind == "decode" else f"prefill, {size}" for kind, size in axes]
        parts.append(wrap(f"`{model['model']}`, {head(result)}: ms per step (ratio to stock).") + "\n\n")
        parts[-1] += table(["", *titles], rows)
    return "\n\n".join(parts)


def equality_table(result: dict[str, Any]) -> str:
    """How far log-probabilities are from stock's, kernels of ours in captured graphs, and memory at load."""
    rows = []
    for model in result["models"]:
        for name, row in model["variants"].items():
            counts = [f"{one['ours']:g} of {one['all']:g}" for one in row["kernels"].values()]
            load = row["load_bytes"]
            own = f"{model['noise']:.4f} (its own noise)" if name == "stock" else f"{row['mean_difference']:.4f}"
            top = "" if name == "stock" else f"{row['same_top_1']:.3f}"
            peaks = f"{load['peak'] / 2**30:.2f} / {load['after'] / 2**30:.2f}"
            rows.append([model["model"], NAMES[name], own, top, counts[0] if counts else "not counted", peaks])
    titles = ["model", "", "mean difference", "same top-1", "our kernels in a graph", "GiB at load: peak / after"]
    served = [
        wrap(
            f"Served by `vllm serve` over HTTP, model `{one['model']}`, {one['requests']} requests at once, "
            f"`ABIDING_VLLM=all`: mean difference to stock {one['variants']['all']['mean_difference']:.4f}."
        )
        for one in result["served"]
    ]
    return "\n\n".join([wrap(head(result) + "."), table(titles, rows), *served])


def transformers_table(result: dict[str, Any]) -> str:
    sizes = list(result["ms"]["abiding w8a16"])
    rows = []
    for name, times in result["ms"].items():
        for kind in ("graph", "eager"):
            rows.append([name, kind, *(f"{times[s][kind]:.3g}" if s in times else "-" for s in sizes)])
    errors = [
        [name, *(f"{values[kind]:.2%}" if kind in values else "-" for kind in ("experts", "logits"))]
        for name, values in result["relative_errors"].items()
    ]
    speeds = ", ".join(f"{name} {value:.0f}" for name, value in result["generated_tokens_per_second"].items())
    memory = {name: f"{value / 2**30:.2f}" for name, value in result["bytes"].items()}
    sentences = (
        f"`generate` with 8 sequences, tokens per second: {speeds}. Memory, GiB: peak at load "
        f"{memory['peak_at_load']}, after it {memory['after_load']}, after the first use {memory['after_first_use']}; "
        f"dequantized to bfloat16 {memory['dequantized_to_bf16']}."
    )
    about = (
        f"**{result['device']}**, transformers {result['transformers']}, torch {result['torch']}; commit "
        f"{result['commit'][:12]}, {result['date']}: ms per forward pass, by sequences x tokens."
    )
    return "\n\n".join(
        [
            wrap(about),
            table(["", "", *sizes], rows),
            table(["relative error against float64", "experts", "logits"], errors),
            wrap(sentences),
        ]
    )


def plot(results: list[dict[str, Any]]) -> None:
    """The ratio of each variant's time to stock's, by model."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "engines"
    from matplotlib import pyplot

    models = [(result, model) for result in results for model in timed(result)]
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(5.5 * len(models), 3.6), layout="constrained", sharey=True
    )
    styles = {"humming": ("tab:green", "s--"), "w8a16": ("tab:blue", "o-"), "w8a8": ("tab:purple", "^-.")}
    for panel, (result, model) in zip(panels, models, strict=True):
        stock = model["variants"]["stock"]
        axes = axes_of(stock)
        for name, (color, style) in styles.items():
            if row := model["variants"].get(name):
                ratios = [row[kind][size] / stock[kind][size] for kind, size in axes]
                panel.plot(ratios, style, color=color, label=NAMES[name].replace("*", ""))
        panel.axhline(1, color="tab:orange", label=NAMES["stock"])
        labels = [f"{kind}\n{size}" for kind, size in axes]
        panel.set(title=f"{model['model']}, {result['gpu']}, vLLM {result['vllm']}", ylim=(0, 1.4))
        panel.set_xticks(range(len(axes)), labels)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("time per step / stock's")
    figure.supxlabel("decode: sequences; prefill: tokens")
    figure.savefig(PLOT, metadata={"Date": None})


def write_docs() -> None:
    vllm, own = every("vllm"), every("transformers")
    for page, parts in (
        (
            Path("docs/engines_vllm.md"),
            {
                "engines:vllm:times": [times_table(one) for one in reversed(vllm)],
                "engines:vllm:equality": [equality_table(one) for one in vllm],
            },
        ),
        (Path("docs/engines_transformers.md"), {"engines:transformers": map(transformers_table, own)}),
    ):
        text = page.read_text()
        for marker, bodies in parts.items():
            text = fill(text, marker, bodies)
        page.write_text(text)
        print(f"Wrote {page}")
    plot(vllm)
    print(f"Wrote {PLOT}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("docs")
    condensing = commands.add_parser("condense")
    condensing.add_argument("folders", nargs="+", type=Path)
    condensing.add_argument("--commit", required=True)
    condensing.add_argument("--output", required=True, type=Path)
    condensing.add_argument("--skip", nargs="*", default=[], help='cases that do not count, such as "decode 256"')
    given = parser.parse_args()
    if given.command == "docs":
        write_docs()
    else:
        condensed = condense(given.folders, given.commit, given.skip)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(condensed, indent=1) + "\n")
