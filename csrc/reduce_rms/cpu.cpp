#include "common/cpu.h"

#include <cmath>
#include <vector>

#include "peer/host.h"
#include "reduce_rms/operators.h"

namespace abiding::reduce_rms {
namespace {

using peer::HostAccess;

// The sum of squares of this rank's columns, for each token and part.
template <class T>
std::vector<float> sums_of_squares(const ReduceRmsParams& p) {
  std::vector<float> sums(static_cast<size_t>(p.tokens * p.part_count));
  parallel_for(0, p.tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* x = static_cast<const T*>(p.input) + token * p.input_stride;
      for (int i = 0; i < p.part_count; x += p.parts[i++].width) {
        const Part& part = p.parts[i];
        float lanes[8] = {};
        for (int64_t c = 0; c < part.width; ++c) lanes[c % 8] += static_cast<float>(x[c]) * static_cast<float>(x[c]);
        for (int width = 4; width; width /= 2)
          for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
        sums[static_cast<size_t>(token * p.part_count + i)] = lanes[0];
      }
    }
  });
  return sums;
}

template <class T>
void normalize(const ReduceRmsParams& p, int ranks, const std::vector<float>& sums) {
  parallel_for(0, p.tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* x = static_cast<const T*>(p.input) + token * p.input_stride;
      for (int i = 0; i < p.part_count; x += p.parts[i++].width) {
        const Part& part = p.parts[i];
        const T* w = static_cast<const T*>(part.weight);
        T* out = static_cast<T*>(part.out) + token * part.width;
        const float sum = sums[static_cast<size_t>(token * p.part_count + i)];
        const float factor = 1.0f / std::sqrt(sum / static_cast<float>(part.width * ranks) + p.eps);
        for (int64_t c = 0; c < part.width; ++c)
          out[c] = static_cast<T>(static_cast<float>(x[c]) * factor * static_cast<float>(w[c]));
      }
    }
  });
}

// Replaces each sum by that of all ranks, in rank order, over upstream's table; NaN where a rank does not send in time.
void sum_over_table(const TableParams& table, std::vector<float>& sums, int parts) {
  auto* counters = static_cast<uint32_t*>(table.pointers[3 * table.ranks]);
  const int64_t slot_bytes = static_cast<const int64_t*>(table.pointers[3 * table.ranks + 1])[1];
  const int64_t region_bytes = slot_bytes / table.ranks / 16 * 16;
  const uint32_t epoch = HostAccess::load(&counters[2]);
  const auto slot_ptr = [&](int receiver, int source) {
    auto* buffer = static_cast<uint8_t*>(table.pointers[2 * table.ranks + receiver]);
    return reinterpret_cast<uint32_t*>(buffer + epoch % peer::kSlots * slot_bytes + source * region_bytes);
  };
  const auto count = static_cast<int64_t>(sums.size());
  if (count * 4 > region_bytes)
    fail(parts == 2 ? "minimax_allreduce_rms_qk" : "minimax_allreduce_rms", "workspace has slots of ", slot_bytes,
         " bytes; expected at least ", count * 4 * table.ranks);
  for (int peer = 0; peer < table.ranks; ++peer)
    for (int64_t i = 0; peer != table.rank && i < count; ++i)
      HostAccess::store(slot_ptr(peer, table.rank) + i,
                        peer::encode(float_bits(sums[static_cast<size_t>(i)])) ^ kTableEmpty);
  std::vector<float> total(sums.size());
  for (int source = 0; source < table.ranks; ++source) {
    peer::Header unknown{};
    HostAccess::Wait wait(table.ranks);
    for (int64_t i = 0; i < count; ++i) {
      float value = sums[static_cast<size_t>(i)];
      if (source != table.rank) {
        uint32_t* from = slot_ptr(table.rank, source) + i;
        uint32_t wire = HostAccess::load(from);
        while (wire == kTableEmpty && wait.pause(unknown, table.timeout_ns) == peer::Fault::kNone)
          wire = HostAccess::load(from);
        value = wire == kTableEmpty ? NAN : bits_float(peer::decode(wire ^ kTableEmpty));
        HostAccess::store(from, kTableEmpty);
      }
      total[static_cast<size_t>(i)] = source == 0 ? value : total[static_cast<size_t>(i)] + value;
    }
  }
  sums = total;
  HostAccess::fence();
  HostAccess::store(&counters[2], epoch + 1);
}

// Calls sum_over_ranks(sums) between the two passes over the rows.
template <class SumOverRanks>
void reduce_and_normalize(const ReduceRmsParams& p, int ranks, const SumOverRanks& sum_over_ranks) {
  dispatch_floating(p.dtype, [&](auto tag) {
    using T = HostType<decltype(tag)>;
    std::vector<float> sums = sums_of_squares<T>(p);
    sum_over_ranks(sums);
    normalize<T>(p, ranks, sums);
  });
}

}  // namespace

void run_cpu(const ReduceRmsParams& p, const peer::Peers& peers) {
  reduce_and_normalize(p, peers.ranks, [&](std::vector<float>& sums) {
    const auto count = static_cast<int64_t>(sums.size());
    peer::all_reduce(peers, peer::kScalars, sums.data(), sums.data(), count, DType::kFloat32);
  });
}

void run_cpu(const ReduceRmsParams& p, const TableParams& table) {
  reduce_and_normalize(p, table.ranks, [&](std::vector<float>& sums) { sum_over_table(table, sums, p.part_count); });
}

ABIDING_KERNELS(abiding, CPU, reduce_rms, m) { Operators<CpuScope>::implement(m); }

}  // namespace abiding::reduce_rms
