"""One engine of one variant: what it answers, what a step costs, which kernels its captured graphs hold.

    python -m benchmarks.engines.engine VARIANT MODEL FOLDER [--times] [--peers A,B,C]

Several variants run at once, each in a process of its own, and measure in turns; all write FOLDER/VARIANT.json.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VARIANTS = {
    "stock": {},
    "humming": {},
    "off": {"ABIDING_VLLM": "0"},
    "w8a16": {"ABIDING_VLLM": "moe"},
    "w8a8": {"ABIDING_VLLM": "moe", "ABIDING_VLLM_MOE_MODE": "w8a8"},
    "fp8": {"ABIDING_VLLM": "moe", "ABIDING_VLLM_MOE_MODE": "fp8"},
    "all": {"ABIDING_VLLM": "all"},
    "spoilt": {"ABIDING_VLLM": "moe", "SEEDED_SPOIL": "1"},
}
BATCHES, LENGTHS = (1, 8, 64, 256), (2048, 8192)
MOST_TOKENS = 8192  # of one step
ROUNDS = 3


class Turns:
    """Lets processes of one folder wait for each other and measure one at a time."""

    def __init__(self, folder: Path, me: str, peers: list[str]) -> None:
        self.folder, self.me, self.peers = folder, me, peers

    def meet(self, name: str, limit_s: float) -> None:
        """Wait until all peers that live have come to ``name``."""
        (self.folder / f"{name}.{self.me}").touch()
        end = time.monotonic() + limit_s
        while late := [p for p in self.peers if not any((self.folder / f"{n}.{p}").exists() for n in (name, "dead"))]:
            if time.monotonic() > end:
                print(f"{self.me}: {', '.join(late)} did not come to {name} in {limit_s:.0f} s", flush=True)
                return
            time.sleep(0.05)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with (self.folder / "turn").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Recorder:
    """Watches vLLM's model runner: time of each forward, the graphs that were replayed, memory at load."""

    def __init__(self) -> None:
        import torch
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        self.torch: Any = torch
        self.events: list[Any] = []
        self.is_recording = False
        self.graph: Any = None
        self.replays = 0
        self.memory: dict[str, int] = {}
        self.replay: Any = self.torch.cuda.CUDAGraph.replay
        forward, load = GPUModelRunner._model_forward, GPUModelRunner.load_model

        def timed_forward(runner: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.is_recording:
                return forward(runner, *args, **kwargs)
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            value = forward(runner, *args, **kwargs)
            pair[1].record()
            self.events.append(pair)
            return value

        def watched_load(runner: Any, *args: Any, **kwargs: Any) -> Any:
            torch.cuda.reset_peak_memory_stats()
            value = load(runner, *args, **kwargs)
            torch.cuda.synchronize()
            self.memory = {"peak": torch.cuda.max_memory_allocated(), "after": torch.cuda.memory_allocated()}
            return value

        def counted_replay(graph: Any) -> Any:
            self.graph = graph
            self.replays += 1
            return self.replay(graph)

        GPUModelRunner._model_forward, GPUModelRunner.load_model = timed_forward, watched_load
        self.torch.cuda.CUDAGraph.replay = counted_replay

    def forwards_ms(self, call: Callable[[], object]) -> tuple[list[float], float]:
        """The time of each forward of ``call`` on the GPU, and of the whole on the wall."""
        self.events, self.replays, self.graph = [], 0, None
        self.torch.cuda.synchronize()
        start = time.perf_counter()
        self.is_recording = True
        call()
        self.is_recording = False
        self.torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in self.events], (time.perf_counter() - start) * 1e3

    def graph_ms(self, repetitions: int = 40) -> float:
        """The median time of the graph that was replayed last."""
        times: list[float] = []
        for _ in range(5):
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repetitions):
                self.replay(self.graph)
            end.record()
            self.torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / repetitions)
        return sorted(times)[2]

    def kernels(self, call: Callable[[], object]) -> dict[str, list[float]]:
        """Calls and microseconds of each kernel that runs in ``call``."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.torch.cuda.synchronize()
        rows = [row for row in profiler.key_averages() if row.self_device_time_total > 0]
        return {row.key[:160]: [row.count, row.self_device_time_total] for row in rows}


def main(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    variant = arguments.variant
    turns = Turns(folder, variant, arguments.peers.split(",") if arguments.peers else [])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs here, where it can be watched
    os.environ.update(VARIANTS[variant])
    start = time.time()

    import torch
    import vllm
    from vllm import LLM, SamplingParams

    recorder = Recorder()
    vocabulary = json.loads((Path(arguments.model) / "config.json").read_text())["vocab_size"]
    llm = LLM(
        arguments.model,
        load_format="seeded",
        skip_tokenizer_init=True,
        seed=0,
        max_model_len=8704 if arguments.times else 2048,
        max_num_batched_tokens=MOST_TOKENS,
        max_num_seqs=max(BATCHES),
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=(4 if arguments.times else 1) << 30,
        enable_prefix_caching=False,
        moe_backend="humming" if variant == "humming" else "auto",
        disable_log_stats=True,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
    )
    from abiding import engines

    result: dict[str, Any] = {
        "variant": variant,
        "model": Path(arguments.model).name,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(),
        "start_s": time.time() - start,
        "load_bytes": recorder.memory,
        "jobs": engines.report()["engines"]["vllm"]["jobs"],
    }

    def save() -> None:
        (folder / f"{variant}.json").write_text(json.dumps(result))

    generator = torch.Generator().manual_seed(1)

    def prompts(count: int, length: int) -> list[dict[str, list[int]]]:
        ids = torch.randint(3, vocabulary, (count, length), generator=generator)
        return [{"prompt_token_ids": row} for row in ids.tolist()]

    def generate(given: list[Any], steps: int, **options: Any) -> list[Any]:
        sampling = SamplingParams(temperature=0, max_tokens=steps, detokenize=False, ignore_eos=True, **options)
        return list(llm.generate(given, sampling, use_tqdm=False))

    def forced(given: list[Any], singly: bool = False) -> list[list[list[float]]]:
        """Of each token of a fixed text: its log-probability, and the most likely token."""
        batches = [[one] for one in given] if singly else [given]
        rows = []
        for output in (one for batch in batches for one in generate(batch, 1, prompt_logprobs=1)):
            row = []
            for token, entries in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
                if entries:
                    best = max(entries, key=lambda key: entries[key].logprob)
                    row.append([entries[token].logprob, best])
            rows.append(row)
        return rows

    text = prompts(8, 96)
    result["forced"] = forced(text)
    result["forced_again"] = forced(text)
    result["forced_singly"] = forced(text, singly=True)
    result["greedy"] = [list(one.outputs[0].token_ids) for one in generate(prompts(8, 96), 32)]
    save()

    def decode(batch: int, steps: int) -> dict[str, Any]:
        length = min(128, MOST_TOKENS // batch)  # all prompts in one step, so that all sequences end in the same one
        times, wall = recorder.forwards_ms(lambda: generate(prompts(batch, length), steps))
        steady = sorted(times[1:])  # without the prefill
        row = {"forward_ms": steady[len(steady) // 2], "wall_ms_per_step": wall / steps, "replays": recorder.replays}
        if recorder.graph is not None:
            row["graph_ms"] = recorder.graph_ms()
        return row

    turns.meet("ready", 300)
    if arguments.times:
        result["times"] = []
        for number in range(ROUNDS):
            turns.meet(f"round{number}", 200)
            with turns.alone():
                row: dict[str, Any] = {"decode": {batch: decode(batch, 32 if number else 12) for batch in BATCHES}}
                row["prefill"] = {}
                for length in LENGTHS:
                    times, wall = recorder.forwards_ms(lambda: generate(prompts(1, length), 1))  # noqa: B023
                    row["prefill"][length] = {"forward_ms": sum(times), "wall_ms": wall}
                result["times"].append(row)
            save()
    turns.meet("kernels", 200)
    with turns.alone():  # last, since profiling disturbs times
        result["kernels"] = {}
        for batch in BATCHES if arguments.times else (8,):
            decode(batch, 4)
            if recorder.graph is not None:
                graph = recorder.graph
                found = recorder.kernels(lambda: recorder.replay(graph))  # noqa: B023
                result["kernels"][f"decode {batch}"] = found
    save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("model", help="a folder with a config.json")
    parser.add_argument("folder", help="for the results")
    parser.add_argument("--times", action="store_true", help="measure, and do not only compare")
    parser.add_argument("--peers", default="", help="the variants that run beside this one, separated by commas")
    given = parser.parse_args()
    status = 0
    try:
        main(given)
    except BaseException:
        traceback.print_exc()
        (Path(given.folder) / f"dead.{given.variant}").touch()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # some of vLLM's threads would hold the process
