"""Includes."""

from abiding_abi.rules.model import Include, Rule

_LIBRARY = "torch/csrc/stable/library.h"
_TENSOR = "torch/csrc/stable/tensor.h"
_ACCELERATOR = "torch/csrc/stable/accelerator.h"
_UTIL = ("Half", "BFloat16", "Float8_*", "complex", "bit_cast", "TypeCast", "Float4_*", "TypeSafeSignMath")


def _include(path: str) -> str:
    return f"#include <{path}>"


RULES = (
    Rule(
        "INC001",
        "<torch/extension.h>, <torch/all.h>, <torch/torch.h>, <torch/types.h>, <ATen/ATen.h>, <ATen/core/Tensor.h>",
        "<torch/csrc/stable/{library,tensor,ops}.h>, those that are used",
        (
            Include(
                (
                    *("torch/extension.h", "torch/all.h", "torch/torch.h", "torch/types.h", "torch/python.h"),
                    *("ATen/ATen.h", "ATen/core/Tensor.h", "ATen/Tensor.h", "ATen/TensorUtils.h", "ATen/Functions.h"),
                    *("torch/csrc/api/include/torch/*.h", "torch/csrc/api/include/torch/**/*.h", "ATen/Context.h"),
                ),
                to=(_TENSOR,),
            ),
        ),
        headers="2.9",
        pitfall="The umbrella headers also brought <vector>, <string>, <cmath> and others, Python.h and pybind11: "
        "what the file used through them has to be included by name.",
        before=_include("torch/extension.h"),
        after=_include(_TENSOR),
        scope="file",
    ),
    Rule(
        "INC002",
        "<torch/library.h>, <torch/script.h>",
        f"<{_LIBRARY}>",
        (Include(("torch/library.h", "torch/script.h", "torch/custom_class.h"), to=(_LIBRARY,)),),
        headers="2.9",
        before=_include("torch/library.h"),
        after=_include(_LIBRARY),
        scope="file",
    ),
    Rule(
        "INC003",
        "<ATen/cuda/CUDAContext.h>, <c10/cuda/CUDAStream.h>",
        f"<{_ACCELERATOR}>, <torch/csrc/stable/c/shim.h> and <cuda_runtime.h>, compiled with -DUSE_CUDA",
        (
            Include(
                ("ATen/cuda/CUDAContext.h", "ATen/cuda/CUDAContextLight.h", "c10/cuda/CUDAStream.h"),
                to=(_ACCELERATOR, "torch/csrc/stable/c/shim.h", "cuda_runtime.h"),
            ),
        ),
        cuda=True,
        pitfall="CUDAContext.h also brought cuda_runtime_api.h, cublas and cusparse.",
        before=_include("ATen/cuda/CUDAContext.h"),
        after="\n".join(map(_include, (_ACCELERATOR, "torch/csrc/stable/c/shim.h", "cuda_runtime.h"))),
        scope="file",
    ),
    Rule(
        "INC004",
        "<c10/cuda/CUDAGuard.h>, <c10/core/DeviceGuard.h>",
        f"<{_ACCELERATOR}>",
        (
            Include(
                ("c10/cuda/CUDAGuard.h", "c10/core/DeviceGuard.h", "ATen/DeviceGuard.h", "c10/cuda/CUDAFunctions.h"),
                to=(_ACCELERATOR,),
            ),
        ),
        headers="2.9",
        before=_include("c10/cuda/CUDAGuard.h"),
        after=_include(_ACCELERATOR),
        scope="file",
    ),
    Rule(
        "INC005",
        "<c10/cuda/CUDAException.h>, <ATen/cuda/Exceptions.h>",
        "<torch/csrc/stable/macros.h>",
        (
            Include(
                ("c10/cuda/CUDAException.h", "ATen/cuda/Exceptions.h", "THC/THC.h", "THC/THCGeneral.h"),
                to=("torch/csrc/stable/macros.h", "cuda_runtime.h"),
            ),
        ),
        cuda=True,
        pitfall="Before 2.14 the header includes neither <string> nor <stdexcept>, and never cuda_runtime.h.",
        before=_include("c10/cuda/CUDAException.h"),
        after="\n".join(map(_include, ("torch/csrc/stable/macros.h", "cuda_runtime.h"))),
        scope="file",
    ),
    Rule(
        "INC006",
        "<c10/util/Half.h>, BFloat16.h, Float8_*.h, complex.h, bit_cast.h",
        "<torch/headeronly/util/...>",
        (Include(tuple(f"c10/util/{name}.h" for name in _UTIL), to=("torch/headeronly/util/{file}",)),),
        headers="2.9",
        before=_include("c10/util/Half.h"),
        after=_include("torch/headeronly/util/Half.h"),
        scope="file",
    ),
    Rule(
        "INC007",
        "<c10/core/ScalarType.h>, DeviceType.h, Layout.h, MemoryFormat.h",
        "<torch/headeronly/core/...>",
        (
            Include(
                tuple(f"c10/core/{name}.h" for name in ("ScalarType", "DeviceType", "Layout", "MemoryFormat")),
                to=("torch/headeronly/core/{file}",),
            ),
            Include(("ATen/core/ScalarType.h",), to=("torch/headeronly/core/ScalarType.h",)),
        ),
        before=_include("c10/core/ScalarType.h"),
        after=_include("torch/headeronly/core/ScalarType.h"),
        scope="file",
    ),
    Rule(
        "INC008",
        "<c10/util/Exception.h>",
        "<torch/headeronly/util/Exception.h>",
        (Include(("c10/util/Exception.h", "c10/util/Logging.h"), to=("torch/headeronly/util/Exception.h",)),),
        headers="2.9",
        before=_include("c10/util/Exception.h"),
        after=_include("torch/headeronly/util/Exception.h"),
        scope="file",
    ),
    Rule(
        "INC009",
        "<c10/macros/Macros.h>, <c10/macros/Export.h>",
        "<torch/headeronly/macros/...>",
        (Include(("c10/macros/Macros.h", "c10/macros/Export.h"), to=("torch/headeronly/macros/{file}",)),),
        headers="2.9",
        before=_include("c10/macros/Macros.h"),
        after=_include("torch/headeronly/macros/Macros.h"),
        scope="file",
    ),
    Rule(
        "INC010",
        "<ATen/Dispatch.h>, <ATen/Dispatch_v2.h>",
        "<torch/headeronly/core/Dispatch_v2.h>",
        (Include(("ATen/Dispatch.h", "ATen/Dispatch_v2.h"), to=("torch/headeronly/core/Dispatch_v2.h",)),),
        before=_include("ATen/Dispatch.h"),
        after=_include("torch/headeronly/core/Dispatch_v2.h"),
        scope="file",
    ),
    Rule(
        "INC011",
        "<ATen/Parallel.h>",
        "<torch/csrc/stable/ops.h>",
        (Include(("ATen/Parallel.h", "ATen/ParallelOpenMP.h"), to=("torch/csrc/stable/ops.h",)),),
        before=_include("ATen/Parallel.h"),
        after=_include("torch/csrc/stable/ops.h"),
        scope="file",
    ),
    Rule(
        "INC012",
        "<ATen/core/TensorAccessor.h>",
        "<torch/headeronly/core/TensorAccessor.h>",
        (
            Include(
                ("ATen/core/TensorAccessor.h", "ATen/TensorAccessor.h"), to=("torch/headeronly/core/TensorAccessor.h",)
            ),
        ),
        before=_include("ATen/core/TensorAccessor.h"),
        after=_include("torch/headeronly/core/TensorAccessor.h"),
        scope="file",
    ),
    Rule(
        "INC013",
        "<ATen/cuda/Atomic.cuh>, <THC/THCAtomics.cuh>",
        "<torch/headeronly/cuda/Atomic.h>",
        (Include(("ATen/cuda/Atomic.cuh", "THC/THCAtomics.cuh"), to=("torch/headeronly/cuda/Atomic.h",)),),
        headers="2.14",
        pitfall="With headers before 2.14 use CUDA's own atomicAdd; uint8, int8 and int64 need a loop of atomicCAS.",
        before=_include("ATen/cuda/Atomic.cuh"),
        after=_include("torch/headeronly/cuda/Atomic.h"),
        scope="file",
        cuda=True,
    ),
    Rule(
        "INC014",
        "<ATen/cuda/detail/KernelUtils.h> (CUDA_KERNEL_LOOP)",
        "a loop macro of your own",
        (Include(("ATen/cuda/detail/KernelUtils.h", "c10/cuda/CUDAMathCompat.h", "ATen/cuda/CUDAApplyUtils.cuh")),),
        kind="decide",
        pitfall="torch/headeronly/cuda/KernelUtils.h holds fastAtomicAdd, not CUDA_KERNEL_LOOP.",
        before=_include("ATen/cuda/detail/KernelUtils.h"),
        after="",
        scope="file",
    ),
    Rule(
        "INC015",
        "<c10/util/irange.h>",
        "<torch/headeronly/util/irange.h>, or a plain for",
        (Include(("c10/util/irange.h",), to=("torch/headeronly/util/irange.h",)),),
        headers="2.15",
        before=_include("c10/util/irange.h"),
        after=_include("torch/headeronly/util/irange.h"),
        scope="file",
    ),
    Rule(
        "INC016",
        "<torch/version.h>, TORCH_VERSION_MAJOR",
        "<torch/headeronly/version.h>; at run time, aoti_torch_abi_version()",
        (Include(("torch/version.h", "torch/csrc/api/include/torch/version.h"), ("torch/headeronly/version.h",)),),
        headers="2.9",
        pitfall="What was chosen by the version of the build must now be right for every later release.",
        before=_include("torch/version.h"),
        after=_include("torch/headeronly/version.h"),
        scope="file",
    ),
    Rule(
        "INC017",
        "<c10/util/MathConstants.h>, <ATen/NumericUtils.h>",
        "<torch/headeronly/util/...>",
        (
            Include(("c10/util/MathConstants.h",), to=("torch/headeronly/util/MathConstants.h",)),
            Include(("ATen/NumericUtils.h",), to=("torch/headeronly/util/NumericUtils.h",)),
        ),
        headers="2.15",
        before=_include("c10/util/MathConstants.h"),
        after=_include("torch/headeronly/util/MathConstants.h"),
        scope="file",
    ),
    Rule(
        "INC018",
        "<c10/util/Optional.h>, <c10/util/string_view.h>, <c10/util/ArrayRef.h> and other vocabulary types",
        "the standard header, or torch/headeronly",
        (
            Include(("c10/util/Optional.h", "c10/util/OptionalArrayRef.h"), to=("optional",)),
            Include(("c10/util/string_view.h", "c10/util/StringUtil.h"), to=("string",)),
            Include(("c10/util/ArrayRef.h",), to=("torch/headeronly/util/HeaderOnlyArrayRef.h",)),
            Include(("c10/util/SmallVector.h", "ATen/core/DimVector.h"), to=("vector",)),
            Include(("c10/core/Device.h",), to=("torch/csrc/stable/device.h",)),
        ),
        before=_include("c10/util/Optional.h"),
        after=_include("optional"),
        scope="file",
    ),
    Rule(
        "INC019",
        "<ATen/ops/*.h>, <ATen/native/*.h>",
        "<torch/csrc/stable/ops.h> for the ops it has",
        (Include(("ATen/ops/*.h", "ATen/*Functions.h"), to=("torch/csrc/stable/ops.h",)),),
        headers="2.9",
        before=_include("ATen/ops/empty_like.h"),
        after=_include("torch/csrc/stable/ops.h"),
        scope="file",
    ),
    Rule(
        "INC020",
        "<pybind11/...>, <torch/csrc/utils/pybind.h>",
        "none: the module becomes operators; pybind11 may stay in a module that knows no tensor",
        (Include(("torch/csrc/utils/pybind.h", "torch/csrc/Exceptions.h", "torch/csrc/utils/*.h", "pybind11/*")),),
        kind="context",
        edit="includes",
        before=_include("torch/csrc/utils/pybind.h"),
        after="",
        scope="file",
    ),
    Rule(
        "INC099",
        "any other header of ATen, c10, caffe2, THC or torch outside torch/csrc/stable and torch/headeronly",
        "none",
        (Include(("ATen/*", "c10/*", "caffe2/*", "THC/*", "TH/*", "torch/*", "torchgen/*")),),
        kind="decide",
        before=_include("ATen/native/TensorIterator.h"),
        after="",
        scope="file",
    ),
)
