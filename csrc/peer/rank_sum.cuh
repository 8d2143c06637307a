// The rank-order sum on the device, which collectives share: 16-byte vectors of a message, and their sum over ranks in
// float32, rounded once. host_sum.h is the host's.
#pragma once

#include "common/vec16.cuh"
#include "peer/device.cuh"

namespace abiding::peer {

// The values of a 16-byte vector of float32, float16 or bfloat16.
template <class T>
constexpr int kVectorElements = 16 / sizeof(T);

template <class T>
__device__ __forceinline__ void to_floats(const uint4& vector, float (&x)[kVectorElements<T>]) {
  if constexpr (sizeof(T) == 4)
    memcpy(x, &vector, 16);
  else
    unpack<T>(vector, x);
}
template <class T>
__device__ __forceinline__ uint4 from_floats(const float (&x)[kVectorElements<T>]) {
  if constexpr (sizeof(T) == 4) {
    uint4 vector;
    memcpy(&vector, x, 16);
    return vector;
  } else {
    return pack<T>(x);
  }
}

// What an output holds after a fault.
template <class T>
__device__ __forceinline__ uint4 nan_vector() {
  uint32_t word = 0x7FC00000;
  if constexpr (sizeof(T) == 2) word = Vec2<T>::kNan | Vec2<T>::kNan << 16;
  return {word, word, word, word};
}

union VectorElements {
  uint4 vector;
  uint32_t words[4];
  uint16_t halves[8];
};

// The elements of a vector that exist, one by one: of an unaligned vector, or of the last one.
template <int kSize>
__device__ __noinline__ uint4 load_partial(const void* from, int64_t count) {
  VectorElements e{};
  for (int j = 0; j < 16 / kSize && j < count; ++j) {
    if constexpr (kSize == 4)
      e.words[j] = static_cast<const uint32_t*>(from)[j];
    else
      e.halves[j] = static_cast<const uint16_t*>(from)[j];
  }
  return e.vector;
}
template <int kSize>
__device__ __noinline__ void store_partial(void* to, uint4 vector, int64_t count) {
  const VectorElements e{vector};
  for (int j = 0; j < 16 / kSize && j < count; ++j) {
    if constexpr (kSize == 4)
      static_cast<uint32_t*>(to)[j] = e.words[j];
    else
      static_cast<uint16_t*>(to)[j] = e.halves[j];
  }
}

// The 16-byte vectors of a message in the caller's memory. It may end within a vector, and start at any address unless
// kAligned.
template <class T, bool kAligned>
struct Message {
  static constexpr int kElements = kVectorElements<T>;
  const T* input;
  T* out;
  int64_t numel;

  __device__ __forceinline__ bool is_whole(int64_t i) const { return kAligned && (i + 1) * kElements <= numel; }
  __device__ __forceinline__ const uint4* address(int64_t i) const { return reinterpret_cast<const uint4*>(input) + i; }
  __device__ __forceinline__ uint4 load(int64_t i) const {
    return is_whole(i) ? *address(i) : load_partial<sizeof(T)>(input + i * kElements, numel - i * kElements);
  }
  __device__ __forceinline__ void store(int64_t i, const uint4& vector) const {
    if (is_whole(i))
      reinterpret_cast<uint4*>(out)[i] = vector;
    else
      store_partial<sizeof(T)>(out + i * kElements, vector, numel - i * kElements);
  }
};

// Accumulates vectors in the order of add().
template <class T>
struct VectorSum {
  float values[kVectorElements<T>];

  __device__ __forceinline__ void add(const uint4& vector, bool first) {
    float more[kVectorElements<T>];
    to_floats<T>(vector, more);
#pragma unroll
    for (int i = 0; i < kVectorElements<T>; ++i) values[i] = first ? more[i] : values[i] + more[i];
  }
  __device__ __forceinline__ uint4 rounded() const { return from_floats<T>(values); }
};

// How many ranks' vectors are polled together. If the number of ranks is unknown at compile time (kRanks is 0), the
// registers do not hold those of all.
template <int kRanks>
constexpr int kRanksPerPoll = kRanks ? kRanks : 4;
// The compile-time bound of loops over ranks.
template <int kRanks>
constexpr int kRankBound = kRanks ? kRanks : kMaxRanks;

// The sum of this rank's vector `own` and those of the others at slot_ptr(rank), rounded; NaN after a fault. `vectors`
// are those of the first poll, loaded just before by load_pending.
template <class T, int kRanks, class IsPending, class SlotPtr>
__device__ __forceinline__ uint4 receive_sum(CallScope& scope, const Peers& peers,
                                             uint4 (&vectors)[kRanksPerPoll<kRanks>], const uint4& own,
                                             IsPending is_pending, SlotPtr slot_ptr) {
  const int ranks = kRanks ? kRanks : peers.ranks;
  VectorSum<T> sum;
#pragma unroll
  for (int first = 0; first < kRankBound<kRanks>; first += kRanksPerPoll<kRanks>) {
    if (first >= ranks) break;
    if (first > 0) scope.load_pending(vectors, first, is_pending, slot_ptr);
    scope.receive(vectors, first, is_pending, slot_ptr);
#pragma unroll
    for (int g = 0; g < kRanksPerPoll<kRanks>; ++g)
      if (const int r = first + g; r < ranks) sum.add(r == peers.rank ? own : decode(vectors[g]), r == 0);
  }
  return scope.ok() ? sum.rounded() : nan_vector<T>();
}

}  // namespace abiding::peer
