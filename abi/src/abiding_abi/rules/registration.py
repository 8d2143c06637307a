"""Registration."""

from abiding_abi.rules.model import Check, Macro, Name, Rule

_F = "torch::stable::Tensor f(torch::stable::Tensor a) { return a; }\n"
_LEGACY_F = "at::Tensor f(at::Tensor a) { return a; }\n"
_LIBRARY = "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/tensor.h>\n"

RULES = (
    Rule(
        "REG001",
        "TORCH_LIBRARY(ns, m)",
        "STABLE_TORCH_LIBRARY(ns, m)",
        (Macro(("TORCH_LIBRARY",), to="STABLE_TORCH_LIBRARY"),),
        headers="2.9",
        pitfall="Two in one process for one namespace, stable or not, crash when the library is loaded.",
        before='TORCH_LIBRARY(example, m) { m.def("f(Tensor a) -> Tensor"); }',
        after='STABLE_TORCH_LIBRARY(example, m) { m.def("f(Tensor a) -> Tensor"); }',
        scope="file",
    ),
    Rule(
        "REG002",
        "TORCH_LIBRARY_FRAGMENT(ns, m)",
        "STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)",
        (Macro(("TORCH_LIBRARY_FRAGMENT",), to="STABLE_TORCH_LIBRARY_FRAGMENT"),),
        headers="2.9",
        before='TORCH_LIBRARY_FRAGMENT(example, m) { m.def("f(Tensor a) -> Tensor"); }',
        after='STABLE_TORCH_LIBRARY_FRAGMENT(example, m) { m.def("f(Tensor a) -> Tensor"); }',
        scope="file",
    ),
    Rule(
        "REG003",
        "TORCH_LIBRARY_IMPL(ns, KEY, m) { m.impl(name, &f); }",
        "STABLE_TORCH_LIBRARY_IMPL(ns, KEY, m) { m.impl(name, TORCH_BOX(&f)); }",
        (Macro(("TORCH_LIBRARY_IMPL",)),),
        edit="library",
        pitfall="TORCH_BOX needs a function with linkage: lambdas and overloaded names fail. A kernel under CatchAll "
        "was traced through: choose the key.",
        before=_LEGACY_F + 'TORCH_LIBRARY_IMPL(example, CPU, m) { m.impl("f", &f); }',
        after=_F + 'STABLE_TORCH_LIBRARY_IMPL(example, CPU, m) { m.impl("f", TORCH_BOX(&f)); }',
        scope="file",
    ),
    Rule(
        "REG004",
        "m.def(schema, &f), m.def(name, &f), m.impl(name, f) in a TORCH_LIBRARY block",
        "m.def(schema) and m.impl(name, TORCH_BOX(&f)) in a block with a key",
        (Check("library_def"),),
        kind="context",
        edit="library",
        pitfall="m.def(schema, &f) registers for every key and differentiates through; an inferred schema called its "
        "arguments _0, _1 and had no mutation marks.",
        before=_LEGACY_F + 'TORCH_LIBRARY(example, m) { m.def("f(Tensor a) -> Tensor", &f); }',
        after=_F + 'STABLE_TORCH_LIBRARY(example, m) { m.def("f(Tensor a) -> Tensor"); }\n\n'
        'STABLE_TORCH_LIBRARY_IMPL(example, CompositeExplicitAutograd, m) { m.impl("f", TORCH_BOX(&f)); }',
        scope="file",
    ),
    Rule(
        "REG006",
        "torch::RegisterOperators().op(name, &f), torch::jit::RegisterOperators",
        "STABLE_TORCH_LIBRARY_FRAGMENT with a written schema",
        (Name(("RegisterOperators", "jit::RegisterOperators")),),
        kind="context",
        edit="register_operators",
        before=_LEGACY_F + 'static auto registry = torch::RegisterOperators().op("example::f", &f);',
        after="",
        scope="file",
    ),
    Rule(
        "REG007",
        "PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def(name, &f); }",
        "STABLE_TORCH_LIBRARY with a schema, and a Python module with the old names",
        (
            Macro(
                ("PYBIND11_MODULE", "PYBIND11_DECLARE_HOLDER_TYPE", "PYBIND11_MAKE_OPAQUE", "PYBIND11_EMBEDDED_MODULE")
            ),
        ),
        kind="context",
        edit="pybind",
        pitfall="pybind11 took None for a Tensor, any int for a float, and keyword defaults from py::arg: schema and "
        "Python module take these over. The arguments that the function writes need (a!) marks.",
        before=_LEGACY_F + 'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("f", &f); }',
        after="",
        scope="file",
    ),
    Rule(
        "REG008",
        "py::object, py::array_t, py::class_ and other names of pybind11 outside a module",
        "none: keep Python objects in Python, or in a module without tensors",
        (Check("pybind_name"),),
        headers="2.14",
        runs="2.14",
        kind="decide",
        scope="file",
        pitfall="Headers before 2.13 refuse pybind11 under TORCH_STABLE_ONLY.",
        before="#include <torch/extension.h>\nvoid f(py::object a) {}",
        after="",
    ),
    Rule(
        "REG014",
        "torch::CppFunction, torch::Library, torch::dispatch, m.class_, m.fallback",
        "none: register fallthroughs in Python",
        (
            Name(
                ("CppFunction", "Library", "dispatch", "DispatchKey", "OperatorHandle", "Dispatcher", "DispatchKeySet")
            ),
        ),
        headers="2.9",
        kind="decide",
        before="void f(torch::Library& m) {}",
        after="void f(torch::stable::Tensor a) {}",
        scope="file",
    ),
    Rule(
        "REG015",
        "TORCH_FN, TORCH_SELECTIVE_NAME, TORCH_SELECTIVE_SCHEMA",
        "TORCH_BOX(&f); the name or schema itself",
        (Macro(("TORCH_FN", "TORCH_SELECTIVE_NAME", "TORCH_SELECTIVE_SCHEMA", "TORCH_FN_TYPE")),),
        kind="context",
        edit="library",
        before="auto g = TORCH_FN(f);",
        after="",
        scope="file",
    ),
    Rule(
        "REG019",
        "TORCH_API, C10_EXPORT, C10_API",
        "a visibility macro of your own; C10_EXPORT and C10_API are header-only",
        (Macro(("TORCH_API", "CAFFE2_API")),),
        headers="2.9",
        kind="context",
        edit="visibility",
        before="TORCH_API void f();",
        after='__attribute__((visibility("default"))) void f();',
        scope="file",
    ),
    Rule(
        "REG022",
        "TORCH_LIBRARY_EXPAND(NS, m), REGISTER_EXTENSION and other project macros around registration",
        "the macro's body around STABLE_TORCH_LIBRARY_FRAGMENT",
        (Macro(("TORCH_LIBRARY_EXPAND", "TORCH_LIBRARY_IMPL_EXPAND", "TORCH_LIBRARY_THREAD_UNSAFE_LAZY_INIT")),),
        headers="2.9",
        kind="decide",
        before='TORCH_LIBRARY_EXPAND(NAME, m) { m.def("f(Tensor a) -> Tensor"); }',
        after="",
        scope="file",
    ),
    Rule(
        "REG101",
        "two STABLE_TORCH_LIBRARY of one namespace in a project",
        "STABLE_TORCH_LIBRARY_FRAGMENT in all but one",
        (Check("second_library"),),
        headers="2.9",
        kind="mechanical",
        level="wrong",
        edit="fragment",
        scope="file",
        why="The second one crashes the process when the library is loaded.",
        before=_LIBRARY + 'STABLE_TORCH_LIBRARY(example, m) { m.def("f(Tensor a) -> Tensor"); }\n'
        'STABLE_TORCH_LIBRARY(example, m) { m.def("g(Tensor a) -> Tensor"); }',
        after=_LIBRARY + 'STABLE_TORCH_LIBRARY(example, m) { m.def("f(Tensor a) -> Tensor"); }\n'
        'STABLE_TORCH_LIBRARY_FRAGMENT(example, m) { m.def("g(Tensor a) -> Tensor"); }',
    ),
    Rule(
        "REG102",
        "an operator on tensors under CompositeExplicitAutograd",
        "one block per device key, and torch.library.register_fake",
        (Check("composite_tensor"),),
        kind="decide",
        level="note",
        scope="file",
        why="The kernel shadows the fake kernel, so that torch.compile runs it on fake tensors.",
        before=_LIBRARY + _F + "STABLE_TORCH_LIBRARY_IMPL(example, CompositeExplicitAutograd, m) "
        '{ m.impl("f", TORCH_BOX(&f)); }',
        after=_LIBRARY + _F + 'STABLE_TORCH_LIBRARY_IMPL(example, CPU, m) { m.impl("f", TORCH_BOX(&f)); }',
    ),
)
