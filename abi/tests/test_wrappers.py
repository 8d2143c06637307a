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
from abiding_abi.lint.engine import index
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
COMPOSED = {
    "zeros": "zeros({2, 3}, abi_ops::options(a))",
    "zeros_default": "zeros({2})",
    "zeros_of_one_size": "zeros(4, ScalarType::Int)",
    "zeros_chain": "zeros({2}, abi_ops::dtype(ScalarType::Half).device(DeviceType::CPU).requires_grad(false))",
    "zeros_typed": "zeros({2}, abi_ops::device(a.device()).dtype<int16_t>())",
    "empty": "empty({2, 3, 4, 5}, abi_ops::options(a), MemoryFormat::ChannelsLast).zero",
    "empty_strided": "empty_strided({2, 3}, {1, 2}, abi_ops::options(a)).zero",
    "ones": "ones({2}, abi_ops::TensorOptions().dtype(ScalarType::Long).device(DeviceType::CPU, -1))",
    "full": "full({2}, 2.5, abi_ops::options(a))",
    "full_int": "full({2}, 2)",
    "full_bool": "full({2}, true)",
    "full_float": "full({2}, 2.f)",
    "full_exact": "full({2}, std::numeric_limits<int64_t>::max(), ScalarType::Long)",
    "full_half": "full({2}, torch::headeronly::Half(2.5f), abi_ops::options(a))",
    "full_like_exact": "full_like(a, (int64_t{1} << 53) + 1, ScalarType::Long)",
    "new_full_exact": "new_full(a, {2}, -(int64_t{1} << 53) - 1, ScalarType::Long)",
    "fill_": "fill_(abi_ops::empty_like(a), 3)",
    "fill_tensor": "fill_(abi_ops::empty_like(a), abi_ops::tensor(2.5))",
    "rand": "rand({2}, abi_ops::options(a))",
    "randn": "randn({2})",
    "randint": "randint(9, {20})",
    "randint_low": "randint(-3, 3, {20}, abi_ops::options(a))",
    "randperm": "randperm(9)",
    "eye": "eye(3)",
    "eye_m": "eye(2, 3, ScalarType::Long)",
    "arange": "arange(5)",
    "arange_none": "arange(0)",
    "arange_from": "arange(2, 7, abi_ops::options(a))",
    "arange_step": "arange(7, -2, -2, ScalarType::Int)",
    "empty_like": "empty_like(a, ScalarType::Double).zero",
    "empty_like_format": "empty_like(a, {}, MemoryFormat::Contiguous).zero",
    "zeros_like": "zeros_like(a)",
    "zeros_like_double": "zeros_like(a, abi_ops::options(a).dtype(ScalarType::Double))",
    "ones_like": "ones_like(a)",
    "full_like": "full_like(a, 3, ScalarType::Long)",
    "rand_like": "rand_like(a)",
    "randn_like": "randn_like(a)",
    "new_empty": "new_empty(a, {2, 2}).zero",
    "new_zeros": "new_zeros(a, {2}, ScalarType::Byte)",
    "new_ones": "new_ones(a, {2}, abi_ops::TensorOptions())",
    "new_full": "new_full(a, {2, 2}, 7.5)",
    "to": "to(a, abi_ops::TensorOptions().dtype(ScalarType::Long))",
    "from_blob": "from_blob(numbers, {2, 3}, ScalarType::Float)",
    "from_blob_strided": "from_blob(numbers, {2, 2}, {1, 3})",
    "tensor": "tensor({1, 2, 3})",
    "tensor_float": "tensor({0.5, 0.1})",
    "tensor_vector": "tensor(std::vector<float>{0.5f, 0.1f}, ScalarType::Double)",
    "tensor_byte": "tensor(std::vector<uint8_t>{1, 200})",
    "tensor_bool": "tensor({true, false})",
    "tensor_number": "tensor(7)",
    "tensor_one": "tensor(true)",
    "tensor_none": "tensor(std::vector<int64_t>{})",
    "get_slices": "get_item(a, {Slice(None, 2), None, Slice(1)})",
    "get_last": 'get_item(a, {"...", -1})',
    "get_steps": "get_item(a, {-1, Slice(None, None, 2)})",
    "get_mask": "get_item(a, {abi_ops::gt(a, 0)})",
    "get_rows": "get_item(a, {None, Slice(), abi_ops::tensor({0, 0})})",
    "get_all": "get_item(a, {true})",
    "get_none": "get_item(a, {false, Ellipsis})",
    "get_by_tensor": "get_item(a, {abi_ops::tensor(0)})",
    "set_number": "set_item(torch::stable::clone(a), {Ellipsis, Slice(0, 1)}, 2.5)",
    "set_row": "set_item(torch::stable::clone(a), {Ellipsis, Slice(1, 2)}, abi_ops::tensor({7}, ScalarType::Float))",
    "set_mask": "set_item(torch::stable::clone(a), {abi_ops::gt(a, 0)}, -1)",
}


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


def test_every_wrapped_operator_is_known_to_the_rules() -> None:
    """So that a member or a function for which there is a wrapper is never left for a person."""
    known = {*index().methods, *index().names}
    assert {op.name for op in wrappers.operators()} - known == set()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One library with an operator for every wrapper, built once and loaded under every torch."""
    folder = tmp_path_factory.mktemp("wrappers")
    (folder / wrappers.HEADER_NAME).write_text(wrappers.header())
    functions, schemas, boxes = [], [], []

    def add(name: str, schema: str, declared: str, call: str) -> None:
        call = f"abi_ops::{call}"
        if call.endswith(").zero"):  # memory that nothing has written
            call = f"[&] {{ auto made = {call.removesuffix('.zero')}; return torch::stable::zero_(made); }}()"
        functions.append(f"static auto {name}_({declared}) {{ return {call}; }}")
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
    for name, call in COMPOSED.items():
        add(f"composed_{name}", "(Tensor a) -> Tensor", tensor, call)
    for name, sign in (("plus", "+"), ("minus", "-"), ("times", "*"), ("over", "/"), ("less", "<")):
        functions.append(f"static Tensor {name}_(Tensor a, Tensor b) {{ return (a {sign} b) {sign} 2; }}")
        schemas.append(f'm.def("{name}(Tensor a, Tensor b) -> Tensor");')
        boxes.append(f'm.impl("{name}", TORCH_BOX(&{name}_));')
    functions.append(
        "static Tensor bits_(Tensor a, Tensor b) { a &= 6; a |= b; a ^= 1; return (~a & 7) | (b ^ a) ^ (a | 8); }"
    )
    schemas.append('m.def("bits(Tensor(a!) a, Tensor b) -> Tensor");')
    boxes.append('m.impl("bits", TORCH_BOX(&bits_));')
    functions.append("static Tensor mixed_(Tensor a) { a += a; a *= 3; return 1.5 - -a / (2 * a) + (1 - a) / 4; }")
    schemas.append('m.def("mixed(Tensor(a!) a) -> Tensor");')
    boxes.append('m.impl("mixed", TORCH_BOX(&mixed_));')
    add("constant_pad_nd", "(Tensor a, int[] pad, float v) -> Tensor",
        f"{tensor}, std::vector<int64_t> p, double v", "constant_pad_nd(a, p, v)")  # fmt: skip
    add("suggest_memory_format", "(Tensor a) -> int", tensor, "suggest_memory_format(a)")
    functions[-1] = functions[-1].replace("return ", "return (int64_t)")
    add("canUse32BitIndexMath", "(Tensor a) -> bool", tensor, "canUse32BitIndexMath(a)")
    source = folder / "all.cpp"
    source.write_text(
        f'#include "{wrappers.HEADER_NAME}"\n#include <torch/csrc/stable/library.h>\n'
        + "using torch::headeronly::DeviceType;\nusing torch::headeronly::MemoryFormat;\n"
        + "using torch::headeronly::ScalarType;\nusing torch::stable::Device;\nusing torch::stable::Tensor;\n"
        + "using namespace abi_ops::indexing;\nstatic float numbers[] = {1, 2, 3, 4, 5, 6};\n"
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
