#include "common/cpu.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <vector>

#include "peer/host.h"
#include "reduce_rms/operators.h"

namespace abiding::reduce_rms {
namespace {

using peer::HostAccess;

// The sums of squares of each token's parts, of this rank's columns.
template <class T>
std::vector<float> sums_of_squares(const ReduceRmsParams& p) {
  std::vector<float> sums(static_cast<size_t>(p.tokens * p.part_count));
  torch::stable::parallel_for(0, p.tokens, 16, [&](int64_t begin, int64_t end) {
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
void normalise(const ReduceRmsParams& p, int ranks, const std::vector<float>& sums) {
  torch::stable::parallel_for(0, p.tokens, 16, [&](int64_t begin, int64_t end) {
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

// Exchange over upstream's table: sums of every rank, in rank order. NaN where a rank does not send in time.
void sum_over_table(const TableParams& table, std::vector<float>& sums, int parts) {
  auto* counters = static_cast<uint32_t*>(table.pointers[3 * table.ranks]);
  const int64_t slot_bytes = static_cast<const int64_t*>(table.pointers[3 * table.ranks + 1])[1];
  const int64_t source_bytes = slot_bytes / table.ranks / 16 * 16;
  const uint32_t epoch = HostAccess::load(&counters[2]);
  const auto place = [&](int receiver, int source) {
    auto* buffer = static_cast<uint8_t*>(table.pointers[2 * table.ranks + receiver]);
    return reinterpret_cast<uint32_t*>(buffer + epoch % peer::kSlots * slot_bytes + source * source_bytes);
  };
  const auto count = static_cast<int64_t>(sums.size());
  if (count * 4 > source_bytes)
    fail(parts == 2 ? "minimax_allreduce_rms_qk" : "minimax_allreduce_rms", "workspace has slots of ", slot_bytes,
         " bytes; expected at least ", count * 4 * table.ranks);
  for (int peer = 0; peer < table.ranks; ++peer)
    for (int64_t i = 0; peer != table.rank && i < count; ++i)
      HostAccess::store(place(peer, table.rank) + i,
                        peer::encode(float_bits(sums[static_cast<size_t>(i)])) ^ kTableEmpty);
  std::vector<float> total(sums.size());
  for (int source = 0; source < table.ranks; ++source) {
    peer::Header unknown{};
    HostAccess::Wait wait(table.ranks);
    for (int64_t i = 0; i < count; ++i) {
      float value = sums[static_cast<size_t>(i)];
      if (source != table.rank) {
        uint32_t* from = place(table.rank, source) + i;
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

struct Backend : CpuScope {
  static constexpr bool kBlocking = true;
  using CpuScope::CpuScope;
  static const peer::Memory* memory() { return &peer::cpu_memory(); }
  static void reduce_rms(const Communicator& communicator, const ReduceRmsParams& p) {
    const peer::Op op = p.part_count == 2 ? peer::Op::kQkNorm : peer::Op::kRmsNorm;
    dispatch_floating(p.dtype, [&](auto tag) {
      using T = HostType<decltype(tag)>;
      std::vector<float> sums = sums_of_squares<T>(p);
      peer::sum_scalars(communicator.peers(), op, sums.data(), sums.data(), static_cast<int64_t>(sums.size()));
      normalise<T>(p, communicator.ranks, sums);
    });
  }
  static void reduce_rms(const TableParams& table, const ReduceRmsParams& p) {
    dispatch_floating(p.dtype, [&](auto tag) {
      using T = HostType<decltype(tag)>;
      std::vector<float> sums = sums_of_squares<T>(p);
      sum_over_table(table, sums, p.part_count);
      normalise<T>(p, table.ranks, sums);
    });
  }
};

}  // namespace

ABIDING_KERNELS(abiding, CPU, reduce_rms, m) { Operators<Backend>::implement(m); }

}  // namespace abiding::reduce_rms
