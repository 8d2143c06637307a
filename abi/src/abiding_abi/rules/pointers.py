"""Data pointers and accessors."""

from abiding_abi.rules.model import Check, Method, Name, Rule

RULES = (
    Rule(
        "TYP021",
        "torch::TensorAccessor<T, N>",
        "torch::headeronly::HeaderOnlyTensorAccessor<T, N>",
        (Name(("TensorAccessor",), to="torch::headeronly::HeaderOnlyTensorAccessor"),),
        pitfall="It borrows sizes and strides, so that the tensor must outlive it.",
        before="void f(torch::TensorAccessor<float, 2> a) {}",
        after="void f(torch::headeronly::HeaderOnlyTensorAccessor<float, 2> a) {}",
        scope="file",
    ),
    Rule(
        "TYP022",
        "torch::PackedTensorAccessor32<T, N, Traits>, PackedTensorAccessor64, GenericPackedTensorAccessor",
        "torch::headeronly::HeaderOnlyGenericPackedTensorAccessor<T, N, Traits, int32_t>",
        (
            Name(("PackedTensorAccessor32", "PackedTensorAccessor64", "PackedTensorAccessor")),
            Name(("GenericPackedTensorAccessor",), to="torch::headeronly::HeaderOnlyGenericPackedTensorAccessor"),
        ),
        edit="accessor_type",
        pitfall="packed_accessor32 checked that the tensor has less than 2^31 elements; that check is gone.",
        before="void f(torch::PackedTensorAccessor32<float, 2> a) {}",
        after="void f(torch::headeronly::HeaderOnlyGenericPackedTensorAccessor<float, 2, "
        "torch::headeronly::DefaultPtrTraits, int32_t> a) {}",
        scope="file",
    ),
    Rule(
        "TYP031",
        "torch::RestrictPtrTraits, at::RestrictPtrTraits, DefaultPtrTraits",
        "torch::headeronly::RestrictPtrTraits (nvcc only)",
        (Name(("RestrictPtrTraits", "DefaultPtrTraits"), to="torch::headeronly::{name}"),),
        pitfall="RestrictPtrTraits is declared only under nvcc: a .cpp file that shares the declaration fails.",
        before="using A = torch::DefaultPtrTraits<float>;",
        after="using A = torch::headeronly::DefaultPtrTraits<float>;",
        scope="file",
    ),
    Rule(
        "MET001",
        "t.data_ptr<T>(), t.data<T>()",
        "t.mutable_data_ptr<T>() where it is written through, t.const_data_ptr<T>() where it is only read",
        (Check("data_pointer"),),
        kind="context",
        edit="pointers",
        pitfall="mutable_data_ptr of a copy-on-write tensor copies it; const_data_ptr makes helpers take const T*.",
        before="float* a = t.data_ptr<float>();\na[0] = 1;",
        after="float* a = t.mutable_data_ptr<float>();\na[0] = 1;",
    ),
    Rule(
        "MET003",
        "t.data_ptr<T>() with T = long, long long, half, nv_bfloat16 and other types outside the header-only list",
        "the same with the type of the list, and a reinterpret_cast of the pointer",
        (Check("foreign_pointer"),),
        kind="context",
        edit="pointers",
        pitfall="It compiles and is an undefined symbol when the library is loaded.",
        before="auto a = t.data_ptr<long long>();\na[0] = 1;",
        after="auto a = reinterpret_cast<long long*>(t.mutable_data_ptr<int64_t>());\na[0] = 1;",
    ),
    Rule(
        "MET031",
        "t.accessor<T, N>()",
        "abi_accessor<T, N>(t), which migrate brings: torch::headeronly::HeaderOnlyTensorAccessor<T, N>, and the check "
        "of the dimensions",
        (Method(("accessor",), distinct=True),),
        kind="context",
        edit="accessors",
        pitfall="The class itself does not check how many dimensions there are. It borrows sizes and strides, so the "
        "tensor must outlive it.",
        before="auto a = t.accessor<float, 2>();\na[0][0] = 1;",
        after="auto a = abi_accessor<float, 2>(t);\na[0][0] = 1;",
    ),
    Rule(
        "MET032",
        "t.packed_accessor32<T, N, Traits>(), packed_accessor64",
        "abi_packed_accessor<T, N, Traits, int32_t>(t), which migrate brings: "
        "torch::headeronly::HeaderOnlyGenericPackedTensorAccessor and the checks of dimensions and size",
        (
            Method(
                ("packed_accessor32", "packed_accessor64", "packed_accessor", "generic_packed_accessor"), distinct=True
            ),
        ),
        kind="context",
        edit="accessors",
        pitfall="The class itself checks neither the dimensions nor, with indices of 32 bits, that the tensor has less "
        "than 2^31 elements.",
        before="auto a = t.packed_accessor64<float, 2>();",
        after="auto a = abi_packed_accessor<float, 2, torch::headeronly::DefaultPtrTraits, int64_t>(t);",
    ),
)
