// One-shot and two-shot all-reduce over the push protocol, in 16-byte vectors. A CTA owns a contiguous range of
// vectors; each thread takes every blockDim.x-th of them, and the same ones in each step, so that threads need not wait
// for each other.
#include <cuda_runtime.h>

#include <algorithm>

#include "all_reduce/kernels.h"
#include "peer/rank_sum.cuh"

namespace abiding::all_reduce {
namespace {

using peer::CallScope;
using peer::kRankBound;
using peer::kRanksPerPoll;
using peer::Message;
using peer::Peers;

// Kernels in which no thread has more than one vector (kSingle) are compiled apart, with as many threads as their
// registers allow. In the others a thread has as many vectors in flight as registers hold, each with the words of all
// ranks.
template <int kRanks, bool kSingle>
constexpr int kMaxThreads = kSingle && kRanks == 2 ? 1024 : 512;
// With the warp that exchanges tags, as registers allow: ptxas rounds 17 warps up to 20.
template <int kRanks, bool kSingle>
constexpr int kMaxCtaThreads = kMaxThreads<kRanks, kSingle> + (kSingle && kRanks > 2 ? 32 : 0);
template <int kRanks, bool kAligned, bool kSingle>
constexpr int kVectorsInFlight = kAligned && !kSingle && (kRanks == 2 || kRanks == 4) ? 2 : 1;

// This CTA's range of `vectors`: `count` from `begin` on.
struct CtaRange {
  int64_t begin;
  int count;
  __device__ __forceinline__ CtaRange(int64_t vectors, int vectors_per_cta)
      : begin(int64_t{vectors_per_cta} * blockIdx.x),
        count(static_cast<int>(min(int64_t{vectors_per_cta}, vectors - begin))) {}
  // Whether this thread has a vector, and so receives peer data. Ordering: only a thread that has received peer data
  // may trigger dependents (PDL), because that proves that the peer's CTA is resident. Triggering earlier can deadlock:
  // a waiting dependent grid may fill the SMs that another rank's kernel needs. One thread triggers for its CTA.
  __device__ __forceinline__ bool has_vector() const { return static_cast<int>(threadIdx.x) < count; }
};

// The rank with which this thread exchanges the call's tags. They take the last warp. In kernels in which no thread has
// more than one vector, launch_ranks() gives that warp none, unless a CTA would have too many threads.
__device__ __forceinline__ int tag_rank() { return static_cast<int>(threadIdx.x) - static_cast<int>(blockDim.x - 32); }

// Software pipeline over the thread's vectors: calls each stage with k, a vector's index in the range, kBatch vectors
// at a time. Each stage works on what the stage before it did one step earlier, so that transfers overlap with sums.
template <bool kSingle, int kBatch, class... Stages>
__device__ __forceinline__ void run_pipeline(const CtaRange& range, Stages... stages) {
  int k = threadIdx.x;
  if constexpr (kSingle) {
    if (k < range.count) (stages(k), ...);
  } else {
    const int step = kBatch * static_cast<int>(blockDim.x);
    for (const int end = range.count + (sizeof...(Stages) - 1) * step; k < end; k += step) {
      int at = k + step;
      ((at -= step, 0 <= at && at < range.count ? stages(at) : void()), ...);
    }
  }
}

// One-shot with at most one vector per thread: all addresses are computed before pdl_wait.
template <class T, int kRanks>
__global__ void __launch_bounds__(kMaxCtaThreads<kRanks, true>, 1)
    one_shot_single_kernel(const Message<T, true> message, int64_t vectors, int vectors_per_cta,
                           const __grid_constant__ Peers peers) {
  const int ranks = kRanks ? kRanks : peers.ranks;
  const CtaRange range(vectors, vectors_per_cta);
  const int64_t i = range.begin + threadIdx.x;
  const bool has_vector = range.has_vector(), whole = message.is_whole(i);
  CallScope scope(peers, peer::kDirect, tag_rank());
  const uint4* input = message.address(i);
  uint4 *to[kRankBound<kRanks>], *from[kRankBound<kRanks>];          // in the slots of even epochs
  uintptr_t addresses = reinterpret_cast<uintptr_t>(input) | whole;  // `whole` is to be computed before the wait, too
#pragma unroll
  for (int r = 0; r < kRankBound<kRanks>; ++r) {
    if (r >= ranks) break;
    to[r] = scope.even_slot_ptr<uint4>(peer::kDirect, r, peers.rank) + threadIdx.x;
    from[r] = scope.even_slot_ptr<uint4>(peer::kDirect, 0, r) + threadIdx.x;
    addresses |= reinterpret_cast<uintptr_t>(to[r]) | reinterpret_cast<uintptr_t>(from[r]);
  }
  pdl_wait(addresses);
#pragma unroll
  for (int r = 0; r < kRankBound<kRanks>; ++r)
    if (r < ranks) opaque(to[r]), opaque(from[r]);  // or they are computed again after the wait
  uint4 own{};
  if (has_vector) own = whole ? *input : message.load(i);
  scope.begin();
  scope.check_poison();
  scope.send_tag();
  if (has_vector) {
    const uint4 wire = peer::encode(own);
    const int64_t slot = scope.slot_offset() / static_cast<int64_t>(sizeof own);
#pragma unroll
    for (int r = 1; r < kRankBound<kRanks>; ++r) {
      if (r >= ranks) break;
      peer::store_volatile(to[r] + slot, wire);
    }
    const auto is_remote = [&](int r) { return r < ranks && r != peers.rank; };
    const auto slot_ptr = [&](int r) { return from[r] + slot; };
    uint4 vectors_in[kRanksPerPoll<kRanks>];
    scope.load_pending(vectors_in, 0, is_remote, slot_ptr);
    const uint4 sum = peer::receive_sum<T, kRanks>(scope, peers, vectors_in, own, is_remote, slot_ptr);
    pdl_launch_dependents();
    message.store(i, sum);
  }
  if (!scope.end() && has_vector) message.store(i, peer::nan_vector<T>());
}

// Calls body(u, k + u * blockDim.x) for the vectors of a batch.
template <int kBatch, class Body>
__device__ __forceinline__ void for_batch(int k, Body body) {
#pragma unroll
  for (int u = 0; u < kBatch; ++u) body(u, k + u * static_cast<int>(blockDim.x));
}

// Calls done(j, sum over ranks) for each vector j of a batch that exists(j). own(j) loads this rank's vector.
template <class T, int kRanks, int kBatch, class Exists, class Own, class Done>
__device__ __forceinline__ void receive_sums(CallScope& scope, const Peers& peers, int k, Exists exists, Own own,
                                             Done done) {
  uint4 vectors[kBatch][kRanksPerPoll<kRanks>], owns[kBatch];
  const int ranks = kRanks ? kRanks : peers.ranks;
  const auto is_remote = [&](int r) { return r < ranks && r != peers.rank; };
  const auto slot_ptr = [&](int j) {
    return [&scope, j](int r) { return scope.slot_ptr<uint4>(peer::kDirect, 0, r) + j; };
  };
  for_batch<kBatch>(k, [&](int u, int j) {
    if (!exists(j)) return;
    owns[u] = own(j);
    scope.load_pending(vectors[u], 0, is_remote, slot_ptr(j));
  });
  for_batch<kBatch>(k, [&](int u, int j) {
    if (exists(j)) done(j, peer::receive_sum<T, kRanks>(scope, peers, vectors[u], owns[u], is_remote, slot_ptr(j)));
  });
}

template <class T, bool kAligned, int kRanks>
__global__ void __launch_bounds__(kMaxCtaThreads<kRanks, false>, 1)
    one_shot_kernel(const Message<T, kAligned> message, int64_t vectors, int vectors_per_cta,
                    const __grid_constant__ Peers peers) {
  constexpr int kBatch = kVectorsInFlight<kRanks, kAligned, false>;
  const int ranks = kRanks ? kRanks : peers.ranks;
  const CtaRange range(vectors, vectors_per_cta);
  pdl_wait();
  CallScope scope(peers, peer::kDirect, tag_rank());
  scope.begin();
  scope.check_poison();
  scope.send_tag();
  const auto exists = [&](int k) { return k < range.count; };
  const auto own = [&](int j) { return message.load(range.begin + j); };

  const auto send = [&](int k) {
    uint4 wires[kBatch];
    for_batch<kBatch>(k, [&](int u, int j) {
      if (exists(j)) wires[u] = peer::encode(own(j));
    });
#pragma unroll
    for (int r = 1; r < ranks; ++r) {
      uint4* to = scope.slot_ptr<uint4>(peer::kDirect, r, peers.rank);
      for_batch<kBatch>(k, [&](int u, int j) {
        if (exists(j)) peer::store_volatile(to + j, wires[u]);
      });
    }
  };
  const auto receive = [&](int k) {
    receive_sums<T, kRanks, kBatch>(scope, peers, k, exists, own,
                                    [&](int j, const uint4& sum) { message.store(range.begin + j, sum); });
  };
  run_pipeline<false, kBatch>(range, send, receive);
  if (range.has_vector()) pdl_launch_dependents();
  if (scope.end()) return;
  for (int k = threadIdx.x; exists(k); k += static_cast<int>(blockDim.x))
    message.store(range.begin + k, peer::nan_vector<T>());
}

template <class T, bool kAligned, int kRanks, bool kSingle>
__global__ void __launch_bounds__(kMaxCtaThreads<kRanks, kSingle>, 1)
    two_shot_kernel(const Message<T, kAligned> message, int64_t vectors, int vectors_per_cta,
                    const __grid_constant__ Peers peers) {
  constexpr int kBatch = kVectorsInFlight<kRanks, kAligned, kSingle>;
  const int ranks = kRanks ? kRanks : peers.ranks;
  const int64_t shard = (vectors + ranks - 1) / ranks;  // vectors that a rank reduces
  const CtaRange range(shard, vectors_per_cta);
  pdl_wait();
  CallScope scope(peers, peer::kDirect, tag_rank());
  scope.begin();
  scope.check_poison();
  scope.send_tag();
  const auto exists = [&](int owner, int64_t k) {
    return k < range.count && owner * shard + range.begin + k < vectors;
  };

  // Reduce-scatter: every shard but this rank's goes to its owner.
  const auto scatter = [&](int k) {
#pragma unroll
    for (int r = 1; r < ranks; ++r) {
      const int owner = peer::rank_after(peers.rank, r, ranks);
      uint4* to = scope.slot_ptr<uint4>(peer::kDirect, r, peers.rank);
      uint4 own[kBatch];
      for_batch<kBatch>(k, [&](int u, int j) {
        if (exists(owner, j)) own[u] = message.load(owner * shard + range.begin + j);
      });
      for_batch<kBatch>(k, [&](int u, int j) {
        if (exists(owner, j)) peer::store_volatile(to + j, peer::encode(own[u]));
      });
    }
  };
  // This rank's shard is summed, and the sum goes to every rank.
  const auto reduce = [&](int k) {
    const auto exists_here = [&](int j) { return exists(peers.rank, j); };
    const int64_t own_shard = peers.rank * shard + range.begin;
    const auto own = [&](int j) { return message.load(own_shard + j); };
    receive_sums<T, kRanks, kBatch>(scope, peers, k, exists_here, own, [&](int j, const uint4& sum) {
      message.store(own_shard + j, sum);
      const uint4 wire = peer::encode(sum);
#pragma unroll
      for (int r = 1; r < ranks; ++r)
        peer::store_volatile(scope.slot_ptr<uint4>(peer::kResult, r, peers.rank) + j, wire);
    });
  };
  // All-gather: the sums of the other shards.
  const auto gather = [&](int k) {
    uint4 sums[kBatch][kRanksPerPoll<kRanks>];
    const auto is_pending = [&](int j) {
      return [&, j](int r) { return r < ranks && r != peers.rank && exists(r, j); };
    };
    const auto slot_ptr = [&](int j) {
      return [&scope, j](int r) { return scope.slot_ptr<uint4>(peer::kResult, 0, r) + j; };
    };
#pragma unroll
    for (int first = 0; first < kRankBound<kRanks>; first += kRanksPerPoll<kRanks>) {
      if (first >= ranks) break;
      for_batch<kBatch>(k, [&](int u, int j) { scope.load_pending(sums[u], first, is_pending(j), slot_ptr(j)); });
      for_batch<kBatch>(k, [&](int u, int j) {
        scope.receive(sums[u], first, is_pending(j), slot_ptr(j));
#pragma unroll
        for (int g = 0; g < kRanksPerPoll<kRanks>; ++g)
          if (const int r = first + g; is_pending(j)(r))
            message.store(r * shard + range.begin + j, scope.ok() ? peer::decode(sums[u][g]) : peer::nan_vector<T>());
      });
    }
  };
  run_pipeline<kSingle, kBatch>(range, scatter, reduce, gather);
  if (range.has_vector()) pdl_launch_dependents();
  if (scope.end()) return;
  for (int r = 0; r < ranks; ++r)
    for (int k = threadIdx.x; exists(r, k); k += static_cast<int>(blockDim.x))
      message.store(r * shard + range.begin + k, peer::nan_vector<T>());
}

// Launches one kernel, for at most capacity() bytes.
template <class T, bool kAligned, int kRanks>
cudaError_t launch_ranks(const AllReduceParams& p, const Peers& peers, cudaStream_t stream) {
  const Message<T, kAligned> message{static_cast<const T*>(p.input), static_cast<T*>(p.out), p.numel};
  const bool one_shot = p.algorithm == Algorithm::kOneShot;
  const int64_t vectors = (p.numel * static_cast<int64_t>(sizeof(T)) + 15) / 16;
  const int64_t per_rank = one_shot ? vectors : (vectors + peers.ranks - 1) / peers.ranks;
  const auto start = [&](auto one_shot_kernel, auto two_shot_kernel, const GridShape& shape) {
    return launch(one_shot ? one_shot_kernel : two_shot_kernel, LaunchConfig{shape.ctas, shape.threads}, stream,
                  message, vectors, shape.vectors_per_cta, peers);
  };
  // The CTAs and their ranges must be the same on ranks whose messages are aligned differently, so only `threads` may
  // depend on kAligned.
  GridShape shape = choose_grid_shape(per_rank, peers.max_ctas, kMaxThreads<kRanks, true>);
  const bool single = shape.vectors_per_cta <= static_cast<int>(shape.threads);
  if constexpr (kAligned) {  // unaligned messages are slow in any case, and have one kernel fewer
    if (single && shape.vectors_per_cta > static_cast<int>(shape.threads) - 32)
      shape.threads = std::min(shape.threads + 32, unsigned{kMaxCtaThreads<kRanks, true>});
    if (single) return start(&one_shot_single_kernel<T, kRanks>, &two_shot_kernel<T, kAligned, kRanks, true>, shape);
  }
  shape.threads = std::min(shape.threads, unsigned{kMaxThreads<kRanks, false>});
  return start(&one_shot_kernel<T, kAligned, kRanks>, &two_shot_kernel<T, kAligned, kRanks, false>, shape);
}

template <class T, bool kAligned>
cudaError_t launch_aligned(const AllReduceParams& p, const Peers& peers, cudaStream_t stream) {
  switch (peers.ranks) {
    case 2: return launch_ranks<T, kAligned, 2>(p, peers, stream);
    case 4: return launch_ranks<T, kAligned, 4>(p, peers, stream);
    case 8: return launch_ranks<T, kAligned, 8>(p, peers, stream);
    default: return launch_ranks<T, kAligned, 0>(p, peers, stream);
  }
}

template <class T>
cudaError_t launch_type(const AllReduceParams& p, const Peers& peers, cudaStream_t stream) {
  const bool aligned = (reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.out)) % 16 == 0;
  return aligned ? launch_aligned<T, true>(p, peers, stream) : launch_aligned<T, false>(p, peers, stream);
}

}  // namespace

cudaError_t run_cuda(const AllReduceParams& p, const Peers& peers, cudaStream_t stream) {
  const int64_t size = size_of(p.dtype), most = capacity(p.algorithm, peers.ranks, peers.max_ctas) / size;
  for (int64_t done = 0; done < p.numel; done += most) {
    AllReduceParams part = p;
    part.input = static_cast<const char*>(p.input) + done * size;
    part.out = static_cast<char*>(p.out) + done * size;
    part.numel = std::min(most, p.numel - done);
    const cudaError_t status =
        dispatch_floating(p.dtype, [&](auto tag) { return launch_type<CudaType<decltype(tag)>>(part, peers, stream); });
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace abiding::all_reduce
