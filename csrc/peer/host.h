// The push protocol on a host: one thread of each rank, one "block". Whatever other ranks can see goes through an `Access`.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "common/dtypes.h"
#include "peer/protocol.h"
#include "peer/sums.h"

namespace abiding::peer {

// Whether a process has ended. One that its parent has not waited for yet is still listed, as a zombie.
inline bool has_ended(uint32_t pid) {
  if (pid == 0) return false;
  char path[32], text[512];
  std::snprintf(path, sizeof path, "/proc/%u/stat", pid);
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return errno == ENOENT;
  const ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  if (size <= 0) return true;
  text[size] = 0;
  const char* name_end = std::strrchr(text, ')');  // the name itself may hold anything
  return name_end && name_end[1] && (name_end[2] == 'Z' || name_end[2] == 'X');
}

// Memory of this host. An aligned word is never torn, nor are the four of a vector; the protocol asks for no more.
struct HostAccess {
  static constexpr int kWords = 4;  // moved at once
  typedef uint32_t Vector __attribute__((vector_size(16), may_alias));

  static void load_words(const uint32_t* from, uint32_t* to) {
    const Vector words = *reinterpret_cast<const volatile Vector*>(from);
    std::memcpy(to, &words, sizeof words);
  }
  static void store_words(uint32_t* to, const uint32_t* from) {
    Vector words;
    std::memcpy(&words, from, sizeof words);
    *reinterpret_cast<volatile Vector*>(to) = words;
  }
  static uint32_t load(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
  static void store(uint32_t* at, uint32_t value) { __atomic_store_n(at, value, __ATOMIC_RELAXED); }
  static uint32_t exchange(uint32_t* at, uint32_t value) { return __atomic_exchange_n(at, value, __ATOMIC_ACQ_REL); }
  static void fence() { std::atomic_thread_fence(std::memory_order_acq_rel); }

  // One wait: it spins, not for long where processors are fewer than ranks, then lets others run, then sleeps.
  class Wait {
   public:
    explicit Wait(int ranks) : spins_(ranks <= processors() ? 500 : 20) {}

    // Between two looks at memory that `source` should have written: what there is to say against waiting on.
    Fault pause(const Header& source, uint64_t timeout_ns) {
      if (++looks_ < spins_) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        return Fault::kNone;
      }
      const uint64_t now = now_ns();
      if (since_ == 0) since_ = checked_ = now;
      if (waited_ns() > timeout_ns) return Fault::kTimeout;
      if (now - checked_ > 10'000'000) {
        checked_ = now;
        if (has_ended(load(&source.pid))) return Fault::kGone;
      }
      if (now - since_ < 2'000'000) {
        sched_yield();
      } else {
        const timespec nap{0, 50'000};
        nanosleep(&nap, nullptr);
      }
      return Fault::kNone;
    }
    uint64_t waited_ns() const { return since_ ? now_ns() - since_ : 0; }

   private:
    static int processors() {
      static const int count = [] {
        cpu_set_t set;
        return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
      }();
      return count;
    }
    static uint64_t now_ns() {
      timespec now;
      clock_gettime(CLOCK_MONOTONIC, &now);
      return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
    }
    int looks_ = 0, spins_;
    uint64_t since_ = 0, checked_ = 0;
  };
};

// A rank's part in one call, over as many epochs as its message takes.
template <class Access>
class HostTurn {
 public:
  HostTurn(const Peers& peers, Channel channel, Op op)
      : peers_(peers), channel_(channel), op_(op), share_(share_bytes(channel, peers.ranks, 1)) {
    if (const uint32_t poison = Access::load(&header(0)->poison)) {
      give_up(poison, 0);
      return;
    }
    const uint32_t turn = Access::exchange(&header(0)->turns[channel][0], kTaken);
    epoch_ = Access::load(&header(0)->epochs[channel][0]);
    if (turn != epoch_) give_up(poison_word(Fault::kConcurrent, peers.rank, peers.rank), 0);
  }

  bool ok() const { return ok_; }

  // Encodes `count` words and stores them from word `at` on into this rank's place at every other rank.
  void send(uint32_t* words, int64_t at, int count) {
    for (int i = 0; i < count; ++i) words[i] = encode(words[i]);
    for (int peer = 1; peer < peers_.ranks; ++peer) {
      uint32_t* to = place(peer, peers_.rank) + at;
      for (int i = 0; i < count; i += Access::kWords) Access::store_words(to + i, words + i);
    }
  }

  // Waits for `count` words of `source`, empties their place and decodes them. False: the call is over.
  bool receive(int source, int64_t at, uint32_t* words, int count) {
    uint32_t* from = place(0, source) + at;
    if (!read(from, words, count) && !wait(source, from, words, count)) return false;
    const uint32_t empty[Access::kWords] = {};
    for (int i = 0; i < count; i += Access::kWords) Access::store_words(from + i, empty);
    for (int i = 0; i < count; ++i) words[i] = decode(words[i]);
    return true;
  }

  // On to the next epoch. The fence: whoever receives what is sent from now on also sees what was emptied so far.
  void next() {
    Access::fence();
    Access::store(&header(0)->epochs[channel_][0], ++epoch_);
  }

  void end() {
    Access::fence();
    Access::store(&header(0)->epochs[channel_][0], epoch_ + 1);
    Access::store(&header(0)->turns[channel_][0], epoch_ + 1);
  }

 private:
  // Of the rank that comes `i` after this one.
  Header* header(int i) const { return reinterpret_cast<Header*>(peers_.workspaces[i]); }

  uint32_t* place(int i, int source) const {
    return reinterpret_cast<uint32_t*>(peers_.workspaces[i] + share_at(channel_, epoch_, source, share_));
  }

  static bool read(const uint32_t* from, uint32_t* words, int count) {
    for (int i = 0; i < count; i += Access::kWords) Access::load_words(from + i, words + i);
    uint32_t empty = 0;
    for (int i = 0; i < count; ++i) empty |= words[i] == kEmpty;
    return !empty;
  }

  bool wait(int source, const uint32_t* from, uint32_t* words, int count) {
    const Header* sender = header((source - peers_.rank + peers_.ranks) % peers_.ranks);
    typename Access::Wait wait(peers_.ranks);
    Fault fault = Fault::kNone;
    do {
      uint32_t poison = Access::load(&header(0)->poison);
      // A process may end after it has sent, or wake up late, so one more look has come before it is blamed.
      if (poison == 0 && fault != Fault::kNone) poison = poison_word(fault, source, peers_.rank);
      if (poison != 0) return give_up(poison, wait.waited_ns());
      fault = wait.pause(*sender, peers_.timeout_ns);
    } while (!read(from, words, count));
    return true;
  }

  // The first fault of a rank is kept for its caller, and every rank is told. Returns false.
  bool give_up(uint32_t poison, uint64_t waited_ns) {
    ok_ = false;
    FaultRecord* record = peers_.record;
    uint32_t none = 0;
    if (__atomic_compare_exchange_n(&record->fault, &none, ~0u, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      record->op = op_;
      record->epoch = epoch_;
      record->block = 0;
      record->rank = poison >> 8 & 0xFF;
      record->found_by = poison >> 16;
      record->waited_ns = waited_ns;
      __atomic_store_n(&record->fault, poison & 0xFF, __ATOMIC_RELEASE);
    }
    for (int i = 0; i < peers_.ranks; ++i)
      if (Access::load(&header(i)->poison) == 0) Access::store(&header(i)->poison, poison);
    return false;
  }

  const Peers& peers_;
  Channel channel_;
  Op op_;
  int64_t share_;
  uint32_t epoch_ = 0;
  bool ok_ = true;
};

// A message in memory of its own, at any address; reads and writes it by whole words.
template <class T>
struct HostMessage {
  const uint8_t* input;
  uint8_t* out;
  int64_t numel, bytes;

  void load(int64_t at, uint32_t* words, int count) const {
    const int64_t have = std::min<int64_t>(4 * count, bytes - at);
    std::memcpy(words, input + at, static_cast<size_t>(have));
    std::memset(reinterpret_cast<uint8_t*>(words) + have, 0, static_cast<size_t>(4 * count - have));
  }
  void store(int64_t at, const uint32_t* words, int count) const {
    std::memcpy(out + at, words, static_cast<size_t>(std::min<int64_t>(4 * count, bytes - at)));
  }
  void fill_with_nans() const {
    const int64_t size = ChunkSums<T>::kHalves ? 2 : 4;
    for (int64_t i = 0; i < numel; ++i) std::memcpy(out + i * size, &T::kNan, static_cast<size_t>(size));
  }
};

template <class Access, class T>
bool all_reduce(HostTurn<Access>& turn, const Peers& peers, int64_t share, const HostMessage<T>& message) {
  uint32_t words[kChunkWords];
  // Calls body(byte of the message, word of the share, words) for each chunk of a share.
  const auto for_chunks = [&](int64_t begin, auto body) {
    const int64_t end = std::min(begin + share, message.bytes);
    for (int64_t at = begin; at < end && turn.ok(); at += 4 * kChunkWords) {
      const int64_t left = (end - at + 4 * Access::kWords - 1) / (4 * Access::kWords) * Access::kWords;
      body(at, (at - begin) / 4, static_cast<int>(std::min<int64_t>(left, kChunkWords)));
    }
  };
  for (int64_t begin = 0; begin < message.bytes && turn.ok(); begin += share) {
    if (begin > 0) turn.next();
    for_chunks(begin, [&](int64_t at, int64_t word, int count) {
      message.load(at, words, count);
      turn.send(words, word, count);
    });
    for_chunks(begin, [&](int64_t at, int64_t word, int count) {
      ChunkSums<T> sums;
      for (int rank = 0; rank < peers.ranks; ++rank) {
        if (rank == peers.rank)
          message.load(at, words, count);
        else if (!turn.receive(rank, word, words, count))
          return;
        rank == 0 ? sums.set(words, count) : sums.add(words, count);
      }
      sums.round(words, count);
      message.store(at, words, count);
    });
  }
  if (turn.ok())
    turn.end();
  else
    message.fill_with_nans();
  return turn.ok();
}

// The sum over ranks, in rank order, the same bits everywhere; `out` may be `input`. False: `out` is all NaN, and the record
// says why.
template <class Access = HostAccess>
bool all_reduce(const Peers& peers, Channel channel, Op op, const void* input, void* out, int64_t numel, DType dtype) {
  if (numel == 0) return true;
  HostTurn<Access> turn(peers, channel, op);
  const int64_t share = share_bytes(channel, peers.ranks, 1), bytes = numel * size_of(dtype);
  return dispatch_floating(dtype, [&](auto tag) {
    using T = SumFormat<decltype(tag)>;
    return all_reduce(turn, peers, share,
                      HostMessage<T>{static_cast<const uint8_t*>(input), static_cast<uint8_t*>(out), numel, bytes});
  });
}

inline bool all_reduce(const Peers& peers, const void* input, void* out, int64_t numel, DType dtype) {
  return all_reduce(peers, kDirect, Op::kAllReduce, input, out, numel, dtype);
}

// The same for a few numbers a token, on a channel of their own.
inline bool sum_scalars(const Peers& peers, Op op, const float* values, float* sums, int64_t count) {
  return all_reduce(peers, kScalars, op, values, sums, count, DType::kFloat32);
}

}  // namespace abiding::peer
