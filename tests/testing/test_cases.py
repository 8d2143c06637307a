"""The cases contain what they promise; a test that runs on tame inputs proves little."""

from __future__ import annotations

import pytest
import torch

from abiding import reference
from abiding.testing import assert_bitwise_equal
from abiding.testing.cases import mxfp8_moe
from abiding.testing.cases.mla_prologue import CORNER, ODD, PERFORMANCE, REGULAR, PrologueCase, finite_magnitudes

CASES = pytest.mark.parametrize("case", [*REGULAR, *ODD, *CORNER], ids=str)


@CASES
def test_slots_are_distinct_and_as_many_are_skipped_as_asked(case: PrologueCase) -> None:
    inputs = case.make()
    capacity = inputs.cache.shape[0] * case.block_size
    live = inputs.slots[(inputs.slots >= 0) & (inputs.slots < capacity)]
    assert len(live.unique()) == len(live)
    assert len(inputs.slots) == (case.tokens if case.inserted is None else case.inserted)
    assert bool((inputs.slots < 0).any()) == (case.skipped > 0 and len(inputs.slots) > 0)
    assert bool((inputs.positions >= case.max_position).any() or (inputs.slots >= capacity).any()) == (case.wild > 0)


@CASES
def test_the_layout_is_as_asked(case: PrologueCase) -> None:
    inputs = case.make()
    assert inputs.q.shape == (case.tokens, case.heads, 512)
    assert inputs.q.dtype == inputs.kv.dtype == case.dtype
    assert inputs.slots.dtype == case.index_dtype
    assert inputs.cache.shape[1] == case.block_size * 584
    if case.page_stride is not None:
        assert inputs.cache.stride(0) == case.page_stride
    if case.q_stride is not None:
        assert inputs.q.stride(0) == case.q_stride
    assert inputs.kv.data_ptr() % 64 == case.offset_bytes
    assert bool((inputs.cache == 0xFF).all())
    inputs.check()


def test_a_seed_makes_the_same_inputs_again_and_another_seed_others() -> None:
    case = REGULAR[4]
    first, again, other = case.make(seed=1), case.make(seed=1), case.make(seed=2)
    for name in ("q", "kv", "slots", "positions"):
        assert_bitwise_equal(getattr(first, name), getattr(again, name), name)
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_a_clone_has_a_cache_of_its_own() -> None:
    for guards in (True, False):
        inputs = REGULAR[0].make(guards=guards)
        copy = inputs.clone()
        copy.run(reference.mla_prologue)
        assert not torch.equal(inputs.cache, copy.cache)
        copy.check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_amax_is_there(dtype: torch.dtype) -> None:
    case = next(case for case in CORNER if case.values == "every_amax" and case.dtype == dtype)
    amax = case.make().kv[:, :448].reshape(-1, 64).abs().amax(-1).view(torch.int16)
    assert set(range(finite_magnitudes(dtype))) == set(amax.tolist())


def test_special_values_are_there() -> None:
    made = {case.values: case.make() for case in CORNER if case.dtype == torch.bfloat16 and case.tokens == 9}
    assert not made["zero"].kv.any()
    assert set(made["zero"].kv.signbit().unique().tolist()) == {False, True}
    assert 0 < float(made["subnormal"].kv.abs().max()) < torch.finfo(torch.bfloat16).tiny
    assert float(made["huge"].kv.abs().max()) > 1e38
    assert bool(made["huge"].q.float().square().sum(-1).isfinite().all())
    assert bool(made["nan"].kv.isnan()[0].all())
    assert 0 < int(made["nan"].kv.isnan()[1:].sum()) < 400
    assert bool(made["inf"].kv.isinf().any())
    assert bool(made["bits"].kv.isnan().any())


def test_performance_cases_are_the_whole_table() -> None:
    found = {(case.tokens, case.heads, case.out_heads) for case in PERFORMANCE}
    heads = ((16, 16), (16, 64), (64, 64), (128, 128))
    assert found == {(t, *h) for t in (1, 4, 16, 64, 256, 1024, 4096, 16384) for h in heads}
    one = next(case for case in PERFORMANCE if (case.tokens, case.heads, case.out_heads) == (1, 16, 64))
    assert one.bytes == 16 * 1024 + 64 * 1024 + 1024 + 584 + 256 + 16


@pytest.mark.parametrize("case", [*mxfp8_moe.REGULAR, *mxfp8_moe.ODD, *mxfp8_moe.TILES, *mxfp8_moe.CORNER], ids=str)
def test_gemms_are_as_asked(case: mxfp8_moe.GemmCase) -> None:
    i = case.make()
    assert i.x.shape == (case.rows, case.k)
    assert i.x.dtype == case.dtype
    assert i.live().sum() == sum(case.sizes)
    if i.expert_offsets is not None:
        assert tuple(i.expert_offsets.diff().tolist()) == case.sizes
    if i.offs is not None:
        assert tuple(i.offs.diff(prepend=i.offs.new_zeros(1)).tolist()) == case.sizes
    assert [i.expert_offsets is not None, i.offs is not None] == [case.form == "starts", case.form == "ends"]
    assert i.weight.shape == (len(case.sizes), *((case.k, case.n) if case.transposed else (case.n, case.k)))
    assert i.weight.stride(1 if case.transposed else 2) == 1
    assert i.x.stride(0) == case.k + case.gap or case.rows <= 1
    special = {"nan": i.x.isnan(), "inf": i.x.isinf(), "zero": i.x == 0}.get(case.values)
    assert special is None or int(special.sum()) > 0
    assert case.values != "bits" or bool(i.x.isnan().any() and (~i.x.isnan()).any())


@pytest.mark.parametrize("case", mxfp8_moe.LAYERS, ids=str)
def test_layers_are_routed_as_asked(case: mxfp8_moe.LayerCase) -> None:
    i = case.make()
    assert i.topk_ids.shape == i.topk_weights.shape == (case.tokens, case.top_k)
    assert i.topk_ids.dtype == case.index_dtype
    assert bool(((i.topk_ids >= -1) & (i.topk_ids < case.experts)).all())
    assert bool((i.topk_ids < 0).any()) == (case.elsewhere > 0)
    for row in i.topk_ids:
        assert len(row[row >= 0].unique()) == int((row >= 0).sum())
    if case.routing == "one":
        assert len(i.topk_ids.sort(1).values.unique(dim=0)) == 1


def test_performance_layers_are_the_whole_table() -> None:
    found = {(case.name, case.routing, case.tokens) for case in mxfp8_moe.PERFORMANCE}
    tokens = mxfp8_moe.PERFORMANCE_TOKENS
    table = {(name, way, t) for name in mxfp8_moe.SHAPES for way in tokens for t in tokens[way]}
    real = {(f"{name}-ep8-real", "uniform", t) for name in ("wide", "minimax-m3") for t in tokens["uniform"]}
    between = {(name, "uniform", t) for name in mxfp8_moe.SHAPES for t in (384, 1000, 3000)}
    assert found == table | real | between
    assert {(c.name, c.routing, c.tokens) for c in mxfp8_moe.PERFORMANCE if c.mode == "fp8"} == between
    assert tokens["uniform"] == (1, 3, 8, 11, 32, 48, 100, 128, 256, 512, 2048, 8192)
    zipf = mxfp8_moe.LayerCase(4096, 32, 32, 64, 4, "zipf").make()
    counts = zipf.topk_ids.flatten().bincount().sort(descending=True).values
    assert counts[0] > 4 * counts[16]


def test_expert_parallel_layers_have_one_rank_of_eight() -> None:
    case = next(c for c in mxfp8_moe.PERFORMANCE if (c.name, c.tokens) == ("wide-ep8-real", 2048))
    assert (case.experts, case.global_experts) == (32, 256)
    ids, _ = case.route(torch.Generator().manual_seed(0))
    assert ids[0, 0] >= 0, "the rank of the first choice of token 0"
    assert bool(((ids >= -1) & (ids < 32)).all())
    assert 0.11 < float((ids >= 0).float().mean()) < 0.14
    assert len(ids.unique()) == 33
    moved = mxfp8_moe.rotated_ids(ids, 32, 3, 4)
    assert torch.equal(moved < 0, ids < 0)
    assert torch.equal(moved[ids >= 0], (ids[ids >= 0] + 24) % 32)


def test_uniform_routing_gives_every_expert_its_share() -> None:
    case = mxfp8_moe.LayerCase(4096, 32, 32, 64, 4)
    rng = torch.Generator().manual_seed(0)
    ids, _ = case.route(rng)
    counts = ids.flatten().bincount(minlength=64)
    assert 200 < int(counts.min()) <= int(counts.max()) < 320  # 256 on average
    assert not torch.equal(case.route(rng)[0], ids)
