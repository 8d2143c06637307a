"""Random calls, half of them spoiled: refused, or computed without a byte written outside of the tensors."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from calls import Call, is_refused
from calls.mla_prologue import BF16, FP8, GATHER, INSERT, PUBLIC_NAMES, SPOILS, well_formed
from torch import Tensor

from abiding import mla_prologue, reference
from abiding.testing.cases.mla_prologue import PrologueCase
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import GuardedTensor

READ_ONLY = {"q_in", "kv", "slot_mapping", "position_ids", "cos_sin_cache", "fp8_scale", "q_fp8_scale_inv"}


def random_spoil(call: Call, rng: random.Random) -> None:
    """Change some arguments of a call to other values, accepted or not."""
    for name in rng.sample(list(call.args), rng.choice([1, 1, 2, 4]) if len(call.args) >= 4 else 1):
        value = call.args[name]
        if isinstance(value, bool):
            call.args[name] = not value
        elif isinstance(value, float):
            call.args[name] = rng.choice([0.0, -0.0, -1.0, 1e-45, 1e300, float("nan"), float("inf"), 1.0])
        elif isinstance(value, int):
            extremes = [
                0,
                -1,
                1,
                2,
                value + 1,
                value - 1,
                64,
                1 << 20,
                1 << 31,
                1 << 32,
                1 << 40,
                1 << 54,
                (1 << 63) - 1,
                -(1 << 63),
            ]
            # An output of 2^20 heads would be accepted, and takes gigabytes.
            call.args[name] = rng.choice(
                [e for e in extremes if name != "q_head_padded" or e < 1 << 10 or e >= 1 << 40]
            )
        else:
            call.args[name] = random_view(value, rng)


def random_view(x: Tensor, rng: random.Random) -> Tensor:
    def view_as(dtype: torch.dtype) -> Tensor:
        return x.view(dtype) if x.is_contiguous() and x.dim() and x.shape[-1] % dtype.itemsize == 0 else x.to(dtype)

    changes: list[Callable[[], Tensor]] = [
        lambda: x[:0],
        lambda: x[: x.shape[0] // 2],
        lambda: x[1:],
        lambda: x[::2],
        lambda: x[..., :-1],
        lambda: x[..., ::2],
        lambda: x[..., 1:],
        lambda: x.unsqueeze(0),
        lambda: x.unsqueeze(-1),
        lambda: x.flatten(),
        lambda: x.transpose(0, -1),
        lambda: x.flip(0),
        lambda: x[:1].expand_as(x),
        lambda: x.new_zeros(()),
        lambda: x.new_zeros(0),
        lambda: x.new_zeros((*x.shape, 0)),
        lambda: torch.cat([x, x]),
        lambda: view_as(
            rng.choice([torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.float32, torch.bool])
        ),
        lambda: x.to(torch.complex64) if x.is_floating_point() and x.element_size() > 1 else x.to(torch.int16),
        lambda: x.to("meta"),
        lambda: x.as_strided(x.shape, [0] * x.dim(), x.storage_offset()),
        lambda: x.to_sparse() if x.dim() == 1 and x.is_floating_point() and x.element_size() > 1 else x,
    ]
    try:
        return rng.choice(changes)()
    except (RuntimeError, IndexError, ValueError):
        return x


def assert_as_the_reference(call: Call) -> None:
    """Compare what a call wrote with what the reference writes for the same arguments."""
    a = {PUBLIC_NAMES.get(name, name): value for name, value in call.args.items()}
    api = reference.mla_prologue
    if call.op == GATHER:
        expected = api.gather_kv(a["cache"], a["slots"], block_size=a["block_size"], dtype=a["out"].dtype)
        assert_close(a["out"], expected, name="out")
        return
    given = call.guards["k_cache"]
    before = GuardedTensor(given.tensor, call.before["k_cache"], given.start).clone()
    inputs = [a["kv"], before.tensor, a["slots"], a["positions"], a["cos_sin"]]
    if call.op == INSERT:
        api.insert_kv(*inputs, block_size=a["block_size"])
    elif call.op == BF16:
        api.qnorm_rope_full_cache_bf16_insert(a["q"].clone(), *inputs, eps=a["eps"])
    elif call.op == FP8:
        scales = {"kv_scale": a["kv_scale"], "q_scale_inv": a["q_scale_inv"], "eps": a["eps"]}
        api.qnorm_rope_full_cache_fp8_insert(a["q"], *inputs, **scales)
    else:
        flags = {name: a[name] for name in ("apply_q_norm", "apply_q_rope") if name in a}
        expected = api.qnorm_rope_kv_insert(a["q"], *inputs, block_size=a["block_size"], eps=a["eps"], **flags)
        if "out" in a:
            assert_close(a["out"][:, : expected.shape[1]], expected, ulps=1, atol=1e-5, name="out")
    assert_bitwise_equal(given.storage, before.storage, "cache, with what lies around it")


@pytest.mark.parametrize("op", SPOILS)
def test_fuzz(op: str) -> None:
    """Thousands of calls, half of them spoiled: no crash, every error is ours, no byte outside of a tensor changes."""
    rng = random.Random(op)
    refused = 0
    for step in range(2400):
        call = well_formed(op, rng=rng)
        spoil = step % 2 == 1
        if spoil:
            random_spoil(call, rng)
        if is_refused(call, spoiled=spoil, step=step):
            refused += 1
            continue
        for name in READ_ONLY & set(call.guards):
            assert_bitwise_equal(
                call.guards[name].storage, call.before[name], f"step {step}: {name}, which is only read,"
            )
        if not spoil and step % 10 == 0:
            assert_as_the_reference(call)
    assert 500 < refused < 1200


def test_fuzz_of_index_contents() -> None:
    """Random bits in slots and positions: rows out of range are skipped, as in the reference."""
    rng = random.Random(5)
    for step in range(300):
        case = PrologueCase(
            rng.randint(0, 12),
            2,
            block_size=rng.choice([1, 2, 5]),
            wild=0.7,
            skipped=0.3 * rng.random(),
            max_position=3,
        )
        ours = case.make("cpu", seed=step)
        theirs = ours.clone()
        out = ours.run(mla_prologue)
        theirs.run(reference.mla_prologue)
        ours.check()
        assert_bitwise_equal(ours.storage, theirs.storage, f"step {step}: cache")
        lost = (ours.positions < 0) | (ours.positions >= 3)
        assert bool(out[lost].isnan().all())
        assert not bool(out[~lost].isnan().any())
