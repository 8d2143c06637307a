# abiding_torch: the headers and libtorch.so of the torch package that the running Python would import. Torch is located
# without importing it.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
set(locate_torch "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])")
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "${locate_torch}"
  OUTPUT_VARIABLE torch_dir
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE not_found
  ERROR_QUIET)
if(not_found)
  message(FATAL_ERROR "${Python_EXECUTABLE} has no torch: install torch >= 2.10, "
                      "or name a Python that has it (-DPython_EXECUTABLE=...)")
endif()
message(STATUS "torch: ${torch_dir}")

add_library(abiding_torch INTERFACE)
target_include_directories(abiding_torch SYSTEM INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:${torch_dir}/include>")
target_compile_options(abiding_torch INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${torch_dir}/include/=>")
target_compile_definitions(abiding_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
# The libraries that libtorch.so depends on define the shims. Nothing refers to libtorch.so itself, so --as-needed would
# drop it.
target_link_libraries(
  abiding_torch INTERFACE -Wl,--push-state,--no-as-needed "${torch_dir}/lib/libtorch.so" -Wl,--pop-state)
