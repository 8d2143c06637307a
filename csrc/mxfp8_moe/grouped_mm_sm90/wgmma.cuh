// wgmma m64nNk16: a warpgroup adds the product of 64 x 16 bf16 of its registers and 16 x N bf16 of shared memory to fp32 sums.
#pragma once

#include <cstdint>

namespace abiding::mxfp8_moe {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Rows of 128 bytes, 128-byte swizzle, eight rows to an atom of 1024 bytes; `offset` bytes further, of a whole atom or within
// a row. Only the low half depends on where the tile is.
__device__ __forceinline__ uint64_t make_smem_desc_128b(uint32_t address, uint32_t offset) {
  const uint32_t low = (1 << 16 | (address & 0x3FFFF) >> 4) + (offset >> 4);
  return uint64_t{1 << 30 | 1024 >> 4} << 32 | low;
}

template <int N>
struct Wgmma;

// Operands 0 .. N/2 - 1 are the sums; a variant passes the numbers of those behind: A's four registers, the tile, "add".
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

#define D8(i)                                                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define S16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define S32 S16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define S48 S32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define S64 S48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define S80 S64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define S96 S80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define S112 S96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define S128 S112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define S144 S128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define S160 S144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define S176 S160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define S192 S176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define S208 S192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define S224 S208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define S240 S224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define S256 S240 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define O16 D8(0)
#define O32 O16, D8(8)
#define O48 O32, D8(16)
#define O64 O48, D8(24)
#define O80 O64, D8(32)
#define O96 O80, D8(40)
#define O112 O96, D8(48)
#define O128 O112, D8(56)
#define O144 O128, D8(64)
#define O160 O144, D8(72)
#define O176 O160, D8(80)
#define O192 O176, D8(88)
#define O208 O192, D8(96)
#define O224 O208, D8(104)
#define O240 O224, D8(112)
#define O256 O240, D8(120)
#define ABIDING_LIST(...) __VA_ARGS__
ABIDING_WGMMA(16, S16, ABIDING_LIST(O16), "8", "9", "10", "11", "12", "13")
ABIDING_WGMMA(32, S32, ABIDING_LIST(O32), "16", "17", "18", "19", "20", "21")
ABIDING_WGMMA(48, S48, ABIDING_LIST(O48), "24", "25", "26", "27", "28", "29")
ABIDING_WGMMA(64, S64, ABIDING_LIST(O64), "32", "33", "34", "35", "36", "37")
ABIDING_WGMMA(96, S96, ABIDING_LIST(O96), "48", "49", "50", "51", "52", "53")
ABIDING_WGMMA(128, S128, ABIDING_LIST(O128), "64", "65", "66", "67", "68", "69")
ABIDING_WGMMA(160, S160, ABIDING_LIST(O160), "80", "81", "82", "83", "84", "85")
ABIDING_WGMMA(192, S192, ABIDING_LIST(O192), "96", "97", "98", "99", "100", "101")
ABIDING_WGMMA(224, S224, ABIDING_LIST(O224), "112", "113", "114", "115", "116", "117")
ABIDING_WGMMA(256, S256, ABIDING_LIST(O256), "128", "129", "130", "131", "132", "133")

}  // namespace abiding::mxfp8_moe
