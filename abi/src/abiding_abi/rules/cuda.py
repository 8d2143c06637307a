"""CUDA: streams, guards, handles, atomics."""

from abiding_abi.rules.model import Check, Macro, Name, Rule

_GET = "aoti_torch_get_current_cuda_stream"

RULES = (
    Rule(
        "CUD001",
        "at::cuda::getCurrentCUDAStream(), c10::cuda::getCurrentCUDAStream(device)",
        f"{_GET}(device_index, &pointer)",
        (Name(("cuda::getCurrentCUDAStream", "cuda::getDefaultCUDAStream", "hip::getCurrentHIPStream")),),
        headers="2.9",
        kind="context",
        edit="streams",
        cuda=True,
        pitfall="Without an argument it means the current device: take the index from the tensor, after the guard. "
        "nullptr (stream 0) compiles and races.",
        before="cudaStream_t s = at::cuda::getCurrentCUDAStream();",
        after="cudaStream_t s = abi_current_stream();",
    ),
    Rule(
        "CUD002",
        "at::cuda::CUDAStream, c10::cuda::CUDAStream",
        "cudaStream_t",
        (Name(("cuda::CUDAStream", "Stream")),),
        headers="2.9",
        kind="context",
        edit="streams",
        cuda=True,
        before="at::cuda::CUDAStream s = at::cuda::getCurrentCUDAStream();",
        after="cudaStream_t s = abi_current_stream();",
    ),
    Rule(
        "CUD003",
        "at::cuda::CUDAGuard, OptionalCUDAGuard, c10::DeviceGuard",
        "torch::stable::accelerator::DeviceGuard(t.get_device_index())",
        (
            Name(
                (
                    *("cuda::CUDAGuard", "cuda::OptionalCUDAGuard", "DeviceGuard", "OptionalDeviceGuard"),
                    *("cuda::CUDADeviceGuard", "device_of", "hip::HIPGuard"),
                )
            ),
        ),
        headers="2.9",
        kind="context",
        edit="guards",
        pitfall="OptionalCUDAGuard of a CPU tensor does nothing; DeviceGuard for one raises on a build without an "
        "accelerator: guard only tensors for which is_cuda() holds.",
        before="at::cuda::CUDAGuard guard(t.device());",
        after="torch::stable::accelerator::DeviceGuard guard(t.get_device_index());",
    ),
    Rule(
        "CUD004",
        "at::cuda::getCurrentCUDABlasHandle()",
        "torch_get_current_cuda_blas_handle(&handle)",
        (Name(("cuda::getCurrentCUDABlasHandle", "cuda::getCurrentCUDABlasLtHandle")),),
        kind="context",
        edit="blas_handle",
        cuda=True,
        pitfall="Workspace, stream and math mode are torch's.",
        before="auto a = at::cuda::getCurrentCUDABlasHandle();",
        after="auto a = abi_blas_handle();",
    ),
    Rule(
        "CUD005",
        "at::cuda::getCurrentDeviceProperties(), getDeviceProperties(i), warp_size",
        "cudaGetDeviceProperties, asked once: abi_device_properties(i)",
        (
            Name(
                (
                    *("cuda::getCurrentDeviceProperties", "cuda::getDeviceProperties", "cuda::warp_size"),
                    *("cuda::device_count", "cuda::is_available", "cuda::getNumGPUs"),
                )
            ),
        ),
        headers="2.10",
        kind="context",
        edit="device_properties",
        cuda=True,
        pitfall="cudaGetDeviceProperties takes about a millisecond a call, and its struct differs between CUDA 12 "
        "and 13.",
        before="auto a = at::cuda::getCurrentDeviceProperties();",
        after="auto a = abi_device_properties();",
    ),
    Rule(
        "CUD006",
        "at::cuda::getStreamFromPool, CUDAStreamGuard",
        "torch_get_cuda_stream_from_pool, torch_set_current_cuda_stream",
        (
            Name(
                (
                    *("cuda::getStreamFromPool", "cuda::CUDAStreamGuard", "cuda::setCurrentCUDAStream"),
                    *("cuda::OptionalCUDAStreamGuard", "cuda::getStreamFromExternal", "cuda::CUDAMultiStreamGuard"),
                )
            ),
        ),
        kind="decide",
        cuda=True,
        pitfall="The old stream has to be set back by hand, also after an exception.",
        before="auto a = at::cuda::getStreamFromPool();",
        after="void* a = nullptr;\nTORCH_ERROR_CODE_CHECK(torch_get_cuda_stream_from_pool(false, 0, &a));",
    ),
    Rule(
        "CUD007",
        "c10::cuda::device_synchronize, at::cuda::stream_synchronize",
        "cudaDeviceSynchronize, cudaStreamSynchronize",
        (
            Name(("cuda::device_synchronize",)),
            Name(("cuda::stream_synchronize",)),
        ),
        cuda=True,
        edit="synchronize",
        before="c10::cuda::device_synchronize();",
        after="STD_CUDA_CHECK(cudaDeviceSynchronize());",
    ),
    Rule(
        "CUD008",
        "c10::cuda::CUDACachingAllocator",
        "aoti_torch_cuda_caching_allocator_raw_alloc, or a uint8 tensor by new_empty",
        (Name(("cuda::CUDACachingAllocator", "cuda::getCUDADeviceAllocator", "cuda::getPinnedMemoryAllocator")),),
        kind="decide",
        cuda=True,
        pitfall="It allocates on the current stream alone.",
        before="void* a = c10::cuda::CUDACachingAllocator::raw_alloc(16);",
        after="void* a = nullptr;\nTORCH_ERROR_CODE_CHECK(aoti_torch_cuda_caching_allocator_raw_alloc(16, &a));",
    ),
    Rule(
        "CUD009",
        "at::cuda::current_device(), c10::cuda::current_device()",
        "torch::stable::accelerator::getCurrentDeviceIndex()",
        (Name(("cuda::current_device",), to="torch::stable::accelerator::getCurrentDeviceIndex"),),
        headers="2.9",
        before="auto a = c10::cuda::current_device();",
        after="auto a = torch::stable::accelerator::getCurrentDeviceIndex();",
    ),
    Rule(
        "CUD010",
        "gpuAtomicAdd, gpuAtomicAddNoReturn of ATen",
        "the same name of torch/headeronly/cuda/Atomic.h",
        (Check("atomic_add"),),
        headers="2.14",
        edit="includes",
        cuda=True,
        scope="file",
        pitfall="nvcc only.",
        before="#include <ATen/cuda/Atomic.cuh>\n__global__ void f(float* a) { gpuAtomicAdd(a, 1.f); }",
        after="#include <torch/headeronly/cuda/Atomic.h>\n__global__ void f(float* a) { gpuAtomicAdd(a, 1.f); }",
    ),
    Rule(
        "CUD011",
        "at::PhiloxCudaState, at::cuda::philox, CUDAGeneratorImpl",
        "none: seed and offset as int arguments",
        (
            Name(
                (
                    *("PhiloxCudaState", "cuda::philox", "CUDAGeneratorImpl", "cuda::detail::getDefaultCUDAGenerator"),
                    *("get_generator_or_default", "check_generator", "cuda::detail::createCUDAGenerator"),
                )
            ),
        ),
        headers="2.9",
        kind="decide",
        pitfall="A captured CUDA graph would replay the same numbers.",
        before="void f(at::PhiloxCudaState a) {}",
        after="void f(int64_t seed, int64_t offset) {}",
        scope="file",
    ),
    Rule(
        "CUD012",
        "at::cuda::CUDAEvent, c10::Event",
        "cudaEvent_t",
        (Name(("cuda::CUDAEvent", "Event")),),
        headers="2.9",
        kind="decide",
        cuda=True,
        before="at::cuda::CUDAEvent a;",
        after="cudaEvent_t a;",
    ),
    Rule(
        "CUD013",
        "at::ceil_div, at::cuda::ATenCeilDiv, at::cuda::getApplyGrid, at::cuda::detail::*",
        "a helper of your own",
        (
            Name(("ceil_div", "cuda::ATenCeilDiv")),
            Name(("cuda::detail::canUse32BitIndexMath", "native::canUse32BitIndexMath", "canUse32BitIndexMath")),
            Name(
                (
                    *("cuda::getApplyGrid", "cuda::getApplyBlock", "cuda::detail", "cuda::CUDA_tensor_apply*"),
                    *("cuda::ScalarConvert", "cuda::blas"),
                )
            ),
        ),
        headers="2.9",
        kind="context",
        edit="ceil_div",
        before="auto a = at::ceil_div(n, int64_t(4));",
        after="auto a = ((n) + (int64_t(4)) - 1) / (int64_t(4));",
    ),
    Rule(
        "CUD014",
        "CUDA_KERNEL_LOOP, GET_BLOCKS and other launch helpers of ATen",
        "a loop of your own",
        (Check("kernel_loop"),),
        headers="2.9",
        kind="decide",
        scope="file",
        before="#include <ATen/cuda/detail/KernelUtils.h>\nvoid f(int n) { CUDA_KERNEL_LOOP(i, n) {} }",
        after="void f(int n) { for (int i = 0; i < n; ++i) {} }",
    ),
    Rule(
        "CUD101",
        "nullptr or 0 as stream in a file that has the tensor's stream at hand",
        f"the stream of {_GET}",
        (Check("null_stream"),),
        kind="decide",
        level="wrong",
        cuda=True,
        scope="file",
        why="The kernel runs on the legacy default stream and races with torch's stream.",
        before="#include <torch/csrc/stable/tensor.h>\n__global__ void k(float*);\n"
        "void f(torch::stable::Tensor t) { k<<<1, 32>>>(t.mutable_data_ptr<float>()); }",
        after="",
    ),
    Rule(
        "CUD102",
        "a kernel launch on a tensor's data without a DeviceGuard in the function",
        "torch::stable::accelerator::DeviceGuard guard(t.get_device_index());",
        (Check("launch_without_guard"),),
        kind="decide",
        level="wrong",
        cuda=True,
        scope="file",
        why="With several GPUs the kernel runs on the current device instead of the tensor's.",
        before="#include <torch/csrc/stable/tensor.h>\n__global__ void k(float*);\n"
        "void f(torch::stable::Tensor t, cudaStream_t s) { k<<<1, 32, 0, s>>>(t.mutable_data_ptr<float>()); }",
        after="",
    ),
    Rule(
        "CUD103",
        "DeviceGuard(index); without a name",
        "DeviceGuard guard(index);",
        (Check("unnamed_guard"),),
        kind="mechanical",
        level="wrong",
        edit="name_guard",
        why="A temporary ends with its statement: nothing is guarded.",
        before="torch::stable::accelerator::DeviceGuard(t.get_device_index());",
        after="torch::stable::accelerator::DeviceGuard guard(t.get_device_index());",
    ),
    Rule(
        "CUD104",
        "DeviceGuard of a tensor that may be on the CPU",
        "the guard inside if (t.is_cuda()), or after a check of is_cuda()",
        (Check("cpu_guard"),),
        kind="decide",
        level="wrong",
        scope="file",
        why="The guard of a CPU tensor's index raises on a build without accelerator.",
        before="#include <torch/csrc/stable/accelerator.h>\n#include <torch/csrc/stable/tensor.h>\n"
        "void f(torch::stable::Tensor t) {\n  torch::stable::accelerator::DeviceGuard guard(t.get_device_index());\n"
        "  if (t.is_cpu()) return;\n}",
        after="#include <torch/csrc/stable/accelerator.h>\n#include <torch/csrc/stable/tensor.h>\n"
        "void f(torch::stable::Tensor t) {\n  if (t.is_cpu()) return;\n"
        "  torch::stable::accelerator::DeviceGuard guard(t.get_device_index());\n}",
    ),
    Rule(
        "CUD105",
        "a CUDA shim in a file that does not see USE_CUDA",
        "-DUSE_CUDA for .cpp files too",
        (Macro(("C10_CUDA_API", "TORCH_CUDA_API", "TORCH_CUDA_CU_API", "TORCH_CUDA_CPP_API")),),
        kind="decide",
        before="TORCH_CUDA_API void f();",
        after="void f();",
        scope="file",
    ),
)
