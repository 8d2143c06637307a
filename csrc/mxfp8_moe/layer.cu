// The kernels around a layer's two GEMMs: routing, permute (gather), activation, top-k weighted reduce (combine).
// `gathered` and `activated` hold bf16 rows, or e4m3 rows and behind them their scales.
//
// PDL contract of a layer, and of a GEMM of e4m3 rows (docs/mxfp8_moe.md explains it):
//
//   kernel      reads before pdl_wait         reads after it                 writes (after it)   triggers dependents
//   route       nothing                       topk_ids, expert_map           offsets, pair_rows  after its pdl_wait
//   gather      nothing                       x, pair_rows                   gathered            at its end (*)
//   gate_up     offsets; w13, s13: 2 stages   gathered; w13, s13             gate_up_out         after its pdl_wait
//   activate    nothing                       gate_up_out, offsets[experts]  activated           at its end (*)
//   down        offsets; w2, s2: 2 stages     activated; w2, s2              gathered (alias)    after its pdl_wait
//   combine     nothing                       pair_rows, weights, gathered   out                 at its start
//
//   dequantize  nothing                       offsets, e4m3 rows, codes      bf16 rows           at its end
//   row_scales  nothing                       offsets, codes                 fp32 scales         at its end (*)
//   grouped_mm  offsets; weights: 2 stages    rows, their scales; weights    out                 after its pdl_wait
//
// gather and activate stand for their row-wise variants, too. A grouped_mm of the caller's bf16 rows, quantize and
// round read nothing before pdl_wait, and trigger after it.
//
// Ordering: a kernel starts once every CTA of the kernel upstream has triggered or exited. pdl_wait returns once that
// kernel has completed; as every CTA has threads that wait, all kernels further upstream have completed too.
// Invariant 1: nothing is written before pdl_wait. So no alias is a hazard: down's output lies over gate_up's input
// (`gathered`), and the next layer may use the same workspace.
// Invariant 2: before pdl_wait a kernel K reads only what was written upstream of T, the nearest kernel upstream of K
// that triggers after its own pdl_wait (exiting is a trigger). T had then waited for all of that, and K cannot start
// before T triggers. For gate_up T is gather, so route has completed. For down T is activate or, where that triggers at
// its start, gate_up: gather and route have completed. GroupedMmParams::inputs_ready_before_pdl says that this holds.
// So gather may never trigger before its pdl_wait: gate_up reads the offsets that route writes.
// Without local experts combine follows route directly, which may still write pair_rows: combine reads nothing early.
//
// (*) Room. A GEMM of few tokens has two CTAs per SM. A CTA upstream of it that an SM still holds leaves a gap in its
// registers, and then the SM may run one CTA of the GEMM where it has room for two; the other starts when a first one
// ends, and the GEMM takes up to twice as long. So the kernels in front of a GEMM trigger by exiting, unless their grid
// is small: at most one CTA of kSmallThreads threads per two SMs, for which the GEMM leaves registers
// (Config::kSpareThreads). Such a gather triggers after its pdl_wait and such an activate at its start, so that the
// GEMM is there and has its first weights when they end; row_scales does as gather. For the same reason route does not
// trigger at its start: gather's CTAs would settle among those of the layer before.
#include <algorithm>

#include "common/launch.cuh"
#include "common/sm90.cuh"
#include "common/warp.cuh"
#include "mxfp8_moe/activation.h"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/quantizer.cuh"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 256;
constexpr int kRouteThreads = 1024;
constexpr int kRouteCtas = 8;                   // of a cluster
constexpr int kRouteLonePairs = 512;            // above, a cluster is faster than a lone CTA
constexpr int kRouteShortPairs = 4096;          // above, it is faster to have several pairs per lane
constexpr int kRouteRows = 8;                   // of counters, whose loads are in flight at once
constexpr int kRouteSmemBytes = 47 * 1024;      // for counters: what a kernel gets without asking
constexpr int kSmallThreads = 128;              // of a small grid's CTA, see (*) above
constexpr int kMinCtasPerSm = 2048 / kThreads;  // caps registers at 32 per thread

// The lanes of a warp with the same expert, for one of 0..experts - 1. Faster than __match_any_sync for all numbers of
// experts of models.
__device__ __forceinline__ unsigned lanes_with(int expert, int experts) {
  unsigned same = ~0u;
  for (int bit = 0; 1 << bit < experts; ++bit) {
    const bool is_set = expert >> bit & 1;
    const unsigned lanes = __ballot_sync(~0u, is_set);
    same &= is_set ? lanes : ~lanes;
  }
  return same & __ballot_sync(~0u, expert >= 0);
}

// A counting sort by one cluster, or by a lone CTA where there are few pairs or no clusters. The first `warps` warps of
// each CTA have `range` neighboring pairs each, in the order of ranks and warps, and a row of counters in shared
// memory.
//   1. A warp numbers its pairs of each expert from 0 on, in their order.
//   2. An expert's thread in each CTA sums up what the warps have of it, and then what the CTAs have.
//   3. Each CTA scans the sums over all experts: that gives the experts' first rows.
//   4. The row of a pair is the first one of its expert's pairs in its CTA, plus those of the warps before, plus its
//      number.
// A lane takes kPairs pairs at a time. If there are more, their numbers wait in pair_rows, and else in registers.
template <int kPairs>
__global__ void __launch_bounds__(kRouteThreads, 1)
    route_kernel(const __grid_constant__ RouteParams p, int warps, int range) {
  extern __shared__ int counters[];  // rows of experts: one per warp; the pairs of this CTA; the first row of these
  __shared__ int warp_sums[kRouteThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = blockIdx.x;
  const int expert = threadIdx.x, experts = static_cast<int>(p.experts);
  const bool has_expert = expert < experts;
  int *mine = counters + warp * experts, *totals = counters + warps * experts, *firsts = totals + experts;
  const int64_t pairs = p.tokens * p.top_k, begin = min((int64_t{rank} * warps + warp) * range, pairs);
  const int size = warp < warps ? static_cast<int>(min(int64_t{range}, pairs - begin)) : 0;
  const void* ids = p.ids.address(begin + lane);
  int32_t* pair_rows = p.pair_rows + begin + lane;
  if (warp < warps)
    for (int e = lane; e < experts; e += 32) mine[e] = 0;
  __syncwarp();
  pdl_wait(ids, pair_rows);
  pdl_launch_dependents();

  int found[kPairs], number[kPairs];
  const bool in_registers = size <= 32 * kPairs;
  const auto find = [&](int at) {
    int64_t id[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) id[i] = at + 32 * i + lane < size ? p.ids.from(ids, at + 32 * i) : -1;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) found[i] = p.expert(id[i]);  // their loads are in flight together
  };
  for (int at = 0; at < size; at += 32 * kPairs) {
    find(at);
    unsigned peers[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (at + 32 * i < size) peers[i] = lanes_with(found[i], experts);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (at + 32 * i >= size) break;
      const int before = found[i] >= 0 ? mine[found[i]] : 0, lower = __popc(peers[i] & ((1u << lane) - 1));
      number[i] = before + lower;
      __syncwarp();
      if (found[i] >= 0 && lower == 0) mine[found[i]] = before + __popc(peers[i]);
      __syncwarp();
      if (!in_registers && at + 32 * i + lane < size) pair_rows[at + 32 * i] = number[i];
    }
  }
  __syncthreads();

  int here = 0, lower_ranks = 0;  // this thread's expert: its pairs in this CTA, and in those before it
  for (int from = 0; has_expert && from < warps; from += kRouteRows) {
    int count[kRouteRows];
    int* row = counters + from * experts + expert;
#pragma unroll
    for (int i = 0; i < kRouteRows; ++i) count[i] = from + i < warps ? row[i * experts] : 0;
#pragma unroll
    for (int i = 0; i < kRouteRows; ++i) {
      if (from + i < warps) row[i * experts] = here;
      here += count[i];
    }
  }
  int all = here;
#if __CUDA_ARCH__ >= 900
  if (gridDim.x > 1) {
    if (has_expert) totals[expert] = here;
    sm90::cluster_sync();
    all = 0;
#pragma unroll
    for (int r = 0; r < kRouteCtas; ++r) {
      const int there = has_expert ? sm90::load_cluster(sm90::mapa(sm90::smem_address(totals + expert), r)) : 0;
      lower_ranks += r < rank ? there : 0;
      all += there;
    }
    sm90::cluster_arrive();  // no CTA leaves before all have read its totals
  }
#endif
  const int sum = inclusive_sum(all);
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  const int end = __reduce_add_sync(~0u, lane < warp ? warp_sums[lane] : 0) + sum;
  if (has_expert) firsts[expert] = end - all + lower_ranks;
  __syncthreads();
  if (rank == 0 && has_expert) p.offsets[expert + 1] = end;
  if (rank == 0 && threadIdx.x == 0) p.offsets[0] = 0;

  for (int at = 0; at < size; at += 32 * kPairs) {
    if (!in_registers) {
      find(at);
#pragma unroll
      for (int i = 0; i < kPairs; ++i) number[i] = at + 32 * i + lane < size ? pair_rows[at + 32 * i] : 0;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      if (at + 32 * i + lane < size)
        pair_rows[at + 32 * i] = found[i] >= 0 ? firsts[found[i]] + mine[found[i]] + number[i] : -1;
  }
#if __CUDA_ARCH__ >= 900
  if (gridDim.x > 1) sm90::cluster_wait();
#endif
}

// With `ctas` CTAs, and at least `least` pairs per warp if there are so many.
template <int kPairs>
cudaError_t run_route(const RouteParams& p, unsigned ctas, int64_t least, cudaStream_t stream) {
  const auto parts = [](int64_t n, int64_t size) { return (n + size - 1) / size; };
  const int64_t pairs = p.tokens * p.top_k, experts = std::max<int64_t>(p.experts, 1);
  const int64_t row_bytes = experts * sizeof(int);
  const int64_t most = std::min<int64_t>(kRouteSmemBytes / row_bytes - 2, kRouteThreads / 32);
  const int64_t warps = std::clamp<int64_t>(parts(pairs, ctas * least), 1, most);
  const int64_t threads = 32 * std::max(warps, parts(experts, 32)), range = 32 * parts(pairs, ctas * warps * 32);
  const LaunchConfig config{ctas, static_cast<unsigned>(threads), static_cast<size_t>((warps + 2) * row_bytes), ctas};
  return launch(route_kernel<kPairs>, with_max_smem(config), stream, p, static_cast<int>(warps),
                static_cast<int>(range));
}

// Pairs of a token whose loads are in flight at once.
constexpr int kPairsInFlight = 8;

// Grid x is the token, grid y a part of its row: a 16-byte vector of 8 elements per thread.
LaunchConfig config_per_token(int64_t tokens, int64_t hidden, int threads) {
  LaunchConfig config{static_cast<unsigned>(tokens), static_cast<unsigned>(threads)};
  config.grid_y = static_cast<unsigned>((hidden / 8 + threads - 1) / threads);
  return with_max_smem(config);
}
__device__ __forceinline__ int vector_of_thread() { return static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x); }

__global__ void __launch_bounds__(kThreads, kMinCtasPerSm)
    gather_kernel(const __grid_constant__ GatherParams p, bool is_small) {
  const int64_t token = blockIdx.x;
  const int vector = vector_of_thread();
  const uint4* from =
      reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + token * p.x_stride) + vector;
  const int32_t* pair_rows = p.pair_rows + token * p.top_k;
  pdl_wait(from, pair_rows);
  if (is_small) pdl_launch_dependents();
  if (vector >= p.hidden / 8) return;  // whole scale blocks, and so all lanes of a shuffle
  uint4 packed = *from;
  bool is_ready = false;
  for (int left = static_cast<int>(p.top_k); left > 0; left -= kPairsInFlight, pair_rows += kPairsInFlight) {
    int rows[kPairsInFlight];
#pragma unroll
    for (int j = 0; j < kPairsInFlight; ++j) rows[j] = j < left ? pair_rows[j] : -1;
    if (!is_ready && p.out.round) packed = round_vec8<__nv_bfloat16>(packed);
    if (!is_ready && p.out.format == RowFormat::kBf16Interleaved) packed = interleave(packed);
    is_ready = true;
#pragma unroll
    for (int j = 0; j < kPairsInFlight; ++j)
      if (rows[j] >= 0)
        reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out.data) + rows[j] * p.hidden)[vector] = packed;
  }
}

// Vector `vector` of row `row` for a GEMM, with the row's code. `width` is the row's number of vectors.
template <bool kE4m3>
__device__ __forceinline__ void store_rowwise(const GemmRows& out, int64_t row, int width, int vector,
                                              const float (&x)[8], uint8_t code) {
  if constexpr (kE4m3) {
    static_cast<uint2*>(out.data)[row * width + vector] = quantize_vec8(x, code);
  } else {
    const uint4 rounded = round_vec8(x, code);
    static_cast<uint4*>(out.data)[row * width + vector] =
        out.format == RowFormat::kBf16Interleaved ? interleave(rounded) : rounded;
  }
}

// One code per row. A CTA per token, or, in a small grid, several, each of which writes some of the token's rows.
template <bool kE4m3>
__global__ void __launch_bounds__(kRowThreads)
    gather_rowwise_kernel(const __grid_constant__ GatherParams p, bool is_small) {
  __shared__ int rows[kMaxTopK];
  const int64_t token = blockIdx.x;
  const uint4* from = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + token * p.x_stride);
  const int32_t* pair_rows = p.pair_rows + token * p.top_k + threadIdx.x;
  pdl_wait(from, pair_rows);
  if (is_small) pdl_launch_dependents();
  const auto top_k = static_cast<int>(p.top_k), width = static_cast<int>(p.hidden / 8);
  const bool has_pair = static_cast<int>(threadIdx.x) < top_k;
  const int row = has_pair ? *pair_rows : -1;
  if (has_pair) rows[threadIdx.x] = row;  // others read it behind the barriers in quantize_row
  const uint8_t code = quantize_row<__nv_bfloat16, 8>(
      width, [&](int vector) { return from[vector]; },
      [&](int vector, const float (&x)[8], uint8_t its_code) {
        for (int j = static_cast<int>(blockIdx.y); j < top_k; j += static_cast<int>(gridDim.y))
          if (rows[j] >= 0) store_rowwise<kE4m3>(p.out, rows[j], width, vector, x, its_code);
      });
  if (kE4m3 && row >= 0 && blockIdx.y == 0) p.out.scales[row] = ue8m0_decode(code);
}

template <Activation kActivation>
__device__ __forceinline__ uint4 activate_vec8(uint4 gates, const uint4& ups, const SwigluConstants& swiglu,
                                               bool round) {
  if constexpr (kActivation != Activation::kNone) {
    float gate[8], up[8];
    unpack<__nv_bfloat16>(gates, gate);
    unpack<__nv_bfloat16>(ups, up);
#pragma unroll
    for (int j = 0; j < 8; ++j) gate[j] = activated(kActivation, swiglu, gate[j], up[j]);
    gates = pack<__nv_bfloat16>(gate);
    if (!round) return canonical_nans<__nv_bfloat16>(gates);
  }
  return round ? round_vec8<__nv_bfloat16>(gates) : gates;
}

// Grid-stride over the vectors of all rows. Row and column are stepped without a division.
template <Activation kActivation>
__global__ void __launch_bounds__(kThreads, kMinCtasPerSm)
    activate_kernel(const __grid_constant__ ActivateParams p, bool is_small) {
  if (is_small) pdl_launch_dependents();
  const unsigned width = static_cast<unsigned>(p.intermediate / 8), step = gridDim.x * blockDim.x;
  const unsigned step_rows = step / width, step_columns = step % width, start = blockIdx.x * blockDim.x + threadIdx.x;
  int64_t row = start / width;
  unsigned column = start % width;
  constexpr int kParts = kActivation == Activation::kNone ? 1 : 2;
  const auto from = [&] { return static_cast<const uint4*>(p.input) + row * kParts * width + column; };
  uint4 gates{}, ups{};
  const auto load = [&](const uint4* at) { gates = *at, ups = kParts == 2 ? at[width] : uint4{}; };
  const uint4* first = from();
  uintptr_t steps = step_rows | step_columns;
  pdl_wait(first, steps);
  if (row < p.max_rows) load(first);  // in flight together with used_rows, which says whether the row counts
  const int used_rows = *p.used_rows;
  // The four lanes of a scale block have the same row, so they leave together.
  while (row < used_rows) {
    const uint4 result = activate_vec8<kActivation>(gates, ups, p.swiglu, p.out.round);
    static_cast<uint4*>(p.out.data)[row * width + column] =
        p.out.format == RowFormat::kBf16Interleaved ? interleave(result) : result;
    row += step_rows;
    column += step_columns;
    if (column >= width) column -= width, ++row;
    if (row < used_rows) load(from());
  }
}

// One code per row. Grid-stride over the rows, a CTA per row.
template <Activation kActivation, bool kE4m3>
__global__ void __launch_bounds__(kRowThreads)
    activate_rowwise_kernel(const __grid_constant__ ActivateParams p, bool is_small) {
  if (is_small) pdl_launch_dependents();
  const auto width = static_cast<int>(p.intermediate / 8);
  constexpr int kParts = kActivation == Activation::kNone ? 1 : 2;
  const int32_t* used_rows = p.used_rows;
  pdl_wait(used_rows);
  const int rows = *used_rows;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const uint4* from = static_cast<const uint4*>(p.input) + row * kParts * width;
    const uint8_t code = quantize_row<__nv_bfloat16, 4>(
        width,
        [&](int vector) {
          const uint4 ups = kParts == 2 ? from[vector + width] : uint4{};
          return activate_vec8<kActivation>(from[vector], ups, p.swiglu, false);
        },
        [&](int vector, const float (&x)[8], uint8_t its_code) {
          store_rowwise<kE4m3>(p.out, row, width, vector, x, its_code);
        });
    if (kE4m3 && threadIdx.x == 0) p.out.scales[row] = ue8m0_decode(code);
  }
}

__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ CombineParams p) {
  pdl_launch_dependents();
  const int64_t token = blockIdx.x;
  const int vector = vector_of_thread();
  const int32_t* pair_rows = p.pair_rows + token * p.top_k;
  const float* token_weights = p.weights + token * p.weights_stride;
  const uint4* column = static_cast<const uint4*>(p.input) + vector;
  pdl_wait(pair_rows, token_weights, column);
  if (vector >= p.hidden / 8) return;
  float sums[8] = {};
  for (int left = static_cast<int>(p.top_k); left > 0;
       left -= kPairsInFlight, pair_rows += kPairsInFlight, token_weights += kPairsInFlight) {
    int rows[kPairsInFlight];
    float weights[kPairsInFlight];
    uint4 parts[kPairsInFlight];
#pragma unroll
    for (int j = 0; j < kPairsInFlight; ++j) {
      rows[j] = j < left ? pair_rows[j] : -1;
      weights[j] = j < left ? token_weights[j] : 0;
    }
#pragma unroll
    for (int j = 0; j < kPairsInFlight; ++j)
      if (rows[j] >= 0) parts[j] = column[rows[j] * (p.hidden / 8)];
#pragma unroll
    for (int j = 0; j < kPairsInFlight; ++j) {
      if (rows[j] < 0) continue;
      float x[8];
      unpack<__nv_bfloat16>(parts[j], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[i] = __fadd_rn(sums[i], __fmul_rn(weights[j], x[i]));
    }
  }
  reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(p.out) + token * p.out_stride)[vector] =
      canonical_nans<__nv_bfloat16>(pack<__nv_bfloat16>(sums));
}

}  // namespace

cudaError_t run_cuda(const RouteParams& p, cudaStream_t stream) {
  int major = 0;
  if (const cudaError_t status = device_attribute(cudaDevAttrComputeCapabilityMajor, &major); status != cudaSuccess)
    return status;
  const int64_t pairs = p.tokens * p.top_k;
  const unsigned ctas = major >= 9 && pairs > kRouteLonePairs ? kRouteCtas : 1;
  return pairs <= kRouteShortPairs ? run_route<1>(p, ctas, 32, stream) : run_route<4>(p, ctas, 64, stream);
}

cudaError_t run_cuda(const GatherParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t status = sm_count(&sms); status != cudaSuccess) return status;
  if (p.out.rowwise) {
    LaunchConfig config = with_max_smem({static_cast<unsigned>(p.tokens), kRowThreads});
    const bool is_small = p.tokens <= sms / 2;
    if (is_small) config.grid_y = static_cast<unsigned>(std::min(p.top_k, sms / 2 / p.tokens));
    return p.out.format == RowFormat::kE4m3 ? launch(gather_rowwise_kernel<true>, config, stream, p, is_small)
                                            : launch(gather_rowwise_kernel<false>, config, stream, p, is_small);
  }
  LaunchConfig config = config_per_token(p.tokens, p.hidden, kSmallThreads);
  const bool is_small = int64_t{config.grid_x} * config.grid_y <= sms / 2;
  if (!is_small) config = config_per_token(p.tokens, p.hidden, kThreads);
  return launch(gather_kernel, config, stream, p, is_small);
}

// Returns body(activation), as an integral constant.
template <class Body>
cudaError_t dispatch_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kSilu: return body(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kSwiglu: return body(std::integral_constant<Activation, Activation::kSwiglu>{});
    case Activation::kNone: break;
  }
  return body(std::integral_constant<Activation, Activation::kNone>{});
}

cudaError_t run_cuda(const ActivateParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t status = sm_count(&sms); status != cudaSuccess) return status;
  if (p.out.rowwise) {
    const int64_t ctas = p.max_rows < int64_t{sms} * 16 ? p.max_rows : int64_t{sms} * 16;
    const LaunchConfig config = with_max_smem({static_cast<unsigned>(ctas), kRowThreads});
    const bool is_small = ctas <= sms / 2;
    return dispatch_activation(p.activation, [&](auto tag) {
      constexpr Activation kActivation = decltype(tag)::value;
      return p.out.format == RowFormat::kE4m3
                 ? launch(activate_rowwise_kernel<kActivation, true>, config, stream, p, is_small)
                 : launch(activate_rowwise_kernel<kActivation, false>, config, stream, p, is_small);
    });
  }
  const int64_t vectors = p.max_rows * (p.intermediate / 8);
  const bool is_small = vectors <= int64_t{kSmallThreads} * (sms / 2);
  const int threads = is_small ? kSmallThreads : kThreads;
  const int64_t ctas = (vectors + threads - 1) / threads;
  const LaunchConfig config =
      with_max_smem({static_cast<unsigned>(ctas < 4096 ? ctas : 4096), static_cast<unsigned>(threads)});
  return dispatch_activation(p.activation, [&](auto tag) {
    return launch(activate_kernel<decltype(tag)::value>, config, stream, p, is_small);
  });
}

cudaError_t run_cuda(const CombineParams& p, cudaStream_t stream) {
  return launch(combine_kernel, config_per_token(p.tokens, p.hidden, kThreads), stream, p);
}

}  // namespace abiding::mxfp8_moe
