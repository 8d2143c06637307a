// Registration with the dispatcher, once per process.
//
// A second copy of this library in one process would define every operator again. Torch's C shim reports that by
// leaving the library handle unset, and the next call on it crashes. So a second copy skips registration and warns on
// stderr.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/float_environment.h"

namespace abiding {

// A library that exports this symbol is a copy of this binary, whatever its file is called.
#define ABIDING_MARKER_NAME2(binary) binary##_registers_operators
#define ABIDING_MARKER_NAME(binary) ABIDING_MARKER_NAME2(binary)
#define ABIDING_STRING2(name) #name
#define ABIDING_STRING(name) ABIDING_STRING2(name)
extern "C" __attribute__((visibility("default"), weak)) const char ABIDING_MARKER_NAME(ABIDING_BINARY) = 1;

// The path of another loaded copy of this binary, or "" if there is none.
inline const std::string& other_copy() {
  static const std::string path = [] {
    Dl_info self{};
    dladdr(reinterpret_cast<void*>(&other_copy), &self);
    struct Loaded {
      ElfW(Addr) self;
      std::vector<std::string> others;
    } loaded{reinterpret_cast<ElfW(Addr)>(self.dli_fbase), {}};
    dl_iterate_phdr(
        [](dl_phdr_info* library, size_t, void* data) {
          auto* list = static_cast<Loaded*>(data);
          if (library->dlpi_addr != list->self && *library->dlpi_name) list->others.push_back(library->dlpi_name);
          return 0;
        },
        &loaded);
    for (const std::string& other : loaded.others) {
      void* handle = dlopen(other.c_str(), RTLD_LAZY | RTLD_NOLOAD);
      if (!handle) continue;
      const bool marked = dlsym(handle, ABIDING_STRING(ABIDING_MARKER_NAME(ABIDING_BINARY))) != nullptr;
      dlclose(handle);
      if (!marked) continue;
      std::fprintf(stderr, "abiding: %s was loaded but not registered, since %s already serves this process.\n",
                   self.dli_fname, other.c_str());
      return other;
    }
    return std::string();
  }();
  return path;
}

using Library = torch::stable::detail::StableLibrary;

// The registration is leaked on purpose: removing operators at exit would race with the interpreter's shutdown.
inline bool register_once(void (*init)(Library&), const char* ns, const char* key) {
  if (other_copy().empty()) init(*new Library(Library::Kind::IMPL, ns, key, "abiding", 0));
  return true;
}

// Torch's boxing silently misreads C++ types that are narrower than the schema's, so only types that it boxes correctly
// are accepted.
template <class T>
constexpr bool is_boxable = std::is_void_v<T> || !(std::is_arithmetic_v<T> || std::is_pointer_v<T>) ||
                            std::is_same_v<T, int64_t> || std::is_same_v<T, double> || std::is_same_v<T, bool>;

template <auto function>
struct Boxed;
template <class R, class... A, R (*function)(A...)>
struct Boxed<function> {
  static_assert(is_boxable<R> && (is_boxable<std::decay_t<A>> && ...),
                "operators take int64_t, double, bool, Tensor and containers of those");
  // Every operator, on either backend, is entered here: its checks, which round doubles to float, and its CPU kernel.
  // Not inlined: nothing else keeps arithmetic on arguments in registers behind the change of the environment.
  [[gnu::noinline]] static R body(A... arguments) { return function(std::forward<A>(arguments)...); }
  static R enter(A... arguments) {
    const DefaultFloatEnvironment environment;
    return body(std::forward<A>(arguments)...);
  }
  static constexpr auto* call = TORCH_BOX(&enter);
};

}  // namespace abiding

// `ABIDING_KERNELS(abiding, CPU, group, m) { m.impl("op", ABIDING_BOX(op)); }`; schemas.h has the definitions.
#define ABIDING_KERNELS(ns, key, group, m)                         \
  static void ns##_##group##_##key(::abiding::Library&);           \
  [[maybe_unused]] static const bool ns##_##group##_##key##_done = \
      ::abiding::register_once(&ns##_##group##_##key, #ns, #key);  \
  static void ns##_##group##_##key(::abiding::Library& m)
#define ABIDING_BOX(function) ::abiding::Boxed<&function>::call
