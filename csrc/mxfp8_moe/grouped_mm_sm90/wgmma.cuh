// wgmma: a warpgroup adds the product of 64 x 32 bytes of K of A and N x 32 bytes of B, which is in shared memory, to
// fp32 accumulators. m64nNk16 has bf16, and A in registers; m64nNk32 has e4m3, and A in shared memory as well.
#pragma once

#include <cstdint>

namespace abiding::mxfp8_moe::sm90_mm {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The shared-memory descriptor of an operand: rows of 128 bytes in the 128-byte swizzle, atoms of eight rows (1024
// bytes); `offset` is a whole number of atoms, or within a row. Only the low half depends on the address.
__device__ __forceinline__ uint64_t make_smem_desc_128b(uint32_t address, uint32_t offset) {
  const uint32_t low = (1 << 16 | (address & 0x3FFFF) >> 4) + (offset >> 4);
  return uint64_t{1 << 30 | 1024 >> 4} << 32 | low;
}

template <int N>
struct Wgmma;
template <int N>
struct WgmmaE4m3;

// Operands 0 .. N/2 - 1 are the accumulators; an instance passes the numbers of those behind them: A's four registers,
// B's descriptor, and whether to accumulate.
#define ABIDING_WGMMA(N, SUMS, OPERANDS, a0, a1, a2, a3, tile, add)                                                    \
  template <>                                                                                                          \
  struct Wgmma<N> {                                                                                                    \
    static __device__ __forceinline__ void run(float (&d)[N / 2], const uint32_t* a, uint64_t b, int32_t accumulate) { \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" add ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N         \
                   "k16.f32.bf16.bf16 {" SUMS "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" tile ", p, 1, 1, 0;\n\t}"   \
                   : OPERANDS                                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                             \
    }                                                                                                                  \
  };

#define ABIDING_WGMMA_E4M3(N, SUMS, OPERANDS, rows, tile, add)                                                  \
  template <>                                                                                                   \
  struct WgmmaE4m3<N> {                                                                                         \
    static __device__ __forceinline__ void run(float (&d)[N / 2], uint64_t a, uint64_t b, int32_t accumulate) { \
      asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" add ", 0;\n\twgmma.mma_async.sync.aligned.m64n" #N  \
                   "k32.f32.e4m3.e4m3 {" SUMS "}, %" rows ", %" tile ", p, 1, 1;\n\t}"                          \
                   : OPERANDS                                                                                   \
                   : "l"(a), "l"(b), "r"(accumulate));                                                          \
    }                                                                                                           \
  };

// Sn lists the accumulators' operand numbers of width n, On their constraints.
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define S8 "%0, %1, %2, %3"
#define S16 S8 ", %4, %5, %6, %7"
#define S24 S16 ", %8, %9, %10, %11"
#define S32 S24 ", %12, %13, %14, %15"
#define S40 S32 ", %16, %17, %18, %19"
#define S48 S40 ", %20, %21, %22, %23"
#define S56 S48 ", %24, %25, %26, %27"
#define S64 S56 ", %28, %29, %30, %31"
#define S72 S64 ", %32, %33, %34, %35"
#define S80 S72 ", %36, %37, %38, %39"
#define S88 S80 ", %40, %41, %42, %43"
#define S96 S88 ", %44, %45, %46, %47"
#define S104 S96 ", %48, %49, %50, %51"
#define S112 S104 ", %52, %53, %54, %55"
#define S120 S112 ", %56, %57, %58, %59"
#define S128 S120 ", %60, %61, %62, %63"
#define S136 S128 ", %64, %65, %66, %67"
#define S144 S136 ", %68, %69, %70, %71"
#define S152 S144 ", %72, %73, %74, %75"
#define S160 S152 ", %76, %77, %78, %79"
#define S168 S160 ", %80, %81, %82, %83"
#define S176 S168 ", %84, %85, %86, %87"
#define S184 S176 ", %88, %89, %90, %91"
#define S192 S184 ", %92, %93, %94, %95"
#define S200 S192 ", %96, %97, %98, %99"
#define S208 S200 ", %100, %101, %102, %103"
#define S216 S208 ", %104, %105, %106, %107"
#define S224 S216 ", %108, %109, %110, %111"
#define S232 S224 ", %112, %113, %114, %115"
#define S240 S232 ", %116, %117, %118, %119"
#define S248 S240 ", %120, %121, %122, %123"
#define S256 S248 ", %124, %125, %126, %127"
#define O8 D4(0)
#define O16 O8, D4(4)
#define O24 O16, D4(8)
#define O32 O24, D4(12)
#define O40 O32, D4(16)
#define O48 O40, D4(20)
#define O56 O48, D4(24)
#define O64 O56, D4(28)
#define O72 O64, D4(32)
#define O80 O72, D4(36)
#define O88 O80, D4(40)
#define O96 O88, D4(44)
#define O104 O96, D4(48)
#define O112 O104, D4(52)
#define O120 O112, D4(56)
#define O128 O120, D4(60)
#define O136 O128, D4(64)
#define O144 O136, D4(68)
#define O152 O144, D4(72)
#define O160 O152, D4(76)
#define O168 O160, D4(80)
#define O176 O168, D4(84)
#define O184 O176, D4(88)
#define O192 O184, D4(92)
#define O200 O192, D4(96)
#define O208 O200, D4(100)
#define O216 O208, D4(104)
#define O224 O216, D4(108)
#define O232 O224, D4(112)
#define O240 O232, D4(116)
#define O248 O240, D4(120)
#define O256 O248, D4(124)
#define ABIDING_LIST(...) __VA_ARGS__
ABIDING_WGMMA(8, S8, ABIDING_LIST(O8), "4", "5", "6", "7", "8", "9")
ABIDING_WGMMA(16, S16, ABIDING_LIST(O16), "8", "9", "10", "11", "12", "13")
ABIDING_WGMMA(24, S24, ABIDING_LIST(O24), "12", "13", "14", "15", "16", "17")
ABIDING_WGMMA(32, S32, ABIDING_LIST(O32), "16", "17", "18", "19", "20", "21")
ABIDING_WGMMA(48, S48, ABIDING_LIST(O48), "24", "25", "26", "27", "28", "29")
ABIDING_WGMMA(64, S64, ABIDING_LIST(O64), "32", "33", "34", "35", "36", "37")
ABIDING_WGMMA(96, S96, ABIDING_LIST(O96), "48", "49", "50", "51", "52", "53")
ABIDING_WGMMA(128, S128, ABIDING_LIST(O128), "64", "65", "66", "67", "68", "69")
ABIDING_WGMMA(160, S160, ABIDING_LIST(O160), "80", "81", "82", "83", "84", "85")
ABIDING_WGMMA(192, S192, ABIDING_LIST(O192), "96", "97", "98", "99", "100", "101")
ABIDING_WGMMA(224, S224, ABIDING_LIST(O224), "112", "113", "114", "115", "116", "117")
ABIDING_WGMMA(256, S256, ABIDING_LIST(O256), "128", "129", "130", "131", "132", "133")
ABIDING_WGMMA_E4M3(8, S8, ABIDING_LIST(O8), "4", "5", "6")
ABIDING_WGMMA_E4M3(16, S16, ABIDING_LIST(O16), "8", "9", "10")
ABIDING_WGMMA_E4M3(32, S32, ABIDING_LIST(O32), "16", "17", "18")
ABIDING_WGMMA_E4M3(48, S48, ABIDING_LIST(O48), "24", "25", "26")
ABIDING_WGMMA_E4M3(64, S64, ABIDING_LIST(O64), "32", "33", "34")
ABIDING_WGMMA_E4M3(80, S80, ABIDING_LIST(O80), "40", "41", "42")
ABIDING_WGMMA_E4M3(96, S96, ABIDING_LIST(O96), "48", "49", "50")
ABIDING_WGMMA_E4M3(128, S128, ABIDING_LIST(O128), "64", "65", "66")

}  // namespace abiding::mxfp8_moe::sm90_mm
