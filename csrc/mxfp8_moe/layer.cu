// What a layer does around its two products: order the tokens by expert, gather them, activate, combine.
#include "common/launch.cuh"
#include "common/warp.cuh"
#include "mxfp8_moe/activation.h"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/octet.cuh"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 256;
constexpr int kRouteThreads = 1024, kRouteUnroll = 4;

__device__ __forceinline__ int block_sum(int value, int* warp_sums) {
  value = __reduce_add_sync(~0u, value);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  int sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += warp_sums[w];
  __syncthreads();
  return sum;
}

// A block has an expert. It counts the pairs of the experts before, and then gives its own their rows in order.
__global__ void __launch_bounds__(kRouteThreads) route_kernel(RouteParams p) {
  __shared__ int warp_sums[kRouteThreads / 32];
  wait_for_earlier_grids();
  launch_dependents();
  const int64_t expert = blockIdx.x, pairs = p.tokens * p.top_k;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int smaller = 0;
  for (int64_t pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
    const int64_t id = p.ids[pair];
    smaller += id >= 0 && id < expert;
    if (expert == 0 && (id < 0 || id >= p.experts)) p.rows[pair] = -1;
  }
  int next = block_sum(smaller, warp_sums);
  if (threadIdx.x == 0) p.offsets[expert] = next;
  // A thread has neighbouring pairs, so that rows are given in the order of the pairs.
  for (int64_t from = 0; from < pairs; from += int64_t{blockDim.x} * kRouteUnroll) {
    const int64_t first = from + threadIdx.x * kRouteUnroll;
    bool mine[kRouteUnroll];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i) {
      mine[i] = first + i < pairs && p.ids[first + i] == expert;
      count += mine[i];
    }
    const int sum = inclusive_sum(count);
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int row = next + sum - count;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) {
      if (static_cast<int>(w) < warp) row += warp_sums[w];
      next += warp_sums[w];
    }
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i)
      if (mine[i]) p.rows[first + i] = row++;
    __syncthreads();
  }
  if (threadIdx.x == 0 && expert == p.experts - 1) p.offsets[p.experts] = next;
}

// Blocks that share a token's columns, eight to a thread.
ABIDING_HD unsigned parts_of(int64_t k) { return static_cast<unsigned>((k / 8 + kThreads - 1) / kThreads); }

__global__ void __launch_bounds__(kThreads) gather_kernel(GatherParams p) {
  wait_for_earlier_grids();
  launch_dependents();
  const unsigned parts = parts_of(p.k);
  const int64_t token = blockIdx.x / parts, octet = int64_t{blockIdx.x % parts} * kThreads + threadIdx.x;
  if (octet >= p.k / 8) return;  // blocks of 32 elements are inside or outside as a whole
  uint4 packed = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + token * p.x_stride)[octet];
  if (p.round) packed = round_octet<__nv_bfloat16>(packed);
  for (int64_t j = 0; j < p.top_k; ++j) {
    const int row = p.rows[token * p.top_k + j];
    if (row >= 0) reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + row * p.k)[octet] = packed;
  }
}

template <Activation kActivation>
__global__ void __launch_bounds__(kThreads) activate_kernel(ActivateParams p) {
  wait_for_earlier_grids();
  launch_dependents();
  const unsigned width = static_cast<unsigned>(p.width / 8);
  const int64_t octets = int64_t{*p.total} * width, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < octets; i += step) {
    const int64_t row = i / width, column = i - row * width;
    constexpr int kParts = kActivation == Activation::kNone ? 1 : 2;
    const uint4* from = static_cast<const uint4*>(p.input) + row * kParts * width + column;
    uint4 packed = *from;
    if constexpr (kParts == 2) {
      float gate[8], up[8];
      unpack<__nv_bfloat16>(packed, gate);
      unpack<__nv_bfloat16>(from[width], up);
#pragma unroll
      for (int j = 0; j < 8; ++j) gate[j] = activated(kActivation, gate[j], up[j]);
      packed = pack<__nv_bfloat16>(gate);
    }
    if (p.round) packed = round_octet<__nv_bfloat16>(packed);
    static_cast<uint4*>(p.out)[i] = kParts == 2 && !p.round ? canonical_nans<__nv_bfloat16>(packed) : packed;
  }
}

__global__ void __launch_bounds__(kThreads) combine_kernel(CombineParams p) {
  wait_for_earlier_grids();
  launch_dependents();
  const unsigned parts = parts_of(p.k);
  const int64_t token = blockIdx.x / parts, octet = int64_t{blockIdx.x % parts} * kThreads + threadIdx.x;
  if (octet >= p.k / 8) return;
  float sums[8] = {};
#pragma unroll 4
  for (int64_t j = 0; j < p.top_k; ++j) {
    const int row = p.rows[token * p.top_k + j];
    if (row < 0) continue;
    const float weight = p.weights[token * p.weights_stride + j];
    const float4* from = reinterpret_cast<const float4*>(p.input + row * p.k) + 2 * octet;
    const float4 low = from[0], high = from[1];
    const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = __fadd_rn(sums[i], __fmul_rn(weight, x[i]));
  }
  reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + token * p.out_stride)[octet] =
      canonical_nans<__nv_bfloat16>(pack<__nv_bfloat16>(sums));
}

}  // namespace

cudaError_t route(const RouteParams& p, cudaStream_t stream) {
  const int64_t pairs = p.tokens * p.top_k;
  const unsigned threads = pairs <= 256 ? 64 : kRouteThreads;
  return launch(route_kernel, Launch{static_cast<unsigned>(p.experts), threads}, stream, p);
}

cudaError_t gather(const GatherParams& p, cudaStream_t stream) {
  return launch(gather_kernel, Launch{static_cast<unsigned>(p.tokens) * parts_of(p.k), kThreads}, stream, p);
}

cudaError_t activate(const ActivateParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows * (p.width / 8) + kThreads - 1) / kThreads;
  const Launch config{static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kThreads};
  switch (p.activation) {
    case Activation::kSilu: return launch(activate_kernel<Activation::kSilu>, config, stream, p);
    case Activation::kSwigluOai: return launch(activate_kernel<Activation::kSwigluOai>, config, stream, p);
    case Activation::kNone: break;
  }
  return launch(activate_kernel<Activation::kNone>, config, stream, p);
}

cudaError_t combine(const CombineParams& p, cudaStream_t stream) {
  return launch(combine_kernel, Launch{static_cast<unsigned>(p.tokens) * parts_of(p.k), kThreads}, stream, p);
}

}  // namespace abiding::mxfp8_moe
