"""Every case on virtual ranks: the result is bitwise the sum in rank order, on all ranks."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding import Communicator
from abiding.communicator import DTYPES
from abiding.testing.cases import all_reduce as cases
from abiding.testing.cases.all_reduce import AllReduceCase, canonical
from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.ranks import calls_on_each, on_each, run_processes, virtual_ranks

EVERY = [*cases.REGULAR, *cases.ODD, *cases.CORNER]


def assert_sums(comms: list[Any], case: AllReduceCase, seed: int = 0) -> None:
    """One call on all ranks: bitwise equal to the expected sum, and nothing else written."""
    inputs = case.make(len(comms), comms[0].device, seed)
    before = [message.storage.clone() for message in inputs.messages]
    on_each(comms, lambda rank, comm: comm.all_reduce(inputs.messages[rank].tensor, inputs.outs[rank].tensor))
    inputs.check()
    for rank, (out, message) in enumerate(zip(inputs.outs, inputs.messages, strict=True)):
        assert_bitwise_equal(canonical(out.tensor), canonical(inputs.expected), f"{case}: rank {rank}")
        assert_bitwise_equal(out.tensor, inputs.outs[0].tensor, f"{case}: ranks {rank} and 0")
        if not case.in_place:
            assert_bitwise_equal(message.storage, before[rank], f"{case}: message of rank {rank}")


@pytest.mark.parametrize("case", EVERY, ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sum(ranks: int, case: AllReduceCase, device: torch.device) -> None:
    with virtual_ranks(ranks, device) as comms:
        assert_sums(comms, case)


@pytest.mark.parametrize("ranks", [1, 5, 7, 8, 16])
def test_any_number_of_ranks(ranks: int, device: torch.device) -> None:
    with virtual_ranks(ranks, device) as comms:
        for case in (cases.REGULAR[1], *cases.ODD[:6], AllReduceCase((70_000,), torch.float32), *cases.CORNER[:3]):
            assert_sums(comms, case)


def test_a_single_rank_goes_through_the_kernel_too(device: torch.device) -> None:
    """The communicator of one rank copies; the operator itself gives the same result."""
    with virtual_ranks(1, device) as (comm,):
        for case in EVERY:
            x = case.make(1, device).messages[0].tensor
            out = torch.ops.abiding.all_reduce(x, comm._token, comm._handle)
            assert out.stride() == torch.empty_like(x).stride()
            assert_bitwise_equal(canonical(out), canonical(x), str(case))


def test_sizes_and_layouts_may_change_from_call_to_call(device: torch.device) -> None:
    """Sixty back-to-back calls of different sizes, in the same order on all ranks."""
    rng = random.Random(0)
    sizes = [rng.choice([0, 1, 5, 511, 4096, rng.randrange(300_000)]) for _ in range(60)]
    with virtual_ranks(3, device) as comms:
        made = [AllReduceCase((size,), rng.choice(DTYPES)).make(3, device, i) for i, size in enumerate(sizes)]

        def call(inputs: Any, rank: int, comm: Any) -> None:
            comm.all_reduce(inputs.messages[rank].tensor, inputs.outs[rank].tensor)

        calls_on_each(comms, [partial(call, inputs) for inputs in made])
        for inputs in made:
            for out in inputs.outs:
                assert_bitwise_equal(out.tensor, inputs.expected, str(inputs.case))


@pytest.mark.parametrize("count", [5000, 300_001, 600_000])
def test_ranks_need_not_be_aligned_alike(count: int, device: torch.device) -> None:
    """One rank's message is 16-byte aligned and the other's is not: both must partition it among CTAs alike."""
    inputs = [
        case.make(2, device) for case in (AllReduceCase((count,)), AllReduceCase((count,), offset=3, out_offset=1))
    ]
    messages = [inputs[rank].messages[rank].tensor for rank in range(2)]
    outs = [inputs[rank].outs[rank].tensor for rank in range(2)]
    with virtual_ranks(2, device) as comms:
        on_each(comms, lambda rank, comm: comm.all_reduce(messages[rank], outs[rank]))
    for rank, one in enumerate(inputs):
        assert_bitwise_equal(outs[rank], one.expected, f"rank {rank}")


def test_larger_than_the_workspace(device: torch.device) -> None:
    """A message that takes several rounds, in both algorithms."""
    with virtual_ranks(2, device, max_bytes=1 << 30) as comms:
        assert_sums(comms, AllReduceCase((9_000_001,)))
    with virtual_ranks(3, device, max_bytes=1 << 30) as comms:
        assert_sums(comms, AllReduceCase((3_000_001,), torch.float32))


@pytest.mark.parametrize("one_shot_bytes", [0, 1 << 40])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_shot_and_two_shot_at_any_size(ranks: int, one_shot_bytes: int, device: torch.device) -> None:
    """Either algorithm at sizes for which the other would be chosen: the same bits, also in several rounds."""
    with virtual_ranks(ranks, device, max_bytes=1 << 30) as comms:
        for comm in comms:
            assert comm._memory is not None
            torch.ops.abiding_custom_ar.configure(comm._handle, 20.0, comm._memory.max_ctas, one_shot_bytes)
        for case in (*cases.REGULAR, *cases.ODD, *cases.CORNER, AllReduceCase((3_000_001,))):
            assert_sums(comms, case)


def sum_of(xs: list[Tensor], rank: int, comm: Communicator) -> Tensor:
    return comm.all_reduce(xs[rank])


def test_slices_of_heads_go_through_peer_memory(device: torch.device) -> None:
    """Permuted dense views in the middle of their storage; strides are preserved."""
    with virtual_ranks(2, device) as comms:
        whole = [torch.randn(3, 4, 5, device=device) for _ in comms]
        views = (
            [a[:2].permute(2, 0, 1) for a in whole],
            [a[1:2].transpose(1, 2) for a in whole],
            [a[1].t() for a in whole],
        )
        for xs in views:
            assert all(comm.explain(x).backend == "abiding" for comm, x in zip(comms, xs, strict=True))
            outs = on_each(comms, partial(sum_of, xs))
            for out in outs:
                assert out.stride() == xs[0].stride()
                assert_bitwise_equal(out, xs[0] + xs[1])


# --- several processes on one GPU -------------------------------------------------------------------------------------


def on_one_gpu(rank: int) -> list[str]:
    """Two processes that share a GPU: the same sums, over CUDA IPC."""
    backends: list[str] = []
    device = torch.device("cuda", 0)
    with Communicator(device=device, timeout_s=20.0) as comm:
        backends.append(comm.explain(torch.ones(3, device=device)).backend)
        for seed, case in enumerate((*cases.REGULAR[:4], *cases.ODD, *cases.CORNER)):
            inputs = case.make(2, device, seed)
            out = comm.all_reduce(inputs.messages[rank].tensor)
            assert_bitwise_equal(canonical(out), canonical(inputs.expected), str(case))
        comm.check()
        comm.reset()
        comm.check()
    return backends


@pytest.mark.gpu
def test_two_processes_on_one_gpu(cuda: torch.device) -> None:
    assert run_processes(on_one_gpu, 2, timeout_s=120) == [["abiding"]] * 2
