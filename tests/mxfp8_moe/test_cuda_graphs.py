"""CUDA graphs, streams, and CPU against CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from mxfp8_rules import offsets_of, tensors_of
from torch import Tensor

from abiding import mxfp8_moe
from abiding.mxfp8_moe import MXFP8
from abiding.testing.cases.mxfp8_moe import GemmCase, GemmInputs, LayerCase
from abiding.testing.comparison import assert_bitwise_equal, assert_close

LAYER = LayerCase(6, 64, 96, 4, 2, elsewhere=0.2)


def captured(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "replays"),
    [
        (LayerCase(16, 256, 128, 8, 2, elsewhere=0.2), 1000),
        (LayerCase(300, 512, 256, 16, 4, "zipf", activation="swiglu_oai", elsewhere=0.1), 100),
        (LayerCase(64, 256, 128, 8, 2, "zipf", mode="w8a16"), 100),
        (LayerCase(64, 256, 128, 8, 2, "zipf", mode="fp8"), 100),
        (LayerCase(2000, 256, 160, 8, 2, "zipf", mode="fp8"), 20),
    ],
    ids=str,
)
def test_cuda_graph_with_changing_routing(case: LayerCase, replays: int, cuda: torch.device) -> None:
    """One capture, replayed on other rows and other experts, gives the bits of an eager call."""
    static = case.make(cuda)
    graph, out = captured(lambda: static.run(mxfp8_moe))
    rng = torch.Generator(cuda).manual_seed(1)
    for step in range(replays):
        ids, weights = case.route(rng)
        static.x.normal_(generator=rng)
        static.topk_ids.copy_(ids)
        static.topk_weights.copy_(weights)
        graph.replay()
        assert_bitwise_equal(out, static.run(mxfp8_moe), f"replay {step}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cuda_graph_with_a_changing_expert_map(dtype: torch.dtype, cuda: torch.device) -> None:
    """The map is read by the kernels of the graph, after whatever wrote it upstream."""
    case = LayerCase(64, 256, 128, 8, 4, index_dtype=dtype)
    static = case.make(cuda)
    static.topk_ids.copy_(replace(case, experts=32).route(torch.Generator(cuda).manual_seed(1))[0])
    placed, expert_map = torch.zeros(2, 32, dtype=torch.int32, device=cuda)

    def step() -> Tensor:
        expert_map.copy_(placed)
        return static.run(mxfp8_moe, expert_map=expert_map)

    graph, out = captured(step)
    for replay in range(100):
        placed.fill_(-1)
        placed[torch.randperm(32)[:8].to(cuda)] = torch.arange(8, dtype=torch.int32, device=cuda)
        graph.replay()
        local = replace(static, topk_ids=placed[static.topk_ids.long()])
        assert_bitwise_equal(out, local.run(mxfp8_moe, global_experts=32), f"replay {replay}")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["w8a8", "w8a16"])
def test_cuda_graph_of_a_linear_layer(mode: mxfp8_moe.Mode, cuda: torch.device) -> None:
    i = GemmCase((40,), 256, 512, form="whole").make(cuda)
    graph, out = captured(lambda: mxfp8_moe.linear(i.x, i.weight[0], i.weight_scale, mode=mode))
    for replay in range(10):
        i.x.normal_()
        graph.replay()
        assert_bitwise_equal(out, mxfp8_moe.linear(i.x, i.weight[0], i.weight_scale, mode=mode), f"replay {replay}")


@pytest.mark.gpu
def test_cuda_graph_of_gemms_with_changing_offsets(cuda: torch.device) -> None:
    i = GemmCase((40, 0, 200, 16), 256, 512).make(cuda)

    def step() -> tuple[Tensor, ...]:
        a = i.quantize(mxfp8_moe)
        return a.scales, i.run(mxfp8_moe, a), i.run(mxfp8_moe, i.x)

    graph, results = captured(step)
    for replay in range(100):
        edges = torch.randint(0, 257, (3,)).sort().values
        offsets_of(i)[1:4] = edges.to(cuda)
        graph.replay()
        for found, expected in zip(results, step(), strict=True):
            assert_bitwise_equal(found, expected, f"replay {replay}")


@pytest.mark.gpu
def test_checked_indices_do_not_disturb_a_capture(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABIDING_CHECK_INDICES", "1")
    i = LAYER.make(cuda)
    graph, out = captured(lambda: i.run(mxfp8_moe))
    i.topk_ids.fill_(1 << 40)
    graph.replay()
    assert_bitwise_equal(out, torch.zeros_like(out))


@pytest.mark.gpu
def test_work_is_queued_on_the_current_stream(cuda: torch.device) -> None:
    """Inputs that are written late on a side stream are read correctly without synchronizing with the default
    stream."""
    i = LayerCase(64, 256, 128, 8, 2).make(cuda)
    expected = i.run(mxfp8_moe)
    x = i.x.clone()
    i.x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        i.x.copy_(x)
        out = i.run(mxfp8_moe)
    assert not stream.query(), "the call did not wait for the stream"
    stream.synchronize()
    assert_bitwise_equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["w8a8", "w8a16", "fp8"])
def test_cpu_and_cuda_agree(mode: mxfp8_moe.Mode, cuda: torch.device) -> None:
    """Codes and bytes are equal; sums differ only by their order."""
    here = GemmCase((5, 0, 70), 128, 256).make("cpu")
    moved = {name: getattr(here, name).to(cuda) for name in ("x", "weight", "weight_scale", "codes", "expert_offsets")}
    there: GemmInputs = replace(here, **moved)
    for ours, theirs in zip(here.quantize(mxfp8_moe), there.quantize(mxfp8_moe), strict=True):
        assert_bitwise_equal(theirs.view(torch.uint8).cpu(), ours.view(torch.uint8))
    rows = MXFP8(*here.quantize(mxfp8_moe))
    ours, theirs = here.run(mxfp8_moe, rows), there.run(mxfp8_moe, there.quantize(mxfp8_moe)).cpu()
    assert_close(theirs, ours, ulps=1, atol=1e-5)
    layer = replace(LAYER, mode=mode).make("cpu")
    on_cuda = mxfp8_moe.moe(*(tensor.to(cuda) for tensor in tensors_of(layer)), mode=mode)
    assert_close(on_cuda.cpu(), layer.run(mxfp8_moe), rtol=2.0**-7, atol=0.05 * float(layer.run(mxfp8_moe).std()))
