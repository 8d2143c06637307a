// The floating-point environment that documented bits assume.
#pragma once

#include <cstdint>

namespace abiding {

// Sets this thread's control register to the default: round to nearest even, subnormals kept (neither flush-to-zero nor
// denormals-are-zero), no traps. The caller's register comes back at the end, its exception flags too where they are in
// the same register. A process may run in another environment without knowing: a library linked with -ffast-math sets
// one when it is loaded, torch.set_flush_denormal() sets one for a thread, and threads inherit that of their creator.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() : callers_(read()) { write(kDefault); }
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;
  ~DefaultFloatEnvironment() { write(callers_); }

 private:
  // Ordering: the memory clobbers keep loads, and so what is computed from them, behind a write of the register, and
  // stores before the next. A value that is computed from registers alone is not held by them.
#if defined(__x86_64__)
  using Register = uint32_t;
  static constexpr Register kDefault = 0x1F80;  // MXCSR: all exceptions masked, no flags
  static Register read() {
    Register value;
    asm volatile("stmxcsr %0" : "=m"(value) : : "memory");
    return value;
  }
  static void write(Register value) { asm volatile("ldmxcsr %0" : : "m"(value) : "memory"); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kDefault = 0;  // FPCR
  static Register read() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value) : : "memory");
    return value;
  }
  static void write(Register value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else
  using Register = int;
  static constexpr Register kDefault = 0;
  static Register read() { return 0; }
  static void write(Register) {}
#endif

  Register callers_;
};

}  // namespace abiding
