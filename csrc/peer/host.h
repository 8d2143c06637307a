// The push protocol on the host: one thread per rank, which takes the place of a CTA. Every access to memory that other
// ranks share goes through an `Access`, so that tests can put another one in.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/dtypes.h"
#include "peer/host_sum.h"
#include "peer/interrupt.h"
#include "peer/process.h"
#include "peer/protocol.h"

namespace abiding::peer {

// Host memory. No aligned word is torn, which is all that the protocol needs.
struct HostAccess {
  static constexpr int kWords = 4;     // per load or store
  static constexpr int kTagWords = 2;  // of a CallTag that travel
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

  // One wait: it spins (briefly where there are more ranks than processors), then yields, then sleeps.
  class Wait {
   public:
    explicit Wait(int ranks) : spins_(ranks <= processors() ? 500 : 20) {}

    // To be called between two polls of words from `source`. Returns a reason to stop waiting, or kNone.
    Fault pause(const Header& source, uint64_t timeout_ns) {
      if (++polls_ < spins_) {
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
        if (load(&source.departed)) return Fault::kClosed;
        if (has_ended(load(&source.pid))) return Fault::kGone;
        if (poll_interrupt()) return Fault::kInterrupted;
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
    int polls_ = 0, spins_;
    uint64_t since_ = 0, checked_ = 0;
  };
};

// A rank's part in one call, which takes as many epochs as the message needs. The constructor claims the epoch and
// sends the tag, end() publishes the next epoch.
template <class Access>
class HostCallScope {
 public:
  HostCallScope(const Peers& peers, Channel channel)
      : peers_(peers), channel_(channel), region_bytes_(region_bytes(channel, peers.ranks, 1)) {
    if (const uint32_t poison = Access::load(&header(0)->poison)) {
      report_fault(poison, 0);
      return;
    }
    const uint32_t claim = Access::exchange(&header(0)->claims[0], kClaimed);
    epoch_ = Access::load(&header(0)->epochs[0]);
    if (claim != epoch_) {
      report_fault(poison_word(Fault::kConcurrent, peers.rank, peers.rank), 0);
      return;
    }
    for (int peer = 1; peer < peers.ranks; ++peer) store_tag(tag_ptr(peer, peers.rank), peers.tag);
  }

  bool ok() const { return ok_; }

  // Encodes `count` words in place and stores them to every other rank, from word `at` of this rank's region on.
  void send(uint32_t* words, int64_t at, int count) {
    for (int i = 0; i < count; ++i) words[i] = encode(words[i]);
    for (int peer = 1; peer < peers_.ranks; ++peer) {
      uint32_t* to = slot_ptr(peer, peers_.rank) + at;
      for (int i = 0; i < count; i += Access::kWords) Access::store_words(to + i, words + i);
    }
  }

  // Waits for the tag of every other rank, to be called once, before any receive(): only a rank that makes the same
  // call sends as many words as this one waits for. False: the call is over.
  bool receive_tags() {
    for (int source = 0; source < peers_.ranks; ++source) {
      if (source == peers_.rank) continue;
      uint32_t* from = tag_ptr(0, source);
      uint32_t words[4] = {};  // as many as a load may bring
      if (!read(from, words, Access::kTagWords) && !wait(source, from, words, Access::kTagWords)) return false;
      store_tag(from, {});
      const CallTag theirs{{words[0], words[1]}};
      if (!std::equal(words, words + Access::kTagWords, peers_.tag.words)) return report_mismatch(source, theirs);
    }
    return true;
  }

  // Waits for `count` words of `source`, empties them in memory and decodes them. False: the call is over.
  bool receive(int source, int64_t at, uint32_t* words, int count) {
    uint32_t* from = slot_ptr(0, source) + at;
    if (!read(from, words, count) && !wait(source, from, words, count)) return false;
    const uint32_t empty[Access::kWords] = {};
    for (int i = 0; i < count; i += Access::kWords) Access::store_words(from + i, empty);
    for (int i = 0; i < count; ++i) words[i] = decode(words[i]);
    return true;
  }

  // Ordering: the fence makes the words that this rank has emptied visible before the words that it sends next.
  void next_epoch() {
    Access::fence();
    Access::store(&header(0)->epochs[0], ++epoch_);
  }

  void end() {
    Access::fence();
    Access::store(&header(0)->epochs[0], epoch_ + 1);
    Access::store(&header(0)->claims[0], epoch_ + 1);
  }

 private:
  // The header of rank (rank + i) % ranks.
  Header* header(int i) const { return reinterpret_cast<Header*>(peers_.workspaces[i]); }

  uint32_t* slot_ptr(int i, int source) const {
    return reinterpret_cast<uint32_t*>(peers_.workspaces[i] + region_offset(channel_, epoch_, source, region_bytes_));
  }
  uint32_t* tag_ptr(int i, int source) const {
    const int64_t bytes = region_bytes(kTags, peers_.ranks, 1);
    return reinterpret_cast<uint32_t*>(peers_.workspaces[i] + region_offset(kTags, epoch_, source, bytes));
  }

  static void store_tag(uint32_t* to, const CallTag& tag) {
    for (int i = 0; i < Access::kTagWords; ++i) Access::store(to + i, tag.words[i]);
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
      // The words are read once more before `source` is blamed: its process may have ended after it had sent them, or
      // this one may have been suspended.
      if (poison == 0 && fault != Fault::kNone)
        poison = poison_word(fault, fault == Fault::kInterrupted ? peers_.rank : source, peers_.rank);
      if (poison != 0) return report_fault(poison, wait.waited_ns());
      fault = wait.pause(*sender, peers_.timeout_ns);
    } while (!read(from, words, count));
    return true;
  }

  // Ordering: the fence makes the two calls visible before the poison.
  bool report_mismatch(int source, const CallTag& theirs) {
    for (int i = 0; i < peers_.ranks; ++i) {
      store_tag(header(i)->calls[source].words, theirs);
      store_tag(header(i)->calls[peers_.rank].words, peers_.tag);
    }
    Access::fence();
    return report_fault(poison_word(Fault::kMismatch, source, peers_.rank), 0);
  }

  // Records this rank's first fault for its caller and writes the poison to every rank. Returns false.
  bool report_fault(uint32_t poison, uint64_t waited_ns) {
    ok_ = false;
    FaultRecord* record = peers_.record;
    uint32_t none = 0;
    if (__atomic_compare_exchange_n(&record->fault, &none, kRecordInWriting, false, __ATOMIC_RELAXED,
                                    __ATOMIC_RELAXED)) {
      record->op = op_of(peers_.tag);
      record->epoch = epoch_;
      record->cta = 0;
      record->rank = culprit_of(poison);
      record->found_by = finder_of(poison);
      record->waited_ns = waited_ns;
      const bool mismatch = fault_of(poison) == static_cast<uint32_t>(Fault::kMismatch);
      for (int i = 0; mismatch && i < Access::kTagWords; ++i) {
        record->calls[0].words[i] = Access::load(&header(0)->calls[record->rank].words[i]);
        record->calls[1].words[i] = Access::load(&header(0)->calls[record->found_by].words[i]);
      }
      __atomic_store_n(&record->fault, fault_of(poison), __ATOMIC_RELEASE);
    }
    for (int i = 0; i < peers_.ranks; ++i)
      if (Access::load(&header(i)->poison) == 0) Access::store(&header(i)->poison, poison);
    return false;
  }

  const Peers& peers_;
  Channel channel_;
  int64_t region_bytes_;
  uint32_t epoch_ = 0;
  bool ok_ = true;
};

// A message in the caller's memory, at any address, as whole words; the last one is padded with zeros.
template <class Format>
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
  void fill_with_nan() const {
    const int64_t size = ChunkSum<Format>::kIs16Bit ? 2 : 4;
    for (int64_t i = 0; i < numel; ++i) std::memcpy(out + i * size, &Format::kNan, static_cast<size_t>(size));
  }
};

template <class Access, class Format>
bool all_reduce(HostCallScope<Access>& scope, const Peers& peers, int64_t region, const HostMessage<Format>& message) {
  uint32_t words[kChunkWords];
  // Calls body(byte of the message, word of the region, words) for each chunk of what one region holds.
  const auto for_chunks = [&](int64_t begin, auto body) {
    const int64_t end = std::min(begin + region, message.bytes);
    for (int64_t at = begin; at < end && scope.ok(); at += 4 * kChunkWords) {
      const int64_t left = (end - at + 4 * Access::kWords - 1) / (4 * Access::kWords) * Access::kWords;
      body(at, (at - begin) / 4, static_cast<int>(std::min<int64_t>(left, kChunkWords)));
    }
  };
  for (int64_t begin = 0; begin < message.bytes && scope.ok(); begin += region) {
    if (begin > 0) scope.next_epoch();
    for_chunks(begin, [&](int64_t at, int64_t word, int count) {
      message.load(at, words, count);
      scope.send(words, word, count);
    });
    if (begin == 0) scope.receive_tags();
    for_chunks(begin, [&](int64_t at, int64_t word, int count) {
      ChunkSum<Format> sum;
      for (int rank = 0; rank < peers.ranks; ++rank) {
        if (rank == peers.rank)
          message.load(at, words, count);
        else if (!scope.receive(rank, word, words, count))
          return;
        rank == 0 ? sum.set(words, count) : sum.add(words, count);
      }
      sum.round(words, count);
      message.store(at, words, count);
    });
  }
  if (scope.ok())
    scope.end();
  else
    message.fill_with_nan();
  return scope.ok();
}

// The sum over ranks in rank order, bitwise equal on all ranks; `out` may be `input`. False: `out` is all NaN, and the
// record says why.
template <class Access = HostAccess>
bool all_reduce(const Peers& peers, Channel channel, const void* input, void* out, int64_t numel, DType dtype) {
  if (numel == 0) return true;
  HostCallScope<Access> scope(peers, channel);
  const int64_t region = region_bytes(channel, peers.ranks, 1), bytes = numel * size_of(dtype);
  return dispatch_floating(dtype, [&](auto tag) {
    using Format = HostFormat<decltype(tag)>;
    const HostMessage<Format> message{static_cast<const uint8_t*>(input), static_cast<uint8_t*>(out), numel, bytes};
    return all_reduce(scope, peers, region, message);
  });
}

}  // namespace abiding::peer
