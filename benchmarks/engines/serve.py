"""Serve a model with ``vllm serve``, as a user would, once per variant, and ask all servers the same over HTTP.

    python -m benchmarks.engines.serve MODEL FOLDER STOCK OTHER...

A variant is an environment of ``engine.py``; nothing else differs. Each server answers the same texts, of which the
log-probabilities are compared with stock's; FOLDER gets VARIANT.log and serve.json.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.engines.engine import VARIANTS

OPTIONS = ["--load-format=seeded", "--max-model-len=2048", "--max-num-seqs=64", "--no-enable-prefix-caching"]
OPTIONS += ["--gpu-memory-utilization=0.05", f"--kv-cache-memory-bytes={1 << 30}", "--host=127.0.0.1"]
FIRST_PORT = 8600


def ask(port: int, prompt: list[int], model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "prompt_logprobs": 1}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        choice: dict[str, Any] = json.load(answer)["choices"][0]
    return choice


def wait_until_ready(port: int, process: subprocess.Popen[bytes], end: float) -> bool:
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    return False


def log_probabilities(choice: dict[str, Any], prompt: list[int]) -> list[float]:
    """Of each token of the prompt but the first."""
    entries = choice["prompt_logprobs"][1:]
    return [entry[str(token)]["logprob"] for token, entry in zip(prompt[1:], entries, strict=True)]


def main(model: Path, folder: Path, variants: list[str], limit_s: float) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    generator = random.Random(1)
    prompts = [[generator.randrange(3, vocabulary) for _ in range(96)] for _ in range(32)]
    end = time.monotonic() + limit_s
    servers = {}
    for number, variant in enumerate(variants):
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += [*OPTIONS, f"--port={FIRST_PORT + number}", "--served-model-name=model"]
        with (folder / f"{variant}.log").open("w") as log:
            servers[variant] = subprocess.Popen(
                command, env=os.environ | VARIANTS[variant], stdout=log, stderr=subprocess.STDOUT
            )
    result: dict[str, Any] = {"model": model.name, "requests": len(prompts), "variants": {}}
    found: dict[str, list[list[float]]] = {}
    failures = []
    try:
        for number, (variant, process) in enumerate(servers.items()):
            port = FIRST_PORT + number
            if not wait_until_ready(port, process, end):
                failures.append(f"{variant}: the server did not come up")
                continue
            with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
                choices = list(pool.map(lambda prompt: ask(port, prompt, "model"), prompts))  # noqa: B023
            found[variant] = [log_probabilities(*pair) for pair in zip(choices, prompts, strict=True)]
    finally:
        for process in servers.values():
            process.terminate()
        for process in servers.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    stock = found.get(variants[0])
    for variant, rows in found.items():
        lines = (folder / f"{variant}.log").read_text(errors="replace").splitlines()
        said = sorted({line[line.index("abiding: ") :] for line in lines if "abiding: " in line})
        row: dict[str, Any] = {"environment": VARIANTS[variant], "log": said}
        if stock is not None:
            pairs = [(a, b) for both in zip(stock, rows, strict=True) for a, b in zip(*both, strict=True)]
            row["mean_difference"] = statistics.fmean(abs(a - b) for a, b in pairs)
        result["variants"][variant] = row
        print(f"{variant}: answered {len(rows)} requests, mean difference {row.get('mean_difference')}")
        print(*said, sep="\n")
    (folder / "serve.json").write_text(json.dumps(result, indent=1))
    for failure in failures:
        print(f"FAILED: {failure}")
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder with config.json and a tokenizer")
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="+", choices=VARIANTS, help="the first is what the others are compared with")
    parser.add_argument("--limit-s", type=float, default=240, help="for all servers to come up")
    given = parser.parse_args()
    sys.exit(main(given.model, given.folder, given.variants, given.limit_s))
