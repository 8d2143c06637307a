"""vLLM's operator names, implemented by Abiding's kernels.

:func:`install` registers what is missing in ``torch.ops._C.*`` and ``torch.ops._C_custom_ar.*``, so that an engine
which calls vLLM's operators by name runs on Abiding without a change. It only fills gaps: an operator that has a kernel
of its own keeps it, and one with another schema is left alone. Call it before or after vLLM's own Python, which may
register fakes for these names itself. A vLLM with its own binaries has no gap on a GPU: there, the jobs of
:mod:`abiding.engines.vllm` are the way in, and this serves the CPU and engines that call these names without vLLM.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import abiding  # registers the operators that the aliases call

_log = logging.getLogger("abiding")


@dataclass(frozen=True)
class Alias:
    """One operator name of vLLM: its schema and its implementation.

    ``implementation`` takes the arguments of the schema by position. Newer releases of vLLM append arguments with
    defaults: those in ``options`` are passed on by keyword, the others are accepted at their default value only. The
    operators of a ``family`` share handles, so they are implemented together or not at all. An operator that is
    ``gone`` is in no release of vLLM that we support; engines of their own may still call it.
    """

    schema: str
    implementation: Callable[..., Any]
    options: frozenset[str] = frozenset()
    family: str | None = None
    gone: bool = False

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def _quant_insert(
    q_in: Tensor,
    kv: Tensor,
    k_cache: Tensor,
    slot_mapping: Tensor,
    position_ids: Tensor,
    cos_sin_cache: Tensor,
    q_head_padded: int,
    eps: float,
    cache_block_size: int,
    *,
    apply_q_norm: bool = True,
    apply_q_rope: bool = True,
) -> Tensor:
    op = torch.ops.abiding.fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert
    inputs = (q_in, kv, k_cache, slot_mapping, position_ids, cos_sin_cache)
    if apply_q_norm and apply_q_rope:
        result: Tensor = op.default(*inputs, q_head_padded, eps, cache_block_size)
        return result
    out = q_in.new_empty((q_in.size(0), q_head_padded, q_in.size(2)))
    op.out(*inputs, eps, cache_block_size, apply_q_norm, apply_q_rope, True, out=out)
    return out


def _full_cache_bf16_insert(*args: Any) -> None:
    torch.ops.abiding.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(*args)


def _full_cache_fp8_insert(*args: Any) -> None:
    torch.ops.abiding.fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(*args)


def _minimax_rms(*args: Any) -> Tensor:
    result: Tensor = torch.ops.abiding.minimax_allreduce_rms(*args)
    return result


def _minimax_rms_qk(*args: Any) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = torch.ops.abiding.minimax_allreduce_rms_qk(*args)
    return result


def _mxfp8_experts_quant(*args: Any) -> None:
    *others, scale_factor = args
    torch.ops.abiding.mxfp8_experts_quant(*others, _codes(scale_factor))


def _mxfp8_grouped_mm(a: Tensor, b: Tensor, sfa: Tensor, sfb: Tensor, *others: Tensor) -> None:
    torch.ops.abiding.cutlass_mxfp8_grouped_mm(a, b, _codes(sfa), _codes(sfb), *others)


def _codes(scales: Tensor) -> Tensor:
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales


def _custom_all_reduce(schema: str) -> Alias:
    """An operator of the custom all-reduce; Abiding's operator has the same schema."""
    operator = getattr(torch.ops.abiding_custom_ar, schema.partition("(")[0])
    return Alias(f"_C_custom_ar::{schema}", lambda *args: operator(*args), family="custom all-reduce")


ALIASES = (
    Alias(
        "_C::fused_deepseek_v4_qnorm_rope_kv_rope_quant_insert(Tensor q_in, Tensor kv, Tensor! k_cache, "
        "Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, int q_head_padded, float eps, "
        "int cache_block_size) -> Tensor",
        _quant_insert,
        frozenset({"apply_q_norm", "apply_q_rope"}),
    ),
    Alias(
        "_C::fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_bf16_insert(Tensor! q, Tensor kv, Tensor! k_cache, "
        "Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, float eps, int cache_block_size) -> ()",
        _full_cache_bf16_insert,
    ),
    Alias(
        "_C::fused_deepseek_v4_qnorm_rope_kv_rope_full_cache_fp8_insert(Tensor q, Tensor kv, Tensor! q_fp8, "
        "Tensor! k_cache, Tensor slot_mapping, Tensor position_ids, Tensor cos_sin_cache, Tensor fp8_scale, "
        "Tensor q_fp8_scale_inv, float eps, int cache_block_size) -> ()",
        _full_cache_fp8_insert,
    ),
    Alias(
        "_C::minimax_allreduce_rms(Tensor input, Tensor norm_weight, Tensor workspace, int rank, int nranks, "
        "float eps) -> Tensor",
        _minimax_rms,
    ),
    Alias(
        "_C::minimax_allreduce_rms_qk(Tensor qkv, Tensor norm_weight_q, Tensor norm_weight_k, Tensor workspace, "
        "int q_size, int kv_size, int rank, int nranks, float eps) -> (Tensor, Tensor)",
        _minimax_rms_qk,
    ),
    *map(
        _custom_all_reduce,
        (
            "init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int",
            "all_reduce(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()",
            "open_mem_handle(Tensor mem_handle) -> int",
            "dispose(int fa) -> ()",
            "meta_size() -> int",
            "register_buffer(int fa, int[] ipc_tensors) -> ()",
            "get_graph_buffer_ipc_meta(int fa) -> (int[], int[])",
            "register_graph_buffers(int fa, int[][] handles, int[][] offsets) -> ()",
            "allocate_shared_buffer_and_handle(int size) -> (int, Tensor)",
            "free_shared_buffer(int ptr) -> ()",
        ),
    ),
    Alias(
        "_C::mxfp8_experts_quant(Tensor input, Tensor problem_sizes, Tensor expert_offsets, "
        "Tensor blockscale_offsets, Tensor! quant_output, Tensor! scale_factor) -> ()",
        _mxfp8_experts_quant,
        gone=True,
    ),
    Alias(
        "_C::cutlass_mxfp8_grouped_mm(Tensor a, Tensor b, Tensor sfa, Tensor sfb, Tensor! out, Tensor problem_sizes, "
        "Tensor expert_offsets, Tensor blockscale_offsets) -> ()",
        _mxfp8_grouped_mm,
        gone=True,
    ),
)

# A torch Library removes its registrations when it is garbage-collected, so these live as long as the process.
_libraries: dict[str, torch.library.Library] = {}
_report: dict[str, str] = {}


def install() -> dict[str, str]:
    """Register Abiding's kernels under vLLM's operator names; returns what was done, by name and device.

    * ``registered: CPU, CUDA``: the operator did not exist; now it does. CUDA is missing where Abiding's CUDA kernels
      are.
    * ``implemented: CPU; kept: CUDA``: the schema existed, kernels were missing; Abiding's serve the devices that had
      none.
    * ``kept: ...``: the operator has kernels of its own.
    * ``left alone: ...``: the operator has another schema.

    "(in no vLLM since 0.26)" is added to operators that no supported vLLM has.

    The operators of the custom all-reduce share handles: if one of them has a kernel, all are kept.

    Further calls change nothing and return the same report.
    """
    if not _report:
        _load_vllm()
        kept = {alias.family: alias.name for alias in ALIASES if alias.family and _has_kernel(alias.name)}
        for alias in ALIASES:
            owner = kept.get(alias.family or "")
            done = f"kept: {owner} has kernels of its own, and shares handles with it" if owner else _install(alias)
            _report[alias.name] = f"{done} (in no vLLM since 0.26)" if alias.gone else done
    return dict(_report)


def _load_vllm() -> None:
    """Let an installed vLLM define its operators first: its binary fails to load once others have defined them."""
    for module in ("vllm._C", "vllm._C_stable_libtorch"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            pass
        except Exception as error:  # an installed vLLM that does not fit this torch may raise anything
            _log.warning("abiding: %s does not load, and is left out: %s: %s", module, type(error).__name__, error)


def _install(alias: Alias) -> str:
    expected = torch._C.parse_schema(alias.schema)
    found = _registered_schema(alias.name)
    served = [device for device in ("CPU", "CUDA") if device == "CPU" or abiding.has_cuda_kernels()]
    kept: list[str] = []
    if found is None:
        _library(alias).define(alias.schema.partition("::")[2])
        found, done = expected, f"registered: {', '.join(served)}"
    elif difference := _difference(found, expected):
        return f"left alone: {difference} (its schema is {found})"
    elif owner := _owner(alias.name):
        return f"kept: {owner}"
    else:
        kept = [key for key in ("CPU", "CUDA") if torch._C._dispatch_has_kernel_for_dispatch_key(alias.name, key)]
        done = f"implemented: {', '.join(device for device in served if device not in kept) or 'nothing'}"
        done += f"; kept: {', '.join(kept)}" if kept else ""
    name, kernel = alias.name.partition("::")[2], _adapt(alias, expected, found)
    # CompositeExplicitAutograd yields to any kernel that is registered for a device, and it is no Meta kernel: fake
    # tensors reach the fakes of Abiding's own operators, and vLLM can still register a fake of its own.
    _library(alias).impl(name, kernel, "CompositeExplicitAutograd")
    # Lazily negated and conjugated views get to Abiding's operators, which refuse them (csrc/common/schemas.h); but
    # where a kernel of others is kept, it may take them.
    for key in ("Negative", "Conjugate") if not kept else ():
        _library(alias).impl(name, kernel, key)
    return done


def _library(alias: Alias) -> torch.library.Library:
    namespace = alias.name.partition("::")[0]
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    return _libraries[namespace]


def _registered_schema(name: str) -> torch.FunctionSchema | None:
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    return None if packet is None or "default" not in packet.overloads() else packet.default._schema


def _has_kernel(name: str) -> bool:
    keys = ("CPU", "CUDA", "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    defined = _registered_schema(name) is not None
    return defined and any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)


def _owner(name: str) -> str | None:
    """Which kernels make an existing operator complete; None if kernels are missing."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for key in ("CompositeImplicitAutograd", "CompositeExplicitAutograd"):
        if has_kernel(name, key):
            return f"it has a {key} kernel"
    if has_kernel(name, "CPU") and has_kernel(name, "CUDA"):
        return "it has CPU and CUDA kernels"
    return None


def _difference(found: torch.FunctionSchema, expected: torch.FunctionSchema) -> str | None:
    """Why ``found`` cannot be called like ``expected``, or None if it can; additional flags with a default are fine."""

    def described(argument: torch.Argument) -> str:
        written = argument.alias_info is not None and argument.alias_info.is_write
        return (
            f"{argument.type}{'!' if written else ''} {argument.name}{' (keyword only)' if argument.kwarg_only else ''}"
        )

    for position, wanted in enumerate(expected.arguments):
        if position >= len(found.arguments):
            return f"argument {position} is missing, not {described(wanted)}"
        if described(found.arguments[position]) != described(wanted):
            return f"argument {position} is {described(found.arguments[position])}, not {described(wanted)}"
    for extra in found.arguments[len(expected.arguments) :]:
        if str(extra.type) != "bool" or not extra.has_default_value():
            return f"argument {described(extra)} is not an optional flag"
    if [str(value.type) for value in found.returns] != [str(value.type) for value in expected.returns]:
        return f"it returns {[str(value.type) for value in found.returns]}"
    return None


def _adapt(alias: Alias, expected: torch.FunctionSchema, found: torch.FunctionSchema) -> Callable[..., Any]:
    """``alias.implementation``, callable also with the arguments that ``found`` has beyond ``expected``."""
    count = len(expected.arguments)
    extras = found.arguments[count:]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = {extra.name: value for extra, value in zip(extras, args[count:], strict=False)} | kwargs
        for extra in extras:
            value = given.get(extra.name, extra.default_value)
            if extra.name not in alias.options and value != extra.default_value:
                raise RuntimeError(f"{alias.name}: {extra.name} is {value}; expected {extra.default_value}")
        options = {name: value for name, value in given.items() if name in alias.options}
        return alias.implementation(*args[:count], **options)

    return kernel
