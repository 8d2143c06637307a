"""Which header declares which name: torch's stable ones, CUDA's, and the standard library's."""

from __future__ import annotations

import re

_TORCH = {
    "torch/csrc/stable/tensor.h": r"torch::stable::Tensor\b",
    "torch/csrc/stable/library.h": r"\bSTABLE_TORCH_LIBRARY|\bTORCH_BOX\b",
    "torch/csrc/stable/ops.h": r"torch::stable::(?!accelerator\b|detail\b)[a-z_]\w*",
    "torch/csrc/stable/accelerator.h": r"torch::stable::accelerator\b",
    "torch/csrc/stable/device.h": r"torch::stable::Device\b",
    "torch/csrc/stable/macros.h": r"\bSTD_CUDA_\w+|\bSTABLE_TORCH_ERROR_CODE_CHECK\b",
    "torch/csrc/inductor/aoti_torch/c/shim.h": r"\baoti_torch_\w+",
    "torch/csrc/stable/c/shim.h": r"\btorch_(?:get|set|cuda|call)_\w+|\baoti_torch_get_current_cuda_stream\b",
    "torch/headeronly/util/shim_utils.h": r"\bTORCH_ERROR_CODE_CHECK\b",
    "torch/headeronly/core/Dispatch_v2.h": r"\bTHO_DISPATCH_\w+",
    "torch/headeronly/core/TensorAccessor.h": r"torch::headeronly::(?:HeaderOnly\w*TensorAccessor|\w+PtrTraits)",
    "torch/headeronly/core/ScalarType.h": r"\bScalarType\b|\bCppTypeToScalarType\b|torch::headeronly::toString\b",
    "torch/headeronly/core/DeviceType.h": r"\bDeviceType\b",
    "torch/headeronly/core/Layout.h": r"torch::headeronly::Layout\b",
    "torch/headeronly/core/MemoryFormat.h": r"torch::headeronly::MemoryFormat\b",
    "torch/headeronly/util/Half.h": r"(?:torch::headeronly|c10|at)::Half\b",
    "torch/headeronly/util/BFloat16.h": r"(?:torch::headeronly|c10|at)::BFloat16\b",
    "torch/headeronly/util/complex.h": r"(?:torch::headeronly|c10|at)::complex\b",
    "torch/headeronly/util/Float8_e4m3fn.h": r"(?:torch::headeronly|c10|at)::Float8_e4m3fn\b",
    "torch/headeronly/util/Float8_e5m2.h": r"(?:torch::headeronly|c10|at)::Float8_e5m2\b",
    "torch/headeronly/util/HeaderOnlyArrayRef.h": r"\b(?:Int)?HeaderOnlyArrayRef\b",
    "torch/headeronly/util/Exception.h": r"\bSTD_TORCH_CHECK\b",
    "torch/headeronly/macros/Macros.h": r"\bC10_(?!CUDA)\w+|\bCUDA_KERNEL_ASSERT\b",
    "torch/headeronly/version.h": r"\bTORCH_VERSION(?:_MAJOR|_MINOR|_PATCH)?\b",
    "torch/headeronly/util/irange.h": r"torch::headeronly::irange\b",
    "torch/headeronly/cuda/Atomic.h": r"\bgpuAtomic\w+|\bfastAtomicAdd\b",
    "cuda_runtime.h": r"\bcuda(?:Stream_t|Get|Set|Mem|Malloc|Free|Device|Event|Func|Error|Success|Launch|Stream)\w*"
    r"|\bSTD_CUDA_\w+",
    "cuda_fp16.h": r"\b__half2?\b|\bhalf2?\b(?=[\s*&>(])|\b__float2half\w*|\b__half2float\w*",
    "cuda_bf16.h": r"\b(?:__)?nv_bfloat16\d*\b|\b__float2bfloat16\w*",
    "cublas_v2.h": r"\bcublas\w+",
    "omp.h": r"\bomp_[gs]et_\w+",
}
_STD = {
    "algorithm": "all_of any_of binary_search clamp copy copy_n count count_if equal fill fill_n find find_if for_each "
    "generate lower_bound make_heap max max_element merge min min_element minmax none_of nth_element "
    "partial_sort pop_heap push_heap remove_if reverse rotate shuffle sort stable_sort swap_ranges transform unique "
    "upper_bound",
    "any": "any any_cast",
    "array": "array",
    "atomic": "atomic atomic_flag memory_order",
    "bitset": "bitset",
    "chrono": "chrono",
    "cmath": "abs atan atan2 cbrt ceil cos cosh erf exp exp2 expm1 fabs floor fmax fmin fmod hypot isfinite isinf "
    "isnan lgamma llround log log10 log1p log2 lround nearbyint pow rint round signbit sin sinh sqrt tan tanh trunc",
    "complex": "complex",
    "condition_variable": "condition_variable",
    "cstddef": "byte nullptr_t ptrdiff_t size_t",
    "cstring": "memcmp memcpy memmove memset strcmp strlen",
    "deque": "deque",
    "exception": "exception",
    "fstream": "fstream ifstream ofstream",
    "functional": "bind cref function greater hash less multiplies plus ref reference_wrapper",
    "future": "async future promise",
    "initializer_list": "initializer_list",
    "iomanip": "setprecision setw",
    "iostream": "cerr cin clog cout endl",
    "limits": "numeric_limits",
    "list": "list",
    "map": "map multimap",
    "memory": "allocator make_shared make_unique shared_ptr unique_ptr weak_ptr",
    "mutex": "call_once lock_guard mutex once_flag unique_lock",
    "numeric": "accumulate exclusive_scan gcd inclusive_scan inner_product iota lcm partial_sum reduce "
    "transform_reduce",
    "optional": "make_optional nullopt nullopt_t optional",
    "queue": "priority_queue queue",
    "random": "bernoulli_distribution default_random_engine mt19937 mt19937_64 normal_distribution random_device "
    "uniform_int_distribution uniform_real_distribution",
    "set": "set",
    "sstream": "istringstream ostream ostringstream stringstream",
    "stack": "stack",
    "stdexcept": "domain_error invalid_argument logic_error out_of_range overflow_error runtime_error",
    "string": "getline stof stoi string to_string",
    "string_view": "string_view",
    "thread": "this_thread thread",
    "tuple": "forward_as_tuple get make_tuple tie tuple",
    "type_traits": "common_type common_type_t conditional conditional_t decay decay_t enable_if enable_if_t false_type "
    "integral_constant invoke_result_t is_arithmetic is_arithmetic_v is_base_of is_convertible is_floating_point "
    "is_floating_point_v is_integral is_integral_v is_same is_same_v make_unsigned remove_const_t remove_cv_t "
    "remove_pointer_t remove_reference remove_reference_t true_type underlying_type_t void_t",
    "unordered_map": "unordered_map",
    "unordered_set": "unordered_set",
    "utility": "exchange forward index_sequence make_index_sequence make_pair move pair swap",
    "variant": "monostate variant visit",
    "vector": "vector",
}
"""Names of namespace std."""
_GLOBAL = {
    "cassert": r"\bassert\s*\(",
    "cfloat": r"\b(?:FLT|DBL)_(?:MAX|MIN|EPSILON)\b",
    "climits": r"\b(?:INT_MAX|INT_MIN|UINT_MAX|LONG_MAX|LLONG_MAX|CHAR_BIT)\b",
    "cmath": r"\b(?:sqrtf?|expf|logf|powf|fabsf?|floorf|ceilf|tanhf|roundf|fmaxf|fminf|rintf|isnan|isinf)\s*\("
    r"|\b(?:INFINITY|NAN|M_PI|M_SQRT\w+)\b",
    "cstdint": r"\bu?int(?:8|16|32|64)_t\b|\buintptr_t\b",
    "cstdio": r"\b(?:f|s|sn)?printf\s*\(|\bf(?:open|close|flush)\s*\(",
    "cstdlib": r"\b(?:malloc|calloc|free|exit|abort|atoi|getenv|rand|aligned_alloc)\s*\(",
    "cstring": r"\b(?:memcpy|memset|memmove|strlen|strcmp)\s*\(",
}
_FROM_TORCH = frozenset(("cstdint", "cstddef"))
"""Standard headers that every stable header includes."""
C_NAMES = {
    "cmath": "math.h",
    "cstdio": "stdio.h",
    "cstring": "string.h",
    "cstdlib": "stdlib.h",
    "cassert": "assert.h",
    "cstdint": "stdint.h",
    "cfloat": "float.h",
    "climits": "limits.h",
}
"""The C spellings of headers."""


def _compiled() -> list[tuple[str, re.Pattern[str]]]:
    patterns = list(_TORCH.items())
    for header in sorted({*_STD, *_GLOBAL}):
        std = rf"\bstd\s*::\s*(?:{'|'.join(_STD[header].split())})\b" if header in _STD else ""
        patterns.append((header, "|".join(part for part in (std, _GLOBAL.get(header, "")) if part)))
    return [(header, re.compile(pattern)) for header, pattern in patterns]


_PATTERNS = _compiled()


def needed(code: str, *, nvcc: bool) -> list[str]:
    """Headers whose names a text uses, in the order in which they are written."""
    found = [header for header, pattern in _PATTERNS if pattern.search(code)]
    left_out = {"cuda_runtime.h"} if nvcc else set()
    if any(header.startswith("torch/") for header in found):
        left_out |= _FROM_TORCH
    return [header for header in found if header not in left_out]
