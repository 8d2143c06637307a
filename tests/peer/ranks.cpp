// Ranks that call all_reduce many times, as threads or as processes, and compare every bit with a sum computed another
// way.
//
//   ranks threads <ranks> <calls> <seed>     ranks processes <ranks> <calls> <seed>
//   ranks twice                              two threads on one communicator: neither gets a wrong sum
//   ranks killed <ranks> <times> <seed>      a rank is killed in a call, and all others name it
//   ranks missing <ranks>                    a rank makes no call, and all others name it
//   ranks time <ranks>                       microseconds per call, as "bytes us" lines
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <cmath>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "peer/host.h"

using namespace abiding::peer;

namespace {

#ifdef __SANITIZE_THREAD__
// The sanitizer understands accesses to single words only.
struct Access : HostAccess {
  static void load_words(const uint32_t* from, uint32_t* to) {
    for (int i = 0; i < kWords; ++i) to[i] = load(from + i);
  }
  static void store_words(uint32_t* to, const uint32_t* from) {
    for (int i = 0; i < kWords; ++i) store(to + i, from[i]);
  }
  static void fence() {}
};
#else
using Access = HostAccess;
#endif

// Memory that all ranks of a run share.
struct World {
  int ranks;
  uint8_t* workspaces[kMaxRanks];
  struct Report {
    uint32_t calls, fault, rank, wrong;
  }* reports;

  explicit World(int n) : ranks(n) {
    for (int rank = 0; rank < n; ++rank) workspaces[rank] = static_cast<uint8_t*>(shared(kWorkspaceBytes));
    reports = static_cast<Report*>(shared(sizeof(Report) * kMaxRanks));
  }
  ~World() {
    for (int rank = 0; rank < ranks; ++rank) munmap(workspaces[rank], kWorkspaceBytes);
    munmap(reports, sizeof(Report) * kMaxRanks);
  }
  static void* shared(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  Peers peers(int rank, FaultRecord* record, double timeout_s) const {
    Peers peers{};
    peers.tag = tag_of({Op::kAllReduce, abiding::DType::kFloat32, 1});  // as all calls of a rank have it, unless set
    peers.rank = rank;
    peers.ranks = ranks;
    peers.max_ctas = 1;
    peers.record = record;
    peers.timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
    for (int i = 0; i < ranks; ++i) peers.workspaces[i] = workspaces[(rank + i) % ranks];
    return peers;
  }
  Header* header(int rank) const { return reinterpret_cast<Header*>(workspaces[rank]); }
};

// One call of many; every rank draws the same calls.
struct RandomCall {
  Channel channel;
  abiding::DType dtype;
  int64_t numel, offset;  // elements
  bool in_place;
  uint32_t seed;

  explicit RandomCall(std::mt19937& draw) {
    const abiding::DType types[] = {abiding::DType::kFloat32, abiding::DType::kFloat16, abiding::DType::kBfloat16};
    dtype = types[draw() % 3];
    channel = draw() % 3 ? kDirect : kScalars;
    const uint32_t size = draw() % 1000;
    numel = size < 900 ? draw() % 200 : size < 998 ? draw() % 5000 : draw() % 400000;
    offset = draw() % 9;
    in_place = draw() % 2;
    seed = draw();
  }

  // Values of both signs and many magnitudes, with some special ones: NaN, infinity, -0.0, subnormal, largest.
  uint32_t bits(int rank, int64_t i) const {
    uint64_t x = (seed + static_cast<uint64_t>(i) * 16 + static_cast<uint64_t>(rank)) * 0x9E3779B97F4A7C15;
    x = (x ^ x >> 31) * 0xBF58476D1CE4E5B9;
    x ^= x >> 29;
    const uint32_t odd[] = {0xFFFFFFFF, 0x80000000, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0, 1, 0x7F7FFFFF};
    if (x % 61 == 0) return abiding::size_of(dtype) == 4 ? odd[x >> 8 & 7] : static_cast<uint32_t>(x >> 16 & 0xFFFF);
    const float value = static_cast<float>(static_cast<int>(x >> 40 & 0xFFFF) - 0x8000) *
                        std::ldexp(1.0f, static_cast<int>(x >> 56 & 15) - 18);
    return from_float(value);
  }

  // Conversions by other means than those under test.
  uint32_t from_float(float value) const {
    if (dtype == abiding::DType::kFloat32) return std::isnan(value) ? 0x7FC00000 : abiding::float_bits(value);
    if (std::isnan(value)) return dtype == abiding::DType::kFloat16 ? 0x7E00 : 0x7FC0;
    if (dtype == abiding::DType::kBfloat16) {
      int exponent;
      std::frexp(value, &exponent);
      const double step = std::ldexp(1.0, std::max(exponent - 8, -133));
      const float rounded = std::isinf(value) ? value : static_cast<float>(std::nearbyint(value / step) * step);
      return abiding::float_bits(rounded) >> 16;
    }
    const auto half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
  float to_float(uint32_t bits) const {
    if (dtype == abiding::DType::kFloat32) return abiding::bits_float(bits);
    if (dtype == abiding::DType::kBfloat16) return abiding::bits_float(bits << 16);
    const auto half = static_cast<uint16_t>(bits);
    _Float16 value;
    std::memcpy(&value, &half, 2);
    return static_cast<float>(value);
  }
  uint32_t expected(int ranks, int64_t i) const {
    float sum = to_float(bits(0, i));
    for (int rank = 1; rank < ranks; ++rank) sum += to_float(bits(rank, i));
    return from_float(sum);
  }
};

// Makes a call; returns how many elements are wrong, or -1 if the call failed as it should.
int64_t make(const RandomCall& call, Peers peers) {
  peers.tag = tag_of({call.channel == kDirect ? Op::kAllReduce : Op::kRmsNorm, call.dtype, call.numel});
  const auto size = static_cast<size_t>(abiding::size_of(call.dtype)), bytes = static_cast<size_t>(call.numel) * size;
  constexpr size_t kGuard = 32;
  std::vector<uint8_t> input(kGuard + bytes + 16 * size + kGuard, 0xA5), other(input.size(), 0xA5);
  uint8_t* from = input.data() + kGuard + static_cast<size_t>(call.offset) * size;
  uint8_t* to = call.in_place ? from : other.data() + kGuard + static_cast<size_t>(call.offset % 5) * size;
  for (int64_t i = 0; i < call.numel; ++i) {
    const uint32_t bits = call.bits(peers.rank, i);
    std::memcpy(from + static_cast<size_t>(i) * size, &bits, size);
  }
  const bool ok = all_reduce<Access>(peers, call.channel, from, to, call.numel, call.dtype);
  int64_t wrong = 0;
  for (int64_t i = 0; i < call.numel; ++i) {
    uint32_t bits = 0;
    std::memcpy(&bits, to + static_cast<size_t>(i) * size, size);
    wrong += ok ? bits != call.expected(peers.ranks, i) : !std::isnan(call.to_float(bits));
  }
  for (size_t i = 1; i <= kGuard; ++i)
    wrong += to[-static_cast<std::ptrdiff_t>(i)] != 0xA5 || to[bytes + i - 1] != 0xA5;
  return ok || wrong ? wrong : -1;
}

// All calls of one rank. What went wrong is in its report.
void live(const World& world, int rank, int64_t calls, uint32_t seed, double timeout_s) {
  World::Report& report = world.reports[rank];
  FaultRecord record{};
  const Peers peers = world.peers(rank, &record, timeout_s);
  std::mt19937 draw(seed), delay(seed + 1 + static_cast<uint32_t>(rank));
  for (int64_t i = 0; i < calls; ++i) {
    if (delay() % 100 == 0) std::this_thread::sleep_for(std::chrono::microseconds(delay() % 200));
    const int64_t wrong = make(RandomCall(draw), peers);
    if (wrong < 0) break;
    report.wrong += wrong != 0;
    ++report.calls;
  }
  report.rank = record.rank;
  report.fault = __atomic_load_n(&record.fault, __ATOMIC_ACQUIRE);
}

int fail(const std::string& what) {
  std::printf("%s\n", what.c_str());
  return 1;
}

int judge(const World& world, int64_t calls) {
  for (int rank = 0; rank < world.ranks; ++rank) {
    const World::Report& report = world.reports[rank];
    if (report.wrong || report.fault || report.calls != calls)
      return fail("rank " + std::to_string(rank) + ": " + std::to_string(report.calls) + " calls, " +
                  std::to_string(report.wrong) + " wrong, fault " + std::to_string(report.fault) + " of rank " +
                  std::to_string(report.rank));
    for (int64_t at = kHeaderBytes; at < kWorkspaceBytes; at += 8)
      if (*reinterpret_cast<const uint64_t*>(world.workspaces[rank] + at)) return fail("a word was left in a slot");
  }
  return 0;
}

template <class Body>
pid_t start(Body body) {
  const pid_t pid = fork();
  if (pid != 0) return pid;
  body();
  _exit(0);
}

int threads(int ranks, int64_t calls, uint32_t seed) {
  World world(ranks);
  std::vector<std::thread> all;
  for (int rank = 0; rank < ranks; ++rank)
    all.emplace_back([&world, rank, calls, seed] { live(world, rank, calls, seed, 60); });
  for (std::thread& thread : all) thread.join();
  return judge(world, calls);
}

int processes(int ranks, int64_t calls, uint32_t seed) {
  World world(ranks);
  for (int rank = 0; rank < ranks; ++rank)
    start([&] {
      world.header(rank)->pid = static_cast<uint32_t>(getpid());
      live(world, rank, calls, seed, 60);
    });
  while (wait(nullptr) > 0) continue;
  return judge(world, calls);
}

// Rank 0 has two threads on one communicator. If their calls overlap, the communicator stops on every rank.
int twice() {
  int overlaps = 0;
  for (int round = 0; round < 200; ++round) {
    World world(2);
    FaultRecord records[2] = {};
    std::atomic<int> sums{0}, wrong{0}, failed{0};
    const auto run = [&](int rank, int calls) {
      const Peers peers = world.peers(rank, &records[rank], 60);
      for (int i = 0; i < calls; ++i) {
        float value = static_cast<float>(rank + 1), sum;
        if (!all_reduce<Access>(peers, kDirect, &value, &sum, 1, abiding::DType::kFloat32)) {
          ++failed;
          return;
        }
        ++sums;
        wrong += sum != 3;
      }
    };
    std::thread one(run, 0, 50), two(run, 0, 50), other(run, 1, 100);
    one.join();
    two.join();
    other.join();
    if (wrong) return fail("a wrong sum");
    overlaps += failed != 0;
    // A thread that was in its last call may have succeeded.
    if (failed == 0 ? sums != 200 : records[0].fault != static_cast<uint32_t>(Fault::kConcurrent) || failed < 2)
      return fail(std::to_string(failed) + " failed, fault " + std::to_string(records[0].fault));
  }
  return overlaps ? 0 : fail("calls never overlapped");
}

int killed(int ranks, int times, uint32_t seed) {
  std::mt19937 draw(seed);
  for (int time = 0; time < times; ++time) {
    World world(ranks);
    pid_t pids[kMaxRanks];
    for (int rank = 0; rank < ranks; ++rank)
      pids[rank] = start([&] {
        world.header(rank)->pid = static_cast<uint32_t>(getpid());
        live(world, rank, 1 << 30, seed, 30);
      });
    const auto victim = static_cast<int>(draw() % static_cast<uint32_t>(ranks));
    // Before a rank has written its pid, the others can only time out on it.
    for (int rank = 0; rank < ranks; ++rank)
      while (HostAccess::load(&world.header(rank)->pid) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    std::this_thread::sleep_for(std::chrono::microseconds(20000 + draw() % 20000));
    kill(pids[victim], SIGKILL);
    const auto began = std::chrono::steady_clock::now();
    // The victim stays a zombie until the others have ended.
    for (int rank = 0; rank < ranks; ++rank)
      if (rank != victim) waitpid(pids[rank], nullptr, 0);
    waitpid(pids[victim], nullptr, 0);
    const double waited = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
    if (waited > 5) return fail("it took " + std::to_string(waited) + " s to find out");
    for (int rank = 0; rank < ranks; ++rank) {
      const World::Report& report = world.reports[rank];
      if (rank != victim && (report.fault != static_cast<uint32_t>(Fault::kGone) ||
                             report.rank != static_cast<uint32_t>(victim) || report.wrong))
        return fail("rank " + std::to_string(victim) + " was killed, but rank " + std::to_string(rank) +
                    " reports fault " + std::to_string(report.fault) + " of rank " + std::to_string(report.rank) +
                    " after " + std::to_string(report.calls) + " calls, " + std::to_string(report.wrong) + " wrong");
    }
  }
  return 0;
}

int missing(int ranks) {
  World world(ranks);
  for (int rank = 0; rank + 1 < ranks; ++rank) start([&] { live(world, rank, 10, 0, 0.3); });
  while (wait(nullptr) > 0) continue;
  for (int rank = 0; rank + 1 < ranks; ++rank) {
    const World::Report& report = world.reports[rank];
    if (report.fault != static_cast<uint32_t>(Fault::kTimeout) || report.rank != static_cast<uint32_t>(ranks - 1) ||
        report.calls)
      return fail("rank " + std::to_string(rank) + " reports fault " + std::to_string(report.fault) + " of rank " +
                  std::to_string(report.rank));
  }
  return 0;
}

int measure(int ranks) {
  World world(ranks);
  for (int rank = 0; rank < ranks; ++rank)
    start([&] {
      FaultRecord record{};
      const Peers peers = world.peers(rank, &record, 60);
      for (int64_t bytes = 1 << 10; bytes <= 1 << 20; bytes *= 4) {
        std::vector<float> values(static_cast<size_t>(bytes) / 4, 1.0f), sums(values.size());
        std::vector<double> us;
        for (int i = 0; i < 1500; ++i) {
          const auto began = std::chrono::steady_clock::now();
          all_reduce<Access>(peers, kDirect, values.data(), sums.data(), bytes / 4, abiding::DType::kFloat32);
          us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - began).count());
        }
        double total = 0;
        for (double one : us) total += one;
        if (rank == 0)
          std::printf("%lld %.2f\n", static_cast<long long>(bytes), total / static_cast<double>(us.size()));
        if (rank == 0) std::fflush(stdout);
      }
    });
  while (wait(nullptr) > 0) continue;
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string mode = count > 1 ? arguments[1] : "";
  const auto number = [&](int i) { return i < count ? std::atoi(arguments[i]) : 0; };
  const auto seed = static_cast<uint32_t>(number(4));
  if (mode == "threads") return threads(number(2), number(3), seed);
  if (mode == "processes") return processes(number(2), number(3), seed);
  if (mode == "twice") return twice();
  if (mode == "killed") return killed(number(2), number(3), seed);
  if (mode == "missing") return missing(number(2));
  if (mode == "time") return measure(number(2));
  return 2;
}
