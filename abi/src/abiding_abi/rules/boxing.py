"""Boxing: what compiles under TORCH_BOX and arrives wrong."""

from abiding_abi.rules.model import Check, Rule

_HEAD = "#include <torch/csrc/stable/library.h>\n#include <torch/csrc/stable/tensor.h>\n#include <string>\n"


def _boxed(function: str, schema: str) -> str:
    return (
        f'{_HEAD}{function}\nSTABLE_TORCH_LIBRARY(example, m) {{ m.def("{schema}"); }}\n'
        'STABLE_TORCH_LIBRARY_IMPL(example, CPU, m) { m.impl("f", TORCH_BOX(&f)); }'
    )


RULES = (
    Rule(
        "BOX001",
        "float, int32_t, int, unsigned, char, optional<float>, vector<int> under TORCH_BOX",
        "double, int64_t, optional<double>, vector<int64_t>",
        (Check("narrow_type"),),
        kind="mechanical",
        level="wrong",
        edit="widen",
        scope="file",
        why="No compiler warns: the float 1.5 arrives as 0.0, the int32_t 2**32+7 as 7, the uint32_t -1 as 4294967295.",
        before=_boxed("void f(torch::stable::Tensor a, float x) {}", "f(Tensor a, float x) -> ()"),
        after=_boxed("void f(torch::stable::Tensor a, double x) {}", "f(Tensor a, float x) -> ()"),
    ),
    Rule(
        "BOX002",
        "const char* under TORCH_BOX",
        "std::string",
        (Check("char_pointer"),),
        kind="mechanical",
        level="wrong",
        edit="widen",
        scope="file",
        why="It reads a handle as text: garbage or a crash.",
        before=_boxed("void f(torch::stable::Tensor a, const char* x) {}", "f(Tensor a, str x) -> ()"),
        after=_boxed("void f(torch::stable::Tensor a, std::string x) {}", "f(Tensor a, str x) -> ()"),
    ),
    Rule(
        "BOX003",
        "a struct or another type that does not box under TORCH_BOX",
        "its fields as arguments",
        (Check("unboxable_type"),),
        kind="decide",
        level="wrong",
        scope="file",
        why="Any trivially copyable type compiles and is read beyond its slot.",
        before=_boxed(
            "struct P { int64_t x[4]; };\nvoid f(torch::stable::Tensor a, P x) {}", "f(Tensor a, int x) -> ()"
        ),
        after=_boxed("void f(torch::stable::Tensor a, int64_t x) {}", "f(Tensor a, int x) -> ()"),
    ),
    Rule(
        "BOX004",
        "a schema that does not fit the C++ signature in count, type or optional",
        "the schema of the signature",
        (Check("schema_mismatch"),),
        kind="decide",
        level="wrong",
        scope="file",
        why="The count is checked at the first call, the types never: a double is read as an integer's bits.",
        before=_boxed("void f(torch::stable::Tensor a, double x) {}", "f(Tensor a, int x) -> ()"),
        after=_boxed("void f(torch::stable::Tensor a, int64_t x) {}", "f(Tensor a, int x) -> ()"),
    ),
    Rule(
        "BOX005",
        "a tensor that the function writes without (a!) in the schema",
        "Tensor(a!) in the schema",
        (Check("unmarked_mutation"),),
        kind="decide",
        level="wrong",
        scope="file",
        why="torch.compile moves or drops the call.",
        before=_boxed(
            "void f(torch::stable::Tensor a) { a.mutable_data_ptr<float>()[0] = 1; }",
            "f(Tensor a) -> ()",
        ),
        after=_boxed(
            "void f(torch::stable::Tensor a) { a.mutable_data_ptr<float>()[0] = 1; }",
            "f(Tensor(a!) a) -> ()",
        ),
    ),
)
