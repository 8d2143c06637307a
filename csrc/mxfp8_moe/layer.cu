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
#include "common/launch.cuh"
#include "mxfp8_moe/activation.h"
#include "mxfp8_moe/kernels.h"
#include "mxfp8_moe/quantizer.cuh"

namespace abiding::mxfp8_moe {
namespace {

constexpr int kThreads = 256;
constexpr int kRouteThreads = 1024, kRouteUnroll = 4;
constexpr int kSmallThreads = 128;              // of a small grid's CTA, see (*) above
constexpr int kMinCtasPerSm = 2048 / kThreads;  // caps registers at 32 per thread

// One CTA per expert, one warp per range of neighboring pairs. A warp counts the pairs of smaller experts and of its
// own, and then numbers its expert's pairs in their order. Without local experts one CTA marks all pairs as elsewhere.
__global__ void __launch_bounds__(kRouteThreads) route_kernel(const __grid_constant__ RouteParams p, int range) {
  __shared__ int smaller[kRouteThreads / 32], equal[kRouteThreads / 32];
  const int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int begin = warp * range, end = min(begin + range, static_cast<int>(p.tokens * p.top_k));
  const void* ids = p.ids.address(begin + lane);
  pdl_wait(ids);
  pdl_launch_dependents();
  int before = 0, mine = 0;
  for (int from = begin + lane; from < end; from += 32 * kRouteUnroll) {
    int64_t id[kRouteUnroll];
    int found[kRouteUnroll];
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i)
      id[i] = from + 32 * i < end ? p.ids.from(ids, from - begin - lane + 32 * i) : -1;
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i) found[i] = p.expert(id[i]);  // their loads are in flight together
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i) {
      before += found[i] >= 0 && found[i] < expert;
      mine += found[i] == expert;
      if (expert == 0 && found[i] < 0 && from + 32 * i < end) p.pair_rows[from + 32 * i] = -1;
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
      is_mine[i] = pair < end && p.expert(p.ids[pair]) == expert;
    }
#pragma unroll
    for (int i = 0; i < kRouteUnroll; ++i) {
      const unsigned lanes = __ballot_sync(~0u, is_mine[i]);
      if (is_mine[i]) p.pair_rows[from + i * 32 + lane] = row + __popc(lanes & ((1u << lane) - 1));
      row += __popc(lanes);
    }
  }
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

// One code per row. A CTA per token.
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
        for (int j = 0; j < top_k; ++j)
          if (rows[j] >= 0) store_rowwise<kE4m3>(p.out, rows[j], width, vector, x, its_code);
      });
  if (kE4m3 && row >= 0) p.out.scales[row] = ue8m0_decode(code);
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
  const int64_t pairs = p.tokens * p.top_k;
  const unsigned threads = pairs <= 256 ? 64 : kRouteThreads, warps = threads / 32;
  const auto range = static_cast<int>(round_up((pairs + warps - 1) / warps, 32));
  return launch(route_kernel, with_max_smem({static_cast<unsigned>(p.experts > 0 ? p.experts : 1), threads}), stream, p,
                range);
}

cudaError_t run_cuda(const GatherParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t status = sm_count(&sms); status != cudaSuccess) return status;
  if (p.out.rowwise) {
    const LaunchConfig config = with_max_smem({static_cast<unsigned>(p.tokens), kRowThreads});
    const bool is_small = p.tokens <= sms / 2;
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
