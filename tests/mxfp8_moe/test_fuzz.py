"""Random calls with random bits in their indices: no byte is written outside of the tensors, or in those only read."""

from __future__ import annotations

import random

import pytest
from calls import is_refused
from calls.mxfp8_moe import SPOILS, WRITTEN, well_formed

INDICES = {"offsets", "expert_offsets", "problem_sizes", "blockscale_offsets", "topk_ids", "expert_map"}


@pytest.mark.parametrize("op", SPOILS)
def test_fuzz(op: str) -> None:
    rng = random.Random(op)
    for step in range(300):
        call = well_formed(op, rng=rng)
        if rng.random() < 0.3:
            for name in INDICES & set(call.args):
                index = call.args[name].view(-1)
                if len(index):
                    index[rng.randrange(len(index))] = rng.choice([-1, -(1 << 31), (1 << 31) - 1, 1, 5, 128, 1 << 30])
        assert not is_refused(call, spoiled=False, step=step)
        call.assert_untouched(set(call.guards) - WRITTEN)
