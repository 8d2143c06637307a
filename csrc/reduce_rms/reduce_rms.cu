// A team of warps takes a token: it adds up the squares of its columns, sends the sums to every rank, adds up what all ranks
// sent in rank order, and scales the row, which it still holds in registers.
#include <cuda_runtime.h>

#include <limits>

#include "common/half.cuh"
#include "peer/device.cuh"
#include "reduce_rms/kernels.h"

namespace abiding::reduce_rms {
namespace {

using peer::Peers;

constexpr int kTableBlocks = 16;  // so few that those of 8 ranks fit on one GPU
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// A token's sum of squares travels as one word, and as two words where it has two parts. Lane l of a warp has part l / 16
// and exchanges it with rank l % 16.
static_assert(peer::kMaxRanks == 16);
struct Lane {
  int part, rank;
  __device__ __forceinline__ explicit Lane(unsigned lane)
      : part(static_cast<int>(lane / 16)), rank(static_cast<int>(lane % 16)) {}
};

// Exchange over a communicator's workspaces.
template <int kParts>
class WorkspaceLink {
 public:
  __device__ __forceinline__ WorkspaceLink(const Peers& peers, Lane lane)
      : peers_(peers),
        lane_(lane),
        turn_(peers, peer::kScalars, kParts == 2 ? peer::Op::kQkNorm : peer::Op::kRmsNorm) {}
  __device__ __forceinline__ int ranks() const { return peers_.ranks; }
  __device__ __forceinline__ void begin() { turn_.begin(); }

  // Where the words of the block's token `index` lie in even epochs. It takes a while, in which what was loaded arrives.
  __device__ __forceinline__ void find_places(int index) {
    const int other = exchanges() ? lane_.rank : peers_.rank;  // lanes that exchange nothing have places too, unused
    const int distance = other >= peers_.rank ? other - peers_.rank : other - peers_.rank + peers_.ranks;
    const int word = index * kParts + lane_.part;
    to_ = turn_.template even_place<uint32_t>(peer::kScalars, distance, peers_.rank) + word;
    from_ = turn_.template even_place<uint32_t>(peer::kScalars, 0, other) + word;
    asm volatile("" : "+l"(to_), "+l"(from_));
  }
  __device__ __forceinline__ void go_to_epoch() {
    to_ += turn_.slot() / static_cast<int64_t>(sizeof *to_);
    from_ += turn_.slot() / static_cast<int64_t>(sizeof *from_);
    asm volatile("" : "+l"(to_), "+l"(from_));
  }
  // So many tokens on.
  __device__ __forceinline__ void advance(int tokens) {
    to_ += tokens * kParts;
    from_ += tokens * kParts;
  }

  // The sum of rank l % 16, 0 where there is none such; `own` is that of this rank.
  __device__ __forceinline__ float exchange(int64_t /*token*/, float own) {
    if (!turn_.ok()) return kNan;
    if (!exchanges()) return lane_.rank == peers_.rank ? own : 0.0f;
    peer::store_volatile(to_, peer::encode(__float_as_uint(own)));
    uint32_t word = peer::load_volatile(from_);
    return turn_.receive(from_, word, lane_.rank) ? __uint_as_float(peer::decode(word)) : kNan;
  }
  __device__ __forceinline__ void end() { turn_.end(); }

 private:
  __device__ __forceinline__ bool exchanges() const {
    return lane_.rank != peers_.rank && lane_.rank < peers_.ranks && lane_.part < kParts;
  }

  const Peers& peers_;
  Lane lane_;
  peer::Turn turn_;
  uint32_t *to_ = nullptr, *from_ = nullptr;
};

// Exchange over upstream's table. It has one epoch for the whole grid, which the last block to finish moves on.
template <int kParts>
class TableLink {
 public:
  __device__ __forceinline__ TableLink(const TableParams& table, Lane lane) : table_(table), lane_(lane) {}
  __device__ __forceinline__ void begin() {
    slot_bytes_ = static_cast<uint32_t>(static_cast<const int64_t*>(table_.pointers[3 * table_.ranks + 1])[1]);
    share_bytes_ = slot_bytes_ / table_.ranks / 16 * 16;
    epoch_ = peer::load_volatile(&counters()[2]);
  }
  __device__ __forceinline__ int ranks() const { return table_.ranks; }
  __device__ __forceinline__ void find_places(int /*index*/) {}
  __device__ __forceinline__ void go_to_epoch() {}
  __device__ __forceinline__ void advance(int /*tokens*/) {}

  __device__ __forceinline__ float exchange(int64_t token, float own) {
    if (lane_.rank >= table_.ranks || lane_.part >= kParts) return 0.0f;
    if (lane_.rank == table_.rank) return own;
    if (gave_up_ || (token + 1) * kParts * static_cast<int64_t>(sizeof own) > share_bytes_)
      return kNan;  // the table may have been made for fewer tokens
    const int64_t at = token * kParts + lane_.part;
    peer::store_volatile(place(lane_.rank, table_.rank) + at, peer::encode(__float_as_uint(own)) ^ kTableEmpty);
    uint32_t* from = place(table_.rank, lane_.rank) + at;
    uint32_t word = peer::load_volatile(from);
    uint64_t since = 0;
    for (int polls = peer::kPolls; word == kTableEmpty;) {
      if (--polls == 0) {
        polls = peer::kPolls;
        const uint64_t now = peer::now_ns();
        if (since == 0) since = now;
        if (now - since > table_.timeout_ns) {
          gave_up_ = true;
          return kNan;
        }
      }
      word = peer::load_volatile(from);
    }
    peer::store_volatile(from, kTableEmpty);
    return __uint_as_float(peer::decode(word ^ kTableEmpty));
  }

  __device__ __forceinline__ void end() {
    __syncthreads();
    if (!peer::leads_block() || atomicAdd(&counters()[0], 1u) != gridDim.x - 1) return;
    peer::store_volatile(&counters()[0], 0u);
    peer::store_volatile(&counters()[2], epoch_ + 1);
  }

 private:
  __device__ __forceinline__ uint32_t* place(int receiver, int source) const {
    auto* buffer = static_cast<uint8_t*>(table_.pointers[2 * table_.ranks + receiver]);
    return reinterpret_cast<uint32_t*>(buffer + epoch_ % peer::kSlots * slot_bytes_ + source * share_bytes_);
  }
  __device__ __forceinline__ uint32_t* counters() const {
    return static_cast<uint32_t*>(table_.pointers[3 * table_.ranks]);
  }

  const TableParams& table_;
  Lane lane_;
  uint32_t slot_bytes_ = 0, share_bytes_ = 0, epoch_ = 0;
  bool gave_up_ = false;
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
  __device__ __forceinline__ const P* weight(int i) const {
    const auto of = [&](int part) { return static_cast<const P*>(p.parts[part].weight); };
    return in_second(i) ? of(1) + (i - first) : of(0) + i;
  }
  __device__ __forceinline__ P* out(int64_t token, int i) const {
    const auto of = [&](int part) {
      return reinterpret_cast<P*>(static_cast<T*>(p.parts[part].out) + token * p.parts[part].width);
    };
    return in_second(i) ? of(1) + (i - first) : of(0) + i;
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

// Keeps the compiler from unpacking what is being loaded, and so waiting for it, before this.
__device__ __forceinline__ void not_before(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }
template <class Element>
__device__ __forceinline__ void not_before(Element*& at) {
  asm volatile("" : "+l"(at));
}
template <class Element>
__device__ __forceinline__ void not_before(Element&) {}

// A team is a row of the block's threads. Where each has one token they wait for each other, since the block's own barrier takes
// least time. Where they go through several, each goes at its own pace.
template <bool kOnce>
__device__ __forceinline__ void team_barrier() {
  if constexpr (kOnce)
    __syncthreads();
  else if (blockDim.x == 32)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
}

template <int kParts>
struct SharedSums {
  float of_warps[kMaxBlockWarps][kParts];
  float scales[kMaxBlockWarps][kParts];  // of teams
};

// From a thread's sums of squares to the team's scales. A team that is not busy has no token, and waits at the barriers alone.
template <bool kOnce, int kParts, class Link>
__device__ __forceinline__ void find_scales(SharedSums<kParts>& shared, Link& link, Lane own,
                                            const float (&sums)[kParts], int64_t token, bool busy, float inverse_width,
                                            float eps) {
  const int warps = blockDim.x / 32, part = own.part < kParts ? own.part : 0;
  float (*of_warps)[kParts] = shared.of_warps + threadIdx.y * warps;
  // Over a warp: each half of it takes its own part.
  float sum = sums[0];
  float others = sums[0];
  if constexpr (kParts == 2) (own.part == 0 ? others : sum) = sums[1];
  sum += __shfl_xor_sync(~0u, others, 16);
#pragma unroll
  for (int mask = 8; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  if (own.rank == 0 && own.part < kParts) of_warps[threadIdx.x / 32][own.part] = sum;
  team_barrier<kOnce>();
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
    if constexpr (kOnce) launch_dependents();
    float total = 0;
    int from = 0;
#pragma unroll 1
    do {  // beyond the ranks there is a zero
#pragma unroll
      for (int r = 0; r < 2; ++r) total += __shfl_sync(~0u, theirs, from++, 16);
    } while (from < link.ranks());
    if (own.rank == 0 && own.part < kParts) shared.scales[threadIdx.y][own.part] = rsqrtf(total * inverse_width + eps);
  }
  team_barrier<kOnce>();
}

template <class T, bool kVector, int kParts, int kPacks, bool kOnce, class Link, class Peer>
__device__ __forceinline__ void normalise(const Peer& peer, const ReduceRmsParams& p) {
  using P = Pack<T, kVector>;
  __shared__ SharedSums<kParts> shared;
  const int thread = threadIdx.x, threads = blockDim.x, team = threadIdx.y, teams = blockDim.y;
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
  constexpr bool kEarly = kOnce && kPacks <= 2;  // of more packs, registers have no room for the weights
  P held[kPacks ? kPacks : 1], weights[kPacks ? kPacks : 1];
  int64_t token = int64_t{blockIdx.x} * teams + team;
  const bool busy = token < p.tokens;
  const P* first = columns.input(token) + thread;
  const auto load = [&] {
    for_packs([&](int c, int i) { held[c] = kOnce && c == 0 ? *first : columns.input(token)[i]; });
  };
  const auto load_weights = [&] { for_packs([&](int c, int i) { weights[c] = *columns.weight(i); }); };

  wait_for_earlier_grids(first);
  if (kPacks > 0 && busy) load();
  // What follows, up to the first use of the row, takes no longer than the row takes to come.
  const Lane own(threadIdx.x % 32);
  Link link(peer, own);
  link.begin();
  if (kEarly && busy) load_weights();
  link.find_places(team);
  const float inverse_width = p.parts[own.part < kParts ? own.part : 0].inverse_full_width;
  P* out = columns.out(token, thread);
  not_before(out);
  if constexpr (kOnce)
    for (P& pack : held) not_before(pack);
  link.go_to_epoch();

  const auto normalise_token = [&] {
    float sums[kParts] = {};
    if (!kOnce || busy) {
      for_packs([&](int c, int i) {
        if constexpr (kPacks == 0) held[c] = columns.input(token)[i];
        const float sum = sum_of_squares<T, kVector>(held[c]);
        sums[0] += columns.in_second(i) ? 0.0f : sum;
        if constexpr (kParts == 2) sums[1] += columns.in_second(i) ? sum : 0.0f;
      });
    }
    find_scales<kOnce>(shared, link, own, sums, token, busy, inverse_width, p.eps);
    if (kOnce && !busy) return;
    if constexpr (kOnce && !kEarly) load_weights();
    if constexpr (kOnce)
      for (P& pack : weights) not_before(pack);
    for_packs([&](int c, int i) {
      if constexpr (kPacks == 0) held[c] = columns.input(token)[i];
      if constexpr (!kOnce) weights[c] = *columns.weight(i);
      *(kOnce && c == 0 ? out : columns.out(token, i)) =
          scaled<T, kVector>(held[c], weights[c], shared.scales[team][columns.in_second(i)]);
    });
  };
  if constexpr (kOnce) {
    normalise_token();
  } else {
    while (token < p.tokens) {
      normalise_token();
      token += int64_t{gridDim.x} * teams;
      link.advance(teams);
      if (kPacks > 0 && token < p.tokens) load();
    }
    // A team that waited for nobody does not know that the other ranks' blocks run, which the next kernel could keep from it.
    if (busy) launch_dependents();
  }
  link.end();
}

template <class T, bool kVector, int kParts, int kPacks, bool kOnce>
__global__ void __launch_bounds__(32 * kMaxBlockWarps, 1)
    reduce_rms_kernel(const __grid_constant__ ReduceRmsParams p, const __grid_constant__ Peers peers) {
  normalise<T, kVector, kParts, kPacks, kOnce, WorkspaceLink<kParts>>(peers, p);
}

template <class T, bool kVector, int kParts, int kPacks, bool kOnce>
__global__ void __launch_bounds__(32 * kMaxBlockWarps, 1)
    reduce_rms_table_kernel(const __grid_constant__ ReduceRmsParams p, const __grid_constant__ TableParams table) {
  normalise<T, kVector, kParts, kPacks, kOnce, TableLink<kParts>>(table, p);
}

template <class T, bool kVector, int kParts, int kPacks, bool kOnce>
constexpr auto kernel_for(const Peers&) {
  return reduce_rms_kernel<T, kVector, kParts, kPacks, kOnce>;
}
template <class T, bool kVector, int kParts, int kPacks, bool kOnce>
constexpr auto kernel_for(const TableParams&) {
  return reduce_rms_table_kernel<T, kVector, kParts, kPacks, kOnce>;
}

// `link` is what the kernel exchanges over: Peers or TableParams.
template <class T, bool kVector, int kParts, class Link>
cudaError_t launch_parts(const Link& link, ReduceRmsParams p, int max_blocks, cudaStream_t stream) {
  for (int part = 0; part < kParts; ++part) {
    const int64_t width = p.parts[part].width;
    p.packs[part] = static_cast<int>(width / kElements<T, kVector>);
    p.parts[part].inverse_full_width = 1.0f / static_cast<float>(width * link.ranks);
  }
  int64_t packs = 0;
  for (int part = 0; part < kParts; ++part) packs += (p.parts[part].width * static_cast<int64_t>(sizeof(T)) + 15) / 16;
  const Shape shape = choose_shape(packs, p.tokens, max_blocks);
  const int64_t blocks = (p.tokens + shape.teams - 1) / shape.teams;
  const auto grid = static_cast<unsigned>(blocks < max_blocks ? blocks : max_blocks);
  Launch how{grid, static_cast<unsigned>(32 * shape.team)};
  how.block_rows = static_cast<unsigned>(shape.teams);
  const auto run = [&](auto kernel) { return launch(kernel, how, stream, p, link); };
  if constexpr (kVector) {
    if (shape.packs_a_thread == 1) return run(kernel_for<T, true, kParts, 1, true>(link));
    if (shape.packs_a_thread == 2) return run(kernel_for<T, true, kParts, 2, true>(link));
    if (shape.packs_a_thread == 4)
      return run(shape.once ? kernel_for<T, true, kParts, 4, true>(link) : kernel_for<T, true, kParts, 4, false>(link));
  }
  return run(kernel_for<T, kVector, kParts, 0, false>(link));
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
