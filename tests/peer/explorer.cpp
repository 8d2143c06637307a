// A model checker of the push protocol: runs the host code through every interleaving of its accesses to shared memory.
//
// A rank runs the real code over an `Access` that answers from a list, and stops at the first access that has no answer
// yet. So a rank's local state is its list of answers, and a global state is the shared memory, the ranks' local states
// and the stores in flight. Stores to another rank arrive late and in any order, as on a link between GPUs; only stores
// to the same word keep their order.
//
//   explorer <ranks> <epochs> <words> [crash] [timeout] [late] [twice] [shorter | dtype | other]
//     crash: one rank may stop for good anywhere;  timeout: any wait may end;  late: stores are in flight for a while
//     twice: another thread of rank 0 makes a call of its own
//     shorter, dtype, other: the second call of the last rank has a word less, only another tag, or another channel too
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "peer/host.h"

using namespace abiding::peer;

namespace {

constexpr int kMaxWords = 2;

struct Options {
  int ranks, epochs, words;
  bool crash, timeout, late, twice, shorter, dtype, other;
};
Options options;

[[noreturn]] void reject(const std::string& what);

// A workspace is an address that is never dereferenced.
constexpr int kRankShift = 40;
uint64_t workspace(int rank) { return static_cast<uint64_t>(rank + 1) << kRankShift; }
int rank_at(uint64_t address) { return static_cast<int>(address >> kRankShift) - 1; }

// ---- What a rank does next.

enum Kind { kPoll, kLoad, kStore, kExchange, kPause, kDone };
struct Step {
  Kind kind;
  uint64_t address;  // for kPause: the header of the rank that this one waits for
  uint32_t value;
};

struct Answers {
  std::vector<uint32_t> values;
  std::vector<Kind> kinds;
};
const Answers* answers;
size_t used;

// What a rank knows of its past: its call, its fault, and how many answers it had before each.
struct Progress {
  int call = 0;
  bool stopped = false;
  FaultRecord record{};
  size_t asked = 0;   // answers before the fault
  size_t called = 0;  // answers before the call
  const Header* own = nullptr;

  size_t since() const { return record.fault && !stopped ? asked : called; }
};
Progress progress;

uint32_t ask(Kind kind, const void* at, uint32_t value = 0) {
  // Invariant: a call reads the poison first, and if there is any, it only reports it.
  if (used == progress.called && at != &progress.own->poison) reject("a call began without a look at the poison");
  if (used > progress.called && answers->values[progress.called] != 0 && kind != kLoad && kind != kStore)
    reject("a call went on after it had seen the poison");
  if (used == answers->values.size()) throw Step{kind, reinterpret_cast<uint64_t>(at), value};
  if (progress.record.fault == 0) progress.asked = used + 1;
  return answers->values[used++];
}

struct RecordedAccess {
  static constexpr int kWords = 1;
  static constexpr int kTagWords = 1;  // the first tells all calls here apart, and more words are more interleavings
  static void load_words(const uint32_t* from, uint32_t* to) { *to = ask(kPoll, from); }
  static void store_words(uint32_t* to, const uint32_t* from) { ask(kStore, to, *from); }
  static uint32_t load(const uint32_t* at) { return ask(kLoad, at); }
  static void store(uint32_t* at, uint32_t value) { ask(kStore, at, value); }
  static uint32_t exchange(uint32_t* at, uint32_t value) { return ask(kExchange, at, value); }
  static void fence() {}
  struct Wait {
    explicit Wait(int) {}
    Fault pause(const Header& source, uint64_t) { return static_cast<Fault>(ask(kPause, &source)); }
    uint64_t waited_ns() const { return 0; }
  };
};

// ---- A rank's program, and what must hold at its end.

struct Actor {
  int rank;
  int first, last;  // its calls: a second thread of a rank has one of its own
};
std::vector<Actor> actors;

// A power of two per word, so that a sum tells which words it is made of.
float payload(int rank, int call, int word) {
  return std::ldexp(1.0f, (rank * (options.epochs + 1) + call) * options.words + word - 12);
}

// Calls, by their order; only the second can differ between ranks.
constexpr int kDifferent = 1;
bool has_mismatch() { return options.shorter || options.dtype || options.other; }
bool is_mismatch(int call) { return has_mismatch() && call == kDifferent; }
bool is_different(int rank, int call) { return is_mismatch(call) && rank == options.ranks - 1; }

// The operator stands for the size and the dtype: it is in the first word.
CallTag tag(int rank, int call) {
  return tag_of({is_different(rank, call) ? Op::kAllReduce : Op::kRmsNorm, abiding::DType::kFloat32, options.words});
}

void check_sums(const Actor& actor, int call, const float* sums) {
  for (int word = 0; word < options.words; ++word) {
    float expected = 0;
    for (int rank = 0; rank < options.ranks; ++rank) expected += payload(rank, call, word);
    if (sums[word] == expected) continue;
    // With two threads in one rank, calls are matched in order of arrival: a sum of one word per rank is right.
    bool found = false;
    if (options.twice)
      for (int own = 0; own <= options.epochs; ++own)
        for (int other = 0; other <= options.epochs; ++other)
          found |= sums[word] == payload(0, own, word) + payload(1, other, word) && (actor.rank ? other : own) == call;
    if (!found) reject("rank " + std::to_string(actor.rank) + " got wrong words in call " + std::to_string(call));
  }
}

void check_fault(const Actor& actor, const FaultRecord& record) {
  const auto fault = static_cast<Fault>(record.fault);
  const std::string name = "rank " + std::to_string(actor.rank);
  const auto ranks = static_cast<uint32_t>(options.ranks);
  if (!options.crash && !options.timeout && !options.twice && !has_mismatch()) reject(name + " stopped for no reason");
  if (record.rank >= ranks || record.found_by >= ranks) reject(name + " stopped without saying why");
  if (fault == Fault::kConcurrent ? record.rank != record.found_by : record.rank == record.found_by)
    reject(name + " blames the wrong rank");
  if (fault == Fault::kConcurrent && !(options.twice && record.rank == 0)) reject(name + " saw two calls of one");
  if (fault == Fault::kTimeout && !options.timeout) reject(name + " says that time is over");
  if (fault != Fault::kMismatch) return;
  if (!has_mismatch()) reject(name + " saw calls that differ");
  const bool blames_last = record.rank == ranks - 1, found_by_last = record.found_by == ranks - 1;
  if (blames_last == found_by_last) reject(name + " says that two equal calls differ");
  for (const bool finder : {false, true}) {
    const uint32_t known = record.calls[finder].words[0];
    const auto rank = static_cast<int>(finder ? record.found_by : record.rank);
    // Stores arrive in any order here, though report_mismatch() has a fence between the calls and the poison.
    if (known != tag(rank, kDifferent).words[0] && !(known == 0 && options.late)) reject(name + " names another call");
  }
}

void run(const Actor& actor) {
  progress = {};
  progress.own = reinterpret_cast<const Header*>(workspace(actor.rank));
  Peers peers{};
  peers.rank = actor.rank;
  peers.ranks = options.ranks;
  peers.max_ctas = 1;
  peers.record = &progress.record;
  peers.timeout_ns = 1;
  for (int i = 0; i < options.ranks; ++i)
    peers.workspaces[i] = reinterpret_cast<uint8_t*>(workspace((actor.rank + i) % options.ranks));
  for (progress.call = actor.first; progress.call < actor.last; ++progress.call) {
    progress.called = used;
    float values[kMaxWords], sums[kMaxWords];
    for (int word = 0; word < options.words; ++word) values[word] = payload(actor.rank, progress.call, word);
    const bool different = is_different(actor.rank, progress.call);
    peers.tag = tag(actor.rank, progress.call);
    const bool ok =
        all_reduce<RecordedAccess>(peers, different && options.other ? kDirect : kScalars, values, sums,
                                   options.words - (different && options.shorter), abiding::DType::kFloat32);
    if (ok && progress.stopped) reject("a call went through after one that did not");
    if (ok && is_mismatch(progress.call)) reject("a call went through that is not the others'");
    if (ok) {
      check_sums(actor, progress.call, sums);
      continue;
    }
    if (!std::isnan(sums[0])) reject("a call that failed left something but NaN");
    if (progress.stopped) return;
    check_fault(actor, progress.record);
    progress.stopped = true;  // the next call must fail, too
  }
}

// ---- Local states, found by running the program, and numbered.

struct Node {
  Answers history;
  Step next{kDone, 0, 0};
  Progress progress;
  std::map<uint32_t, uint32_t> after;  // answer -> node
};
std::vector<Node> nodes;
std::map<std::vector<uint32_t>, uint32_t> node_numbers;

uint32_t node_for(size_t actor, const Answers& history) {
  Node node{history, {kDone, 0, 0}, {}, {}};
  answers = &history;
  used = 0;
  try {
    run(actors[actor]);
  } catch (const Step& step) {
    node.next = step;
  }
  node.progress = progress;
  std::vector<uint32_t> key{static_cast<uint32_t>(actor), progress.stopped, node.next.kind == kDone};
  if (node.next.kind != kDone) {
    const FaultRecord& record = progress.record;
    key.push_back(static_cast<uint32_t>(progress.call));
    if (!progress.stopped) key.insert(key.end(), {record.fault, record.rank, record.found_by});
    key.insert(key.end(), history.values.begin() + static_cast<std::ptrdiff_t>(progress.since()), history.values.end());
  }
  const auto [entry, is_new] = node_numbers.try_emplace(key, nodes.size());
  if (is_new) nodes.push_back(std::move(node));
  return entry->second;
}

uint32_t follow(size_t actor, uint32_t number, uint32_t answer) {
  if (const auto known = nodes[number].after.find(answer); known != nodes[number].after.end()) return known->second;
  Answers history = nodes[number].history;
  if (nodes[number].next.kind == kPause && answer == static_cast<uint32_t>(Fault::kNone)) {
    // To wait on is to return to the state before the poison and the words were read.
    size_t size = history.kinds.size() - 1;
    while (history.kinds[size - 1] == kPoll) --size;
    history.kinds.resize(size);
    history.values.resize(size);
  } else {
    history.kinds.push_back(nodes[number].next.kind);
    history.values.push_back(answer);
  }
  const uint32_t next = node_for(actor, history);
  nodes[number].after[answer] = next;
  return next;
}

// ---- Global states. Addresses and values are numbered, so that a state is a few bytes.

template <class T>
class Numbered {
 public:
  uint8_t number(T thing) {
    const auto [entry, is_new] = numbers_.try_emplace(thing, static_cast<uint8_t>(things_.size()));
    if (is_new) things_.push_back(thing);
    if (things_.size() > 255) reject("more addresses or values than a byte can count");
    return entry->second;
  }
  T operator[](size_t number) const { return things_[number]; }

 private:
  std::map<T, uint8_t> numbers_;
  std::vector<T> things_;
};
Numbered<uint64_t> addresses;
Numbered<uint32_t> values;  // 0 has number 0
bool is_word(size_t variable) { return (addresses[variable] & ((1ull << kRankShift) - 1)) >= kHeaderBytes; }

bool is_poison(size_t variable) {
  return (addresses[variable] & ((1ull << kRankShift) - 1)) == offsetof(Header, poison);
}

struct Store {
  uint8_t actor, variable, value;
};
constexpr uint8_t kNobody = 255;
struct State {
  uint32_t at[4] = {};      // node of each actor
  uint8_t memory[72] = {};  // value of each variable
  Store late[15] = {};      // stores in flight, those to one word in order
  uint8_t late_count = 0, crashed = kNobody;
  uint8_t unused = 0;

  void send(Store store) {
    if (late_count == 15) reject("more stores in flight than there is room for");
    const auto after = [](const Store& a, const Store& b) {
      return std::pair(a.actor, a.variable) < std::pair(b.actor, b.variable);
    };
    Store* at = std::upper_bound(late, late + late_count, store, after);
    std::copy_backward(at, late + late_count, late + late_count + 1);
    *at = store;
    ++late_count;
  }
  void deliver(int i) {
    memory[late[i].variable] = late[i].value;
    std::copy(late + i + 1, late + late_count, late + i);
    late[--late_count] = {};
  }
  uint64_t fingerprint() const {
    static_assert(sizeof(State) % 8 == 0 && sizeof(State) == 16 + 72 + 45 + 3);
    uint64_t words[sizeof(State) / 8], hash = 0;
    std::memcpy(words, this, sizeof words);
    for (uint64_t word : words) {
      hash = (hash ^ word) * 0x9E3779B97F4A7C15;
      hash ^= hash >> 29;
      hash *= 0xBF58476D1CE4E5B9;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

std::unordered_map<uint64_t, uint32_t> numbers;  // fingerprint -> number
std::vector<std::pair<State, uint32_t>> left;
std::vector<std::pair<uint32_t, uint32_t>> edges;  // to, from
std::vector<uint32_t> ends;

[[noreturn]] void reject(const std::string& what) {
  std::printf("violation: %s\n", what.c_str());
  std::exit(1);
}

void reach(const State& state, uint32_t from) {
  const auto [entry, is_new] = numbers.try_emplace(state.fingerprint(), numbers.size());
  edges.emplace_back(entry->second, from);
  if (is_new) left.emplace_back(state, entry->second);
}

// Whether the order of this access among those of others does not matter (partial-order reduction): only the owner uses
// the address, or nobody sees the store before it arrives, and its rank cannot crash before it.
bool is_private(const Step& step, int rank) {
  if (options.twice || step.kind == kPoll || step.kind == kPause || step.kind == kDone) return false;
  if (rank_at(step.address) != rank) return step.kind == kStore && options.late && !options.crash;
  const uint64_t offset = step.address - workspace(rank);
  return offset >= offsetof(Header, epochs) && offset < kHeaderBytes;
}

State apply(State state, size_t actor) {
  const Step step = nodes[state.at[actor]].next;
  const uint8_t variable = addresses.number(step.address);
  const uint32_t old = values[state.memory[variable]];
  if (step.kind == kStore && options.late && rank_at(step.address) != actors[actor].rank)
    state.send({static_cast<uint8_t>(actor), variable, values.number(step.value)});
  else if (step.kind == kStore || step.kind == kExchange)
    state.memory[variable] = values.number(step.value);
  state.at[actor] = follow(actor, state.at[actor], step.kind == kStore ? 0 : old);
  return is_private(nodes[state.at[actor]].next, actors[actor].rank) ? apply(state, actor) : state;
}

void check_end(const State& state) {
  bool any_stopped = state.crashed != kNobody;
  for (size_t a = 0; a < actors.size(); ++a) any_stopped |= nodes[state.at[a]].progress.stopped;
  for (size_t variable = 0; variable < sizeof state.memory; ++variable) {
    const uint32_t value = values[state.memory[variable]];
    if (value == 0) continue;
    if (is_word(variable) && !any_stopped) reject("a word was left in a slot");
    if (is_poison(variable) && !options.timeout && !options.twice && (value >> 8 & 0xFF) != state.crashed &&
        fault_of(value) != static_cast<uint32_t>(Fault::kMismatch))
      reject("a rank is blamed that has not crashed");
  }
}

// Whether a store that is in flight to this variable may arrive now: before some rank's next access to it, or while its
// owner waits or has ended. Any earlier would make no difference to anybody (partial-order reduction).
bool is_awaited(const State& state, uint8_t variable) {
  for (size_t a = 0; a < actors.size(); ++a) {
    const Step& next = nodes[state.at[a]].next;
    const bool is_idle = a == state.crashed || next.kind == kPause || next.kind == kDone;
    if (is_idle ? rank_at(addresses[variable]) == actors[a].rank : next.address == addresses[variable]) return true;
  }
  return false;
}

void expand(const State& state, uint32_t number) {
  bool done = true;
  for (size_t a = 0; a < actors.size(); ++a) {
    const Step step = nodes[state.at[a]].next;
    if (a == state.crashed || step.kind == kDone) continue;
    done = false;
    if (options.crash && state.crashed == kNobody && a < static_cast<size_t>(options.ranks)) {
      State next = state;
      next.crashed = static_cast<uint8_t>(a);
      reach(next, number);
    }
    if (step.kind != kPause) {
      reach(apply(state, a), number);
      continue;
    }
    const auto source = static_cast<size_t>(rank_at(step.address));
    const auto answer = [&](Fault fault) {
      State next = state;
      next.at[a] = follow(a, state.at[a], static_cast<uint32_t>(fault));
      reach(next, number);
    };
    answer(Fault::kNone);
    if (options.timeout) answer(Fault::kTimeout);
    bool in_flight = false;  // the stores of a process to this one arrive before its end is seen here
    for (int i = 0; i < state.late_count; ++i)
      in_flight |= state.late[i].actor == source && rank_at(addresses[state.late[i].variable]) == actors[a].rank;
    // A process also ends when it has made all its calls.
    if ((source == state.crashed || nodes[state.at[source]].next.kind == kDone) && !in_flight && !options.twice)
      if (!nodes[state.at[source]].progress.stopped || source == state.crashed) answer(Fault::kGone);
  }
  for (int i = 0; i < state.late_count; ++i) {
    const auto same = [&](const Store& s) {
      return s.actor == state.late[i].actor && s.variable == state.late[i].variable;
    };
    if (std::any_of(state.late, state.late + i, same) || !is_awaited(state, state.late[i].variable)) continue;
    State next = state;
    next.deliver(i);
    reach(next, number);
  }
  if (!done) return;
  ends.push_back(number);
  check_end(state);
}

// Invariant: an end can be reached from every state, so no rank waits forever.
void check_progress() {
  std::vector<uint32_t> first(numbers.size() + 1);  // index of the first edge to a state
  std::sort(edges.begin(), edges.end());
  for (const auto& edge : edges) ++first[edge.first + 1];
  for (size_t i = 1; i < first.size(); ++i) first[i] += first[i - 1];
  std::vector<bool> ending(numbers.size());
  std::vector<uint32_t> open = ends;
  size_t count = ends.size();
  for (uint32_t number : ends) ending[number] = true;
  while (!open.empty()) {
    const uint32_t number = open.back();
    open.pop_back();
    for (uint32_t i = first[number]; i < first[number + 1]; ++i) {
      const uint32_t from = edges[i].second;
      if (ending[from]) continue;
      ending[from] = true;
      ++count;
      open.push_back(from);
    }
  }
  if (count != numbers.size()) reject("ranks wait forever");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) return 2;
  options = {};
  options.ranks = std::atoi(arguments[1]);
  options.epochs = std::atoi(arguments[2]);
  options.words = std::atoi(arguments[3]);
  for (int i = 4; i < count; ++i) {
    const std::string option = arguments[i];
    options.crash |= option == "crash";
    options.timeout |= option == "timeout";
    options.late |= option == "late";
    options.twice |= option == "twice";
    options.shorter |= option == "shorter";
    options.dtype |= option == "dtype";
    options.other |= option == "other";
  }
  for (int rank = 0; rank < options.ranks; ++rank) actors.push_back({rank, 0, options.epochs});
  if (options.twice) actors.push_back({0, options.epochs, options.epochs + 1});
  values.number(0);
  State start;
  for (size_t a = 0; a < actors.size(); ++a) start.at[a] = node_for(a, {});
  reach(start, 0);
  while (!left.empty()) {
    const auto [state, number] = left.back();
    left.pop_back();
    expand(state, number);
  }
  check_progress();
  std::printf("%zu states, %zu steps, %zu ends, %zu local states\n", numbers.size(), edges.size(), ends.size(),
              nodes.size());
  return 0;
}
