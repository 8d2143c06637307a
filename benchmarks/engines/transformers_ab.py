"""Abiding beside transformers' own experts on one model: times, errors, memory and operator calls, as one JSON.

    python -m benchmarks.engines.transformers_ab [--layers 2] [--experts 64] [--out FILE]

The model has MiniMax-M2's widths and seeded weights, in MXFP8, and is loaded from a checkpoint in a temporary folder.
It needs transformers with accelerate, and no network. transformers' own FP8 kernel comes from a hub; without it, what
transformers runs is the same checkpoint dequantized to bfloat16, with its "grouped_mm" or "batched_mm" experts: those
are compared. ``--tiny`` rehearses everything on small sizes, also on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import abiding
from abiding.engines import transformers as engine
from benchmarks.engines import mxfp8_checkpoint
from benchmarks.engines.mxfp8_checkpoint import Calls, layer_errors, relative_error

transformers: Any = importlib.import_module("transformers")
DEVICE = torch.device("cuda" if abiding.has_cuda_kernels() else "cpu")

MINIMAX_M2 = {
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 4096,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    changes = {} if args.tiny else MINIMAX_M2 | {"num_hidden_layers": args.layers, "num_local_experts": args.experts}
    config = mxfp8_checkpoint.config_of("minimax_m2", **changes)
    sizes = [(1, 1), (2, 1), (1, 32)] if args.tiny else [(1, 1), (8, 1), (64, 1), (256, 1), (1, 2048), (1, 8192)]
    registered = {name: status.reason for name, status in engine.register().items() if status.state == "active"}
    with tempfile.TemporaryDirectory() as name:
        folder = mxfp8_checkpoint.write(Path(name), config, device=DEVICE, std=0.02)
        result = {
            "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "model": {key: getattr(config, key) for key in mxfp8_checkpoint.CONFIGS["minimax_m2"]},
            "active": registered,
            **compare(folder, sizes, args.repeats, args.tiny),
        }
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


def compare(folder: Path, sizes: list[tuple[int, int]], repeats: int, tiny: bool) -> dict[str, Any]:
    ours, memory = load(folder, "abiding")
    ids = random_ids(ours, 2, 16 if tiny else 128)
    calls = Calls()
    with calls, torch.no_grad():
        ours(ids)
    memory["after_first_use"] = allocated()
    times = {"abiding w8a16": time_all(ours, sizes, repeats)}
    errors = {"abiding w8a16": {"experts": max(layer_errors(ours, ids))}}
    with torch.no_grad():
        logits = {"abiding w8a16": ours(ids).logits}
        engine.register(mode="w8a8")
        times["abiding w8a8"] = time_all(ours, sizes, repeats)
        errors["abiding w8a8"] = {"experts": max(layer_errors(ours, ids))}
        logits["abiding w8a8"] = ours(ids).logits
        engine.register()
        scales = [p.view(torch.uint8) for n, p in ours.named_parameters() if n.endswith("experts.down_proj_scale_inv")]
        for scale in scales:
            scale.add_(1)
        logits["spoilt: scales of down_proj doubled"] = ours(ids).logits
        for scale in scales:
            scale.sub_(1)
        generated = tokens_per_second(ours)

        exact = mxfp8_checkpoint.dequantized(ours)
        expected = exact(ids).logits
    del exact
    plain = mxfp8_checkpoint.dequantized(ours, torch.bfloat16)
    speeds = {"abiding w8a16": generated}
    del ours
    release()
    memory["dequantized_to_bf16"] = allocated()
    for implementation in ("grouped_mm", "batched_mm"):
        plain.set_experts_implementation(implementation)
        name = f"transformers bf16 {implementation}"
        # batched_mm copies the weights of each token's experts, so it is for decode sizes alone.
        own_sizes = [size for size in sizes if implementation == "grouped_mm" or size[0] * size[1] <= 8]
        times[name] = time_all(plain, own_sizes, repeats)
        with torch.no_grad():
            logits[name] = plain(ids if implementation == "grouped_mm" else ids[:, :8]).logits
        speeds[name] = tokens_per_second(plain)
    for name, value in logits.items():
        errors.setdefault(name, {})["logits"] = relative_error(value, expected[:, : value.size(1)])
    return {
        "bytes": memory,
        "operator_calls_per_forward": dict(calls.of),
        "relative_errors": errors,
        "ms": times,
        "generated_tokens_per_second": speeds,
    }


def load(folder: Path, implementation: str) -> tuple[Any, dict[str, int]]:
    release()
    before = allocated()
    with quantized_on_a_cpu():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation=implementation, device_map=DEVICE.type
        )
    model.eval()
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    scales = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if n.endswith("_scale_inv"))
    return model, {
        "before": before,
        "parameters": parameters,
        "of_these_scales": scales,
        "peak_at_load": peak,
        "after_load": allocated(),
    }


@contextlib.contextmanager
def quantized_on_a_cpu() -> Iterator[None]:
    """Without a GPU, transformers would dequantize the checkpoint as it loads it."""
    quantizer = importlib.import_module("transformers.quantizers.quantizer_finegrained_fp8").FineGrainedFP8HfQuantizer
    original = quantizer.validate_environment
    if DEVICE.type == "cpu":
        quantizer.validate_environment = lambda *_args, **_kwargs: None
    yield
    quantizer.validate_environment = original


def release() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def random_ids(model: Any, batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch * 100_000 + tokens)
    return torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator).to(DEVICE)


def time_all(model: Any, sizes: list[tuple[int, int]], repeats: int) -> dict[str, Any]:
    """Per number of sequences x tokens, without a cache: a forward pass as Python launches it, and its CUDA graph."""
    found = {}
    for batch, tokens in sizes:
        ids = random_ids(model, batch, tokens)

        def forward(ids: torch.Tensor = ids) -> None:
            model(ids, use_cache=False, logits_to_keep=1)

        with torch.no_grad():
            eager = median_ms(forward, repeats)
            graph = in_a_graph(forward)
            captured = None if graph is None else median_ms(graph, repeats)
        found[f"{batch} x {tokens}"] = {"eager": eager, "graph": captured}
    return found


def in_a_graph(call: Callable[[], None]) -> Callable[[], None] | None:
    """The call as a CUDA graph, or None where it cannot be captured."""
    if DEVICE.type == "cpu":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    return graph.replay


def median_ms(call: Callable[[], None], repeats: int) -> float:
    for _ in range(3):
        call()
    samples = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        samples.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(samples), 4)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def tokens_per_second(model: Any, batch: int = 8, new: int = 32) -> float:
    """Of ``generate``: transformers decodes bfloat16 experts by "batched_mm" where "grouped_mm" was chosen."""
    ids = random_ids(model, batch, 16)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        for _ in range(2):
            synchronize()
            start = time.perf_counter()
            model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            synchronize()
    return round(batch * new / (time.perf_counter() - start), 1)


if __name__ == "__main__":
    main()
