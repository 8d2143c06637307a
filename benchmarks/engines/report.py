"""Tables and a plot of what is in benchmarks/results/engines: a file per engine and commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.plots import DENSE, GRAY, LONG, ORANGE, OURS, PEERS, PURPLE, Style, figure
from benchmarks.result_file import RESULTS
from benchmarks.tables import table, wrap

FOLDER = RESULTS / "engines"
PLOT = Path("docs/plots/engines_vllm.svg")
NAMES = {
    "stock": "stock (Marlin)",
    "humming": "stock (Humming)",
    "off": "abiding installed, off",
    "w8a16": "**abiding**, w8a16",
    "w8a8": "**abiding**, w8a8",
    "fp8": "**abiding**, fp8",
    "all": "**abiding**, all jobs",
    "spoilt": "spoilt control",
}
STYLES = {
    "stock": PEERS["marlin"],
    "humming": PEERS["humming"],
    "w8a16": OURS,
    "w8a8": Style(PURPLE, DENSE, "v"),
    "fp8": Style(ORANGE, LONG, "D"),
}
DECODE, PREFILL = ("decode", "graph_ms"), ("prefill", "forward_ms")
VLLM_LEGEND = """MiniMax-M2's widths with seeded weights, in MXFP8, captured graphs; a decode step is the replay of its
graph, a prefill the forward pass of one prompt. All variants are loaded at once and measure in turns. What is compared,
and what it means: [engines_vllm.md](../engines_vllm.md#measured). Written by `make docs` from
[benchmarks/results/engines](../../benchmarks/results/engines)."""
TRANSFORMERS_LEGEND = """A model of MiniMax-M2's widths, with 2 layers, 64 experts and seeded weights. What is compared,
and what it means: [engines_transformers.md](../engines_transformers.md#measured). Written by `make docs` from
[benchmarks/results/engines](../../benchmarks/results/engines)."""


def pages(root: Path) -> dict[str, str]:
    """The pages of docs/results about engines, by name."""
    vllm, transformers = every(root, "vllm"), every(root, "transformers")
    parts = {
        "engines_vllm": [
            "# Results: whole models inside vLLM",
            wrap(VLLM_LEGEND),
            f"![time per step, and as a part of stock's](../plots/{PLOT.name})",
            "## Times",
            *map(times_table, reversed(vllm)),
            "## Log-probabilities, kernels and memory",
            *map(equality_table, vllm),
        ],
        "engines_transformers": [
            "# Results: a model inside transformers",
            wrap(TRANSFORMERS_LEGEND),
            *map(transformers_table, transformers),
        ],
    }
    return {name: "\n\n".join(filter(None, some)) + "\n" for name, some in parts.items()}


def every(root: Path, engine: str) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted((root / FOLDER).glob(f"{engine}-*.json"))]
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


def plot(root: Path) -> None:
    """The time of each variant inside vLLM, and its ratio to stock's, by model."""
    models = [(result, model) for result in every(root, "vllm") for model in timed(result)]
    with figure(2 * len(models), root / PLOT) as panels:
        for index, (result, model) in enumerate(models):
            variants, stock = model["variants"], model["variants"]["stock"]
            axes = axes_of(stock)
            times, ratios = panels[2 * index : 2 * index + 2]
            for name, row in variants.items():
                style = STYLES[name]
                ms = [row[kind][size] for kind, size in axes]
                label = NAMES[name].replace("*", "")
                times.plot(ms, **style._asdict(), label=label, markersize=4)
                parts = [one / stock[kind][size] for one, (kind, size) in zip(ms, axes, strict=True)]
                ratios.plot(parts, **style._asdict(), label=label, markersize=4)
            times.set(ylabel="ms per step", yscale="log")
            times.yaxis.set_major_formatter("{x:g}")
            times.minorticks_off()
            ratios.set(ylabel="time per step / stock's", ylim=(0, 1.3))
            ratios.axhline(1, color=GRAY, linewidth=0.8)
            for panel in (times, ratios):
                panel.set(title=f"{model['model']}, {result['gpu']}, vLLM {result['vllm']}")
                panel.set(xlabel="decode: sequences; prefill: tokens")
                panel.set_xticks(range(len(axes)), [f"{kind}\n{size}" for kind, size in axes], fontsize="small")
                panel.grid(alpha=0.3)
                panel.legend(fontsize="x-small")
