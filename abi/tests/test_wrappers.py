"""wrappers: parsing schemas, the header's form, and every function against torch's own on each release at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from abiding_abi import headers, wrappers
from abiding_abi.cli import app
from abiding_abi.compilers import compile_stable, find_cxx, target_macro
from abiding_abi.errors import UserError
from abiding_abi.versions import OLDEST

HERE = Path(__file__).resolve().parent
RELEASES = [h for h in headers.cached() if h.version >= OLDEST]
MATRIX = Path(os.environ.get("ABIDING_TORCH_MATRIX") or HERE.parents[1] / "build/torch")


def torches() -> dict[str, Path]:
    """Folders to go first on PYTHONPATH: the releases of tools/torch_matrix.py, and the torch of this environment."""
    # The matrix has torch alone: what it imports must be here.
    has_needs = all(importlib.util.find_spec(name) for name in ("numpy", "sympy"))
    found = {p.name: p for p in sorted(MATRIX.iterdir()) if (p / "torch").is_dir()} if MATRIX.is_dir() else {}
    found = found if has_needs else {}
    spec = importlib.util.find_spec("torch")
    return found | ({"installed": Path(spec.origin).parents[1]} if spec and spec.origin else {})


TORCHES = torches()
TRAITS = """using torch::headeronly::Half;
static_assert(std::is_same_v<abi_ops::opmath_type<Half>, float> && std::is_same_v<abi_ops::opmath_type<int>, int>);
static_assert(std::is_same_v<abi_ops::acc_type<float, false>, double>);
static_assert(std::is_same_v<abi_ops::acc_type<float, true>, float>);
static_assert(std::is_same_v<abi_ops::acc_type<Half, false>, float>);
static_assert(std::is_same_v<abi_ops::acc_type<Half, true>, float>);
static_assert(std::is_same_v<abi_ops::acc_type<int, true>, int64_t>);
static_assert(std::is_same_v<abi_ops::acc_type<double, true>, double>);
"""


def test_a_schema_becomes_a_function() -> None:
    operator = wrappers.parse("aten::sum.dim_IntList(Tensor(a) self, SymInt[1]? dim, bool keepdim=False) -> Tensor")
    text = operator.code()
    assert "inline Tensor sum(const Tensor& self, IntArray dim, bool keepdim = false) {" in text
    assert "detail::from(std::optional<IntArray>(dim))" in text
    assert '"aten::sum", "dim_IntList"' in text


def test_several_results_become_a_tuple() -> None:
    operator = wrappers.parse(
        "aten::max.dim(Tensor self, int dim, bool keepdim=False) -> (Tensor values, Tensor indices)"
    )
    assert operator.returns == ("Tensor", "Tensor")
    assert "inline std::tuple<Tensor, Tensor> max(" in operator.code()


@pytest.mark.parametrize("text", ["cat(Tensor[] tensors) -> Tensor", "aten::cat", ""])
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is not a schema"):
        wrappers.parse(text)


def test_the_header_has_what_is_asked_for_and_what_that_uses() -> None:
    text = wrappers.header(["sub_"])
    functions = set(re.findall(r"^inline [\w:<>, ]+ (\w+)\(", text, re.MULTILINE))
    assert {"sub_", "sub", "store_", "can_cast", "diff", "stack", "result_type"} <= functions
    assert "cumsum" not in functions
    assert text.index("struct Scalar") < text.index(" mul(")


def test_a_name_that_is_none_is_said() -> None:
    with pytest.raises(UserError, match="no wrapper is called addd, zzz"):
        wrappers.header(["zzz", "addd", "add"])


def test_the_command_lists_and_writes() -> None:
    done = CliRunner().invoke(app, ["wrappers", "--list"])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) >= len(wrappers.NAMES)
    done = CliRunner().invoke(app, ["wrappers", "cat", "arange"])
    assert done.exit_code == 0
    assert done.stdout == wrappers.header(["cat", "arange"])


@pytest.mark.compile
@pytest.mark.skipif(not RELEASES or not find_cxx(), reason="no torch headers in the cache, or no g++")
@pytest.mark.parametrize("release", RELEASES[:1] + RELEASES[-1:], ids=lambda r: r.release)
def test_every_wrapper_alone_and_all_compile_for_the_oldest_torch(release: headers.Headers, tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text(wrappers.header())
    assert compile_stable(source, release.include, OLDEST) == []
    # Each function with only what it says that it uses: no other function is missing from its header.
    for name in sorted(wrappers.composed()):
        if name in wrappers.NAMES:
            source.write_text(wrappers.header([name]))
            assert compile_stable(source, release.include, OLDEST) == [], name


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One library with an operator for every wrapper, built once and loaded under every torch."""
    folder = tmp_path_factory.mktemp("wrappers")
    (folder / wrappers.HEADER_NAME).write_text(wrappers.header())
    functions, schemas, boxes = [], [], []

    def add(name: str, schema: str, declared: str, call: str) -> None:
        functions.append(f"static auto {name}_({declared}) {{ return abi_ops::{call}; }}")
        schemas.append(f'm.def("{name}{schema}");')
        boxes.append(f'm.impl("{name}", TORCH_BOX(&{name}_));')

    types = {"int[]": "std::vector<int64_t>", "int[]?": "std::optional<std::vector<int64_t>>"}
    for number, operator in enumerate(wrappers.operators()):
        declared = []
        for p in operator.parameters:
            if p.type == "Generator?":
                declared.append(f"std::optional<torch::stable::Tensor> {p.name}")  # never given
                continue
            kind = types.get(p.type) or re.sub(r"^const |&$", "", p.declaration.partition(f" {p.name}")[0])
            declared.append(f"{kind} {p.name}")
        passed = [f"*{p.name}" if p.type == "int[]?" else p.name for p in operator.parameters]
        if operator.overload == "out":
            passed.insert(0, passed.pop())
        shown = [a for a, p in zip(passed, operator.parameters, strict=True) if p.type != "Generator?"]
        call = f"{operator.name}({', '.join(shown)})"
        schema = operator.schema[operator.schema.index("(") :].replace("Generator?", "Tensor?")
        add(f"w{number}", schema, ", ".join(declared), call)
    tensor, two = "torch::stable::Tensor a", "torch::stable::Tensor a, torch::stable::Tensor b"
    for name in ("add", "sub", "mul", "div", "lt"):
        add(f"{name}_float", "(Tensor a, float b) -> Tensor", f"{tensor}, double b", f"{name}(a, b)")
        add(f"{name}_int", "(Tensor a, int b) -> Tensor", f"{tensor}, int64_t b", f"{name}(a, b)")
    for name in ("add", "sub"):
        add(name, "(Tensor a, Tensor b) -> Tensor", two, f"{name}(a, b)")
        add(f"{name}_", "(Tensor(a!) a, Tensor b) -> Tensor(a!)", two, f"{name}_(a, b)")
    add("arange", "(int end) -> Tensor", "int64_t end", "arange(end)")
    for name, sign in (("plus", "+"), ("minus", "-"), ("times", "*"), ("over", "/"), ("less", "<")):
        functions.append(f"static Tensor {name}_(Tensor a, Tensor b) {{ return (a {sign} b) {sign} 2; }}")
        schemas.append(f'm.def("{name}(Tensor a, Tensor b) -> Tensor");')
        boxes.append(f'm.impl("{name}", TORCH_BOX(&{name}_));')
    functions.append("static Tensor mixed_(Tensor a) { a += a; a *= 3; return 1.5 - -a / (2 * a) + (1 - a) / 4; }")
    schemas.append('m.def("mixed(Tensor(a!) a) -> Tensor");')
    boxes.append('m.impl("mixed", TORCH_BOX(&mixed_));')
    add("new_full", "(Tensor a, int[] size, float v) -> Tensor", f"{tensor}, std::vector<int64_t> s, double v",
        "new_full(a, s, v)")  # fmt: skip
    add("constant_pad_nd", "(Tensor a, int[] pad, float v) -> Tensor",
        f"{tensor}, std::vector<int64_t> p, double v", "constant_pad_nd(a, p, v)")  # fmt: skip
    add("suggest_memory_format", "(Tensor a) -> int", tensor, "suggest_memory_format(a)")
    functions[-1] = functions[-1].replace("return ", "return (int64_t)")
    add("canUse32BitIndexMath", "(Tensor a) -> bool", tensor, "canUse32BitIndexMath(a)")
    for name in ("zeros_like", "ones_like"):
        add(name, "(Tensor a) -> Tensor", tensor, f"{name}(a)")
    source = folder / "all.cpp"
    source.write_text(
        f'#include "{wrappers.HEADER_NAME}"\n#include <torch/csrc/stable/library.h>\n'
        + "using torch::headeronly::ScalarType;\nusing torch::stable::Device;\nusing torch::stable::Tensor;\n"
        + TRAITS
        + "\n".join(functions)
        + "\nSTABLE_TORCH_LIBRARY(abi_ops_test, m) {\n"
        + "\n".join(schemas)
        + "\n}\nSTABLE_TORCH_LIBRARY_IMPL(abi_ops_test, CompositeExplicitAutograd, m) {\n"
        + "\n".join(boxes)
        + "\n}\n"
    )
    lib = next(iter(TORCHES.values())) / "torch/lib"
    built = folder / "libwrappers.so"
    command = [find_cxx() or "g++", "-std=c++17", "-O0", "-w", "-shared", "-fPIC", "-DTORCH_STABLE_ONLY"]
    command += [f"-DTORCH_TARGET_VERSION={target_macro(OLDEST)}", "-isystem", str(RELEASES[-1].include), str(source)]
    command += ["-o", str(built), f"-L{lib}", "-Wl,--no-as-needed", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return built


@pytest.mark.compile
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not RELEASES or not find_cxx() or not TORCHES, reason="no torch headers, no g++ or no torch that imports"
)
@pytest.mark.parametrize("torch", TORCHES)
def test_every_wrapper_gives_what_torch_gives(torch: str, library: Path) -> None:
    schemas = json.dumps([operator.schema for operator in wrappers.operators()])
    command = [sys.executable, str(HERE / "wrapper_cases.py"), str(library), schemas]
    environment = {**os.environ, "PYTHONPATH": str(TORCHES[torch])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert re.search(r"^\d{3} calls, 0 differ$", done.stdout, re.MULTILINE)


@pytest.mark.skipif(
    len(TORCHES) < 3, reason="needs several torch releases: tools/torch_matrix.py, ABIDING_TORCH_MATRIX"
)
def test_the_schemas_are_the_same_in_every_torch() -> None:
    command = [sys.executable, str(HERE.parent / "tools/make_wrappers.py"), str(MATRIX), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
