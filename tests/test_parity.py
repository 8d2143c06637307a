"""Every operator has everything: CPU and CUDA kernels, a fake, a documented function, a reference, cases, docs."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

import abiding  # noqa: F401  (registers the operators)
from abiding import _library
from abiding.engines.vllm import operators as vllm

ROOT = Path(__file__).resolve().parents[1]

# Where a group's functions are, if not in abiding.<group>.
PUBLIC_MODULES = {"all_reduce": "abiding.communicator", "peer": "abiding.communicator"}
# Where a group's operators are documented, if not in docs/<group>.md.
DOCS = {"peer": "all_reduce"}
# Operators that an engine calls in turn, over handles: there is nothing to trace, and nothing to differ from.
LIFECYCLE = "abiding_custom_ar::"


def operators() -> list[str]:
    return sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("abiding"))


def groups() -> list[str]:
    return sorted(path.parent.name for path in ROOT.glob("csrc/*/schema.cpp"))


def group_of(op: str) -> str | None:
    name = op.partition("::")[2]
    return next((group for group in groups() if f'"{name}(' in (ROOT / f"csrc/{group}/schema.cpp").read_text()), None)


def public_functions(module: ModuleType) -> dict[str, FunctionType]:
    """What a module defines for its users, methods of its classes included."""
    classes = [one for _, one in inspect.getmembers(module, inspect.isclass) if one.__module__ == module.__name__]
    named = [pair for owner in (module, *classes) for pair in inspect.getmembers(owner, inspect.isfunction)]
    return {
        name: function
        for name, function in named
        if not name.startswith("_") and function.__module__ == module.__name__
    }


def is_of_tensors(function: FunctionType) -> bool:
    return any(parameter.annotation == "Tensor" for parameter in inspect.signature(function).parameters.values())


def module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def takes_tensors(op: str) -> bool:
    """Whether there is a device to have a kernel for; what only answers a question about sizes has one for all."""
    name, _, overload = op.partition("::")[2].partition(".")
    schema = getattr(getattr(getattr(torch.ops, op.partition("::")[0]), name), overload or "default")._schema
    return any("Tensor" in str(argument.type) for argument in schema.arguments)


def undocumented(group: str | None, name: str) -> list[str]:
    path = ROOT / f"docs/{group}.md"
    return [] if path.is_file() and name in path.read_text() else [f"entry in docs/{group}.md"]


def missing(op: str) -> list[str]:
    """What an operator lacks."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    group, name = group_of(op), op.partition("::")[2].partition(".")[0]
    lacks = []
    if takes_tensors(op) and not all(has_kernel(op, key) for key in ("Negative", "Conjugate")):
        lacks.append("refusal of lazily negated and conjugated views")
    if op.startswith(LIFECYCLE):
        text = (ROOT / f"docs/{DOCS.get(group, group)}.md").read_text() if group else ""
        documented = f"`{name}`" in text or f"`abiding_custom_ar.{name}`" in text
        kernels = any(has_kernel(op, key) for key in ("CPU", "CompositeExplicitAutograd"))
        return [*lacks, *["kernel"] * (not kernels), *["entry in docs"] * (not documented)]
    if not takes_tensors(op):
        return ["kernel"] * (not has_kernel(op, "CompositeExplicitAutograd")) + undocumented(group, name)
    if not has_kernel(op, "CPU"):
        lacks.append("CPU kernel")
    if _library.has_cuda_kernels() and not has_kernel(op, "CUDA"):
        lacks.append("CUDA kernel")
    if not has_kernel(op, "Meta"):
        lacks.append("fake kernel")
    if group is None:
        return [*lacks, "schema in csrc/<group>/schema.cpp"]
    if not implemented_in_cuda(group, op.partition("::")[2]):
        lacks.append(f"CUDA kernel in csrc/{group}/cuda.cpp")

    public, reference = module(PUBLIC_MODULES.get(group, f"abiding.{group}")), module(f"abiding.reference.{group}")
    functions = [] if public is None else public_functions(public).values()
    callers = [function for function in functions if re.search(rf"\.{name}\b", inspect.getsource(function))]
    if not callers and not any(alias.name.endswith(f"::{name}") for alias in vllm.ALIASES):
        lacks.append(f"function in abiding.{group}, or name in another engine")
    for function in callers:
        if len(inspect.getdoc(function) or "") < 80:
            lacks.append(f"docstring of {function.__name__}")
        if is_of_tensors(function) and function.__name__ not in (public_functions(reference) if reference else ()):
            lacks.append(f"reference of {function.__name__}")
    cases = module(f"abiding.testing.cases.{group}")
    lacks += [f"{kind} cases" for kind in ("REGULAR", "ODD", "CORNER", "PERFORMANCE") if not getattr(cases, kind, None)]
    lacks += undocumented(group, name)
    lacks += [
        f"tests/{group}/{name}.py"
        for name in ("test_values", "test_errors", "test_contract")
        if not (ROOT / f"tests/{group}/{name}.py").is_file()
    ]
    return lacks


def implemented_in_cuda(group: str, name: str) -> bool:
    """Whether cuda.cpp registers the operator, itself or through the headers of its group."""
    source = ROOT / f"csrc/{group}/cuda.cpp"
    if not source.is_file() or "ABIDING_KERNELS(abiding, CUDA" not in source.read_text():
        return False
    headers = [
        header.read_text()
        for header in ROOT.glob(f"csrc/{group}/*.h")
        if f'"{group}/{header.name}"' in source.read_text()
    ]
    return any(f'm.impl("{name}"' in text for text in (source.read_text(), *headers))


def test_there_are_operators_of_every_group() -> None:
    assert groups()
    assert {group_of(op) for op in operators()} == set(groups())


@pytest.mark.parametrize("op", operators())
def test_operator_has_everything(op: str) -> None:
    assert missing(op) == []


@pytest.mark.parametrize("group", [group for group in groups() if group not in PUBLIC_MODULES])
def test_reference_has_the_signatures_of_the_public_api(group: str) -> None:
    public, reference = (
        public_functions(importlib.import_module(name)) for name in (f"abiding.{group}", f"abiding.reference.{group}")
    )
    for name, function in public.items():
        assert inspect.getdoc(function), f"{name} has no docstring"
        if not is_of_tensors(function):
            continue
        assert name in reference, f"abiding.reference.{group} has no {name}"
        assert inspect.signature(function) == inspect.signature(reference[name]), name


def test_an_operator_with_nothing_is_noticed() -> None:
    with torch.library._scoped_library("abiding", "FRAGMENT") as library:
        library.define("parity_probe(Tensor x) -> Tensor")
        assert missing("abiding::parity_probe") == [
            "refusal of lazily negated and conjugated views",
            "CPU kernel",
            *(["CUDA kernel"] * _library.has_cuda_kernels()),
            "fake kernel",
            "schema in csrc/<group>/schema.cpp",
        ]


def test_a_group_with_nothing_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "csrc/probe").mkdir(parents=True)
    (tmp_path / "csrc/probe/schema.cpp").write_text('m.def("parity_probe(Tensor x) -> Tensor");')
    (tmp_path / "csrc/probe/cuda.cpp").write_text("// no kernels")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with torch.library._scoped_library("abiding", "FRAGMENT") as library:
        library.define("parity_probe(Tensor x) -> Tensor")
        lacks = missing("abiding::parity_probe")
    for what in (
        "CPU kernel",
        "fake kernel",
        "CUDA kernel in",
        "function in",
        "REGULAR",
        "docs/probe.md",
        "tests/probe",
    ):
        assert any(what in item for item in lacks), (what, lacks)
