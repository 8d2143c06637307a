// Registration with the dispatcher, once a process.
//
// A second copy of this library in one process would define every operator again. Torch's C shim reports that by leaving
// the library handle unset, and the next call on it crashes; so a second copy stays silent and says why.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>

#include "common/check.h"

namespace abiding {

// The path of another loaded library with the file name of this one, or "" if there is none.
inline const std::string& other_copy() {
  static const std::string path = [] {
    struct Search {
      ElfW(Addr) self_base;
      const char* file_name;
      std::string found;
    };
    Dl_info self{};
    dladdr(reinterpret_cast<void*>(&other_copy), &self);
    const char* slash = std::strrchr(self.dli_fname, '/');
    Search search{reinterpret_cast<ElfW(Addr)>(self.dli_fbase), slash ? slash + 1 : self.dli_fname, ""};
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* data) {
          auto* wanted = static_cast<Search*>(data);
          const char* name = std::strrchr(library->dlpi_name, '/');
          name = name ? name + 1 : library->dlpi_name;
          if (library->dlpi_addr == wanted->self_base || std::strcmp(name, wanted->file_name) != 0) return 0;
          wanted->found = library->dlpi_name;
          return 1;
        },
        &search);
    if (!search.found.empty())
      std::fprintf(stderr, "abiding: %s was loaded but not registered, since %s already serves this process.\n",
                   self.dli_fname, search.found.c_str());
    return search.found;
  }();
  return path;
}

using Library = torch::stable::detail::StableLibrary;

// Kept for the life of the process: taking operators down at exit would race with the interpreter's own end.
inline bool register_once(Library::Kind kind, void (*init)(Library&), const char* key) {
  if (other_copy().empty()) new torch::stable::detail::StableTorchLibraryInit(kind, init, "abiding", key, "abiding", 0);
  return true;
}

// The boxer reads narrower C++ types than the schema's as wrong values, without a word: accept only what it boxes well.
template <class T>
constexpr bool boxes_well = std::is_void_v<T> || !(std::is_arithmetic_v<T> || std::is_pointer_v<T>) ||
                            std::is_same_v<T, int64_t> || std::is_same_v<T, double> || std::is_same_v<T, bool>;

template <auto function>
struct Boxed;
template <class R, class... A, R (*function)(A...)>
struct Boxed<function> {
  static_assert(boxes_well<R> && (boxes_well<std::decay_t<A>> && ...),
                "operators take int64_t, double, bool, Tensor and containers of those");
  static constexpr auto* call = TORCH_BOX(function);
};

}  // namespace abiding

#define ABIDING_REGISTER(kind, key, name, m)                                                            \
  static void name(::abiding::Library&);                                                                \
  static const bool name##_done = ::abiding::register_once(::abiding::Library::Kind::kind, &name, key); \
  static_assert(std::is_same_v<decltype(name##_done), const bool>);                                     \
  static void name(::abiding::Library& m)

// Schemas: `ABIDING_SCHEMAS(group, m) { m.def("..."); }`. Kernels: `ABIDING_KERNELS(CPU, group, m) { m.impl("op", ABIDING_BOX(op)); }`.
#define ABIDING_SCHEMAS(group, m) ABIDING_REGISTER(FRAGMENT, nullptr, group##_schemas, m)
#define ABIDING_KERNELS(key, group, m) ABIDING_REGISTER(IMPL, #key, group##_##key##_kernels, m)
#define ABIDING_BOX(function) ::abiding::Boxed<&function>::call
