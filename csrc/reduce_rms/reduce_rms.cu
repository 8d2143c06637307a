// RMSNorm over a width that is split over ranks. For each token, warps compute the sums of squares of this rank's
// columns, send them to every rank, add up the sums of all ranks in rank order, and scale the row, which they still
// hold. Two kernels: with few tokens, a CTA takes one tile of tokens, with several warps per token; with many, each
// warp loops over tokens.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/copy_async.cuh"
#include "peer/rank_sum.cuh"
#include "reduce_rms/exchange.cuh"
#include "reduce_rms/kernels.h"

namespace abiding::reduce_rms {
namespace {

// A kernel for 32 warps per CTA has 64 registers per thread. For sm_80, ptxas needs more of them for the same.
#if __CUDA_ARCH__ >= 900
constexpr bool kFewRegisters = false;
#else
constexpr bool kFewRegisters = true;
#endif
// Of the kernels that need most registers.
constexpr TagLanes kTagLanes = kFewRegisters ? TagLanes::kAtEnd : TagLanes::kBesideData;

constexpr int kTableCtas = 16;  // so few that those of 8 ranks are resident on one GPU at once

// What a thread loads at once: 16 bytes, or one element where rows are not aligned to 16 bytes.
template <class T, bool kVectorized>
using Vector = std::conditional_t<kVectorized, uint4, T>;

template <class T, bool kVectorized>
constexpr int kElements = kVectorized ? peer::kVectorElements<T> : 1;

template <class T, bool kVectorized>
__device__ __forceinline__ void to_floats(const Vector<T, kVectorized>& v, float (&x)[kElements<T, kVectorized>]) {
  if constexpr (kVectorized)
    peer::to_floats<T>(v, x);
  else
    x[0] = static_cast<float>(v);
}

template <class T, bool kVectorized>
__device__ __forceinline__ Vector<T, kVectorized> from_floats(const float (&x)[kElements<T, kVectorized>]) {
  if constexpr (kVectorized)
    return peer::from_floats<T>(x);
  else
    return static_cast<T>(x[0]);
}

// The address of vector i of a token, counted through all its parts. The addresses of both parts are in registers, so
// that the choice is one instruction.
template <class T, bool kVectorized, int kParts>
struct Columns {
  using V = Vector<T, kVectorized>;
  const ReduceRmsParams& p;
  int first;    // vectors of part 0
  int vectors;  // of all parts

  __device__ __forceinline__ explicit Columns(const ReduceRmsParams& p)
      : p(p), first(p.vectors[0]), vectors(kParts == 2 ? first + p.vectors[1] : first) {}

  __device__ __forceinline__ bool in_second(int i) const { return kParts == 2 && i >= first; }
  __device__ __forceinline__ const V* input(int64_t token) const {
    return reinterpret_cast<const V*>(static_cast<const T*>(p.input) + token * p.input_stride);
  }
  __device__ __forceinline__ const V* weight_of(int part) const { return static_cast<const V*>(p.parts[part].weight); }
  __device__ __forceinline__ const V* weight(int i) const {
    return in_second(i) ? weight_of(1) + (i - first) : weight_of(0) + i;
  }
  __device__ __forceinline__ V* out_of(int64_t token, int part) const {
    return reinterpret_cast<V*>(static_cast<T*>(p.parts[part].out) + token * p.parts[part].width);
  }
  __device__ __forceinline__ V* out(int64_t token, int i) const {
    return in_second(i) ? out_of(token, 1) + (i - first) : out_of(token, 0) + i;
  }
};

template <class T, bool kVectorized>
__device__ __forceinline__ float sum_of_squares(const Vector<T, kVectorized>& v) {
  constexpr int kN = kElements<T, kVectorized>;
  float x[kN], sum = 0;
  to_floats<T, kVectorized>(v, x);
#pragma unroll
  for (int j = 0; j < kN; ++j) sum = fmaf(x[j], x[j], sum);
  return sum;
}

template <class T, bool kVectorized>
__device__ __forceinline__ Vector<T, kVectorized> scaled(const Vector<T, kVectorized>& v,
                                                         const Vector<T, kVectorized>& weight, float factor) {
  constexpr int kN = kElements<T, kVectorized>;
  float x[kN], w[kN];
  to_floats<T, kVectorized>(v, x);
  to_floats<T, kVectorized>(weight, w);
#pragma unroll
  for (int j = 0; j < kN; ++j) x[j] = x[j] * factor * w[j];
  return from_floats<T, kVectorized>(x);
}

// What an output holds after a fault.
template <class T, bool kVectorized>
__device__ __forceinline__ Vector<T, kVectorized> nan_of() {
  if constexpr (kVectorized)
    return peer::nan_vector<T>();
  else
    return static_cast<T>(kNan);
}

// An empty asm statement that takes a loaded value: the compiler may not convert the value, and so wait for the load,
// before it.
__device__ __forceinline__ void pin(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
template <class Element>
__device__ __forceinline__ void pin(Element*& at) {
  asm volatile("" : "+l"(at));
}
template <class Element>
__device__ __forceinline__ void pin(Element&) {}

// Sums over a warp; lanes 0 to 15 get that of part 0, lanes 16 to 31 that of part 1.
template <int kParts>
__device__ __forceinline__ float sum_over_warp(const float (&sums)[kParts], Lane own) {
  float sum = sums[0];
  float others = sums[0];
  if constexpr (kParts == 2) (own.part == 0 ? others : sum) = sums[1];
  sum += __shfl_xor_sync(~0u, others, 16);
#pragma unroll
  for (int mask = 8; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  return sum;
}

// Sums, in rank order, what lanes l % 16 have received from ranks l % 16.
template <class Exchange>
__device__ __forceinline__ float sum_over_ranks(const Exchange& exchange, float received) {
  float total = 0;
  int from = 0;
#pragma unroll 1
  do {  // two ranks per iteration: lanes beyond the last rank have 0
#pragma unroll
    for (int r = 0; r < 2; ++r) total += __shfl_sync(~0u, received, from++, 16);
  } while (from < exchange.ranks());
  return total;
}

template <int kParts>
struct SharedSums {
  float of_warps[kMaxCtaWarps][kParts];
  float scales[kMaxCtaWarps][kParts];  // per token of the tile
};

// From each thread's sums of squares to the scales of its token. The warps of a tile's unused token row (has_token is
// false) only take part in the barriers.
template <int kParts, class Exchange>
__device__ __forceinline__ void find_scales(SharedSums<kParts>& shared, Exchange& exchange, Lane own,
                                            const float (&sums)[kParts], int64_t token, bool has_token,
                                            float inverse_width, float eps) {
  const int warps = blockDim.x / 32, part = own.part < kParts ? own.part : 0;
  float (*of_warps)[kParts] = shared.of_warps + threadIdx.y * warps;
  float sum = sum_over_warp<kParts>(sums, own);
  if (own.rank == 0 && own.part < kParts) of_warps[threadIdx.x / 32][own.part] = sum;
  __syncthreads();
  // The first of a token's warps sums over its warps and exchanges.
  if (threadIdx.x < 32 && has_token) {
    sum = own.rank < warps ? of_warps[own.rank][part] : 0.0f;
    if (own.rank + 16 < warps) sum += of_warps[own.rank + 16][part];
#pragma unroll
    for (int mask = 8; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    const float received = exchange.exchange(token, sum);
    __syncwarp();
    // Ordering: only a thread that has received peer data may trigger dependents (PDL), because that proves that the
    // peers' CTAs of this index are resident, and what the CTA's other tokens wait for will come. Triggering earlier
    // can deadlock: a waiting dependent grid may fill the SMs that another rank's kernel needs. One thread triggers for
    // its CTA.
    pdl_launch_dependents();
    const float total = sum_over_ranks(exchange, received);
    if (own.rank == 0 && own.part < kParts) shared.scales[threadIdx.y][own.part] = rsqrtf(total * inverse_width + eps);
  } else {
    exchange.exchange_tag();
  }
  __syncthreads();
}

// One tile of tokens per CTA: threadIdx.y is the token, threadIdx.x the thread of its warps. kVectors per thread are
// held in registers; 0: the row is read twice.
template <class T, bool kVectorized, int kParts, int kVectors, class Endpoint>
__device__ __forceinline__ void normalize_tile(const Endpoint& endpoint, const ReduceRmsParams& p) {
  using V = Vector<T, kVectorized>;
  __shared__ SharedSums<kParts> shared;
  const int thread = threadIdx.x, threads = blockDim.x, row = threadIdx.y;
  const Columns<T, kVectorized, kParts> columns(p);

  // Calls body(c, i) for the thread's vectors, of which vector i of the row is the c-th, or for those from `begin` on.
  const auto for_vectors = [&](auto body, int begin = 0, int end = kVectors) {
    if constexpr (kVectors == 0) {
      for (int i = thread; i < columns.vectors; i += threads) body(0, i);
    } else {
#pragma unroll
      for (int c = begin; c < end; ++c)
        if (const int i = thread + c * threads; i < columns.vectors) body(c, i);
    }
  };
  constexpr bool kWeightsEarly =
      1 <= kVectors && kVectors <= 2;  // with more vectors, registers do not hold the weights
  V held[kVectors ? kVectors : 1], weights[kVectors ? kVectors : 1];
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + row;
  const bool has_token = token < p.tokens;
  const V* first = columns.input(token) + thread;
  const auto load_weight = [&](int c, int i) { weights[c] = *columns.weight(i); };

  pdl_wait(first);
  if (kVectors > 0 && has_token)
    for_vectors([&](int c, int i) { held[c] = c == 0 ? *first : columns.input(token)[i]; });
  // From here to the first use of the row, everything overlaps with its loads.
  const Lane own(threadIdx.x % 32);
  constexpr TagLanes kTileTagLanes = kVectors <= 2 ? TagLanes::kIdleWarp : kTagLanes;
  ExchangeOver<Endpoint, kParts, kTileTagLanes> exchange(endpoint, own);
  exchange.begin();
  if (kWeightsEarly && has_token) for_vectors(load_weight);
  exchange.find_slots(row);
  const float inverse_width = p.parts[own.part < kParts ? own.part : 0].inverse_full_width;
  V* out = columns.out(token, thread);
  if constexpr (kWeightsEarly) pin(out);
  for (V& v : held) pin(v);
  exchange.select_epoch();

  float sums[kParts] = {};
  if (has_token) {
    for_vectors([&](int c, int i) {
      if constexpr (kVectors == 0) held[c] = columns.input(token)[i];
      const float sum = sum_of_squares<T, kVectorized>(held[c]);
      sums[0] += columns.in_second(i) ? 0.0f : sum;
      if constexpr (kParts == 2) sums[1] += columns.in_second(i) ? sum : 0.0f;
    });
  }
  find_scales(shared, exchange, own, sums, token, has_token, inverse_width, p.eps);
  if (has_token) {
    constexpr int kBatch = kVectors > 2 && kFewRegisters ? 2 : kVectors ? kVectors : 1;  // weights at once
#pragma unroll
    for (int begin = 0; begin < (kVectors ? kVectors : 1); begin += kBatch) {
      if constexpr (kVectors > 0 && !kWeightsEarly) for_vectors(load_weight, begin, begin + kBatch);
      for (V& v : weights) pin(v);
      for_vectors(
          [&](int c, int i) {
            if constexpr (kVectors == 0) held[c] = columns.input(token)[i], weights[c] = *columns.weight(i);
            *(kWeightsEarly && c == 0 ? out : columns.out(token, i)) =
                scaled<T, kVectorized>(held[c], weights[c], shared.scales[row][columns.in_second(i)]);
          },
          begin, begin + kBatch);
    }
  }
  if (!exchange.end() && has_token) for_vectors([&](int, int i) { *columns.out(token, i) = nan_of<T, kVectorized>(); });
}

// Calls load(u, i), then use(u, i), for a lane's vectors i of `count`, a batch at a time, so that a batch's loads
// overlap.
template <int kBatch, class Load, class Use>
__device__ __forceinline__ void in_batches(int lane, int count, Load load, Use use) {
  for (int first = lane; first < count; first += 32 * kBatch) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (const int i = first + 32 * u; i < count) load(u, i);
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (const int i = first + 32 * u; i < count) use(u, i);
  }
}

// The results of normalize_per_warp() after a fault. It computes everything anew, so as to keep no registers there.
template <class T, bool kVectorized, int kParts>
__device__ __noinline__ void write_nan_per_warp(const ReduceRmsParams& p) {
  const Columns<T, kVectorized, kParts> columns(p);
  const int tokens = static_cast<int>(p.tokens), step = static_cast<int>(gridDim.x * blockDim.y);
  for (int token = static_cast<int>(blockIdx.x * blockDim.y + threadIdx.y); token < tokens; token += step)
    for (int i = threadIdx.x; i < columns.vectors; i += 32) *columns.out(token, i) = nan_of<T, kVectorized>();
}

// Each warp loops over tokens, and waits for no other warp. kInSmem: it holds the row in shared memory; else it reads
// it twice.
template <class T, bool kVectorized, int kParts, bool kInSmem, class Endpoint>
__device__ __forceinline__ void normalize_per_warp(const Endpoint& endpoint, const ReduceRmsParams& p) {
  using V = Vector<T, kVectorized>;
  extern __shared__ uint4 rows[];
  const int lane = threadIdx.x, warp = threadIdx.y;
  // Read anew at each use: ptxas spills it, although it is a constant.
  const auto warps = [] {
    int count;
    asm volatile("mov.u32 %0, %%ntid.y;" : "=r"(count));
    return count;
  };
  const auto step = [&] { return static_cast<int>(gridDim.x) * warps(); };
  const Columns<T, kVectorized, kParts> columns(p);
  const int tokens = static_cast<int>(p.tokens);
  int token = static_cast<int>(blockIdx.x) * warps() + warp;  // less than step()
  const Lane own(lane);
  const float inverse_width = p.parts[own.part < kParts ? own.part : 0].inverse_full_width;

  pdl_wait();
  ExchangeOver<Endpoint, kParts, kTagLanes> exchange(endpoint, own);
  const auto start_row = [&] {
    if constexpr (kInSmem) {
      const V* row = columns.input(token);
      uint4* held = rows + warp * columns.vectors;
      for (int i = lane; i < columns.vectors; i += 32) copy_async(held + i, row + i);
    }
  };
  exchange.begin();
  if (token < tokens) start_row();
  // All of this overlaps with the load of the row.
  exchange.check_claim();
  exchange.find_slots(warp);
  exchange.select_epoch();
  while (token < tokens) {
    const V* row = columns.input(token);
    if constexpr (kInSmem) {
      wait_for_copies();
      __syncwarp();
      row = rows + warp * columns.vectors;
    }
    constexpr int kBatch = kInSmem && !(kFewRegisters && sizeof(T) == 4) ? 4 : 2;  // as registers allow
    V vectors[kBatch], weights[kBatch];
    float sums[kParts] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const V* from = row + (part ? columns.first : 0);
      in_batches<kBatch>(
          lane, p.vectors[part], [&](int u, int i) { vectors[u] = from[i]; },
          [&](int u, int) { sums[part] += sum_of_squares<T, kVectorized>(vectors[u]); });
    }
    const float received = exchange.exchange(token, sum_over_warp<kParts>(sums, own));
    __syncwarp();
    const float scale = rsqrtf(sum_over_ranks(exchange, received) * inverse_width + p.eps);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float factor = __shfl_sync(~0u, scale, 16 * part);
      const V* from = row + (part ? columns.first : 0);
      const V* weight = columns.weight_of(part);
      V* out = columns.out_of(token, part);
      in_batches<kBatch>(
          lane, p.vectors[part], [&](int u, int i) { vectors[u] = from[i], weights[u] = weight[i]; },
          [&](int u, int i) { out[i] = scaled<T, kVectorized>(vectors[u], weights[u], factor); });
    }
    exchange.advance(warps());
    token += step();
    __syncwarp();  // the lanes are done with the row
    if (token < tokens) start_row();
  }
  // Ordering: a warp without a token has received no peer data, so it may not trigger dependents; see find_scales.
  if (token >= step()) pdl_launch_dependents();
  if (!exchange.end()) write_nan_per_warp<T, kVectorized, kParts>(p);
}

// kVectors is CtaTile::vectors_per_thread.
template <class T, bool kVectorized, int kParts, int kVectors, class Endpoint>
__global__ void __launch_bounds__(32 * kMaxCtaWarps, 1)
    reduce_rms_kernel(const __grid_constant__ ReduceRmsParams p, const __grid_constant__ Endpoint endpoint) {
  if constexpr (kVectors < 0)
    normalize_per_warp<T, kVectorized, kParts, kVectors == kRowInSmem>(endpoint, p);
  else
    normalize_tile<T, kVectorized, kParts, kVectors>(endpoint, p);
}

// How many tokens one kernel may have per CTA. A token has at most two words in a CTA's region; the size of a table is
// known only on the device, so there the limit is that tokens are counted in an int.
int64_t max_tokens_per_cta(const Peers& peers) { return peers.region_bytes[peer::kScalars] / (2 * sizeof(float)); }
int64_t max_tokens_per_cta(const TableParams&) { return std::numeric_limits<int>::max() / (2 * kTableCtas); }

template <class T, bool kVectorized, int kParts, class Endpoint>
cudaError_t launch_parts(ReduceRmsParams p, const Endpoint& endpoint, int max_ctas, cudaStream_t stream) {
  int64_t row_vectors = 0;  // of 16 bytes
  for (int part = 0; part < kParts; ++part) {
    const int64_t width = p.parts[part].width;
    p.vectors[part] = static_cast<int>(width / kElements<T, kVectorized>);
    p.parts[part].inverse_full_width = 1.0f / static_cast<float>(width * endpoint.ranks);
    row_vectors += (width * static_cast<int64_t>(sizeof(T)) + 15) / 16;
  }
  int smem_bytes = 0;
  if (const cudaError_t status = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &smem_bytes)) return status;
  const auto kernel_of = [&](const CtaTile& tile) {
    if constexpr (kVectorized) {
      switch (tile.vectors_per_thread) {
        case 1: return reduce_rms_kernel<T, true, kParts, 1, Endpoint>;
        case 2: return reduce_rms_kernel<T, true, kParts, 2, Endpoint>;
        case 4: return reduce_rms_kernel<T, true, kParts, 4, Endpoint>;
        case kRowInSmem: return reduce_rms_kernel<T, true, kParts, kRowInSmem, Endpoint>;
      }
    }
    return tile.warps_loop_over_tokens() ? reduce_rms_kernel<T, kVectorized, kParts, kRowReadTwice, Endpoint>
                                         : reduce_rms_kernel<T, kVectorized, kParts, 0, Endpoint>;
  };
  for (int64_t left = p.tokens; left > 0;) {
    const CtaTile tile = choose_cta_tile(row_vectors, left, max_ctas, smem_bytes);
    const int64_t iterations = tile.warps_loop_over_tokens() ? max_tokens_per_cta(endpoint) / tile.tokens : 1;
    p.tokens = std::min(left, iterations * tile.tokens * max_ctas);
    const int64_t ctas = std::min<int64_t>((p.tokens + tile.tokens - 1) / tile.tokens, max_ctas);
    LaunchConfig config{static_cast<unsigned>(ctas), static_cast<unsigned>(32 * tile.warps_per_token)};
    config.block_y = static_cast<unsigned>(tile.tokens);
    const auto kernel = kernel_of(tile);
    if (kVectorized && tile.vectors_per_thread == kRowInSmem) {
      config.smem_bytes = static_cast<size_t>(tile.tokens * row_vectors * 16);
      // Always the device's limit, not this launch's need: the attribute belongs to the kernel, and another thread may
      // set it between this call and the launch.
      const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
      if (const cudaError_t status = cudaFuncSetAttribute(kernel, limit, smem_bytes)) return status;
    }
    if (const cudaError_t status = launch(kernel, config, stream, p, endpoint)) return status;
    p.input = static_cast<const T*>(p.input) + p.tokens * p.input_stride;
    for (int part = 0; part < kParts; ++part)
      p.parts[part].out = static_cast<T*>(p.parts[part].out) + p.tokens * p.parts[part].width;
    left -= p.tokens;
  }
  return cudaSuccess;
}

// Whether every row of every part is aligned to 16 bytes.
template <class T>
bool can_vectorize(const ReduceRmsParams& p) {
  constexpr int64_t kStep = 16 / sizeof(T);
  if (reinterpret_cast<uintptr_t>(p.input) % 16 || p.input_stride % kStep) return false;
  for (int i = 0; i < p.part_count; ++i) {
    const Part& part = p.parts[i];
    if ((reinterpret_cast<uintptr_t>(part.weight) | reinterpret_cast<uintptr_t>(part.out)) % 16) return false;
    if (part.width % kStep) return false;
  }
  return true;
}

template <class T, class Endpoint>
cudaError_t launch_type(const ReduceRmsParams& p, const Endpoint& endpoint, int max_ctas, cudaStream_t stream) {
  if (can_vectorize<T>(p))
    return p.part_count == 1 ? launch_parts<T, true, 1>(p, endpoint, max_ctas, stream)
                             : launch_parts<T, true, 2>(p, endpoint, max_ctas, stream);
  return p.part_count == 1 ? launch_parts<T, false, 1>(p, endpoint, max_ctas, stream)
                           : launch_parts<T, false, 2>(p, endpoint, max_ctas, stream);
}

template <class Endpoint>
cudaError_t launch_over(const ReduceRmsParams& p, const Endpoint& endpoint, int max_ctas, cudaStream_t stream) {
  return dispatch_floating(
      p.dtype, [&](auto tag) { return launch_type<CudaType<decltype(tag)>>(p, endpoint, max_ctas, stream); });
}

}  // namespace

cudaError_t run_cuda(const ReduceRmsParams& p, const Peers& peers, cudaStream_t stream) {
  return launch_over(p, peers, peers.max_ctas, stream);
}

cudaError_t run_cuda(const ReduceRmsParams& p, const TableParams& table, cudaStream_t stream) {
  return launch_over(p, table, kTableCtas, stream);
}

}  // namespace abiding::reduce_rms
