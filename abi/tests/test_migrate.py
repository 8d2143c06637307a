"""What migrate writes, and what it leaves alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from abiding_abi import migrate, rules
from abiding_abi.lint import Config
from abiding_abi.rules import Rule
from examples import REWRITTEN, after, before

INCLUDE = re.compile(r"^#include[^\n]*\n", re.MULTILINE)


def body(text: str) -> str:
    """The function of an example, or the whole file without includes."""
    found = re.search(r"^void example\([^\n]*\n(.*)^\}$", text, re.DOTALL | re.MULTILINE)
    return (found[1] if found else INCLUDE.sub("", text)).strip()


@pytest.mark.parametrize("rule", REWRITTEN, ids=lambda rule: rule.code)
def test_example_becomes_its_replacement(rule: Rule, migrated: Callable[..., str]) -> None:
    text = migrated(before(rule))
    assert "ABI-TODO" not in text
    if rule.group == "INC":
        legacy = set(INCLUDE.findall(before(rule)))
        assert not legacy & set(INCLUDE.findall(text))
        assert set(INCLUDE.findall(text)) <= set(INCLUDE.findall(after(rule)))
    else:
        assert body(text) == body(after(rule))


@pytest.mark.parametrize("rule", rules.table(), ids=lambda rule: rule.code)
def test_second_run_changes_nothing(rule: Rule, migrated: Callable[..., str]) -> None:
    once = migrated(before(rule))
    assert migrated(once.encode("latin-1")) == once


@pytest.mark.parametrize("rule", [r for r in rules.table() if r.kind == "decide" and r.level == "unstable"],
                         ids=lambda rule: rule.code)  # fmt: skip
def test_what_a_person_decides_is_marked_and_kept(rule: Rule, migrated: Callable[..., str]) -> None:
    text = migrated(before(rule))
    if rule.group == "INC" or "ABI-TODO" not in text:
        return
    assert f"ABI-TODO({rule.code})" in text


LEGACY = """\
#include <torch/extension.h>

// Änderungen: keep	this
void f(at::Tensor x) {
	TORCH_CHECK(x.dim() == 2, "rank");\x20\x20
  float* p = x.data_ptr<float>();  /* at::Tensor */
  p[0] = 1;
}
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_bytes_outside_edits_stay(encoding: str, newline: str, tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    data = LEGACY.replace("\n", newline).encode(encoding)
    path.write_bytes(data)
    got = migrate.run([path], Config(root=tmp_path)).files[0].after
    want = LEGACY.replace("at::Tensor x", "torch::stable::Tensor x").replace("TORCH_CHECK", "STD_TORCH_CHECK")
    want = want.replace("data_ptr", "mutable_data_ptr").replace("\n", newline)
    assert got.split(b"\n")[-8:] == want.encode(encoding).split(b"\n")[-8:]
    assert got.startswith(b"\xef\xbb\xbf") == (encoding == "utf-8-sig")
    assert got.count(b"\r\n") == (got.count(b"\n") if newline == "\r\n" else 0)


def test_only_touches_one_rule(tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    path.write_text(LEGACY, encoding="utf-8")
    file = migrate.run([path], Config(root=tmp_path), only=("CHK",)).files[0]
    assert file.after.decode() == LEGACY.replace("TORCH_CHECK", "STD_TORCH_CHECK")


def test_pybind_module(tmp_path: Path) -> None:
    (tmp_path / "setup.py").write_text("CppExtension('pack._C', ['csrc/a.cpp'])")
    (tmp_path / "csrc").mkdir()
    path = tmp_path / "csrc" / "a.cpp"
    path.write_text(
        """#include <torch/extension.h>
void scale(at::Tensor x, float by) { x.mul_(by); }
at::Tensor copy(const at::Tensor& x, c10::optional<at::Tensor> y, int n) { return x.clone(); }
bool ready() { return true; }
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("scale", &scale, "doc", py::arg("x"), py::arg("by") = 2.f);
  m.def("copy", &copy, py::arg("x"), py::arg("y") = py::none(), py::arg("n") = 1);
  m.def("ready", &ready);
  m.attr("LIMIT") = 3;
}
"""
    )
    result = migrate.run([path], Config(root=tmp_path))
    text = result.files[0].after.decode()
    assert 'm.def("scale(Tensor(a!) x, float by=2.0) -> ()");' in text
    assert 'm.def("copy(Tensor x, Tensor? y=None, int n=1) -> Tensor");' in text
    assert 'm.def("ready() -> bool");' in text
    assert (
        "static void scale_boxed(torch::stable::Tensor x, double by) {\n  scale(x, static_cast<float>(by));\n}" in text
    )
    assert "STABLE_TORCH_LIBRARY(pack__C, m)" in text
    # pybind11 refused an integer that does not fit; a cast alone would cut it off.
    assert (
        'STD_TORCH_CHECK(static_cast<int64_t>(static_cast<int>(n)) == n, "n: ", n, " does not fit into int");' in text
    )
    assert 'STABLE_TORCH_LIBRARY_IMPL(pack__C, CPU, m) {\n  m.impl("scale", TORCH_BOX(&scale_boxed));' in text
    assert 'CompositeExplicitAutograd, m) {\n  m.impl("ready", TORCH_BOX(&ready));' in text
    assert "PYBIND11_MODULE" not in text
    module = result.modules[tmp_path / "pack" / "_C.py"]
    assert "scale = torch.ops.pack__C.scale" in module
    assert "LIMIT = 3" in module
    compile(module, "_C.py", "exec")


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        ("int32_t", "  STD_TORCH_CHECK(static_cast<int64_t>(static_cast<int32_t>(x)) == x,"),
        ("uint64_t", "  STD_TORCH_CHECK(x >= 0,"),
        (
            "std::vector<int>",
            "  for (int64_t item : x) STD_TORCH_CHECK(static_cast<int64_t>(static_cast<int>(item)) ==",
        ),
        (
            "c10::optional<int>",
            "  if (x.has_value()) STD_TORCH_CHECK(static_cast<int64_t>(static_cast<int>(*x)) == *x,",
        ),
    ],
)
def test_narrow_integers_are_checked_as_pybind11_did(kind: str, check: str, migrated: Callable[..., str]) -> None:
    module = 'PYBIND11_MODULE(name, m) { m.def("f", &f); }'
    assert check in migrated(f"#include <torch/extension.h>\nvoid f({kind} x) {{}}\n{module}\n", "c.cpp")


def test_pybind_module_with_a_condition(tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    path.write_text(
        """#include <torch/extension.h>
at::Tensor f(at::Tensor x);
at::Tensor g(at::Tensor x);
PYBIND11_MODULE(name, m) {
#ifdef WITH_CUDA
  m.def("f", &f);
#else
  m.def("h", &g);
#endif
  m.def("g", &g);
}
"""
    )
    result = migrate.run([path], Config(root=tmp_path))
    text = result.files[0].after.decode()
    assert '#if defined(WITH_CUDA)\n  m.def("f(Tensor x) -> Tensor");\n#endif' in re.sub(r" *// ABI-TODO.*\n", "", text)
    assert '#if !defined(WITH_CUDA)\n  m.impl("h", TORCH_BOX(&g));\n#endif\n  m.impl("g", TORCH_BOX(&g));' in text
    module = result.modules[tmp_path / "name.py"]
    assert 'if hasattr(torch.ops.name, "f"):\n    f = torch.ops.name.f\ng = torch.ops.name.g\nif' in module


def test_pybind_function_that_does_not_box_stays_for_a_person(migrated: Callable[..., str]) -> None:
    text = migrated(
        """#include <torch/extension.h>
void g(at::Tensor x) {}
void h(std::map<int, int> x) {}
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("g", &g);
  m.def("h", &h);
}
""",
        "b.cpp",
    )
    assert 'm.def("g(Tensor x) -> ()");' in text
    assert "// ABI-TODO(REG008): std::map<int, int> x does not box" in text
    assert '//   m.def("h", &h)' in text


@pytest.mark.parametrize(
    ("use", "member"),
    [
        ("const float* p = t.data_ptr<float>(); n += p[0];", "const_data_ptr"),
        ("auto p = t.data_ptr<float>(); n += p[0];", "const_data_ptr"),
        ("auto p = t.data_ptr<float>(); p[0] += n;", "mutable_data_ptr"),
        ("auto p = t.data_ptr<float>() + n; auto q = p; *q = 1;", "mutable_data_ptr"),
        ("float* p = t.data_ptr<float>(); n += p[0];", "mutable_data_ptr"),
        ("reads(t.data_ptr<float>());", "const_data_ptr"),
        ("writes(t.data_ptr<float>());", "mutable_data_ptr"),
        ("elsewhere(t.data_ptr<float>());", "mutable_data_ptr"),
        ("elsewhere((const float*) t.data_ptr<float>());", "const_data_ptr"),
        ("reads((float*) t.data_ptr<float>());", "mutable_data_ptr"),
    ],
)
def test_pointer_is_const_where_all_uses_are(use: str, member: str, migrated: Callable[..., str]) -> None:
    text = migrated(
        "void reads(const float* p);\nvoid writes(float* p) { p[0] = 1; }\n"
        f"void example(at::Tensor t, int64_t n) {{\n{use}\n}}\n"
    )
    assert f"t.{member}<float>()" in text


def test_argument_checks_name_their_tensors(migrated: Callable[..., str]) -> None:
    text = migrated(
        """void example(at::Tensor t, at::Tensor u, int64_t n) {
  at::TensorArg a{t, "t", 1}, b{u, "u", 2};
  at::CheckedFrom where = "example";
  at::checkAllSameGPU(where, {a, b});
  at::checkAllSameType(where, {a, b});
}
"""
    )
    assert body(text).splitlines() == [
        'const char* where = "example";',
        "  STD_TORCH_CHECK(t.is_cuda() && u.is_cuda() && t.get_device_index() == u.get_device_index(), where, "
        '": expected t, u on one GPU");',
        '  STD_TORCH_CHECK(t.scalar_type() == u.scalar_type(), where, ": expected t, u of one dtype");',
    ]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        ("torch::from_blob(p, {n, 3}, t.options())", "{n, 3}, {3, 1}, t.device(), t.scalar_type()"),
        ("torch::from_blob(p, {2, n, 3})", "{2, n, 3}, {n * 3, 3, 1}, torch::stable::Device("),
        ("torch::from_blob(p, t.sizes())", "abi_ops::from_blob(p, t.sizes())"),
        ("torch::from_blob(p, {n}, [](void*) {})", "torch::from_blob(p, {n}, [](void*) {})"),
    ],
)
def test_from_blob_gets_its_strides(call: str, wanted: str, migrated: Callable[..., str]) -> None:
    assert wanted in migrated(f"void example(at::Tensor t, float* p, int64_t n) {{\nauto a = {call};\n}}\n")


@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        ("auto a = torch::arange(0, n, t.options());", ["abi_ops::arange(0, n, abi_ops::options(t))"]),
        ("auto a = torch::full_like(t, n, u.options());", ["abi_ops::full_like(t, n, abi_ops::options(u))"]),
        ("auto a = t.to((t - u).options());", ["abi_ops::to(t, abi_ops::options((t - u)))"]),
        ("auto a = torch::empty_like(t, torch::kInt);", ["abi_ops::empty_like(t, torch::headeronly::ScalarType::Int)"]),
        (
            "auto o = torch::dtype(torch::kInt);\nauto a = torch::zeros({n}, o);",
            ["auto a = torch::stable::full({n}, 0, torch::headeronly::ScalarType::Int);"],
        ),
        (  # The second tensor has the second dtype: the declaration does not say what options are by then.
            "auto o = torch::dtype(torch::kInt);\nauto a = torch::zeros({n}, o);\no = o.dtype(torch::kByte);\n"
            "auto b = torch::empty({n}, o);",
            [
                "auto o = abi_ops::dtype(torch::headeronly::ScalarType::Int);",
                "auto a = abi_ops::zeros({n}, o);",
                "o = o.dtype(torch::headeronly::ScalarType::Byte);",
                "auto b = abi_ops::empty({n}, o);",
            ],
        ),
    ],
)
def test_options_that_stay_go_through_the_wrappers(
    before: str, wanted: list[str], migrated: Callable[..., str]
) -> None:
    text = migrated(f"void example(at::Tensor t, at::Tensor u, int64_t n) {{\n{before}\n}}\n")
    assert [line for line in wanted if line not in text] == []
    assert "ABI-TODO" not in text


@pytest.mark.parametrize(
    ("number", "exact"),
    [
        *((text, True) for text in ("1", "-1", "2.5f", "1e-3", "k", "d", "true", "static_cast<float>(n)")),
        ("std::numeric_limits<int64_t>::lowest()", True),
        *((text, False) for text in ("n", "k * 2", "9007199254740993", "std::numeric_limits<int64_t>::max()")),
    ],
)
def test_numbers_that_a_double_may_not_hold_go_through_the_wrappers(
    number: str, exact: bool, migrated: Callable[..., str]
) -> None:
    text = migrated(
        f"void f(at::Tensor t, int64_t n, int k, double d) {{\nt.fill_({number});\nat::fill_(t, {number});\n"
        f"auto a = at::full({{2}}, {number}, t.options());\n}}\n"
    )
    space = "torch::stable" if exact else "abi_ops"
    assert text.count(f"{space}::fill_(t, {number});") == 2
    assert f"auto a = {space}::full({{2}}, {number}, " in text


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ("return x * 2;", "CompositeImplicitAutograd"),
        ("return at::matmul(x, x).sum();", "CompositeImplicitAutograd"),
        ("return other(x);", "CompositeImplicitAutograd"),
        ("return x.reshape({-1});", "CompositeImplicitAutograd"),
        ("return raw(x);", "CPU"),
        ("return elsewhere(x);", "CPU"),
        ("auto p = x.data_ptr<float>(); return x * p[0];", "CPU"),
        ("return at::empty({2});", "CPU"),
        ("at::NoGradGuard guard; return x * 2;", "CPU"),
        ("return x;", "CPU"),
    ],
)
def test_autograd_goes_on_through_what_calls_torch_alone(body: str, key: str, migrated: Callable[..., str]) -> None:
    text = migrated(
        "#include <torch/extension.h>\nat::Tensor elsewhere(at::Tensor x);\n"
        "at::Tensor other(at::Tensor x) { return x + 1; }\n"
        "at::Tensor raw(at::Tensor x) { x.data_ptr<float>()[0] = 1; return x; }\n"
        f"at::Tensor f(at::Tensor x) {{ {body} }}\n"
        'PYBIND11_MODULE(name, m) { m.def("f", &f); }\n',
        "c.cpp",
    )
    assert re.search(rf"STABLE_TORCH_LIBRARY_IMPL\(name, {key}, m\) {{\s*m.impl\(\"f\"", text)


def test_std_of_a_flag_is_not_std_over_a_dimension(migrated: Callable[..., str]) -> None:
    text = migrated("void f(at::Tensor t) {\nauto a = t.std(false);\nauto b = t.std(0);\n}\n")
    assert "ABI-TODO(MET039): std(bool) is of all elements" in text
    assert "auto b = abi_ops::std(t, 0);" in text


def test_kernels_that_autograd_follows_keep_their_key(migrated: Callable[..., str]) -> None:
    text = migrated(
        "#include <torch/library.h>\nat::Tensor f(at::Tensor x) { return x; }\n"
        'TORCH_LIBRARY_IMPL(ns, CompositeImplicitAutograd, m) { m.impl("f", &f); }\n',
        "a.cpp",
    )
    assert 'STABLE_TORCH_LIBRARY_IMPL(ns, CompositeImplicitAutograd, m) { m.impl("f", TORCH_BOX(&f)); }' in text


def test_indices_become_items(migrated: Callable[..., str]) -> None:
    text = migrated(
        "using torch::indexing::Slice;\nvoid example(at::Tensor t, at::Tensor u, int64_t n) {\n"
        "auto a = t.index({Slice(n), 0});\nauto b = t.index({torch::indexing::None, u});\nauto c = t.index({u});\n"
        't.index_put_({"...", 0}, 2);\n}\n'
    )
    assert "using abi_ops::indexing::Slice;" in text
    assert "auto a = abi_ops::get_item(t, {Slice(n), 0});" in text
    assert "auto b = abi_ops::get_item(t, {abi_ops::indexing::None, u});" in text
    assert "auto c = abi_ops::index(t, {u});" in text
    assert 'abi_ops::set_item(t, {"...", 0}, 2);' in text
    assert "ABI-TODO" not in text


def test_what_did_not_parse_is_left_alone_and_said(tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    path.write_text("void f(at::Tensor a) {}\nint x = ) at::Tensor %% ;\nvoid g(at::Tensor b) {}\n")
    file = migrate.run([path], Config(root=tmp_path)).files[0]
    lines = file.after.decode().splitlines()
    assert "int x = ) at::Tensor %% ;" in lines
    assert {"void f(torch::stable::Tensor a) {}", "void g(torch::stable::Tensor b) {}"} <= set(lines)
    assert [(t.rule, t.reason) for t in file.todos] == [("TYP001", "this did not parse, and is left alone")]


def test_stages_add_up_to_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.cpp"
    path.write_text(LEGACY, encoding="utf-8")
    file = migrate.run([path], Config(root=tmp_path)).files[0]
    assert [stage.kind for stage in file.stages] == ["checks", "types", "data pointers", "includes"]
    assert file.stages[-1].data == file.after
    assert file.edits == {"CHK001": 1, "TYP001": 1, "MET001": 1, "INC001": 1}


def test_inferred_schema_gets_a_wrapper_for_narrow_types(migrated: Callable[..., str]) -> None:
    text = migrated(
        "#include <torch/library.h>\n\nat::Tensor f(const at::Tensor& x, float y) { return x; }\n\n"
        'TORCH_LIBRARY(ns, m) {\n  m.def("f", &f);\n}\n',
        "a.cpp",
    )
    wrapper = "static torch::stable::Tensor f_boxed(torch::stable::Tensor x, double y) {\n"
    assert f"{wrapper}  return f(x, static_cast<float>(y));\n}}\n\nSTABLE_TORCH_LIBRARY(ns, m) {{\n" in text
    assert 'm.def("f(Tensor x, float y) -> Tensor");' in text
    assert 'm.impl("f", TORCH_BOX(&f_boxed));' in text


def test_selective_macros_give_way_to_what_they_hold(migrated: Callable[..., str]) -> None:
    text = migrated(
        "#include <torch/library.h>\nat::Tensor f(const at::Tensor& x) { return x; }\n"
        'TORCH_LIBRARY_FRAGMENT(ns, m) { m.def(TORCH_SELECTIVE_SCHEMA("ns::f(Tensor x) -> Tensor")); }\n'
        'TORCH_LIBRARY_FRAGMENT(ns, m) { m.def(TORCH_SELECTIVE_SCHEMA("g(Tensor x) -> Tensor"), TORCH_FN(f)); }\n'
        'TORCH_LIBRARY_IMPL(ns, CPU, m) { m.impl(TORCH_SELECTIVE_NAME("ns::f"), TORCH_FN(f)); }\n',
        "a.cpp",
    )
    assert 'm.def("ns::f(Tensor x) -> Tensor");' in text
    assert 'm.def("g(Tensor x) -> Tensor");' in text
    assert 'm.impl("ns::f", TORCH_BOX(&f));' in text
    assert "SELECTIVE" not in text
    assert "ABI-TODO" not in text
