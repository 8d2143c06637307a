"""Every case on virtual ranks against the float64 reference; vLLM's operators over their table of pointers."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from calls.collectives import minimax_tables
from torch import Tensor

from abiding import Communicator, reduce_rms, reference
from abiding.testing.cases import reduce_rms as cases
from abiding.testing.cases.reduce_rms import RmsCase, RmsInputs
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.ranks import calls_on_each, on_each, run_processes, virtual_ranks

EVERY = [*cases.REGULAR, *cases.ODD, *cases.CORNER]


def assert_normalized(outs: list[list[Tensor]], inputs: list[RmsInputs]) -> None:
    for rank, (mine, one) in enumerate(zip(outs, inputs, strict=True)):
        for name, out, expected in zip("qk", mine, one.expected(), strict=False):
            assert out.is_contiguous()
            assert_close(out, expected, ulps=cases.ULPS[out.dtype], name=f"{one.case}: {name} of rank {rank}")


def assert_case(comms: list[Communicator], case: RmsCase, seed: int = 0) -> None:
    """One call on all ranks: correct values, and unchanged rows, V and gaps included."""
    inputs = case.make(len(comms), comms[0].device, seed)
    before = [one.rows.clone() for one in inputs]
    assert_normalized(on_each(comms, lambda rank, comm: inputs[rank].run(reduce_rms, comm)), inputs)
    for one, rows in zip(inputs, before, strict=True):
        assert_bitwise_equal(one.rows, rows, f"{case}: rows")


@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_norm(ranks: int, case: RmsCase, device: torch.device) -> None:
    with virtual_ranks(ranks, device) as comms:
        assert_case(comms, case)


@pytest.mark.parametrize("ranks", [1, 5, 8, 16])
def test_any_number_of_ranks(ranks: int, device: torch.device) -> None:
    with virtual_ranks(ranks, device) as comms:
        for case in (cases.REGULAR[4], *cases.ODD[:8], *cases.CORNER[:3]):
            assert_case(comms, case)


@pytest.mark.parametrize("tokens", [1, 65, 129, 256, 700, 2500])
def test_ranks_need_not_be_aligned_alike(tokens: int, device: torch.device) -> None:
    """One rank's rows are 16-byte aligned and the other's are not: both must partition the tokens alike."""
    inputs = [RmsCase(tokens, offset=offset).make(2, device)[rank] for rank, offset in enumerate((0, 1))]
    with virtual_ranks(2, device) as comms:
        assert_normalized(on_each(comms, lambda rank, comm: inputs[rank].run(reduce_rms, comm)), inputs)


def test_tokens_change_from_call_to_call(device: torch.device) -> None:
    """Back-to-back calls of different sizes, of qk_norm and of rms_norm."""
    rng = random.Random(0)
    with virtual_ranks(3, device) as comms:
        made = [
            RmsCase(rng.choice([0, 1, 2, 33, 300]), 128, rng.choice([None, 16, 40])).make(3, device, seed)
            for seed in range(40)
        ]

        def run(inputs: list[RmsInputs], rank: int, comm: Communicator) -> list[Tensor]:
            return inputs[rank].run(reduce_rms, comm)

        outs = calls_on_each(comms, [partial(run, inputs) for inputs in made])
        for call, inputs in enumerate(made):
            assert_normalized([outs[rank][call] for rank in range(3)], inputs)


def test_more_tokens_than_the_workspace_takes_at_once(device: torch.device) -> None:
    with virtual_ranks(2, device) as comms:
        assert_case(comms, RmsCase(90_000, 8, 8))
        assert_case(comms, RmsCase(140_001, 8, None))


def test_ranks_scale_by_the_same_bits(device: torch.device) -> None:
    """Columns that all ranks hold get bitwise equal results: the partial sums are added in rank order everywhere."""
    with virtual_ranks(4, device) as comms:
        inputs = RmsCase(50, 512, None, torch.float32).make(4, device)
        weight = torch.ones_like(inputs[0].wq)
        for one in inputs:
            one.rows[:, :16] = inputs[0].rows[:, :16]
        outs = on_each(comms, lambda rank, comm: reduce_rms.rms_norm(inputs[rank].rows, weight, comm)[:, :16])
        for out in outs[1:]:
            assert_bitwise_equal(out, outs[0])


def test_replicated_heads(device: torch.device) -> None:
    """Two ranks that hold the same K heads: each replica counts, and both get the same result."""
    with virtual_ranks(2, device) as comms:
        inputs = RmsCase(9, 64, 32, torch.float32).make(2, device)
        inputs[1].rows[:, 64:96] = inputs[0].rows[:, 64:96]
        wk = inputs[0].wk
        assert wk is not None
        outs = on_each(comms, lambda r, comm: reduce_rms.qk_norm(inputs[r].rows, inputs[r].wq, wk, comm))
        assert_bitwise_equal(outs[0][1], outs[1][1])
        k = inputs[0].rows[:, 64:96]
        assert_close(outs[0][1], reference.reduce_rms.normalized(k, wk, [k], eps=1e-6), ulps=4)


@pytest.mark.parametrize("tokens", [3, 3000])
def test_a_rank_that_never_comes_leaves_nan(tokens: int, device: torch.device) -> None:
    """Also if a warp waits for several tokens."""
    case = RmsCase(tokens, 64, 16)
    inputs, outs = case.make(2, device), list[Tensor]()
    with virtual_ranks(2, device, timeout_s=0.3) as comms:

        def call_and_check() -> None:
            outs.extend(inputs[0].run(reduce_rms, comms[0]))  # on a CPU the call itself raises
            comms[0].check()

        with pytest.raises(RuntimeError, match="qk_norm: this communicator has stopped: rank 1 did not send in time"):
            call_and_check()
        assert all(bool(out.isnan().all()) for out in outs)
        for comm in comms:
            comm.reset()
        assert_case(comms, case)


# --- vLLM's operators -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_vllm_operators(ranks: int, device: torch.device) -> None:
    """Back-to-back calls over the table, with changing tokens and with widths that vLLM has no kernel for."""
    ops = torch.ops.abiding
    made = [
        [replace(one, rows=one.rows.contiguous()) for one in replace(case, dtype=dtype).make(ranks, device, seed)]
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for seed, case in enumerate(
            (
                *(RmsCase(1, 768, 128), RmsCase(37, 768, 128), RmsCase(5, 300, 17), RmsCase(0), RmsCase(200, 64, 8)),
                *(RmsCase(1500, 24, 8), RmsCase(12, 9000, 40)),
            )
        )
    ]
    queries = [[one.rows[:, : one.case.q].reshape(1, -1, one.case.q).contiguous() for one in each] for each in made]

    def qk(call: int, rank: int) -> list[Tensor]:
        one = made[call][rank]
        arguments = (one.rows, one.wq, one.wk, table[rank], one.case.q, one.case.kv, rank, ranks, one.case.eps)
        return list(ops.minimax_allreduce_rms_qk(*arguments))

    def single(call: int, rank: int) -> Tensor:
        one, rows = made[call][rank], queries[call][rank]
        out: Tensor = ops.minimax_allreduce_rms(rows, one.wq, table[rank], rank, ranks, one.case.eps)
        assert out.shape == rows.shape
        return out[0]

    def both(call: int, rank: int, _: Any) -> list[Tensor]:
        return [*qk(call, rank), single(call, rank)]

    # The communicators are there for their threads and streams alone.
    with minimax_tables(ranks, device, slot_bytes=2 << 20) as table, virtual_ranks(ranks, device) as comms:
        outs = calls_on_each(comms, [partial(both, call) for call in range(len(made))])
    for call, inputs in enumerate(made):
        together = [outs[rank][call][:2] for rank in range(ranks)]
        alone = [outs[rank][call][2:] for rank in range(ranks)]
        assert_normalized(together, inputs)
        assert_normalized(alone, inputs)


# --- several processes ------------------------------------------------------------------------------------------------


def against_the_reference(rank: int, ranks: int, device: str) -> None:
    """Against the reference functions of the same names, which all-gather the rows through the group."""
    with Communicator(device=device, timeout_s=20.0) as comm:
        for seed, case in enumerate((cases.REGULAR[0], *cases.ODD[:8], cases.ODD[15], *cases.CORNER[:4])):
            inputs = case.make(ranks, device, seed)[rank]
            for out, expected in zip(inputs.run(reduce_rms, comm), inputs.run(reference.reduce_rms, comm), strict=True):
                assert_close(out, expected, ulps=cases.ULPS[out.dtype], name=f"{case}: rank {rank}")
        comm.check()


def test_processes() -> None:
    run_processes(against_the_reference, 3, 3, "cpu")


@pytest.mark.gpu
def test_two_processes_on_one_gpu(cuda: torch.device) -> None:
    run_processes(against_the_reference, 2, 2, "cuda:0", timeout_s=120)
