// What a layer does around its two products: order the tokens by expert, gather them, activate, combine.
#include "common/launch.cuh"
#include "mxfp8_moe/activation.h"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/octet.cuh"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 256;
constexpr int kRouteThreads = 1024, kRouteUnroll = 4;

// A block has an expert, a warp of it a range of neighbouring pairs. It counts the pairs of the experts before and its own, and
// then gives its own their rows in the order of the pairs.
__global__ void __launch_bounds__(kRouteThreads) route_kernel(const __grid_constant__ RouteParams p, int range) {
  __shared__ int smaller[kRouteThreads / 32], equal[kRouteThreads / 32];
  pdl_launch_dependents();
  const int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int begin = warp * range, end = min(begin + range, static_cast<int>(p.tokens * p.top_k));
  const void* ids = p.ids.address(begin + lane);
  pdl_wait(ids);
  int before = 0, mine = 0;
  for (int from = begin + lane; from < end; from += 32 * kRouteUnroll) {
    int64_t id[kRouteUnroll];
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i)
      if (from + 32 * i < end) id[i] = p.ids.from(ids, from - begin - lane + 32 * i);
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i) {
      if (from + 32 * i >= end) continue;
      before += id[i] >= 0 && id[i] < expert;
      mine += id[i] == expert;
      if (expert == 0 && (id[i] < 0 || id[i] >= p.experts)) p.rows[from + 32 * i] = -1;
    }
  }
  before = __reduce_add_sync(~0u, before);
  mine = __reduce_add_sync(~0u, mine);
  if (lane == 0) {
    smaller[warp] = before;
    equal[warp] = mine;
  }
  __syncthreads();
  int first = 0, row = 0, count = 0;
  for (int w = 0; w < warps; ++w) {
    first += smaller[w];
    row += w < warp ? equal[w] : 0;
    count += equal[w];
  }
  if (threadIdx.x == 0) {
    p.offsets[expert] = first;
    if (expert == p.experts - 1) p.offsets[p.experts] = first + count;
  }
  if (mine == 0) return;
  row += first;
  for (int from = begin; from < end; from += 32 * kRouteUnroll) {
    bool is_mine[kRouteUnroll];
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i) {
      const int pair = from + i * 32 + lane;
      is_mine[i] = pair < end && p.ids[pair] == expert;
    }
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i) {
      const unsigned lanes = __ballot_sync(~0u, is_mine[i]);
      if (is_mine[i]) p.rows[from + i * 32 + lane] = row + __popc(lanes & ((1u << lane) - 1));
      row += __popc(lanes);
    }
  }
}

// Of a token, that are in flight at once: what they load does not depend on each other.
constexpr int kPairs = 8;

// A column of the grid has a token, and each of its blocks some of the token's columns, eight to a thread.
LaunchConfig launch_of(int64_t tokens, int64_t k) {
  LaunchConfig config{static_cast<unsigned>(tokens), kThreads};
  config.grid_y = static_cast<unsigned>((k / 8 + kThreads - 1) / kThreads);
  return config;
}
__device__ __forceinline__ int octet_of_thread() { return static_cast<int>(blockIdx.y * kThreads + threadIdx.x); }

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ GatherParams p) {
  const int64_t token = blockIdx.x;
  const int octet = octet_of_thread();
  const uint4* from =
      reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + token * p.x_stride) + octet;
  const int32_t* rows_of_token = p.rows + token * p.top_k;
  pdl_wait(from, rows_of_token);
  pdl_launch_dependents();       // not sooner: the product behind this reads what route() wrote before it waits itself
  if (octet >= p.k / 8) return;  // blocks of 32 elements are inside or outside as a whole
  uint4 packed = *from;
  bool is_ready = false;
  for (int left = static_cast<int>(p.top_k); left > 0; left -= kPairs, rows_of_token += kPairs) {
    int rows[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) rows[j] = j < left ? rows_of_token[j] : -1;
    if (!is_ready && p.round) packed = round_octet<__nv_bfloat16>(packed);
    if (!is_ready && p.interleaved) packed = interleave(packed);
    is_ready = true;
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (rows[j] >= 0) reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + rows[j] * p.k)[octet] = packed;
  }
}

template <Activation kActivation>
__device__ __forceinline__ uint4 activate_octet(uint4 gates, const uint4& ups, bool round) {
  if constexpr (kActivation != Activation::kNone) {
    float gate[8], up[8];
    unpack<__nv_bfloat16>(gates, gate);
    unpack<__nv_bfloat16>(ups, up);
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = activated(kActivation, gate[j], up[j]);
    gates = pack<__nv_bfloat16>(gate);
    if (!round) return canonical_nans<__nv_bfloat16>(gates);
  }
  return round ? round_octet<__nv_bfloat16>(gates) : gates;
}

template <Activation kActivation>
__global__ void __launch_bounds__(kThreads) activate_kernel(const __grid_constant__ ActivateParams p) {
  pdl_launch_dependents();
  const unsigned width = static_cast<unsigned>(p.width / 8), step = gridDim.x * kThreads;
  const unsigned step_rows = step / width, step_columns = step % width, start = blockIdx.x * kThreads + threadIdx.x;
  int64_t row = start / width;
  unsigned column = start % width;
  constexpr int kParts = kActivation == Activation::kNone ? 1 : 2;
  const auto from = [&] { return static_cast<const uint4*>(p.input) + row * kParts * width + column; };
  uint4 gates{}, ups{};
  const auto load = [&](const uint4* at) { gates = *at, ups = kParts == 2 ? at[width] : uint4{}; };
  const uint4* first = from();
  uintptr_t steps = step_rows | step_columns;
  pdl_wait(first, steps);
  if (row < p.rows) load(first);  // whether it is in use is on its way too
  const int total = *p.total;
  // The four lanes of a block of 32 elements have the same row.
  while (row < total) {
    const uint4 result = activate_octet<kActivation>(gates, ups, p.round);
    static_cast<uint4*>(p.out)[row * width + column] = p.interleaved ? interleave(result) : result;
    row += step_rows;
    column += step_columns;
    if (column >= width) column -= width, ++row;
    if (row < total) load(from());
  }
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineParams p) {
  pdl_launch_dependents();
  const int64_t token = blockIdx.x;
  const int octet = octet_of_thread();
  const int32_t* rows_of_token = p.rows + token * p.top_k;
  const float* weights_of_token = p.weights + token * p.weights_stride;
  const uint4* column = static_cast<const uint4*>(p.input) + octet;
  pdl_wait(rows_of_token, weights_of_token, column);
  if (octet >= p.k / 8) return;
  float sums[8] = {};
  for (int left = static_cast<int>(p.top_k); left > 0;
       left -= kPairs, rows_of_token += kPairs, weights_of_token += kPairs) {
    int rows[kPairs];
    float weights[kPairs];
    uint4 parts[kPairs];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      rows[j] = j < left ? rows_of_token[j] : -1;
      weights[j] = j < left ? weights_of_token[j] : 0;
    }
#pragma unroll
    for (int j = 0; j < kPairs; ++j)
      if (rows[j] >= 0) parts[j] = column[rows[j] * (p.k / 8)];
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if (rows[j] < 0) continue;
      float x[8];
      unpack<__nv_bfloat16>(parts[j], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = __fadd_rn(sums[i], __fmul_rn(weights[j], x[i]));
    }
  }
  reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + token * p.out_stride)[octet] =
      canonical_nans<__nv_bfloat16>(pack<__nv_bfloat16>(sums));
}

}  // namespace

cudaError_t route(const RouteParams& p, cudaStream_t stream) {
  const int64_t pairs = p.tokens * p.top_k;
  const unsigned threads = pairs <= 256 ? 64 : kRouteThreads, warps = threads / 32;
  const auto range = static_cast<int>(round_up((pairs + warps - 1) / warps, 32));
  return launch(route_kernel, LaunchConfig{static_cast<unsigned>(p.experts), threads}, stream, p, range);
}

cudaError_t gather(const GatherParams& p, cudaStream_t stream) {
  return launch(gather_kernel, launch_of(p.tokens, p.k), stream, p);
}

cudaError_t activate(const ActivateParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows * (p.width / 8) + kThreads - 1) / kThreads;
  const LaunchConfig config{static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kThreads};
  switch (p.activation) {
    case Activation::kSilu: return launch(activate_kernel<Activation::kSilu>, config, stream, p);
    case Activation::kSwigluOai: return launch(activate_kernel<Activation::kSwigluOai>, config, stream, p);
    case Activation::kNone: break;
  }
  return launch(activate_kernel<Activation::kNone>, config, stream, p);
}

cudaError_t combine(const CombineParams& p, cudaStream_t stream) {
  return launch(combine_kernel, launch_of(p.tokens, p.k), stream, p);
}

}  // namespace abiding::mxfp8_moe
