"""Times of the DeepSeek V4 MLA prologue: decode batches (one page per token) L2-cold and L2-warm, prefill batches
L2-cold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from abiding import mla_prologue as api
from abiding.testing.cases.mla_prologue import PERFORMANCE, PrologueCase, PrologueInputs
from abiding.testing.comparison import max_ulps
from abiding.testing.timing import call_us, rotations
from benchmarks.base import Benchmark, Settings, say
from benchmarks.result_file import CaseResult, Param

DECODE_TOKENS = 64


@dataclass(frozen=True)
class Call:
    """A call on its own inputs, and the tensors that it wrote, by name."""

    run: Callable[[], object]
    written: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Operator:
    """How to call our operator and the peer's on the inputs of a case, and the bytes that a call must move."""

    ours: Callable[[PrologueInputs], Call]
    bytes: Callable[[PrologueCase], int]
    cases: list[PrologueCase]
    peer_name: str | None = None
    peer: Callable[[Any, PrologueInputs], Call] | None = None


def measure(settings: Settings) -> Iterator[CaseResult]:
    """Time every case of the chosen operators, ours and the peer's, after comparing what the two write."""
    peers = _load(settings.peer) if settings.peer and settings.device.type == "cuda" else None
    for op in settings.ops:
        operator = OPERATORS[op]
        peer = _peer_operator(peers, operator)
        for case in operator.cases:
            if not settings.takes(case.tokens) or (settings.quick and not _is_quick(case, settings.device)):
                continue
            if peer is not None and not _agrees_to_run(op, case, operator, peer, settings.device):
                peer = None
            for l2_warm in (False, True) if case.tokens <= DECODE_TOKENS else (False,):
                yield _time(op, case, operator, peer, l2_warm, settings)


def _time(op: str, case: PrologueCase, operator: Operator, peer: Any, l2_warm: bool, settings: Settings) -> CaseResult:
    device = settings.device
    sets = 1 if l2_warm else rotations(operator.bytes(case), device)
    # The layers of a model share the slots, positions and angles of a step; the other inputs are rotated.
    first = case.make(device, guards=False)
    made = (case.make(device, seed, guards=False) for seed in range(1, sets))
    inputs = [first, *(replace(one, slots=first.slots, positions=first.positions) for one in made)]
    ours = call_us([operator.ours(one).run for one in inputs], device)
    peers = {}
    if peer is not None and operator.peer is not None:
        peers["vllm"] = call_us([operator.peer(peer, one).run for one in inputs], device)
    bound_us = settings.roofline.bound_us(operator.bytes(case))
    return CaseResult.of(op, _params(op, case), ours, peers, l2_warm=l2_warm, bound_us=bound_us)


def target_us(case: CaseResult) -> float | None:
    """The target of the first operator: 95 % of the roofline bound plus 2 µs for the launch; 1.6 µs for one token."""
    if case.op != BENCHMARK.ops[0]:
        return None
    target = case.bound_us / 0.95 + 2.0
    return min(target, 1.6) if case.params["tokens"] == 1 else target


def row(case: CaseResult) -> str:
    """The parameters of a case other than the number of tokens."""
    heads, padded = case.params.get("heads"), case.params.get("padded_heads")
    if heads is None:
        return "KV only"
    return f"{heads} heads" if padded in (heads, None) else f"{heads} heads padded to {padded}"


def _params(op: str, case: PrologueCase) -> dict[str, Param]:
    dtype = str(case.dtype).removeprefix("torch.")
    params: dict[str, Param] = {"tokens": case.tokens, "block_size": case.block_size, "dtype": dtype}
    if op not in ("insert_kv", "gather_kv"):
        params["heads"] = case.heads
    if op == "qnorm_rope_kv_insert":
        params["padded_heads"] = case.out_heads
    return params


def _is_quick(case: PrologueCase, device: torch.device) -> bool:
    return case.tokens in ((1, 64, 1024) if device.type == "cuda" else (1, 64, 256)) and case.heads != 128


# The operators: ours through the public API with preallocated outputs, the peer's as its engine calls it.


def _quant_insert(inputs: PrologueInputs) -> Call:
    out = inputs.q.new_empty(inputs.case.tokens, inputs.case.out_heads, api.HEAD_DIM)
    return Call(lambda: inputs.run(api, out=out), lambda: {"q": out, "cache": inputs.cache})


def _peer_quant_insert(op: Any, inputs: PrologueInputs) -> Call:
    # The peer allocates its output. It is kept until the next call on the same inputs, so that rotated inputs have
    # distinct outputs, as with ours, and freed before that call, so that a single set reuses the same memory.
    kept: list[Tensor] = []

    def run() -> None:
        kept.clear()
        case = inputs.case
        kept.append(op(*_common(inputs), case.out_heads, case.eps, case.block_size))

    return Call(run, lambda: {"q": kept[0], "cache": inputs.cache})


def _insert_kv(inputs: PrologueInputs) -> Call:
    arguments = _common(inputs)[1:]
    block_size = inputs.case.block_size
    return Call(lambda: api.insert_kv(*arguments, block_size=block_size), lambda: {"cache": inputs.cache})


def _gather_kv(inputs: PrologueInputs) -> Call:
    _insert_kv(inputs).run()
    out = torch.empty_like(inputs.kv)
    op = torch.ops.abiding.deepseek_v4_gather_kv
    return Call(lambda: op(inputs.cache, inputs.slots, inputs.case.block_size, out=out), lambda: {"kv": out})


def _bf16_insert(inputs: PrologueInputs) -> Call:
    q, cache = inputs.q.clone(), _full_cache(inputs, torch.bfloat16)
    arguments, eps = (q, inputs.kv, cache, *_common(inputs)[3:]), inputs.case.eps
    op = api.qnorm_rope_full_cache_bf16_insert
    return Call(lambda: op(*arguments, eps=eps), lambda: {"q": q, "cache": cache})


def _peer_bf16_insert(op: Any, inputs: PrologueInputs) -> Call:
    q, cache = inputs.q.clone(), _full_cache(inputs, torch.bfloat16)
    arguments = (q, inputs.kv, cache, *_common(inputs)[3:], inputs.case.eps, inputs.case.block_size)
    return Call(lambda: op(*arguments), lambda: {"q": q, "cache": cache})


def _fp8_insert(inputs: PrologueInputs) -> Call:
    out, cache = torch.empty_like(inputs.q, dtype=torch.float8_e4m3fn), _full_cache(inputs, torch.float8_e4m3fn)
    arguments = (inputs.q, inputs.kv, cache, *_common(inputs)[3:])
    scale = torch.ones(1, device=inputs.q.device)
    options: dict[str, Any] = {"kv_scale": scale, "q_scale_inv": scale, "eps": inputs.case.eps, "out": out}
    op = api.qnorm_rope_full_cache_fp8_insert
    return Call(lambda: op(*arguments, **options), lambda: {"q": out, "cache": cache})


def _peer_fp8_insert(op: Any, inputs: PrologueInputs) -> Call:
    out, cache = torch.empty_like(inputs.q, dtype=torch.float8_e4m3fn), _full_cache(inputs, torch.float8_e4m3fn)
    scale, case = torch.ones(1, device=inputs.q.device), inputs.case
    arguments = (inputs.q, inputs.kv, out, cache, *_common(inputs)[3:], scale, scale, case.eps, case.block_size)
    return Call(lambda: op(*arguments), lambda: {"q": out, "cache": cache})


def _common(inputs: PrologueInputs) -> tuple[Tensor, ...]:
    return inputs.q, inputs.kv, inputs.cache, inputs.slots, inputs.positions, inputs.cos_sin


def _full_cache(inputs: PrologueInputs, dtype: torch.dtype) -> Tensor:
    shape = (inputs.cache.shape[0], inputs.case.block_size, api.HEAD_DIM)
    return torch.zeros(shape, dtype=torch.uint8, device=inputs.q.device).to(dtype)


def _index_bytes(case: PrologueCase) -> int:
    return 2 * case.index_dtype.itemsize + 4 * api.ROPE_DIM


def _bf16_bytes(case: PrologueCase) -> int:
    return case.tokens * ((case.heads + 1) * api.HEAD_DIM * (case.dtype.itemsize + 2) + _index_bytes(case))


def _fp8_bytes(case: PrologueCase) -> int:
    return case.tokens * ((case.heads + 1) * api.HEAD_DIM * (case.dtype.itemsize + 1) + _index_bytes(case))


def _kv_bytes(case: PrologueCase) -> int:
    return case.tokens * (api.HEAD_DIM * case.dtype.itemsize + api.RECORD_BYTES + _index_bytes(case))


def _gather_bytes(case: PrologueCase) -> int:
    return case.tokens * (api.RECORD_BYTES + api.HEAD_DIM * case.dtype.itemsize + case.index_dtype.itemsize)


# With fewer than 16 KV rows it would take tens of thousands of inputs to exceed the L2 cache.
_KV_CASES = [case for case in PERFORMANCE if (case.heads, case.padded_heads) == (16, None) and case.tokens >= 16]
_FULL_CACHE_CASES = [case for case in PERFORMANCE if case.heads >= 64 and case.tokens in (1, 64, 1024, 4096)]
_VLLM = "fused_deepseek_v4_qnorm_rope_kv_rope"

OPERATORS = {
    "qnorm_rope_kv_insert": Operator(
        _quant_insert, lambda case: case.bytes, PERFORMANCE, f"{_VLLM}_quant_insert", _peer_quant_insert
    ),
    "insert_kv": Operator(_insert_kv, _kv_bytes, _KV_CASES),
    "gather_kv": Operator(_gather_kv, _gather_bytes, _KV_CASES),
    "qnorm_rope_full_cache_bf16_insert": Operator(
        _bf16_insert, _bf16_bytes, _FULL_CACHE_CASES, f"{_VLLM}_full_cache_bf16_insert", _peer_bf16_insert
    ),
    "qnorm_rope_full_cache_fp8_insert": Operator(
        _fp8_insert, _fp8_bytes, _FULL_CACHE_CASES, f"{_VLLM}_full_cache_fp8_insert", _peer_fp8_insert
    ),
}

BENCHMARK = Benchmark("mla_prologue", tuple(OPERATORS), "tokens", measure, row, target_us)


# The peer: vLLM's kernels, from the library that holds them.


def _load(library: Path) -> Any:
    torch.ops.load_library(str(library.resolve()))
    return torch.ops._C


def _peer_operator(peers: Any, operator: Operator) -> Any:
    """The peer's operator, or None if it has none to compare with."""
    packet = getattr(peers, operator.peer_name, None) if peers is not None and operator.peer_name else None
    if packet is None:
        return None
    say(f"Peer: {packet.default._schema}")
    return packet.default


def _agrees_to_run(op: str, case: PrologueCase, operator: Operator, peer: Any, device: torch.device) -> bool:
    """Whether the peer accepts the case; prints how its results compare with ours."""
    assert operator.peer is not None
    ours = operator.ours(case.make(device, guards=False))
    theirs = operator.peer(peer, case.make(device, guards=False))
    ours.run()
    try:
        theirs.run()
    except RuntimeError as error:
        say(f"{op} {case}: the peer refuses this case and is skipped from here on: {error}")
        return False
    found = theirs.written()
    words = [f"{name} {_agreement(tensor, found[name])}" for name, tensor in ours.written().items()]
    say(f"{op} {case}: compared with the peer, {', '.join(words)}")
    return True


def _agreement(ours: Tensor, theirs: Tensor) -> str:
    differing = int((ours.contiguous().view(torch.uint8) != theirs.contiguous().view(torch.uint8)).sum())
    if not differing:
        return "equal bit for bit"
    steps = f" by at most {_max_ulps(ours, theirs)} ulps" if ours.dtype.is_floating_point else ""
    return f"differs in {differing} of {ours.numel() * ours.element_size()} bytes{steps}"


def _max_ulps(ours: Tensor, theirs: Tensor, rows: int = 256) -> int:
    """`max_ulps` over chunks of rows, since it needs several times their memory."""
    return max(
        max_ulps(ours[begin : begin + rows], theirs[begin : begin + rows]) for begin in range(0, len(ours), rows)
    )
