"""On the GPU machine, in the folder that ``pack.py`` made: unpack it, look at it, compare variants of the engine.

    python -m benchmarks.engines.on_gpu setup check compare:tiny:stock,off,w8a16,w8a8,fp8,spoilt
    python -m benchmarks.engines.on_gpu times:m2x4:stock,humming,w8a16,w8a8,fp8 times:m2x12:stock,fp8

Results come to --output (default ./results): one JSON file per variant, the logs, and what ``compare.py`` says.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
}
LOOK = """
import torch; print("torch", torch.__version__, torch.cuda.get_device_name())
import vllm, vllm._custom_ops; print("vllm", vllm.__version__, torch.ops._moe_C.moe_wna16_marlin_gemm.default.name())
from vllm.vllm_flash_attn import flash_attn_interface as f; print("fa3", f.FA3_AVAILABLE, f.FA3_UNAVAILABLE_REASON)
from vllm.utils.import_utils import has_humming; print("humming", has_humming())
import json; from abiding import engines; print(json.dumps(engines.report(probe=True), indent=1))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="+", help="setup, check, {compare,times,serve}:MODEL:VARIANTS")
    parser.add_argument("--site", type=Path, default=Path("/tmp/abiding_engines"), help="where packages are unpacked")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--limit-s", type=float, default=400, help="for one comparison")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(given.site), str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | SETTINGS | {"PYTHONPATH": path}
    for name in ("ABIDING_VLLM", "ABIDING_VLLM_MOE_MODE", "SEEDED_SPOIL"):
        environment.pop(name, None)
    for job in given.jobs:
        start = time.monotonic()
        kind, _, rest = job.partition(":")
        if kind == "setup":
            setup(given.site)
        elif kind == "check":
            subprocess.run([sys.executable, "-c", LOOK], env=environment | {"ABIDING_VLLM": "all"}, check=True)
        else:
            model, _, variants = rest.partition(":")
            if kind == "serve":
                command = [sys.executable, "-P", "-m", "benchmarks.engines.serve", HERE / "models" / model]
                command += [given.output / f"{model}_serve", *variants.split(",")]
                subprocess.run(command, env=environment)
            else:
                compare(model, variants.split(","), kind == "times", given.output, environment, given.limit_s)
        print(f"== {job}: {time.monotonic() - start:.0f} s", flush=True)


def setup(site: Path) -> None:
    site.mkdir(parents=True, exist_ok=True)
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", f"--target={site}"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *(HERE / "wheels").glob("*.whl")], check=True)
    with tarfile.open(HERE / "vllm.tar.xz") as packed:
        packed.extractall(site, filter="data")
    for library in (HERE / "libraries").iterdir():
        target = site / "vllm" / library.name.replace("__", "/", 1 if library.name.startswith("vllm") else 0)
        target = target.with_suffix("")
        target.parent.mkdir(parents=True, exist_ok=True)
        with lzma.open(library) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    shutil.copytree(HERE / "site", site, dirs_exist_ok=True)


def compare(
    model: str, variants: list[str], times: bool, output: Path, environment: dict[str, str], limit_s: float
) -> None:
    """Run an engine per variant at once; they measure in turns. Then print what ``compare.py`` finds."""
    folder = output / f"{model}{'_times' if times else ''}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    running = {}
    for variant in variants:
        caches = {
            name: f"/tmp/abiding_caches/{variant}/{name}"
            for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
        }
        command = [sys.executable, "-P", "-m", "benchmarks.engines.engine", variant, str(HERE / "models" / model)]
        command += [str(folder), "--peers", ",".join(variants), *(["--times"] if times else [])]
        log = (folder / f"{variant}.log").open("w")
        running[variant] = subprocess.Popen(command, env=environment | caches, stdout=log, stderr=subprocess.STDOUT)
    end = time.monotonic() + limit_s
    for variant, process in running.items():
        try:
            status = process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        if status:
            (folder / f"dead.{variant}").touch()
            lines = (folder / f"{variant}.log").read_text(errors="replace").strip().splitlines()
            print(f"{variant} ended with {status}:", *lines[-15:], sep="\n  ", flush=True)
        for line in (folder / f"{variant}.log").read_text(errors="replace").splitlines():
            if "abiding:" in line or "MoE backend" in line or "for MXFP8 GEMM" in line:
                print(f"{variant}: {line[-160:]}", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.engines.compare", folder, *variants], env=environment)


if __name__ == "__main__":
    main()
