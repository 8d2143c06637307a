# libabiding_cuda.so: csrc/*/cuda.cpp and csrc/*/*.cu, linked by the host compiler with a static CUDA runtime.
set(CMAKE_CUDA_ARCHITECTURES OFF) # each kernel file gets its own, below
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
set(CMAKE_CUDA_COMPILER_LAUNCHER "${PROJECT_SOURCE_DIR}/cmake/nvcc.sh")
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# nvcc cannot map path prefixes: it sees the sources through this link, by relative names.
file(CREATE_LINK "${PROJECT_SOURCE_DIR}/csrc" "${PROJECT_BINARY_DIR}/csrc" SYMBOLIC)
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/*/cuda.cpp)
file(GLOB cuda_kernels CONFIGURE_DEPENDS "${PROJECT_BINARY_DIR}/csrc/*/*.cu")
abiding_library(abiding_cuda ${cuda_sources} ${cuda_kernels})

list(JOIN host_flags "," host_flags_through_nvcc)
set(nvcc_flags -Icsrc -Werror=all-warnings -Xptxas=-v "-Xcompiler=${host_flags_through_nvcc}")
if(ABIDING_LINEINFO)
  list(APPEND nvcc_flags -lineinfo)
endif()
target_compile_options(abiding_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${nvcc_flags}>")
target_compile_definitions(abiding_cuda PRIVATE USE_CUDA)
target_link_libraries(abiding_cuda PRIVATE CUDA::cudart_static)
set_target_properties(abiding_cuda PROPERTIES CUDA_RUNTIME_LIBRARY None)

# A kernel file's suffix names its architecture: name_sm90.cu is compiled for sm_90a alone, with that architecture's own
# instructions. A file without a suffix is portable: machine code for sm_80 and sm_90a, and PTX that newer GPUs
# translate. A new architecture is a file with its suffix; ABIDING_CUDA_ARCHS restricts portable files.
set(portable -gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_80,code=sm_80
             -gencode=arch=compute_90,code=compute_90)
if(ABIDING_CUDA_ARCHS)
  list(TRANSFORM ABIDING_CUDA_ARCHS REPLACE "(.+)" "-gencode=arch=compute_\\1,code=sm_\\1" OUTPUT_VARIABLE portable)
endif()
foreach(kernel IN LISTS cuda_kernels)
  if(kernel MATCHES "_sm([0-9]+)\\.cu$")
    set(arch "${CMAKE_MATCH_1}a")
    set_source_files_properties("${kernel}" PROPERTIES COMPILE_OPTIONS "-gencode=arch=compute_${arch},code=sm_${arch}")
  else()
    set_source_files_properties("${kernel}" PROPERTIES COMPILE_OPTIONS "${portable}")
  endif()
endforeach()
