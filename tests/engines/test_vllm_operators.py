"""vLLM's operator names on Abiding's kernels. tests/programs/vllm_operators.py has the scenarios."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm_schemas import LATER, QUANT, QUANT_ARGUMENTS, TENSORS

from abiding.engines.vllm import operators as vllm

Scenario = Callable[..., str]
PROGRAM = Path("vllm_operators.py")

SWAPPED = QUANT_ARGUMENTS.replace("slot_mapping, Tensor position_ids", "position_ids, Tensor slot_mapping")


@pytest.fixture
def scenario(python: Callable[..., subprocess.CompletedProcess[str]]) -> Scenario:
    return lambda name, *arguments, **options: python(PROGRAM, name, *arguments, **options).stdout


def test_missing_operators_are_registered(scenario: Scenario) -> None:
    scenario("missing_operators_are_registered")


def test_engine_code_compiles(scenario: Scenario) -> None:
    scenario("engine_code_compiles")


def test_vllm_registers_its_fake_afterwards(scenario: Scenario) -> None:
    scenario("vllm_registers_its_fake_afterwards")


@pytest.mark.parametrize("later", ["", f", {LATER}"], ids=["nine arguments", "thirteen arguments"])
def test_schema_and_fake_without_a_kernel(scenario: Scenario, later: str) -> None:
    scenario("schema_and_fake_without_a_kernel", later)


def test_flags_of_later_releases(scenario: Scenario) -> None:
    scenario("flags_of_later_releases")


def test_existing_kernels_are_kept(scenario: Scenario) -> None:
    scenario("existing_kernels_are_kept")


@pytest.mark.parametrize("theirs", ["CPU", "CUDA"])
def test_only_missing_devices_are_filled(scenario: Scenario, theirs: str) -> None:
    scenario("only_missing_devices_are_filled", theirs)


@pytest.mark.parametrize(
    ("schema", "difference"),
    [
        (f"(Tensor! q, {TENSORS}, float eps, int cache_block_size) -> ()", "argument 0 is Tensor! q, not Tensor q_in"),
        (
            f"({SWAPPED}) -> Tensor",
            "argument 3 is Tensor position_ids, not Tensor slot_mapping",
        ),
        (
            f"({QUANT_ARGUMENTS.replace('Tensor!', 'Tensor')}) -> Tensor",
            "argument 2 is Tensor k_cache, not Tensor! k_cache",
        ),
        (f"({QUANT_ARGUMENTS.replace('float eps', 'int eps')}) -> Tensor", "argument 7 is int eps, not float eps"),
        (f"({QUANT_ARGUMENTS.replace('int cache_block_size', '*, int cache_block_size')}) -> Tensor", "keyword only"),
        (f"({QUANT_ARGUMENTS.removesuffix(', int cache_block_size')}) -> Tensor", "argument 8 is missing"),
        (f"({QUANT_ARGUMENTS}) -> Tensor[]", "returns"),
        (f"({QUANT_ARGUMENTS}) -> ()", "returns"),
        (f"({QUANT_ARGUMENTS}) -> (Tensor, Tensor)", "returns"),
        (f"({QUANT_ARGUMENTS}, bool apply_q_norm) -> Tensor", "bool apply_q_norm is not an optional flag"),
        (f"({QUANT_ARGUMENTS}, Tensor? scale=None) -> Tensor", "scale is not an optional flag"),
        (f"({QUANT_ARGUMENTS}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS.replace('Tensor!', 'Tensor(a!)')}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS.replace('int q_head_padded', 'SymInt q_head_padded')}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS}, {LATER}) -> Tensor", None),
        (f"({QUANT_ARGUMENTS}, *, {LATER}) -> Tensor", None),
    ],
)
def test_schema_comparison(schema: str, difference: str | None) -> None:
    expected = torch._C.parse_schema(vllm.ALIASES[0].schema)
    found = vllm._difference(torch._C.parse_schema(f"_C::{QUANT}{schema}"), expected)
    assert found == difference if difference is None else difference in (found or "")


def test_an_incompatible_operator_is_left_alone(scenario: Scenario) -> None:
    scenario("an_incompatible_operator_is_left_alone")


def test_an_installed_vllm_goes_first(scenario: Scenario, tmp_path: Path) -> None:
    """Its binary defines the names, which fails if somebody has done so before."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_C.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    (package / "_C_stable_libtorch.py").write_text(f"""
import torch
library = torch.library.Library("_C", "FRAGMENT")
library.define("{QUANT}({QUANT_ARGUMENTS}, {LATER}) -> Tensor")
library.impl("{QUANT}", lambda q_in, *rest: q_in, "CUDA")
""")
    scenario("an_installed_vllm_goes_first", first=package.parent)


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "AttributeError", "ValueError"])
def test_a_vllm_that_cannot_load_is_tolerated(scenario: Scenario, tmp_path: Path, error: str) -> None:
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"raise {error}('torch is too new')")
    scenario("a_vllm_that_cannot_load_is_tolerated", first=package.parent)


def test_wrong_arguments_raise_and_write_nothing(scenario: Scenario) -> None:
    scenario("wrong_arguments_raise_and_write_nothing")


def test_the_custom_all_reduce_is_served(scenario: Scenario) -> None:
    scenario("the_custom_all_reduce_is_served")


@pytest.mark.parametrize("key", ["CUDA", "CompositeExplicitAutograd"])
def test_a_custom_all_reduce_is_served_whole_or_not_at_all(scenario: Scenario, key: str) -> None:
    """A handle that one library gives out means nothing to the other."""
    scenario("a_custom_all_reduce_is_served_whole_or_not_at_all", key)


def test_a_custom_all_reduce_with_schemas_alone_is_filled(scenario: Scenario) -> None:
    scenario("a_custom_all_reduce_with_schemas_alone_is_filled")


def test_minimax_reduce_rms_is_served_and_compiles(scenario: Scenario) -> None:
    scenario("minimax_reduce_rms_is_served_and_compiles")


def test_mxfp8_experts_are_served_and_compile(scenario: Scenario) -> None:
    """As vLLM's own test calls them, with scales of either dtype."""
    scenario("mxfp8_experts_are_served_and_compile")


def test_the_former_name_is_the_same_module() -> None:
    import abiding.compat.vllm as former

    assert former is vllm
