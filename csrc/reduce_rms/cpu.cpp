#include "common/cpu.h"

#include <cmath>
#include <memory>
#include <vector>

#include "peer/buffers.h"
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

// Upstream's table, checked: where it leads, and what keeps that mapped during a call.
struct Table {
  int rank, ranks;
  uint64_t timeout_ns;
  uint32_t* counters;
  int64_t slot_bytes;
  uint8_t* slots[peer::kMaxRanks];
  std::vector<std::shared_ptr<peer::Buffer>> buffers;
};

// `words` is how many a rank sends to each other rank.
Table check_table(const TableParams& p, int64_t words, const char* op) {
  Table table{};
  table.rank = p.rank;
  table.ranks = p.ranks;
  table.timeout_ns = p.timeout_ns;
  const auto require = [&](int entry, int64_t bytes) {
    void* const address = p.pointers[entry];
    const auto buffer = peer::find_buffer(reinterpret_cast<int64_t>(address), false);
    check(buffer && buffer->holds(bytes), op, "workspace[", entry, "] is ", reinterpret_cast<int64_t>(address),
          "; expected the address of ", bytes, " bytes or more that this process has allocated or opened by ",
          "abiding_custom_ar's operators");
    table.buffers.push_back(buffer);
    return address;
  };
  const int ranks = p.ranks;
  table.counters = static_cast<uint32_t*>(require(3 * ranks, 3 * sizeof(uint32_t)));
  table.slot_bytes = static_cast<const int64_t*>(require(3 * ranks + 1, 2 * sizeof(int64_t)))[1];
  const int64_t needed = round_up(words * 4, 16) * ranks;
  check(table.slot_bytes >= needed, op, "workspace has slots of ", table.slot_bytes, " bytes; expected at least ",
        needed);
  check(table.slot_bytes % 16 == 0 && table.slot_bytes < INT64_MAX / peer::kSlots, op, "workspace has slots of ",
        table.slot_bytes, " bytes; expected a multiple of 16, as many as there is memory for");
  for (int rank = 0; rank < ranks; ++rank)
    table.slots[rank] = static_cast<uint8_t*>(require(2 * ranks + rank, peer::kSlots * table.slot_bytes));
  return table;
}

// Replaces each sum by that of all ranks, in rank order, over upstream's table; NaN where a rank does not send in time.
void sum_over_table(const Table& table, std::vector<float>& sums) {
  const int64_t region_bytes = table.slot_bytes / table.ranks / 16 * 16;
  const uint32_t epoch = HostAccess::load(&table.counters[2]);
  const auto slot_ptr = [&](int receiver, int source) {
    return reinterpret_cast<uint32_t*>(table.slots[receiver] + epoch % peer::kSlots * table.slot_bytes +
                                       source * region_bytes);
  };
  const auto count = static_cast<int64_t>(sums.size());
  for (int peer = 0; peer < table.ranks; ++peer)
    for (int64_t i = 0; peer != table.rank && i < count; ++i)
      HostAccess::store(slot_ptr(peer, table.rank) + i,
                        peer::encode(float_bits(sums[static_cast<size_t>(i)])) ^ kTableEmpty);
  std::vector<float> total(sums.size());
  bool stopped = false;  // after a timeout, or an interrupt
  for (int source = 0; source < table.ranks; ++source) {
    peer::Header unknown{};
    HostAccess::Wait wait(table.ranks);
    for (int64_t i = 0; i < count; ++i) {
      float value = sums[static_cast<size_t>(i)];
      if (source != table.rank) {
        uint32_t* from = slot_ptr(table.rank, source) + i;
        uint32_t wire = HostAccess::load(from);
        while (wire == kTableEmpty && !stopped) {
          stopped = wait.pause(unknown, table.timeout_ns) != peer::Fault::kNone;
          wire = HostAccess::load(from);
        }
        value = wire == kTableEmpty ? NAN : bits_float(peer::decode(wire ^ kTableEmpty));
        HostAccess::store(from, kTableEmpty);
      }
      total[static_cast<size_t>(i)] = source == 0 ? value : total[static_cast<size_t>(i)] + value;
    }
  }
  sums = total;
  HostAccess::fence();
  HostAccess::store(&table.counters[2], epoch + 1);
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

void run_cpu(const ReduceRmsParams& p, const TableParams& params) {
  const char* op = p.part_count == 2 ? "minimax_allreduce_rms_qk" : "minimax_allreduce_rms";
  const Table table = check_table(params, p.tokens * p.part_count, op);
  reduce_and_normalize(p, table.ranks, [&](std::vector<float>& sums) { sum_over_table(table, sums); });
}

ABIDING_KERNELS(abiding, CPU, reduce_rms, m) { Operators<CpuScope>::implement(m); }

}  // namespace abiding::reduce_rms
