"""Includes: legacy headers out, the stable headers and the standard headers that the code uses in."""

from __future__ import annotations

import os
import re

from abiding_abi.lint.engine import Hit
from abiding_abi.migrate.cuda import HELPER, HELPER_LINES
from abiding_abi.migrate.edits import Edit, replace
from abiding_abi.migrate.simple import whole_line
from abiding_abi.migrate.work import Work
from abiding_abi.rules import Include

_SHIM = "torch/csrc/inductor/aoti_torch/c/shim.h"
# Ordered: the first group are torch's headers, the second CUDA's, the third the standard ones.
_STABLE = (
    (r"torch::stable::Tensor\b", "torch/csrc/stable/tensor.h"),
    (r"\bSTABLE_TORCH_LIBRARY|\bTORCH_BOX\b", "torch/csrc/stable/library.h"),
    (r"torch::stable::(?!Tensor\b|Device\b|accelerator\b|detail\b|Generator\b|DeviceIndex\b)[a-z_]\w*", "torch/csrc/stable/ops.h"),
    (r"torch::stable::accelerator\b", "torch/csrc/stable/accelerator.h"),
    (r"torch::stable::Device\b", "torch/csrc/stable/device.h"),
    (r"\bSTD_CUDA_\w+|\bSTABLE_TORCH_ERROR_CODE_CHECK\b", "torch/csrc/stable/macros.h"),
    (r"\baoti_torch_\w+", _SHIM),
    (r"\baoti_torch_get_current_cuda_stream\b|\btorch_(?:get|set|cuda|call)_\w+", "torch/csrc/stable/c/shim.h"),
    (r"\bTORCH_ERROR_CODE_CHECK\b", "torch/headeronly/util/shim_utils.h"),
    (r"\bTHO_DISPATCH_\w+", "torch/headeronly/core/Dispatch_v2.h"),
    (r"torch::headeronly::(?:HeaderOnly(?:Generic)?(?:Packed)?TensorAccessor|\w+PtrTraits)", "torch/headeronly/core/TensorAccessor.h"),
    (r"\bScalarType\b|\bCppTypeToScalarType\b|torch::headeronly::toString\b", "torch/headeronly/core/ScalarType.h"),
    (r"\bDeviceType\b", "torch/headeronly/core/DeviceType.h"),
    (r"torch::headeronly::Layout\b", "torch/headeronly/core/Layout.h"),
    (r"torch::headeronly::MemoryFormat\b", "torch/headeronly/core/MemoryFormat.h"),
    (r"(?:torch::headeronly|c10|at)::Half\b", "torch/headeronly/util/Half.h"),
    (r"(?:torch::headeronly|c10|at)::BFloat16\b", "torch/headeronly/util/BFloat16.h"),
    (r"(?:torch::headeronly|c10|at)::complex\b", "torch/headeronly/util/complex.h"),
    (r"(?:torch::headeronly|c10|at)::Float8_e4m3fn\b", "torch/headeronly/util/Float8_e4m3fn.h"),
    (r"(?:torch::headeronly|c10|at)::Float8_e5m2\b", "torch/headeronly/util/Float8_e5m2.h"),
    (r"\bIntHeaderOnlyArrayRef\b|\bHeaderOnlyArrayRef\b", "torch/headeronly/util/HeaderOnlyArrayRef.h"),
    (r"\bSTD_TORCH_CHECK\b", "torch/headeronly/util/Exception.h"),
    (r"\bC10_(?!CUDA)\w+|\bCUDA_KERNEL_ASSERT\b", "torch/headeronly/macros/Macros.h"),
    (r"torch::headeronly::irange\b", "torch/headeronly/util/irange.h"),
    (r"\bgpuAtomic\w+|\bfastAtomicAdd\b", "torch/headeronly/cuda/Atomic.h"),
)  # fmt: skip
_CUDA = (
    (r"\bcuda(?:Stream_t|Get|Set|Mem|Malloc|Free|Device|Event|Func|Error|Success|Launch|Stream)\w*|\bSTD_CUDA_\w+", "cuda_runtime.h"),
    (r"\b__half2?\b|\bhalf2?\b(?=[\s*&>(])|\b__float2half\w*|\b__half2float\w*", "cuda_fp16.h"),
    (r"\b__nv_bfloat16\d*\b|\bnv_bfloat16\d*\b|\b__float2bfloat16\w*", "cuda_bf16.h"),
    (r"\bcublas\w+", "cublas_v2.h"),
)  # fmt: skip
_STANDARD = (
    (r"std::vector\b", "vector"),
    (r"std::(?:string|to_string|stoi|stof|getline)\b", "string"),
    (r"std::string_view\b", "string_view"),
    (r"std::(?:optional|nullopt|make_optional|nullopt_t)\b", "optional"),
    (r"std::(?:tuple|tie|make_tuple|get|forward_as_tuple)\b", "tuple"),
    (r"std::(?:pair|make_pair|move|forward|swap|exchange|index_sequence|make_index_sequence)\b", "utility"),
    (r"std::array\b", "array"),
    (r"std::map\b|std::multimap\b", "map"),
    (r"std::set\b", "set"),
    (r"std::unordered_map\b", "unordered_map"),
    (r"std::unordered_set\b", "unordered_set"),
    (r"std::(?:queue|priority_queue)\b", "queue"),
    (r"std::deque\b", "deque"),
    (r"std::list\b", "list"),
    (r"std::stack\b", "stack"),
    (r"std::bitset\b", "bitset"),
    (r"std::(?:unique_ptr|shared_ptr|make_unique|make_shared|weak_ptr|allocator)\b", "memory"),
    (r"std::(?:function|bind|hash|plus|multiplies|less|greater|ref|cref|reference_wrapper)\b", "functional"),
    (r"std::(?:max|min|sort|stable_sort|fill|fill_n|copy|copy_n|transform|find|find_if|any_of|all_of|none_of|clamp|reverse|unique|"
     r"lower_bound|upper_bound|max_element|min_element|nth_element|partial_sort|count|count_if|for_each|remove_if|swap_ranges|"
     r"push_heap|pop_heap|make_heap|minmax|equal|generate|shuffle|rotate|binary_search|merge|max_element)\b", "algorithm"),
    (r"std::(?:accumulate|iota|inner_product|partial_sum|inclusive_scan|exclusive_scan|reduce|transform_reduce|gcd|lcm)\b", "numeric"),
    (r"std::numeric_limits\b", "limits"),
    (r"std::(?:sqrt|exp|log|log2|log10|log1p|pow|abs|fabs|floor|ceil|round|isnan|isinf|isfinite|sin|cos|tan|tanh|sinh|cosh|atan|atan2|"
     r"fmax|fmin|fmod|erf|lround|llround|nearbyint|rint|trunc|cbrt|hypot|expm1|signbit|exp2|lgamma)\b|\b(?:sqrtf?|expf|logf|powf|fabsf?|"
     r"floorf|ceilf|tanhf|roundf|fmaxf|fminf|rintf|INFINITY|NAN|M_PI|M_SQRT\w*|isnan|isinf)\b", "cmath"),
    (r"std::complex\b", "complex"),
    (r"std::(?:cout|cerr|endl|clog|cin)\b", "iostream"),
    (r"std::(?:ostream|ostringstream|stringstream|istringstream)\b", "sstream"),
    (r"std::(?:ifstream|ofstream|fstream)\b", "fstream"),
    (r"std::(?:setw|setprecision)\b", "iomanip"),
    (r"std::(?:runtime_error|invalid_argument|logic_error|out_of_range|domain_error|overflow_error)\b", "stdexcept"),
    (r"std::exception\b", "exception"),
    (r"std::(?:mutex|lock_guard|unique_lock|once_flag|call_once)\b", "mutex"),
    (r"std::thread\b|std::this_thread\b", "thread"),
    (r"std::atomic\w*\b", "atomic"),
    (r"std::condition_variable\b", "condition_variable"),
    (r"std::future\b|std::async\b|std::promise\b", "future"),
    (r"std::chrono\b", "chrono"),
    (r"std::(?:mt19937\w*|uniform_\w+|normal_distribution|random_device|default_random_engine|bernoulli_distribution)\b", "random"),
    (r"std::(?:is_same\w*|enable_if\w*|decay\w*|conditional\w*|is_floating_point\w*|is_integral\w*|remove_\w+|is_arithmetic\w*|true_type|"
     r"false_type|integral_constant|void_t|is_convertible\w*|is_base_of\w*|common_type\w*|make_unsigned\w*|underlying_type\w*|invoke_result\w*)\b",
     "type_traits"),
    (r"std::initializer_list\b", "initializer_list"),
    (r"std::(?:variant|visit|monostate)\b", "variant"),
    (r"std::any\b|std::any_cast\b", "any"),
    (r"std::byte\b|std::size_t\b|std::ptrdiff_t\b|std::nullptr_t\b", "cstddef"),
    (r"std::(?:memcpy|memset|memmove|memcmp|strlen|strcmp)\b|\b(?:memcpy|memset|memmove|strlen|strcmp)\s*\(", "cstring"),
    (r"\b(?:std::)?(?:printf|fprintf|sprintf|snprintf|fopen|fclose|fflush)\s*\(", "cstdio"),
    (r"\b(?:std::)?(?:malloc|calloc|free|exit|abort|atoi|getenv|rand|aligned_alloc)\s*\(", "cstdlib"),
    (r"\bassert\s*\(", "cassert"),
    (r"\b(?:INT_MAX|INT_MIN|UINT_MAX|LONG_MAX|CHAR_BIT|LLONG_MAX)\b", "climits"),
    (r"\b(?:FLT_MAX|FLT_MIN|FLT_EPSILON|DBL_MAX|DBL_MIN|DBL_EPSILON)\b", "cfloat"),
    (r"\b(?:std::)?u?int(?:8|16|32|64)_t\b|\buintptr_t\b", "cstdint"),
    (r"\bomp_get_\w+|\bomp_set_\w+", "omp.h"),
    (r"\bstd::source_location\b", "source_location"),
)  # fmt: skip
_COMPILED = tuple((re.compile(pattern), header) for pattern, header in (*_STABLE, *_CUDA, *_STANDARD))
_NVCC_BRINGS = frozenset(("cuda_runtime.h",))
_TORCH_BRINGS = frozenset(("cstdint", "cstddef"))
_SPELLINGS = {"cmath": "math.h", "cstdio": "stdio.h", "cstring": "string.h", "cstdlib": "stdlib.h", "cassert": "assert.h",
              "cstdint": "stdint.h", "cfloat": "float.h", "climits": "limits.h"}  # fmt: skip


def needed(code: str, *, cuda: bool) -> list[str]:
    """Headers that a text uses, in the order in which they are written."""
    found = [header for pattern, header in _COMPILED if pattern.search(code)]
    stable = any(header.startswith("torch/") for header in found)
    left_out = (_NVCC_BRINGS if cuda else frozenset()) | (_TORCH_BRINGS if stable else frozenset())
    if "torch/csrc/stable/macros.h" in found and "cuda_runtime.h" not in found:
        found.append("cuda_runtime.h")
    return [header for header in dict.fromkeys(found) if header not in left_out]


def includes(work: Work, hits: list[Hit], unresolved: bool, wrappers: bool) -> tuple[list[Edit], list[tuple[Hit, str]]]:
    """Edits that exchange the headers of a file, and includes that a person has to look at."""
    legacy: list[Hit] = []
    open_: list[tuple[Hit, str]] = []
    for hit in hits:
        if not isinstance(hit.match, Include):
            continue
        if hit.rule.kind == "decide" and unresolved and not hit.match.to:
            open_.append((hit, "what the file takes from this header is still there"))
        elif (hit.rule.code == "INC020" and re.search(r"\b(?:py|pybind11)\s*::|\bPYBIND11_", work.code)) or (
            "py::" in work.code and "extension" in hit.name
        ):
            open_.append((hit, "the file still uses pybind11"))
        else:
            legacy.append(hit)
    helper = f"{HELPER}(" in work.code and "ABI_CURRENT_STREAM" not in work.code
    sources = work.project.closure(work.source)
    own_header = _wrapper_header(work) if wrappers else ""
    if not legacy and not helper and not own_header and not _migrated(work):
        return [], open_
    code = work.code + ("\n".join(HELPER_LINES) if helper else "")
    kept = [header for hit in legacy for header in _same(hit)]
    present = {line.path for source in sources for line in source.includes}
    own = {line.path for line in work.source.includes}
    wanted = [
        header
        for header in dict.fromkeys([*needed(code, cuda=work.source.path.suffix in (".cu", ".cuh")), *kept])
        if header not in own
        and (header not in present or header.startswith("torch/"))
        and not _spelled(header, present)
    ]
    if not legacy:
        wanted = [header for header in wanted if header not in present and header.startswith(("torch/", "cuda"))]
    return [*_edits(work, legacy, wanted, helper, own_header)], open_


def _wrapper_header(work: Work) -> str:
    """How the file includes the header of wrappers, unless it does."""
    header = work.shared.header
    if header is None:
        return ""
    path = os.path.relpath(header, work.source.path.parent.absolute()).replace(os.sep, "/")
    return "" if any(line.path == path for line in work.source.includes) else path


def _same(hit: Hit) -> list[str]:
    """The header that is the legacy one under another name, which stays whether this file uses it or not."""
    assert isinstance(hit.match, Include)
    headers = (header.replace("{file}", hit.name.rpartition("/")[2]) for header in hit.match.to)
    return [
        header
        for header in headers
        if header.startswith("torch/headeronly/") or ("/" not in header and hit.rule.code == "INC018")
    ]


def _spelled(header: str, present: set[str]) -> bool:
    return _SPELLINGS.get(header, "") in present


def _migrated(work: Work) -> bool:
    """Whether the file uses the stable API without including any of it."""
    return bool(
        re.search(r"torch::stable::|STD_TORCH_CHECK|THO_DISPATCH|STABLE_TORCH_LIBRARY|torch::headeronly::", work.code)
    )


def _edits(work: Work, legacy: list[Hit], wanted: list[str], helper: bool, own: str) -> list[Edit]:
    newline = work.newline
    written = [f"#include <{header}>" for header in wanted] + ([f'#include "{own}"'] if own else [])
    lines = newline.join(written)
    by_path = {line.start: line for line in work.source.includes}
    edits: list[Edit] = []
    placed = not written
    for hit in legacy:
        line = by_path[hit.start]
        if not placed and not _conditional(work, line.line_start):
            end = line.line_end
            edits.append(replace(line.line_start, end, lines, rule=hit.rule.code))
            placed = True
        else:
            edits.append(replace(*whole_line(work, line.line_start, line.line_end), rule=hit.rule.code))
    if not placed:
        at = _first_place(work)
        edits.append(replace(at, at, lines + newline, rule=legacy[0].rule.code if legacy else "INC001"))
    if helper:
        at = _last_include(work)
        edits.append(replace(at, at, newline + newline.join(HELPER_LINES) + newline, rule="CUD001"))
    return edits


def _conditional(work: Work, at: int) -> bool:
    """Whether a line stands inside #if: what goes there is not seen by every build."""
    depth = 0
    for match in re.compile(r"^[ \t]*#[ \t]*(if|ifdef|ifndef|endif)\b([^\n]*)", re.MULTILINE).finditer(
        work.code, 0, at
    ):
        depth += -1 if match[1] == "endif" else 1
    guard = re.compile(r"\s*#[ \t]*ifndef[ \t]+(\w+)\s*\n\s*#[ \t]*define[ \t]+\1\b").match(work.code)
    return depth > (1 if guard else 0)


def _first_place(work: Work) -> int:
    """In front of the first include, or behind an include guard, or at the top."""
    for line in work.source.includes:
        if not _conditional(work, line.line_start):
            return line.line_start
    found = re.compile(r"^[ \t]*#[ \t]*(?:pragma[ \t]+once|define[ \t]+\w+_H\w*)[^\n]*\n", re.MULTILINE).search(
        work.code
    )
    return found.end() if found else 3 if work.text.startswith("\xef\xbb\xbf") else 0


def _last_include(work: Work) -> int:
    """Behind the last include that every build sees."""
    lines = [line for line in work.source.includes if not _conditional(work, line.line_start)]
    if not lines:
        return _first_place(work)
    end = work.text.find("\n", lines[-1].line_end)
    return len(work.text) if end < 0 else end + 1
