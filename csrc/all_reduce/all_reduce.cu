// Messages travel as packs of 16 bytes. A block owns a run of packs; a thread takes every blockDim-th of them, and the same ones
// in each step, so that threads need not wait for each other. Sums are float32 in rank order, rounded once.
#include <cuda_runtime.h>

#include <algorithm>

#include "all_reduce/kernels.h"
#include "common/vec16.cuh"
#include "peer/device.cuh"

namespace abiding::all_reduce {
namespace {

using peer::Peers;
using peer::Turn;

union Elements {
  uint4 pack;
  uint32_t words[4];
  uint16_t halves[8];
};

// The elements of a pack that exist, one by one.
template <int kSize>
__device__ __noinline__ uint4 load_elements(const void* from, int64_t count) {
  Elements e{};
  for (int j = 0; j < 16 / kSize && j < count; ++j) {
    if constexpr (kSize == 4)
      e.words[j] = static_cast<const uint32_t*>(from)[j];
    else
      e.halves[j] = static_cast<const uint16_t*>(from)[j];
  }
  return e.pack;
}
template <int kSize>
__device__ __noinline__ void store_elements(void* to, uint4 pack, int64_t count) {
  const Elements e{pack};
  for (int j = 0; j < 16 / kSize && j < count; ++j) {
    if constexpr (kSize == 4)
      static_cast<uint32_t*>(to)[j] = e.words[j];
    else
      static_cast<uint16_t*>(to)[j] = e.halves[j];
  }
}

// Packs of a message that may start anywhere and end within a pack.
template <class T, bool kAligned>
struct Message {
  static constexpr int kElements = 16 / sizeof(T);
  const T* input;
  T* out;
  int64_t numel;

  __device__ __forceinline__ bool whole(int64_t i) const { return kAligned && (i + 1) * kElements <= numel; }
  __device__ __forceinline__ const uint4* address(int64_t i) const { return reinterpret_cast<const uint4*>(input) + i; }
  __device__ __forceinline__ uint4 load(int64_t i) const {
    return whole(i) ? *address(i) : load_elements<sizeof(T)>(input + i * kElements, numel - i * kElements);
  }
  __device__ __forceinline__ void store(int64_t i, const uint4& pack) const {
    if (whole(i))
      reinterpret_cast<uint4*>(out)[i] = pack;
    else
      store_elements<sizeof(T)>(out + i * kElements, pack, numel - i * kElements);
  }
};

template <class T>
struct Sum {
  static constexpr int kElements = 16 / sizeof(T);
  float values[kElements];

  static __device__ __forceinline__ void convert(const uint4& pack, float (&x)[kElements]) {
    if constexpr (sizeof(T) == 4)
      memcpy(x, &pack, 16);
    else
      unpack<T>(pack, x);
  }
  __device__ __forceinline__ void add(const uint4& pack, bool first) {
    float more[kElements];
    convert(pack, more);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = first ? more[i] : values[i] + more[i];
  }
  __device__ __forceinline__ uint4 rounded() const {
    if constexpr (sizeof(T) == 4) {
      uint4 pack;
      memcpy(&pack, values, 16);
      return pack;
    } else {
      return pack<T>(values);
    }
  }
};

// What the output holds after a fault.
template <class T>
__device__ __forceinline__ uint4 nans() {
  uint32_t word = 0x7FC00000;
  if constexpr (sizeof(T) == 2) word = Vec2<T>::kNan | Vec2<T>::kNan << 16;
  return {word, word, word, word};
}

// Where no thread has more than one pack (kOnce), kernels are compiled apart, with as many threads as their registers allow.
// Elsewhere a thread has so many packs in flight that all ranks' words of them fit the registers.
template <int kRanks, bool kOnce>
constexpr int kMaxThreads = kOnce && kRanks == 2 ? 1024 : 512;
template <int kRanks, bool kAligned, bool kOnce>
constexpr int kUnroll = kAligned && !kOnce && (kRanks == 2 || kRanks == 4) ? 2 : 1;

// A block's share of `packs`, `each` packs to a block: `count` from `begin`.
struct Run {
  int64_t begin;
  int count;
  __device__ __forceinline__ Run(int64_t packs, int each)
      : begin(int64_t{each} * blockIdx.x), count(static_cast<int>(min(int64_t{each}, packs - begin))) {}
  // Has this thread a pack? One that has none waited for nobody: it does not know that the other ranks' blocks run, from which
  // the next kernel could keep the room. So it does not let that in; any thread's word counts for its block.
  __device__ __forceinline__ bool busy() const { return static_cast<int>(threadIdx.x) < count; }
};

// Calls each stage with k, the thread's packs of a run from the run's begin, kBatch at a time. A stage works on what the one
// before it did a step earlier: what is on its way to or from the peers then overlaps with adding up.
template <bool kOnce, int kBatch, class... Stages>
__device__ __forceinline__ void for_packs(const Run& run, Stages... stages) {
  int k = threadIdx.x;
  if constexpr (kOnce) {
    if (k < run.count) (stages(k), ...);
  } else {
    const int step = kBatch * static_cast<int>(blockDim.x);
    for (const int end = run.count + (sizeof...(Stages) - 1) * step; k < end; k += step) {
      int at = k + step;
      ((at -= step, 0 <= at && at < run.count ? stages(at) : void()), ...);
    }
  }
}

// So many ranks' words are awaited together. Where the number of ranks is not known, registers do not hold all.
template <int kRanks>
constexpr int kGroup = kRanks ? kRanks : 4;
// The numbers of ranks that loops go up to.
template <int kRanks>
constexpr int kMost = kRanks ? kRanks : peer::kMaxRanks;

// The sum of this rank's pack and the others' at place(rank). `words` are those of the first group, loaded just before.
template <class T, int kRanks, class Awaited, class Place>
__device__ __forceinline__ uint4 add_up(Turn& turn, const Peers& peers, uint4 (&words)[kGroup<kRanks>],
                                        const uint4& own, Awaited awaited, Place place) {
  const int ranks = kRanks ? kRanks : peers.ranks;
  Sum<T> sum;
#pragma unroll
  for (int first = 0; first < kMost<kRanks>; first += kGroup<kRanks>) {
    if (first >= ranks) break;
    if (first > 0) peer::load_awaited(words, first, awaited, place);
    turn.receive(words, first, awaited, place);
#pragma unroll
    for (int g = 0; g < kGroup<kRanks>; ++g)
      if (const int r = first + g; r < ranks) sum.add(r == peers.rank ? own : peer::decode(words[g]), r == 0);
  }
  return turn.ok() ? sum.rounded() : nans<T>();
}

// At most one pack a thread: all addresses are at hand when the kernel in front has ended.
template <class T, int kRanks>
__global__ void __launch_bounds__(kMaxThreads<kRanks, true>, 1)
    one_shot_once_kernel(const Message<T, true> message, int64_t packs, int each, const __grid_constant__ Peers peers) {
  const int ranks = kRanks ? kRanks : peers.ranks;
  const Run run(packs, each);
  const int64_t i = run.begin + threadIdx.x;
  const bool busy = run.busy(), whole = message.whole(i);
  Turn turn(peers, peer::kDirect, peer::Op::kAllReduce);
  const uint4* input = message.address(i);
  uint4 *to[kMost<kRanks>], *from[kMost<kRanks>];                    // of even epochs
  uintptr_t addresses = reinterpret_cast<uintptr_t>(input) | whole;  // `whole` too is to be known by then
#pragma unroll
  for (int r = 0; r < kMost<kRanks>; ++r) {
    if (r >= ranks) break;
    to[r] = turn.even_place<uint4>(peer::kDirect, r, peers.rank) + threadIdx.x;
    from[r] = turn.even_place<uint4>(peer::kDirect, 0, r) + threadIdx.x;
    addresses |= reinterpret_cast<uintptr_t>(to[r]) | reinterpret_cast<uintptr_t>(from[r]);
  }
  pdl_wait(addresses);
  uint4 own{};
  if (busy) own = whole ? *input : message.load(i);
  turn.begin();
  if (busy) {
    const uint4 wire = peer::encode(own);
    const int64_t slot = turn.slot() / static_cast<int64_t>(sizeof own);
#pragma unroll
    for (int r = 1; r < kMost<kRanks>; ++r) {
      if (r >= ranks) break;
      peer::store_volatile(to[r] + slot, wire);
    }
    const auto awaited = [&](int r) { return r < ranks && r != peers.rank; };
    const auto place = [&](int r) { return from[r] + slot; };
    uint4 words[kGroup<kRanks>];
    peer::load_awaited(words, 0, awaited, place);
    const uint4 sum = add_up<T, kRanks>(turn, peers, words, own, awaited, place);
    pdl_launch_dependents();
    message.store(i, sum);
  }
  turn.end();
}

// Calls each(u, k + u * blockDim) for the packs of a batch.
template <int kBatch, class Each>
__device__ __forceinline__ void for_batch(int k, Each each) {
#pragma unroll
  for (int u = 0; u < kBatch; ++u) each(u, k + u * static_cast<int>(blockDim.x));
}

// Adds up a batch of packs and hands each j with its sum to done(j, sum). own(j) loads this rank's pack; in(j) says whether there
// is one.
template <class T, int kRanks, int kBatch, class In, class Own, class Done>
__device__ __forceinline__ void add_up_batch(Turn& turn, const Peers& peers, int k, In in, Own own, Done done) {
  uint4 words[kBatch][kGroup<kRanks>], owns[kBatch];
  const int ranks = kRanks ? kRanks : peers.ranks;
  const auto awaited = [&](int r) { return r < ranks && r != peers.rank; };
  const auto place = [&](int j) { return [&turn, j](int r) { return turn.place<uint4>(peer::kDirect, 0, r) + j; }; };
  for_batch<kBatch>(k, [&](int u, int j) {
    if (!in(j)) return;
    owns[u] = own(j);
    peer::load_awaited(words[u], 0, awaited, place(j));
  });
  for_batch<kBatch>(k, [&](int u, int j) {
    if (in(j)) done(j, add_up<T, kRanks>(turn, peers, words[u], owns[u], awaited, place(j)));
  });
}

template <class T, bool kAligned, int kRanks>
__global__ void __launch_bounds__(kMaxThreads<kRanks, false>, 1)
    one_shot_kernel(const Message<T, kAligned> message, int64_t packs, int each, const __grid_constant__ Peers peers) {
  constexpr int kBatch = kUnroll<kRanks, kAligned, false>;
  const int ranks = kRanks ? kRanks : peers.ranks;
  const Run run(packs, each);
  pdl_wait();
  Turn turn(peers, peer::kDirect, peer::Op::kAllReduce);
  turn.begin();
  const auto in = [&](int k) { return k < run.count; };
  const auto own = [&](int j) { return message.load(run.begin + j); };

  const auto send = [&](int k) {
    uint4 words[kBatch];
    for_batch<kBatch>(k, [&](int u, int j) {
      if (in(j)) words[u] = peer::encode(own(j));
    });
#pragma unroll
    for (int r = 1; r < ranks; ++r) {
      uint4* place = turn.place<uint4>(peer::kDirect, r, peers.rank);
      for_batch<kBatch>(k, [&](int u, int j) {
        if (in(j)) peer::store_volatile(place + j, words[u]);
      });
    }
  };
  const auto receive = [&](int k) {
    add_up_batch<T, kRanks, kBatch>(turn, peers, k, in, own,
                                    [&](int j, const uint4& sum) { message.store(run.begin + j, sum); });
  };
  for_packs<false, kBatch>(run, send, receive);
  if (run.busy()) pdl_launch_dependents();
  turn.end();
}

template <class T, bool kAligned, int kRanks, bool kOnce>
__global__ void __launch_bounds__(kMaxThreads<kRanks, kOnce>, 1)
    two_shot_kernel(const Message<T, kAligned> message, int64_t packs, int each, const __grid_constant__ Peers peers) {
  constexpr int kBatch = kUnroll<kRanks, kAligned, kOnce>;
  const int ranks = kRanks ? kRanks : peers.ranks;
  const int64_t part = (packs + ranks - 1) / ranks;
  const Run run(part, each);
  pdl_wait();
  Turn turn(peers, peer::kDirect, peer::Op::kAllReduce);
  turn.begin();
  const auto in = [&](int owner, int64_t k) { return k < run.count && owner * part + run.begin + k < packs; };

  // Every part but the own one goes to its owner.
  const auto send = [&](int k) {
#pragma unroll
    for (int r = 1; r < ranks; ++r) {
      const int to = peer::rank_after(peers.rank, r, ranks);
      uint4* place = turn.place<uint4>(peer::kDirect, r, peers.rank);
      uint4 words[kBatch];
      for_batch<kBatch>(k, [&](int u, int j) {
        if (in(to, j)) words[u] = message.load(to * part + run.begin + j);
      });
      for_batch<kBatch>(k, [&](int u, int j) {
        if (in(to, j)) peer::store_volatile(place + j, peer::encode(words[u]));
      });
    }
  };
  // The own part is added up, and its sum goes to everyone.
  const auto reduce = [&](int k) {
    const auto in_own = [&](int j) { return in(peers.rank, j); };
    const int64_t own_part = peers.rank * part + run.begin;
    const auto own = [&](int j) { return message.load(own_part + j); };
    add_up_batch<T, kRanks, kBatch>(turn, peers, k, in_own, own, [&](int j, const uint4& sum) {
      message.store(own_part + j, sum);
      const uint4 words = peer::encode(sum);
#pragma unroll
      for (int r = 1; r < ranks; ++r) peer::store_volatile(turn.place<uint4>(peer::kResult, r, peers.rank) + j, words);
    });
  };
  const auto receive = [&](int k) {
    uint4 words[kBatch][kGroup<kRanks>];
    const auto awaited = [&](int j) { return [&, j](int r) { return r < ranks && r != peers.rank && in(r, j); }; };
    const auto place = [&](int j) { return [&turn, j](int r) { return turn.place<uint4>(peer::kResult, 0, r) + j; }; };
#pragma unroll
    for (int first = 0; first < kMost<kRanks>; first += kGroup<kRanks>) {
      if (first >= ranks) break;
      for_batch<kBatch>(k, [&](int u, int j) { peer::load_awaited(words[u], first, awaited(j), place(j)); });
      for_batch<kBatch>(k, [&](int u, int j) {
        turn.receive(words[u], first, awaited(j), place(j));
#pragma unroll
        for (int g = 0; g < kGroup<kRanks>; ++g)
          if (const int r = first + g; awaited(j)(r))
            message.store(r * part + run.begin + j, turn.ok() ? peer::decode(words[u][g]) : nans<T>());
      });
    }
  };
  for_packs<kOnce, kBatch>(run, send, reduce, receive);
  if (run.busy()) pdl_launch_dependents();
  turn.end();
}

template <class T, bool kAligned, int kRanks>
cudaError_t launch_ranks(const Peers& peers, const AllReduceParams& p, Algorithm algorithm, cudaStream_t stream) {
  const Message<T, kAligned> message{static_cast<const T*>(p.input), static_cast<T*>(p.out), p.numel};
  const int64_t packs = (p.numel * static_cast<int64_t>(sizeof(T)) + 15) / 16;
  const int64_t run = algorithm == Algorithm::kOneShot ? packs : (packs + peers.ranks - 1) / peers.ranks;
  const auto start = [&](auto one_shot, auto two_shot, const Shape& shape) {
    return launch(algorithm == Algorithm::kOneShot ? one_shot : two_shot, LaunchConfig{shape.blocks, shape.threads},
                  stream, message, packs, shape.each, peers);
  };
  // Blocks and their runs are the same on ranks whose messages are not aligned alike.
  Shape shape = choose_shape(run, peers.blocks, kMaxThreads<kRanks, true>);
  const bool once = shape.each <= static_cast<int>(shape.threads);
  if constexpr (kAligned)  // what is unaligned is slow anyhow
    if (once) return start(&one_shot_once_kernel<T, kRanks>, &two_shot_kernel<T, kAligned, kRanks, true>, shape);
  shape.threads = std::min(shape.threads, unsigned{kMaxThreads<kRanks, false>});
  return start(&one_shot_kernel<T, kAligned, kRanks>, &two_shot_kernel<T, kAligned, kRanks, false>, shape);
}

template <class T, bool kAligned>
cudaError_t launch_aligned(const Peers& peers, const AllReduceParams& p, Algorithm algorithm, cudaStream_t stream) {
  switch (peers.ranks) {
    case 2: return launch_ranks<T, kAligned, 2>(peers, p, algorithm, stream);
    case 4: return launch_ranks<T, kAligned, 4>(peers, p, algorithm, stream);
    case 8: return launch_ranks<T, kAligned, 8>(peers, p, algorithm, stream);
    default: return launch_ranks<T, kAligned, 0>(peers, p, algorithm, stream);
  }
}

template <class T>
cudaError_t launch_type(const Peers& peers, const AllReduceParams& p, Algorithm algorithm, cudaStream_t stream) {
  const bool aligned = (reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.out)) % 16 == 0;
  return aligned ? launch_aligned<T, true>(peers, p, algorithm, stream)
                 : launch_aligned<T, false>(peers, p, algorithm, stream);
}

}  // namespace

cudaError_t all_reduce(const Peers& peers, const AllReduceParams& p, Algorithm algorithm, cudaStream_t stream) {
  return dispatch_floating(p.dtype,
                           [&](auto tag) { return launch_type<CudaType<decltype(tag)>>(peers, p, algorithm, stream); });
}

}  // namespace abiding::all_reduce
