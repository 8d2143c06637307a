// A team of warps takes a token: it adds up the squares of its columns, sends the sums to every rank, adds up what all ranks
// sent in rank order, and scales the row, which it still holds. Of few tokens each has a team; of many, warps take one after
// another.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/vec16.cuh"
#include "reduce_rms/kernels.h"
#include "reduce_rms/links.cuh"

namespace abiding::reduce_rms {
namespace {

constexpr int kTableBlocks = 16;  // so few that those of 8 ranks fit on one GPU

template <class T, bool kVector>
using Pack = std::conditional_t<kVector, uint4, T>;

template <class T, bool kVector>
constexpr int kElements = kVector ? 16 / sizeof(T) : 1;

template <class T, bool kVector>
__device__ __forceinline__ void to_floats(const Pack<T, kVector>& pack, float (&x)[kElements<T, kVector>]) {
  if constexpr (!kVector)
    x[0] = static_cast<float>(pack);
  else if constexpr (sizeof(T) == 4)
    memcpy(x, &pack, 16);
  else
    unpack<T>(pack, x);
}

template <class T, bool kVector>
__device__ __forceinline__ Pack<T, kVector> from_floats(const float (&x)[kElements<T, kVector>]) {
  if constexpr (!kVector) {
    return static_cast<T>(x[0]);
  } else if constexpr (sizeof(T) == 4) {
    uint4 pack;
    memcpy(&pack, x, 16);
    return pack;
  } else {
    return pack<T>(x);
  }
}

// Where pack i of a token lies, counted through all its parts. Their addresses are all at hand, so that choosing is one instruction.
template <class T, bool kVector, int kParts>
struct Columns {
  using P = Pack<T, kVector>;
  const ReduceRmsParams& p;
  int first;  // packs of part 0
  int packs;  // of all parts

  __device__ __forceinline__ explicit Columns(const ReduceRmsParams& p)
      : p(p), first(p.packs[0]), packs(kParts == 2 ? first + p.packs[1] : first) {}

  __device__ __forceinline__ bool in_second(int i) const { return kParts == 2 && i >= first; }
  __device__ __forceinline__ const P* input(int64_t token) const {
    return reinterpret_cast<const P*>(static_cast<const T*>(p.input) + token * p.input_stride);
  }
  __device__ __forceinline__ const P* weight_of(int part) const { return static_cast<const P*>(p.parts[part].weight); }
  __device__ __forceinline__ const P* weight(int i) const {
    return in_second(i) ? weight_of(1) + (i - first) : weight_of(0) + i;
  }
  __device__ __forceinline__ P* out_of(int64_t token, int part) const {
    return reinterpret_cast<P*>(static_cast<T*>(p.parts[part].out) + token * p.parts[part].width);
  }
  __device__ __forceinline__ P* out(int64_t token, int i) const {
    return in_second(i) ? out_of(token, 1) + (i - first) : out_of(token, 0) + i;
  }
};

template <class T, bool kVector>
__device__ __forceinline__ float sum_of_squares(const Pack<T, kVector>& pack) {
  constexpr int kN = kElements<T, kVector>;
  float x[kN], sum = 0;
  to_floats<T, kVector>(pack, x);
#pragma unroll
  for (int j = 0; j < kN; ++j) sum = fmaf(x[j], x[j], sum);
  return sum;
}

template <class T, bool kVector>
__device__ __forceinline__ Pack<T, kVector> scaled(const Pack<T, kVector>& pack, const Pack<T, kVector>& weight,
                                                   float factor) {
  constexpr int kN = kElements<T, kVector>;
  float x[kN], w[kN];
  to_floats<T, kVector>(pack, x);
  to_floats<T, kVector>(weight, w);
#pragma unroll
  for (int j = 0; j < kN; ++j) x[j] = x[j] * factor * w[j];
  return from_floats<T, kVector>(x);
}

__device__ __forceinline__ void copy_async(uint4* to, const uint4* from) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
}
// Of this thread.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Keeps the compiler from unpacking what is being loaded, and so waiting for it, before this.
__device__ __forceinline__ void not_before(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
template <class Element>
__device__ __forceinline__ void not_before(Element*& at) {
  asm volatile("" : "+l"(at));
}
template <class Element>
__device__ __forceinline__ void not_before(Element&) {}

// Over a warp, each half of which takes its own part.
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

// Of what lanes l % 16 have from ranks l % 16.
template <class Link>
__device__ __forceinline__ float sum_over_ranks(const Link& link, float theirs) {
  float total = 0;
  int from = 0;
#pragma unroll 1
  do {  // beyond the ranks there is a zero
#pragma unroll
    for (int r = 0; r < 2; ++r) total += __shfl_sync(~0u, theirs, from++, 16);
  } while (from < link.ranks());
  return total;
}

template <int kParts>
struct SharedSums {
  float of_warps[kMaxBlockWarps][kParts];
  float scales[kMaxBlockWarps][kParts];  // of teams
};

// From a thread's sums of squares to the team's scales. A team that is not busy has no token, and waits at the barriers alone.
template <int kParts, class Link>
__device__ __forceinline__ void find_scales(SharedSums<kParts>& shared, Link& link, Lane own,
                                            const float (&sums)[kParts], int64_t token, bool busy, float inverse_width,
                                            float eps) {
  const int warps = blockDim.x / 32, part = own.part < kParts ? own.part : 0;
  float (*of_warps)[kParts] = shared.of_warps + threadIdx.y * warps;
  float sum = sum_over_warp<kParts>(sums, own);
  if (own.rank == 0 && own.part < kParts) of_warps[threadIdx.x / 32][own.part] = sum;
  __syncthreads();
  // Over the team's warps, of which the first one goes on.
  if (threadIdx.x < 32 && busy) {
    sum = own.rank < warps ? of_warps[own.rank][part] : 0.0f;
    if (own.rank + 16 < warps) sum += of_warps[own.rank + 16][part];
#pragma unroll
    for (int mask = 8; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    const float theirs = link.exchange(token, sum);
    __syncwarp();
    // The other ranks' same blocks run, so what other teams of this one wait for will come, and the next kernel may have the room
    // that is left. Any lane says so for the block.
    pdl_launch_dependents();
    const float total = sum_over_ranks(link, theirs);
    if (own.rank == 0 && own.part < kParts) shared.scales[threadIdx.y][own.part] = rsqrtf(total * inverse_width + eps);
  }
  __syncthreads();
}

template <class T, bool kVector, int kParts, int kPacks, class Peer>
__device__ __forceinline__ void normalise(const Peer& peer, const ReduceRmsParams& p) {
  using P = Pack<T, kVector>;
  __shared__ SharedSums<kParts> shared;
  const int thread = threadIdx.x, threads = blockDim.x, team = threadIdx.y;
  const Columns<T, kVector, kParts> columns(p);

  // Calls each(c, i) for the thread's packs, of which pack i is the c-th one.
  const auto for_packs = [&](auto each) {
    if constexpr (kPacks == 0) {
      for (int i = thread; i < columns.packs; i += threads) each(0, i);
    } else {
#pragma unroll
      for (int c = 0; c < kPacks; ++c)
        if (const int i = thread + c * threads; i < columns.packs) each(c, i);
    }
  };
  constexpr bool kEarly = 1 <= kPacks && kPacks <= 2;  // of more packs, registers have no room for the weights
  P held[kPacks ? kPacks : 1], weights[kPacks ? kPacks : 1];
  const int64_t token = int64_t{blockIdx.x} * blockDim.y + team;
  const bool busy = token < p.tokens;
  const P* first = columns.input(token) + thread;
  const auto load_weights = [&] { for_packs([&](int c, int i) { weights[c] = *columns.weight(i); }); };

  pdl_wait(first);
  if (kPacks > 0 && busy) for_packs([&](int c, int i) { held[c] = c == 0 ? *first : columns.input(token)[i]; });
  // What follows, up to the first use of the row, takes no longer than the row takes to come.
  const Lane own(threadIdx.x % 32);
  LinkOver<Peer, kParts> link(peer, own);
  link.begin();
  if (kEarly && busy) load_weights();
  link.find_places(team);
  const float inverse_width = p.parts[own.part < kParts ? own.part : 0].inverse_full_width;
  P* out = columns.out(token, thread);
  not_before(out);
  for (P& pack : held) not_before(pack);
  link.go_to_epoch();

  float sums[kParts] = {};
  if (busy) {
    for_packs([&](int c, int i) {
      if constexpr (kPacks == 0) held[c] = columns.input(token)[i];
      const float sum = sum_of_squares<T, kVector>(held[c]);
      sums[0] += columns.in_second(i) ? 0.0f : sum;
      if constexpr (kParts == 2) sums[1] += columns.in_second(i) ? sum : 0.0f;
    });
  }
  find_scales(shared, link, own, sums, token, busy, inverse_width, p.eps);
  if (busy) {
    if constexpr (kPacks > 0 && !kEarly) load_weights();
    for (P& pack : weights) not_before(pack);
    for_packs([&](int c, int i) {
      if constexpr (kPacks == 0) held[c] = columns.input(token)[i], weights[c] = *columns.weight(i);
      *(kPacks > 0 && c == 0 ? out : columns.out(token, i)) =
          scaled<T, kVector>(held[c], weights[c], shared.scales[team][columns.in_second(i)]);
    });
  }
  link.end();
}

// Calls load(u, i) and then use(u, i) for a lane's packs i of `count`, a batch at a time, so that what is loaded comes at once.
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

// Of many tokens each warp takes one after another, and holds its row in shared memory, or reads it twice. It waits for no other
// warp.
template <class T, bool kVector, int kParts, bool kHold, class Peer>
__device__ __forceinline__ void normalise_stream(const Peer& peer, const ReduceRmsParams& p) {
  using P = Pack<T, kVector>;
  extern __shared__ uint4 rows[];
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const Columns<T, kVector, kParts> columns(p);
  const int tokens = static_cast<int>(p.tokens), step = static_cast<int>(gridDim.x) * warps;
  int token = static_cast<int>(blockIdx.x) * warps + warp;
  const bool busy = token < tokens;
  const Lane own(lane);
  const float inverse_width = p.parts[own.part < kParts ? own.part : 0].inverse_full_width;

  pdl_wait();
  LinkOver<Peer, kParts> link(peer, own);
  link.begin();
  link.find_places(warp);
  link.go_to_epoch();
  for (; token < tokens; token += step) {
    const P* row = columns.input(token);
    if constexpr (kHold) {
      uint4* held = rows + warp * columns.packs;
      __syncwarp();  // lanes read what others copied
      for (int i = lane; i < columns.packs; i += 32) copy_async(held + i, row + i);
      wait_for_copies();
      __syncwarp();
      row = held;
    }
    constexpr int kBatch = kHold ? 4 : 2;  // as registers have room
    P packs_of_row[kBatch], weights[kBatch];
    float sums[kParts] = {};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const P* from = row + (part ? columns.first : 0);
      in_batches<kBatch>(
          lane, p.packs[part], [&](int u, int i) { packs_of_row[u] = from[i]; },
          [&](int u, int) { sums[part] += sum_of_squares<T, kVector>(packs_of_row[u]); });
    }
    const float theirs = link.exchange(token, sum_over_warp<kParts>(sums, own));
    __syncwarp();
    const float scale = rsqrtf(sum_over_ranks(link, theirs) * inverse_width + p.eps);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float factor = __shfl_sync(~0u, scale, 16 * part);
      const P* from = row + (part ? columns.first : 0);
      const P* weight = columns.weight_of(part);
      P* out = columns.out_of(token, part);
      in_batches<kBatch>(
          lane, p.packs[part], [&](int u, int i) { packs_of_row[u] = from[i], weights[u] = weight[i]; },
          [&](int u, int i) { out[i] = scaled<T, kVector>(packs_of_row[u], weights[u], factor); });
    }
    link.advance(warps);
  }
  // A warp that waited for nobody does not know that the other ranks' blocks run, which the next kernel could keep from it.
  if (busy) pdl_launch_dependents();
  link.end();
}

template <class T, bool kVector, int kParts, int kPacks, class Peer>
__global__ void __launch_bounds__(32 * kMaxBlockWarps, 1)
    reduce_rms_kernel(const __grid_constant__ ReduceRmsParams p, const __grid_constant__ Peer peer) {
  if constexpr (kPacks < 0)
    normalise_stream<T, kVector, kParts, kPacks == kHeldRow>(peer, p);
  else
    normalise<T, kVector, kParts, kPacks>(peer, p);
}

// A token has two words at most in a block's share. A table's size is known on the device alone; here it is that int counts.
int64_t tokens_of_a_block(const Peers& peers) { return peers.shares[peer::kScalars] / (2 * sizeof(float)); }
int64_t tokens_of_a_block(const TableParams&) { return std::numeric_limits<int>::max() / (2 * kTableBlocks); }

// `peer` is what the kernels exchange over: Peers or TableParams.
template <class T, bool kVector, int kParts, class Peer>
cudaError_t launch_parts(const Peer& peer, ReduceRmsParams p, int max_blocks, cudaStream_t stream) {
  for (int part = 0; part < kParts; ++part) {
    const int64_t width = p.parts[part].width;
    p.packs[part] = static_cast<int>(width / kElements<T, kVector>);
    p.parts[part].inverse_full_width = 1.0f / static_cast<float>(width * peer.ranks);
  }
  int64_t packs = 0;
  for (int part = 0; part < kParts; ++part) packs += (p.parts[part].width * static_cast<int64_t>(sizeof(T)) + 15) / 16;
  int memory = 0;
  if (const cudaError_t status = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &memory)) return status;
  const auto kernel_of = [&](const Shape& shape) {
    if constexpr (kVector) {
      switch (shape.packs_a_thread) {
        case 1: return reduce_rms_kernel<T, true, kParts, 1, Peer>;
        case 2: return reduce_rms_kernel<T, true, kParts, 2, Peer>;
        case 4: return reduce_rms_kernel<T, true, kParts, 4, Peer>;
        case kHeldRow: return reduce_rms_kernel<T, true, kParts, kHeldRow, Peer>;
      }
    }
    return shape.streams() ? reduce_rms_kernel<T, kVector, kParts, kReadTwice, Peer>
                           : reduce_rms_kernel<T, kVector, kParts, 0, Peer>;
  };
  for (int64_t left = p.tokens; left > 0;) {
    const Shape shape = choose_shape(packs, left, max_blocks, memory);
    const int64_t rounds = shape.streams() ? tokens_of_a_block(peer) / shape.teams : 1;
    p.tokens = std::min(left, rounds * shape.teams * max_blocks);
    const int64_t blocks = std::min<int64_t>((p.tokens + shape.teams - 1) / shape.teams, max_blocks);
    LaunchConfig how{static_cast<unsigned>(blocks), static_cast<unsigned>(32 * shape.team)};
    how.block_y = static_cast<unsigned>(shape.teams);
    const auto kernel = kernel_of(shape);
    if (kVector && shape.packs_a_thread == kHeldRow) {
      how.smem_bytes = static_cast<size_t>(shape.teams * packs * 16);
      // The same for all calls: it is the kernel's, and another thread's call may stand between this and the launch.
      const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
      if (const cudaError_t status = cudaFuncSetAttribute(kernel, limit, memory)) return status;
    }
    if (const cudaError_t status = launch(kernel, how, stream, p, peer)) return status;
    p.input = static_cast<const T*>(p.input) + p.tokens * p.input_stride;
    for (int part = 0; part < kParts; ++part)
      p.parts[part].out = static_cast<T*>(p.parts[part].out) + p.tokens * p.parts[part].width;
    left -= p.tokens;
  }
  return cudaSuccess;
}

// 16-byte accesses where every row of every part allows them.
template <class T>
bool vectorised(const ReduceRmsParams& p) {
  constexpr int64_t kStep = 16 / sizeof(T);
  if (reinterpret_cast<uintptr_t>(p.input) % 16 || p.input_stride % kStep) return false;
  for (int i = 0; i < p.part_count; ++i) {
    const Part& part = p.parts[i];
    if ((reinterpret_cast<uintptr_t>(part.weight) | reinterpret_cast<uintptr_t>(part.out)) % 16) return false;
    if (part.width % kStep) return false;
  }
  return true;
}

template <class T, class Peer>
cudaError_t launch_type(const Peer& peer, const ReduceRmsParams& p, int max_blocks, cudaStream_t stream) {
  if (vectorised<T>(p))
    return p.part_count == 1 ? launch_parts<T, true, 1>(peer, p, max_blocks, stream)
                             : launch_parts<T, true, 2>(peer, p, max_blocks, stream);
  return p.part_count == 1 ? launch_parts<T, false, 1>(peer, p, max_blocks, stream)
                           : launch_parts<T, false, 2>(peer, p, max_blocks, stream);
}

template <class Peer>
cudaError_t launch_link(const Peer& peer, const ReduceRmsParams& p, int max_blocks, cudaStream_t stream) {
  return dispatch_floating(p.dtype,
                           [&](auto tag) { return launch_type<CudaType<decltype(tag)>>(peer, p, max_blocks, stream); });
}

}  // namespace

cudaError_t reduce_rms(const Peers& peers, const ReduceRmsParams& p, cudaStream_t stream) {
  return launch_link(peers, p, peers.blocks, stream);
}

cudaError_t reduce_rms_table(const TableParams& table, const ReduceRmsParams& p, cudaStream_t stream) {
  return launch_link(table, p, kTableBlocks, stream);
}

}  // namespace abiding::reduce_rms
