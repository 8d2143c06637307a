"""Random calls, half of them spoiled: refused, or computed without a byte written outside of the tensors."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from calls import is_refused
from calls.mxfp8_moe import SPOILS, WRITTEN, well_formed
from torch import Tensor


def random_view(x: Tensor, rng: random.Random) -> Tensor:
    kinds = [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    changes: list[Callable[[], Tensor]] = [
        lambda: x[:0],
        lambda: x[1:],
        lambda: x[::2],
        lambda: x[..., :-1],
        lambda: x[..., ::2],
        lambda: x[..., 32:],
        lambda: x.unsqueeze(0),
        lambda: x.flatten(),
        lambda: x.transpose(0, -1),
        lambda: x[:1].expand_as(x),
        lambda: x.new_zeros(()),
        lambda: x.new_zeros((*x.shape, 0)),
        lambda: torch.cat([x, x]),
        lambda: torch.cat([x, x], -1),
        lambda: x.view(rng.choice(kinds)),
        lambda: x.to("meta"),
    ]
    try:
        return rng.choice(changes)()
    except (RuntimeError, IndexError):
        return x


INDICES = {"offsets", "expert_offsets", "problem_sizes", "blockscale_offsets", "topk_ids", "expert_map"}


@pytest.mark.parametrize("op", SPOILS)
def test_fuzz(op: str) -> None:
    """Many calls, half of them spoiled: no crash, every error is ours, no byte outside of a tensor changes."""
    rng = random.Random(op)
    refused = 0
    for step in range(600):
        call = well_formed(op, rng=rng)
        spoiled = step % 2 == 1
        if spoiled:
            tensors = [name for name, value in call.args.items() if isinstance(value, Tensor)]
            for name in rng.sample(tensors, rng.choice([1, 1, 2])):
                call.args[name] = random_view(call.args[name], rng)
        elif rng.random() < 0.3:  # random bits in the indices
            for name in INDICES & set(call.args):
                index = call.args[name].view(-1)
                if len(index):
                    index[rng.randrange(len(index))] = rng.choice([-1, -(1 << 31), (1 << 31) - 1, 1, 5, 128, 1 << 30])
        if is_refused(call, spoiled=spoiled, step=step):
            refused += 1
            continue
        call.assert_untouched(set(call.guards) - WRITTEN)
    assert 120 < refused < 300
