"""Random calls: computed as by the reference, without a byte written outside of the tensors."""

from __future__ import annotations

import random

import pytest
from calls import Call, is_refused
from calls.mla_prologue import BF16, FP8, GATHER, INSERT, PUBLIC_NAMES, SPOILS, well_formed

from abiding import mla_prologue, reference
from abiding.testing.cases.mla_prologue import PrologueCase
from abiding.testing.comparison import assert_bitwise_equal, assert_close
from abiding.testing.guarded import GuardedTensor

READ_ONLY = {"q_in", "kv", "slot_mapping", "position_ids", "cos_sin_cache", "fp8_scale", "q_fp8_scale_inv"}


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
    rng = random.Random(op)
    for step in range(1200):
        call = well_formed(op, rng=rng)
        assert not is_refused(call, spoiled=False, step=step)
        for name in READ_ONLY & set(call.guards):
            assert_bitwise_equal(
                call.guards[name].storage, call.before[name], f"step {step}: {name}, which is only read,"
            )
        if step % 5 == 0:
            assert_as_the_reference(call)


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
