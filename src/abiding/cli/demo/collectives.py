"""Demo of the collectives: all-reduce and QK norm between two CPU processes, checked and timed against gloo."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from abiding import Communicator, reduce_rms, reference
from abiding.cli.demo.section import Row, Say, Section
from abiding.testing import assert_bitwise_equal, assert_close
from abiding.testing.cases.reduce_rms import RmsCase, unfused_qk_norm
from abiding.testing.ranks import processes_us, run_processes

RANKS = 2
HIDDEN = 4096
MESSAGE_TOKENS = (1, 16, 128)
NORM_TOKENS = (1, 64)
IN_A_ROW = 2000


@dataclass(frozen=True)
class Answer:
    """A call's results on one rank, the expected results, and the times per call of Abiding and torch.distributed."""

    call: str
    message: str
    results: list[Tensor]
    expected: list[Tensor]
    us: float
    peer_us: float


def rows(device: torch.device, say: Say) -> Iterator[Row]:
    """Run two CPU processes and compare every rank's results with the reference over torch.distributed."""
    say(f"Collectives: {RANKS} processes")
    everyone: list[list[Answer]] = run_processes(_in_process, RANKS, timeout_s=180)
    for answers in zip(*everyone, strict=True):
        first: Answer = answers[0]
        faults = []
        for rank, answer in enumerate(answers):
            for result, expected in zip(answer.results, answer.expected, strict=True):
                faults += _faults(f"{answer.call} on rank {rank}", result, expected)
            if first.call.startswith("all_reduce"):
                faults += _faults(f"{answer.call} on ranks 0 and {rank}", answer.results[0], first.results[0])
        yield Row(
            {
                "call": first.call,
                "message per rank": first.message,
                "processes": str(RANKS),
                "against torch.distributed": "differs" if faults else "agrees",
                "time": f"{first.us:.0f} us",
                "gloo": f"{first.peer_us:.0f} us",
            },
            faults,
        )


def _faults(name: str, result: Tensor, expected: Tensor) -> list[str]:
    """Sums must be bitwise equal; norms must be within 1 ulp of the float64 result."""
    exact: Callable[[], None] = partial(assert_bitwise_equal, result, expected, name)
    close: Callable[[], None] = partial(assert_close, result, expected, ulps=1, name=name)
    try:
        (exact if expected.dtype == result.dtype else close)()
    except AssertionError as error:
        return [str(error)]
    return []


def _in_process(rank: int) -> list[Answer]:
    rng = torch.Generator().manual_seed(rank)
    with Communicator(device="cpu", timeout_s=60.0) as comm:
        answers = [_sum(comm, torch.randn(tokens, HIDDEN, generator=rng).bfloat16()) for tokens in MESSAGE_TOKENS]
        answers.append(_many_sums(comm, torch.randn(HIDDEN, generator=rng).bfloat16()))
        answers += [_norm(comm, tokens) for tokens in NORM_TOKENS]
        comm.check()
    return answers


def _sum(comm: Communicator, x: Tensor) -> Answer:
    expected = reference.all_reduce.all_reduce(x, comm)
    return Answer(
        "all_reduce",
        f"{x.shape[0]} x {x.shape[1]} bfloat16",
        [comm.all_reduce(x)],
        [expected],
        _median(partial(comm.all_reduce, x)),
        _median(partial(dist.all_reduce, x.clone())),
    )


def _many_sums(comm: Communicator, x: Tensor) -> Answer:
    """Back-to-back in-place calls, each on the result of the one before."""
    total, expected = x.clone(), x.clone()
    for _ in range(IN_A_ROW):
        comm.all_reduce(total, total)
        total /= comm.ranks
    for _ in range(2):
        expected = reference.all_reduce.all_reduce(expected, comm) / comm.ranks
    return Answer(
        f"all_reduce, {IN_A_ROW} in a row",
        f"{x.numel()} bfloat16",
        [total],
        [expected],
        _median(partial(comm.all_reduce, x, x.clone())),
        _median(partial(dist.all_reduce, x.clone())),
    )


def _norm(comm: Communicator, tokens: int) -> Answer:
    """The QK norm of MiniMax M2 under tensor parallelism."""
    inputs = RmsCase.minimax_m2(tokens, comm.ranks).make(comm.ranks, seed=7)[comm.rank]
    assert inputs.wk is not None
    q, k = inputs.rows[:, : inputs.case.q], inputs.rows[:, inputs.case.q :][:, : inputs.wk.numel()]
    return Answer(
        "qk_norm",
        f"{tokens} x ({q.shape[1]} + {k.shape[1]}) bfloat16",
        list(reduce_rms.qk_norm(inputs.rows, inputs.wq, inputs.wk, comm)),
        [
            reference.reduce_rms.normalized(part, weight, reference.all_reduce.gather(part, comm), eps=1e-6)
            for part, weight in ((q, inputs.wq), (k, inputs.wk))
        ],
        _median(partial(reduce_rms.qk_norm, inputs.rows, inputs.wq, inputs.wk, comm)),
        _median(partial(unfused_qk_norm, inputs, comm.ranks)),
    )


def _median(call: Callable[[], object]) -> float:
    return statistics.median(processes_us(call, calls=10, repetitions=7))


SECTION = Section("Collectives over peer memory: abiding.Communicator.all_reduce, abiding.reduce_rms.qk_norm", rows)
