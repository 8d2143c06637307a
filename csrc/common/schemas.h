// Definitions of operators, each with its refusal of lazily negated and conjugated views.
//
// torch._neg_view(x) and x.conj() set a bit and leave the memory as it is. Where such a view is an output, torch's
// fallback passes a clone to the kernel, takes the operator's first result for that clone, and copies it back. Ours
// return nothing, or another tensor: the fallback reads a stack slot that nobody wrote, and under torch 2.10, 2.11 and
// 2.15 the process dies in a later call. A kernel under the two dispatch keys goes before that fallback; calls without
// such views do not meet it.
#pragma once

#include "common/registration.h"

namespace abiding {

class Schemas {
 public:
  explicit Schemas(const char* ns)
      : schemas_(Library::Kind::FRAGMENT, ns, nullptr, "abiding", 0),
        negative_(Library::Kind::IMPL, ns, "Negative", "abiding", 0),
        conjugate_(Library::Kind::IMPL, ns, "Conjugate", "abiding", 0) {}

  void def(const char* schema);

 private:
  Library schemas_, negative_, conjugate_;
};

// Leaked on purpose, as all registrations.
inline bool define_once(void (*define)(Schemas&), const char* ns) {
  if (other_copy().empty()) define(*new Schemas(ns));
  return true;
}

}  // namespace abiding

// `ABIDING_SCHEMAS(abiding, group, m) { m.def("op(Tensor x) -> Tensor"); }`.
#define ABIDING_SCHEMAS(ns, group, m)                              \
  static void ns##_##group##_schemas(::abiding::Schemas&);         \
  [[maybe_unused]] static const bool ns##_##group##_schemas_done = \
      ::abiding::define_once(&ns##_##group##_schemas, #ns);        \
  static void ns##_##group##_schemas(::abiding::Schemas& m)
