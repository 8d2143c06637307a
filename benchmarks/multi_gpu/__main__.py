"""The command line `python -m benchmarks.multi_gpu`."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from abiding import _library
from abiding.testing.ranks import prepare_for_virtual_ranks
from benchmarks.base import say
from benchmarks.multi_gpu import TOTAL_S, run
from benchmarks.multi_gpu.checks import RunConfig
from benchmarks.result_file import RESULTS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all phases; exits with 1 if a check or our own times failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.multi_gpu",
        description="Check and time the collectives between GPUs, one process per GPU, in less than 8 minutes.",
    )
    parser.add_argument("--ranks", type=int, help="how many processes (default: all GPUs; 2 on a CPU)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on GPU 0: a rehearsal, slow")
    parser.add_argument("--calls", type=int, help="of the stress test (default: 100000; 2000 on a CPU or a shared GPU)")
    parser.add_argument("--quick", action="store_true", help="few and small messages: a rehearsal")
    parser.add_argument(
        "--timeout", type=float, default=20.0, help="timeout of the communicators in seconds (default: 20)"
    )
    parser.add_argument("--peer", type=Path, help="shared library with vLLM's kernels, which are timed too")
    parser.add_argument(
        "--sglang",
        type=Path,
        help="folder with SGLang's package, tvm_ffi and msgspec; its kernels are compiled by nvcc and timed too",
    )
    parser.add_argument("--output", type=Path, help=f"where to write the JSON (default, for GPUs: {RESULTS})")
    parser.add_argument("--commit", help="commit recorded in the results (default: that of the checkout)")
    chosen = parser.parse_args(arguments)

    alone = chosen.device == "cpu" or chosen.share_gpu
    gpus = torch.cuda.device_count() if chosen.device == "cuda" else 0
    ranks = chosen.ranks or (2 if alone else gpus)
    if not 2 <= ranks <= 16:
        parser.error(f"--ranks {ranks}; expected 2 to 16 (this machine has {gpus} GPUs; --device cpu needs none)")
    if chosen.device == "cuda" and gpus < (1 if chosen.share_gpu else ranks):
        parser.error(f"--ranks {ranks}, but torch sees {gpus} GPUs; --share-gpu takes one, --device cpu none")
    if chosen.device == "cuda" and not _library.has_cuda_kernels():
        parser.error(_library.cuda_unavailable_reason() or "the CUDA binary is not loaded")
    config = RunConfig(
        device=chosen.device,
        shared_gpu=chosen.share_gpu,
        calls=chosen.calls or (2000 if alone else 100_000),
        quick=chosen.quick,
        timeout_s=chosen.timeout,
        peer=None if chosen.peer is None else str(chosen.peer.resolve()),
        sglang=None if chosen.sglang is None else str(chosen.sglang.resolve()),
    )
    whole = not alone and not chosen.quick
    # NVLink SHARP (multicast in the NVSwitch) stays off for the peers: it is hardware that our kernels do not use.
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    prepare_for_virtual_ranks()
    if not chosen.share_gpu:
        os.environ["CUDA_MODULE_LOADING"] = "LAZY"  # eager loading would take long in every process
    # Ends the parent even if it is stuck itself, for example in the driver.
    faulthandler.dump_traceback_later(TOTAL_S + 9, exit=True)
    output = chosen.output or (RESULTS if whole else None)
    results, errors = run(ranks, config, output=output, commit=chosen.commit)
    if output is not None:
        say(f"Wrote {output / results.file_name}")
    faulthandler.cancel_dump_traceback_later()
    sys.exit(1 if errors.keys() & {"correctness", "stress", "killed", "times", "times of qk_norm"} else 0)


if __name__ == "__main__":
    main()
