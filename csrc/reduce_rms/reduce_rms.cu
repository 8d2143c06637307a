// A team of warps takes a token: it adds up the squares of its columns, sends the sums to every rank, adds up what all ranks
// sent in rank order, and scales the row, which it still holds in registers.
#include <cuda_runtime.h>

#include "common/half.cuh"
#include "peer/device.cuh"
#include "reduce_rms/kernels.h"

namespace abiding::reduce_rms {
namespace {

using peer::Peers;

constexpr int kTableBlocks = 16;  // so few that those of 8 ranks fit on one GPU

// The sums of squares of a token's parts, as they travel.
template <int kParts>
struct Sums;
template <>
struct Sums<1> {
  using Words = uint32_t;
  static __device__ __forceinline__ Words pack(const float (&s)[1]) { return __float_as_uint(s[0]); }
  static __device__ __forceinline__ void unpack(Words w, float (&s)[1]) { s[0] = __uint_as_float(w); }
};
template <>
struct Sums<2> {
  using Words = uint2;
  static __device__ __forceinline__ Words pack(const float (&s)[2]) {
    return {__float_as_uint(s[0]), __float_as_uint(s[1])};
  }
  static __device__ __forceinline__ void unpack(Words w, float (&s)[2]) {
    s[0] = __uint_as_float(w.x);
    s[1] = __uint_as_float(w.y);
  }
};

__device__ __forceinline__ uint32_t encode(uint32_t w) { return peer::encode(w); }
__device__ __forceinline__ uint2 encode(uint2 w) { return {peer::encode(w.x), peer::encode(w.y)}; }
__device__ __forceinline__ uint32_t flip(uint32_t w, uint32_t mask) { return w ^ mask; }
__device__ __forceinline__ uint2 flip(uint2 w, uint32_t mask) { return {w.x ^ mask, w.y ^ mask}; }

// Exchange over a communicator's workspaces.
class WorkspaceLink {
 public:
  __device__ __forceinline__ WorkspaceLink(const Peers& peers, peer::Op op)
      : peers_(peers), turn_(peers, peer::kScalars, op) {}
  __device__ __forceinline__ int rank() const { return peers_.rank; }
  __device__ __forceinline__ int ranks() const { return peers_.ranks; }
  __device__ __forceinline__ bool ok() const { return turn_.ok(); }

  // Lane i of a warp sends to rank (rank + i) % ranks and receives from it; `index` counts the block's tokens.
  template <class Words>
  __device__ __forceinline__ Words exchange(int lane, int index, int64_t /*token*/, Words own) {
    if (lane == 0 || lane >= peers_.ranks) return own;
    const int from = peer::rank_after(peers_.rank, lane, peers_.ranks);
    peer::store_volatile(turn_.place<Words>(peer::kScalars, lane, peers_.rank) + index, encode(own));
    Words* place = turn_.place<Words>(peer::kScalars, 0, from) + index;
    Words words = peer::load_volatile(place);
    turn_.receive(place, words, from);
    return flip(words, ~0u);
  }
  __device__ __forceinline__ void end() { turn_.end(); }

 private:
  const Peers& peers_;
  peer::Turn turn_;
};

// Exchange over upstream's table. It has one epoch for the whole grid, which the last block to finish moves on.
class TableLink {
 public:
  __device__ __forceinline__ explicit TableLink(const TableParams& table)
      : table_(table),
        slot_bytes_(static_cast<uint32_t>(static_cast<const int64_t*>(table.pointers[3 * table.ranks + 1])[1])),
        epoch_(peer::load_volatile(&counters()[2])) {}
  __device__ __forceinline__ int rank() const { return table_.rank; }
  __device__ __forceinline__ int ranks() const { return table_.ranks; }
  __device__ __forceinline__ bool ok() const { return ok_; }

  template <class Words>
  __device__ __forceinline__ Words exchange(int lane, int /*index*/, int64_t token, Words own) {
    if (lane == 0 || lane >= table_.ranks) return own;
    const int peer = peer::rank_after(table_.rank, lane, table_.ranks);
    if ((token + 1) * static_cast<int64_t>(sizeof(Words)) > slot_bytes_ / table_.ranks) {
      ok_ = false;  // the table was made for fewer tokens
      return own;
    }
    peer::store_volatile(place<Words>(peer, table_.rank) + token, flip(encode(own), kTableEmpty));
    Words* from = place<Words>(table_.rank, peer) + token;
    Words words = flip(peer::load_volatile(from), kTableEmpty);
    uint64_t since = 0;
    for (uint32_t polls = 1; peer::has_empty(words); ++polls) {
      if (polls % 1024 == 0) {
        const uint64_t now = peer::now_ns();
        if (since == 0) since = now;
        if (now - since > table_.timeout_ns) {
          ok_ = false;
          return own;
        }
      }
      words = flip(peer::load_volatile(from), kTableEmpty);
    }
    peer::store_volatile(from, flip(Words{}, kTableEmpty));
    return flip(words, ~0u);
  }

  __device__ __forceinline__ void end() {
    __syncthreads();
    if (threadIdx.x != 0 || atomicAdd(&counters()[0], 1u) != gridDim.x - 1) return;
    peer::store_volatile(&counters()[0], 0u);
    peer::store_volatile(&counters()[2], epoch_ + 1);
  }

 private:
  template <class Words>
  __device__ __forceinline__ Words* place(int receiver, int source) const {
    auto* buffer = static_cast<uint8_t*>(table_.pointers[2 * table_.ranks + receiver]);
    return reinterpret_cast<Words*>(buffer + epoch_ % peer::kSlots * slot_bytes_ +
                                    source * (slot_bytes_ / table_.ranks / 16 * 16));
  }

  __device__ __forceinline__ uint32_t* counters() const {
    return static_cast<uint32_t*>(table_.pointers[3 * table_.ranks]);
  }

  const TableParams& table_;
  uint32_t slot_bytes_;
  uint32_t epoch_;
  bool ok_ = true;
};

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

// Pack i of a token's parts, counted through all of them. Both parts' addresses are at hand, so that choosing is one instruction.
template <class T, bool kVector, int kParts>
struct Row {
  using P = Pack<T, kVector>;
  const P* input[kParts];
  const P* weights[kParts];
  P* out[kParts];
  int first;  // packs of part 0
  int packs;  // of all parts

  __device__ __forceinline__ Row(const ReduceRmsParams& p, int64_t token) : packs(0) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const Part& from = p.parts[part];
      input[part] = reinterpret_cast<const P*>(static_cast<const T*>(from.input) + token * from.input_stride);
      weights[part] = static_cast<const P*>(from.weight);
      out[part] = reinterpret_cast<P*>(static_cast<T*>(from.out) + token * from.width);
      const int size = static_cast<int>(from.width / kElements<T, kVector>);
      if (part == 0) first = size;
      packs += size;
    }
  }
  __device__ __forceinline__ bool in_second(int i) const { return kParts == 2 && i >= first; }
  template <class Pointer>
  __device__ __forceinline__ Pointer at(const Pointer (&parts)[kParts], int i) const {
    return in_second(i) ? parts[kParts - 1] + (i - first) : parts[0] + i;
  }
  __device__ __forceinline__ P load(int i) const { return *at(input, i); }
  __device__ __forceinline__ P weight(int i) const { return *at(weights, i); }
  __device__ __forceinline__ void store(int i, const P& pack) const { *at(out, i) = pack; }
};

// A barrier among the threads of a team; barrier 0 is the block's.
template <int kTeam>
__device__ __forceinline__ void team_barrier(int team) {
  if constexpr (kTeam == 1)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(32 * kTeam) : "memory");
}

template <class T, bool kVector, int kParts, int kTeam, class Link>
__device__ __forceinline__ void normalise_tokens(Link& link, const ReduceRmsParams& p) {
  constexpr int kThreads = 32 * kTeam, kN = kElements<T, kVector>;
  using P = Pack<T, kVector>;
  using Words = typename Sums<kParts>::Words;
  __shared__ float partial[kMaxBlockWarps][kParts];
  __shared__ float scales[kMaxBlockWarps / kTeam][kParts];
  const int teams = blockDim.x / kThreads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / kTeam, thread = threadIdx.x % kThreads;

  int index = team;  // of the token within the block's share
  for (int64_t token = int64_t{blockIdx.x} * teams + team; token < p.tokens;
       token += int64_t{gridDim.x} * teams, index += teams) {
    const Row<T, kVector, kParts> row(p, token);
    P cached[kCachedPacks], weight;
    float sums[kParts] = {};
    const auto add = [&](int i, const P& pack) {
      float x[kN];
      to_floats<T, kVector>(pack, x);
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kN; ++j) sum = fmaf(x[j], x[j], sum);
      sums[0] += row.in_second(i) ? 0.0f : sum;
      if constexpr (kParts == 2) sums[1] += row.in_second(i) ? sum : 0.0f;
    };
#pragma unroll
    for (int c = 0; c < kCachedPacks; ++c)
      if (thread + c * kThreads < row.packs) cached[c] = row.load(thread + c * kThreads);
#pragma unroll
    for (int c = 0; c < kCachedPacks; ++c)
      if (thread + c * kThreads < row.packs) add(thread + c * kThreads, cached[c]);
    for (int i = thread + kCachedPacks * kThreads; i < row.packs; i += kThreads) add(i, row.load(i));
    if (thread < row.packs) weight = row.weight(thread);  // on its way while the sums travel

#pragma unroll
    for (int part = 0; part < kParts; ++part)
#pragma unroll
      for (int mask = 16; mask; mask /= 2) sums[part] += __shfl_xor_sync(~0u, sums[part], mask);
    if constexpr (kTeam > 1) {
      if (lane == 0)
#pragma unroll
        for (int part = 0; part < kParts; ++part) partial[warp][part] = sums[part];
      team_barrier<kTeam>(team);
    }
    if (warp % kTeam == 0) {
      if constexpr (kTeam > 1) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          sums[part] = partial[warp + lane % kTeam][part];
#pragma unroll
          for (int mask = kTeam / 2; mask; mask /= 2) sums[part] += __shfl_xor_sync(~0u, sums[part], mask);
        }
      }
      float inverse[kParts];  // of the full width
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        inverse[part] = 1.0f / static_cast<float>(p.parts[part].width * link.ranks());
      const Words words = link.exchange(lane, index, token, Sums<kParts>::pack(sums));
      __syncwarp();
      const bool ok = __all_sync(~0u, link.ok());
      float theirs[kParts];
      Sums<kParts>::unpack(words, theirs);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float total = 0;
        for (int r = 0; r < link.ranks(); ++r) {
          const float sum =
              __shfl_sync(~0u, theirs[part], r >= link.rank() ? r - link.rank() : r - link.rank() + link.ranks());
          total = r == 0 ? sum : total + sum;
        }
        if (lane == 0) scales[team][part] = ok ? rsqrtf(total * inverse[part] + p.eps) : __uint_as_float(0x7FC00000);
      }
    }
    team_barrier<kTeam>(team);
    const auto scale = [&](int i, const P& pack, const P& by) {
      float x[kN], w[kN];
      to_floats<T, kVector>(pack, x);
      to_floats<T, kVector>(by, w);
      const float factor = scales[team][row.in_second(i)];
#pragma unroll
      for (int j = 0; j < kN; ++j) x[j] = x[j] * factor * w[j];
      row.store(i, from_floats<T, kVector>(x));
    };
#pragma unroll
    for (int c = 0; c < kCachedPacks; ++c)
      if (const int i = thread + c * kThreads; i < row.packs) scale(i, cached[c], c == 0 ? weight : row.weight(i));
    for (int i = thread + kCachedPacks * kThreads; i < row.packs; i += kThreads) scale(i, row.load(i), row.weight(i));
    if constexpr (kTeam > 1) team_barrier<kTeam>(team);  // before the next token's sums overwrite this one's
  }
}

template <class T, bool kVector, int kParts, int kTeam>
__global__ void __launch_bounds__(32 * kMaxBlockWarps, 1)
    reduce_rms_kernel(const __grid_constant__ Peers peers, const __grid_constant__ ReduceRmsParams p) {
  wait_for_earlier_grids();
  WorkspaceLink link(peers, kParts == 2 ? peer::Op::kQkNorm : peer::Op::kRmsNorm);
  normalise_tokens<T, kVector, kParts, kTeam>(link, p);
  link.end();
  launch_dependents();
}

template <class T, bool kVector, int kParts, int kTeam>
__global__ void __launch_bounds__(32 * kMaxBlockWarps, 1)
    reduce_rms_table_kernel(const __grid_constant__ TableParams table, const __grid_constant__ ReduceRmsParams p) {
  wait_for_earlier_grids();
  TableLink link(table);
  normalise_tokens<T, kVector, kParts, kTeam>(link, p);
  link.end();
  launch_dependents();
}

template <class T, bool kVector, int kParts, int kTeam>
constexpr auto kernel_for(const Peers&) {
  return reduce_rms_kernel<T, kVector, kParts, kTeam>;
}
template <class T, bool kVector, int kParts, int kTeam>
constexpr auto kernel_for(const TableParams&) {
  return reduce_rms_table_kernel<T, kVector, kParts, kTeam>;
}

// `link` is what the kernel exchanges over: Peers or TableParams.
template <class T, bool kVector, int kParts, class Link>
cudaError_t launch_parts(const Link& link, const ReduceRmsParams& p, int max_blocks, cudaStream_t stream) {
  int64_t packs = 0;
  for (int part = 0; part < kParts; ++part) packs += p.parts[part].width / kElements<T, kVector>;
  const Shape shape = choose_shape(packs, p.tokens, max_blocks);
  const int64_t blocks = (p.tokens + shape.teams - 1) / shape.teams;
  const auto grid = static_cast<unsigned>(blocks < max_blocks ? blocks : max_blocks);
  const auto threads = static_cast<unsigned>(32 * shape.team * shape.teams);
  const auto run = [&](auto kernel) { return launch(kernel, Launch{grid, threads}, stream, link, p); };
  switch (shape.team) {
    case 1: return run(kernel_for<T, kVector, kParts, 1>(link));
    case 2: return run(kernel_for<T, kVector, kParts, 2>(link));
    case 4: return run(kernel_for<T, kVector, kParts, 4>(link));
    case 8: return run(kernel_for<T, kVector, kParts, 8>(link));
    default: return run(kernel_for<T, kVector, kParts, 16>(link));
  }
}

// 16-byte accesses where every row of every part allows them.
template <class T>
bool vectorised(const ReduceRmsParams& p) {
  constexpr int64_t kStep = 16 / sizeof(T);
  for (int i = 0; i < p.part_count; ++i) {
    const Part& part = p.parts[i];
    const auto addresses = reinterpret_cast<uintptr_t>(part.input) | reinterpret_cast<uintptr_t>(part.weight) |
                           reinterpret_cast<uintptr_t>(part.out);
    if (addresses % 16 || part.width % kStep || part.input_stride % kStep) return false;
  }
  return true;
}

template <class T, class Link>
cudaError_t launch_type(const Link& link, const ReduceRmsParams& p, int max_blocks, cudaStream_t stream) {
  if (vectorised<T>(p))
    return p.part_count == 1 ? launch_parts<T, true, 1>(link, p, max_blocks, stream)
                             : launch_parts<T, true, 2>(link, p, max_blocks, stream);
  return p.part_count == 1 ? launch_parts<T, false, 1>(link, p, max_blocks, stream)
                           : launch_parts<T, false, 2>(link, p, max_blocks, stream);
}

template <class Link>
cudaError_t launch_link(const Link& link, const ReduceRmsParams& p, int max_blocks, cudaStream_t stream) {
  switch (p.type) {
    case Type::kFloat32: return launch_type<float>(link, p, max_blocks, stream);
    case Type::kFloat16: return launch_type<__half>(link, p, max_blocks, stream);
    case Type::kBfloat16: break;
  }
  return launch_type<__nv_bfloat16>(link, p, max_blocks, stream);
}

}  // namespace

cudaError_t reduce_rms(const Peers& peers, const ReduceRmsParams& p, cudaStream_t stream) {
  return launch_link(peers, p, peers.blocks, stream);
}

cudaError_t reduce_rms_table(const TableParams& table, const ReduceRmsParams& p, cudaStream_t stream) {
  return launch_link(table, p, kTableBlocks, stream);
}

}  // namespace abiding::reduce_rms
