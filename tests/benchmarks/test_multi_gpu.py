"""The multi-GPU checks and benchmarks, rehearsed between CPU processes: every phase, and the report of a failure."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding import Communicator
from abiding.testing.ranks import Outcome, RanksFailedError, run_processes
from abiding.testing.timing import Roofline
from benchmarks import multi_gpu
from benchmarks.multi_gpu import BENCHMARK, Phase, _norm_peers, _peers, _Run, _summarize
from benchmarks.multi_gpu.__main__ import main
from benchmarks.multi_gpu.checks import RunConfig
from benchmarks.multi_gpu.times import one_shot_limit
from benchmarks.peers.sglang import SGLang
from benchmarks.result_file import CaseResult, Results
from benchmarks.tables import of_op, targets_met

ROOT = Path(__file__).parents[2]
CPU = RunConfig(device="cpu", quick=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_rehearsal_between_cpu_processes(ranks: int, tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--quick", "--calls", "300", "--ranks", str(ranks), "--output", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.multi_gpu", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob(f"multi_gpu-*-x{ranks}.json")
    found = Results.read(path)
    checks = {case.op: case for case in found.cases if "passed" in case.params}
    assert list(checks) == ["correctness", "stress", "killed"]
    assert all(case.params["passed"] for case in checks.values())
    assert int(checks["correctness"].params["calls"]) > 50
    assert checks["stress"].params["calls"] == 300
    assert checks["killed"].us < 5e6
    timed = [case for case in found.cases if "bytes" in case.params]
    assert [(case.op, case.params["bytes"], list(case.peers)) for case in timed] == [
        ("eager", size, ["gloo"]) for size in (1024, 8192, 65536)
    ]
    normed = [case for case in found.cases if "tokens" in case.params]
    assert [(case.op, case.params["tokens"], list(case.peers)) for case in normed] == [
        ("qk_norm eager", tokens, ["gloo"]) for tokens in (1, 16)
    ]
    for line in (
        "correctness: passed",
        "stress: passed (300 calls",
        "killed: passed",
        "| eager: bytes | abiding us",
        "| qk_norm eager: tokens | abiding us",
    ):
        assert line in done.stdout


def with_a_wrong_bit(rank: int, config: RunConfig, phase: str) -> None:
    """Run a phase in which one sum of rank 1 has one wrong bit."""
    right, calls = Communicator.all_reduce, itertools.count()

    def wrong(self: Communicator, x: Tensor, out: Tensor | None = None) -> Tensor:
        result = right(self, x, out)
        if rank == 1 and result.numel() and next(calls) == 20:
            result.view(torch.uint8).view(-1)[0] ^= 1
        return result

    Communicator.all_reduce = wrong  # type: ignore[method-assign]
    getattr(multi_gpu.checks, phase)(rank, config)


@pytest.mark.parametrize(("phase", "text"), [("correctness", "rank 1: shape="), ("stress", "call .*, Call")])
def test_one_wrong_bit_fails_a_check(phase: str, text: str) -> None:
    with pytest.raises(RanksFailedError, match=rf"AssertionError: .*{text}.* differs? in their bits"):
        run_processes(with_a_wrong_bit, 2, CPU, phase, timeout_s=60)


def fails(rank: int, config: RunConfig) -> None:
    if rank == 1:
        raise ValueError(f"no luck on a {config.device}")


def hangs(rank: int, config: RunConfig) -> None:
    if rank == 0:
        time.sleep(1000)


def test_a_phase_that_fails_or_hangs_is_reported_and_the_next_one_runs() -> None:
    go = _Run(2, CPU)
    assert go(Phase("first", fails))[0] is None
    begin = time.monotonic()
    assert go(Phase("second", hangs, limit_s=5.5))[0] is None
    assert time.monotonic() - begin < 20
    assert go(Phase("third", fails, may_die={1}))[0] == [None, None]
    assert go.errors == {
        "first": "rank 1: ValueError: no luck on a cpu",
        "second": "rank 0: did not end in time",
    }


def test_no_phase_starts_when_the_total_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_gpu, "TOTAL_S", 1.0)
    go = _Run(2, CPU)
    assert go(Phase("late", fails))[0] is None
    assert go.errors == {"late": "no time was left for it"}


def test_the_most_telling_error_is_reported() -> None:
    outcomes = [Outcome(0, error="did not end in time"), Outcome(1, error="x\nKeyError: 3\n"), Outcome(2, value=1)]
    wrong = Outcome(3, error="x\nAssertionError: 3 is 4")
    assert _summarize(RanksFailedError([*outcomes, wrong]), ()) == "rank 3: AssertionError: 3 is 4"
    assert _summarize(RanksFailedError(outcomes), ()) == "rank 1: KeyError: 3"
    assert _summarize(RanksFailedError(outcomes), {1}) == "rank 0: did not end in time"


def test_a_failed_check_is_in_the_results_and_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(multi_gpu.checks, "correctness", fails)
    monkeypatch.setattr(multi_gpu, "run_processes", answer)
    results, errors = multi_gpu.run(2, CPU, output=tmp_path, commit="abc")
    assert errors == {"correctness": "rank 1: no luck"}
    assert Results.read(tmp_path / results.file_name) == results
    assert "correctness: FAILED: rank 1: no luck" in multi_gpu.checked(results)
    assert "correctness: FAILED: rank 1: no luck" in capsys.readouterr().out


def answer(function: Any, ranks: int, *args: Any, **_: Any) -> Any:
    """Replaces run_processes: the results of all ranks for a phase."""
    if function is fails:
        raise RanksFailedError([Outcome(0), Outcome(1, error="no luck")])
    found = {"roofline": [Roofline(10.0, 1.0)], "stress": [(1, 2.0), (1, 3.0)], "killed": [0.5, None]}
    return found.get(function.__name__)


@pytest.mark.parametrize("peers", [_peers, _norm_peers])
def test_external_peers_are_timed_if_they_are_given(peers: Callable[[RunConfig], list[tuple[str, Any]]]) -> None:
    given: list[dict[str, Any]] = [{}, {"peer": "a"}, {"sglang": "b"}]
    names = [[name for name, _ in peers(RunConfig("cuda", **more))] for more in given]
    assert [[name for name in found if name in ("vllm", "sglang")] for found in names] == [[], ["vllm"], ["sglang"]]
    assert [name for name, _ in peers(RunConfig("cpu", peer="a", sglang="b"))] == ["gloo"]
    assert [name for name, _ in peers(RunConfig("cuda", shared_gpu=True, sglang="b"))] == ["gloo"]


def of_a_folder(rank: int, folder: str) -> bool:
    """Call a fake CustomAllReduceV2, imported as SGLang's would be."""
    answer: bool = SGLang(Path(folder))._class.serves(rank)
    return answer


def test_of_sglang_only_the_all_reduce_is_imported(tmp_path: Path) -> None:
    folder = tmp_path / "sglang" / "srt" / "distributed" / "device_communicators"
    kernels = tmp_path / "sglang" / "kernels" / "ops" / "communication"
    for inner in folder, kernels:
        inner.mkdir(parents=True)
        for package in inner, *inner.parents[:3]:
            (package / "__init__.py").write_text("raise ImportError('the whole server')")
    (kernels / "all_reduce.py").touch()
    (folder / "custom_all_reduce_v2.py").write_text(
        "from sglang.srt.distributed.parallel_state import in_the_same_node_as\n"
        "from .custom_all_reduce_utils import can_use_custom_all_reduce_with_nvlink\n"
        "class CustomAllReduceV2:\n"
        "    def serves(rank):\n"
        "        near = in_the_same_node_as(None, source_rank=0)\n"
        "        return near == [True, True] and can_use_custom_all_reduce_with_nvlink(group=None)\n"
    )
    assert run_processes(of_a_folder, 2, str(tmp_path), timeout_s=60) == [True, True]


def test_one_shot_limit() -> None:
    one = [(1, 1.0), (2, 2.0), (4, 4.0), (8, 8.0)]
    assert one_shot_limit(one, [(1, 3.0), (2, 3.0), (4, 3.0), (8, 3.0)]) == 2
    assert one_shot_limit(one, [(1, 3.0), (2, 1.9), (4, 4.5), (8, 3.0)]) == 4, "one small loss does not count"
    assert one_shot_limit(one, [(size, 0.5) for size, _ in one]) is None
    assert one_shot_limit(one, [(size, 50.0) for size, _ in one]) == 8


@pytest.mark.parametrize(
    ("op", "size", "ranks", "peers", "target"),
    [
        ("graph", 1024, 2, {"nccl": 12.0, "vllm": 5.0, "sglang": 2.0}, 4.0),
        ("graph", 1024, 2, {"vllm": 3.0}, 3.0),
        ("graph", 65536, 2, {"nccl": 12.0, "vllm": 5.0}, 5.0),
        ("eager", 1024, 4, {"nccl": 12.0, "nccl symmetric": 9.0}, 9.0),
        ("graph", 2 << 20, 2, {"nccl": 12.0}, None),
        ("graph", 1024, 2, {"gloo": 12.0}, None),
        ("one-shot", 1024, 2, {"nccl": 12.0}, None),
    ],
)
def test_targets(op: str, size: int, ranks: int, peers: dict[str, float], target: float | None) -> None:
    assert BENCHMARK.target_us(CaseResult(op, {"bytes": size, "ranks": ranks}, 1.0, 0.1, True, 0.1, peers)) == target


def test_results_make_tables() -> None:
    cases = [CaseResult("stress", {"ranks": 4, "passed": True, "calls": 9}, 5.0, 0.0, True, 0.0)]
    for op, size, us in (("graph", 1024, 3.0), ("graph", 2048, 4.0), ("eager", 1024, 9.0)):
        cases.append(CaseResult(op, {"bytes": size, "ranks": 4}, us, 0.1, True, 0.1, {"nccl": 12.0}))
    cases.append(CaseResult("qk_norm graph", {"tokens": 77, "ranks": 4}, 3.0, 0.1, True, 0.1, {"nccl": 12.0}))
    results = Results("multi_gpu", "NVIDIA H100 x4", "580", "2.11", "13", "c" * 40, "2026-01-02", 1.0, 1.0, cases)
    assert results.file_name == "multi_gpu-h100-x4.json"
    graph = of_op(results, BENCHMARK, "graph")
    assert "| L2-warm | bytes       | 1 KiB    | 2 KiB    |" in graph
    assert "| 4 ranks | **abiding** | **3.00** | **4.00** |" in graph
    assert "| L2-warm | tokens      | 77       |" in of_op(results, BENCHMARK, "qk_norm graph")
    met = "Targets met on NVIDIA H100 x4: `graph` 2 of 2, `eager` 1 of 1."
    assert targets_met(results, BENCHMARK, ["graph", "eager"]) == met
    assert list(multi_gpu.checked(results)) == ["stress: passed (9 calls, 5.0 µs per call with its check)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--ranks", "1"], "--ranks 1; expected 2 to 16"),
        (["--device", "cpu", "--ranks", "17"], "--ranks 17; expected 2 to 16"),
        (["--ranks", "16"], "--ranks 16, but torch sees"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_work_are_refused_at_once(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
