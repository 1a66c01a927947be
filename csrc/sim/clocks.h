// Which accesses of a cluster's threads are ordered (Lamport 1978; the epochs of FastTrack, Flanagan & Freund 2009).
//
//   A thread stamps what it does with its clock. Where threads meet at a barrier, each learns everything that the
//   others knew or did; then their clocks step. An access of thread u with stamp c comes before what thread t does now
//   exactly when t knows u's clock to have passed c. Clocks of later clusters start above all clocks of earlier ones,
//   so a stamp tells its cluster. (A launch without clusters has clusters of one block.)
//
//   What goes on asynchronously are the deeds of agents of their own, whose stamps are groups: a thread's copies, its
//   stores as readers of shared and as writers of global memory, a warpgroup's products. The clock of such an agent
//   steps at every commit. Only the threads that it works for learn of its groups, by waiting for them, and hand the
//   knowledge on where they meet others. The bulk copies that report to an mbarrier are those of its carrier, whose
//   clock steps at the end of every phase; who waits for the end learns of it, and of what the threads knew or did
//   that arrived.
//
//   The unit that copies in bulk and multiplies for warpgroups sees what threads wrote only behind their fence (PTX
//   ISA, "async proxy"). "Thread u has fenced what it wrote up to stamp c" is knowledge like any other, so it is kept
//   as the clocks of more agents: of u's writes to its block's shared memory, to other blocks', to global memory, and
//   of its copies. Stricter than the document, where a fence by a thread that knows of the writes may do: u itself must
//   fence.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "sim/device.h"

namespace llmengine::sim {

enum class Deeds : uint8_t {
  own,  // what a thread does itself
  copies,
  store_reads,
  store_writes,
  products,
  transfers,  // to an mbarrier
  fenced_shared,
  fenced_cluster,
  fenced_global,
  fenced_copies,
};
inline constexpr size_t kDeeds = 10;

class Clocks {
 public:
  using Knowledge = std::vector<uint32_t>;  // by agent: the last clock that is known to have passed; 0 past the end

  void begin_launch() {
    first_ = 1;
    now_.clear();
  }

  void begin_cluster(int threads) {
    for (uint32_t c : now_) first_ = std::max(first_, c + 1);
    const auto count = static_cast<size_t>(threads);
    threads_ = threads;
    now_.assign(count, first_);
    agents_.assign(count, Agent{Deeds::own, -1});
    own_.assign(count, {});
    known_.assign(count, std::make_shared<const Knowledge>(count, 0));
  }

  // ---- agents ----

  // Of the thread's deeds of this kind; made when it is first asked for.
  int agent(int thread, Deeds deeds) {
    Waited& place = waited(thread, deeds);
    if (place.agent < 0) place.agent = new_agent(deeds, thread);
    return place.agent;
  }

  int new_carrier() { return new_agent(Deeds::transfers, -1); }

  // The threads from `first` on have one agent for these deeds, as a warpgroup has.
  int agent_of_all(int first, int count, Deeds deeds) {
    const int shared = agent(first, deeds);
    for (int t = first; t < first + count; ++t) waited(t, deeds).agent = shared;
    return shared;
  }

  Deeds deeds_of(int agent) const { return agents_[static_cast<size_t>(agent)].deeds; }
  int thread_of(int agent) const {  // that it works for; -1 of a carrier
    return agent < threads_ ? agent : agents_[static_cast<size_t>(agent)].thread;
  }

  uint32_t now(int agent) const { return now_[static_cast<size_t>(agent)]; }
  uint32_t first() const { return first_; }
  bool of_this_cluster(uint32_t stamp) const { return stamp >= first_; }

  // ---- what is known ----

  uint32_t knows(int thread, int agent) const {
    const auto a = static_cast<size_t>(agent);
    const Knowledge& known = *known_[static_cast<size_t>(thread)];
    const uint32_t told = a < known.size() ? known[a] : 0;
    if (agent < threads_) return told;
    const Waited& own = own_[static_cast<size_t>(thread)][static_cast<size_t>(agents_[a].deeds)];
    return own.agent == agent ? std::max(told, own.until) : told;
  }

  bool before(int earlier, uint32_t stamp, int thread) const {
    return earlier == thread || knows(thread, earlier) >= stamp;
  }

  // Before what the `count` threads from `first` on (a warp, a warpgroup) do together: every one must know.
  bool before_all(int earlier, uint32_t stamp, int first, int count) const {
    const int end = std::min(first + count, threads_), owner = thread_of(earlier);
    const bool waited_alone = deeds_of(earlier) == Deeds::products;  // each thread of a warpgroup waits for itself
    const Knowledge* asked = nullptr;
    for (int t = first; t < end; ++t) {
      const Knowledge* theirs = known_[static_cast<size_t>(t)].get();
      if (theirs == asked && t != owner && !waited_alone) continue;  // knows what the one before knew
      if (!before(earlier, stamp, t)) return false;
      if (t != owner) asked = theirs;
    }
    return true;
  }

  // Whether `thread` knows a write of `earlier`, to what its fence must reach, to be fenced: the asynchronous unit's
  // own need none.
  bool fenced(int earlier, uint32_t stamp, int thread, Reach reach) const {
    const Deeds deeds = deeds_of(earlier);
    if (deeds != Deeds::own && deeds != Deeds::copies) return true;
    const Deeds fence = deeds == Deeds::copies    ? Deeds::fenced_copies
                        : reach == Reach::block   ? Deeds::fenced_shared
                        : reach == Reach::cluster ? Deeds::fenced_cluster
                                                  : Deeds::fenced_global;
    const int owner = thread_of(earlier);
    const int agent = own_[static_cast<size_t>(owner)][static_cast<size_t>(fence)].agent;
    return agent >= 0 && knows(thread, agent) >= stamp;
  }

  // ---- barriers ----

  // `givers` arrived, `takers` waited for them.
  void meet(const std::vector<int>& givers, const std::vector<int>& takers) {
    auto all = std::make_shared<Knowledge>(*known_[static_cast<size_t>(givers.front())]);
    const Knowledge* merged = known_[static_cast<size_t>(givers.front())].get();
    for (int g : givers) {
      const Knowledge* theirs = known_[static_cast<size_t>(g)].get();
      if (theirs == merged) continue;  // met before, as a whole: the common case
      join(*all, *theirs);
      merged = theirs;
    }
    for (int g : givers) {
      give_own(g, *all);
      step(g);
    }
    for (int t : takers) known_[static_cast<size_t>(t)] = all;
  }

  // Thread arrives: what it knew or did joins what phases will tell.
  void release(int thread, std::initializer_list<Knowledge*> phases) {
    for (Knowledge* phase : phases) {
      join(*phase, *known_[static_cast<size_t>(thread)]);
      give_own(thread, *phase);
    }
    step(thread);
  }

  // What of that which goes on asynchronously the thread knows to have ended, and nothing else.
  void tell_ended(int thread, Knowledge& phase) {
    for (size_t a = static_cast<size_t>(threads_); a < agents_.size(); ++a) {
      const Deeds deeds = agents_[a].deeds;
      const bool asynchronous = deeds == Deeds::store_reads || deeds == Deeds::store_writes ||
                                deeds == Deeds::products || deeds == Deeds::transfers;
      if (asynchronous) tell(phase, static_cast<int>(a), knows(thread, static_cast<int>(a)));
    }
  }

  void acquire(int thread, const Knowledge& phase) {
    auto both = std::make_shared<Knowledge>(*known_[static_cast<size_t>(thread)]);
    join(*both, phase);
    known_[static_cast<size_t>(thread)] = both;
  }

  void tell(Knowledge& phase, int agent, uint32_t stamp) {
    phase.resize(std::max(phase.size(), now_.size()), 0);
    phase[static_cast<size_t>(agent)] = std::max(phase[static_cast<size_t>(agent)], stamp);
  }

  // ---- groups ----

  void step(int agent) { ++now_[static_cast<size_t>(agent)]; }

  void waits(int thread, Deeds deeds, uint32_t until) {
    Waited& own = waited(thread, deeds);
    own.until = std::max(own.until, until);
  }

  bool has_waited(int thread, Deeds deeds, uint32_t group) const {
    return own_[static_cast<size_t>(thread)][static_cast<size_t>(deeds)].until >= group;
  }

  // What the thread wrote is for the asynchronous unit to see, and the copies that it has waited for.
  void fence(int thread, Reach reach) {
    const uint32_t stamp = now_[static_cast<size_t>(thread)]++, copies = waited(thread, Deeds::copies).until;
    fence_until(thread, Deeds::fenced_shared, stamp);
    if (reach >= Reach::cluster) fence_until(thread, Deeds::fenced_cluster, stamp);
    if (reach == Reach::global) fence_until(thread, Deeds::fenced_global, stamp);
    if (copies > 0) fence_until(thread, Deeds::fenced_copies, copies);
  }

 private:
  struct Agent {
    Deeds deeds;
    int thread;
  };
  struct Waited {
    int agent = -1;
    uint32_t until = 0;  // the last group that the thread waited for
  };

  Waited& waited(int thread, Deeds deeds) { return own_[static_cast<size_t>(thread)][static_cast<size_t>(deeds)]; }

  int new_agent(Deeds deeds, int thread) {
    agents_.push_back({deeds, thread});
    now_.push_back(first_);
    return static_cast<int>(agents_.size()) - 1;
  }

  void fence_until(int thread, Deeds deeds, uint32_t stamp) {
    agent(thread, deeds);
    waits(thread, deeds, stamp);
  }

  static void join(Knowledge& all, const Knowledge& more) {
    if (all.size() < more.size()) all.resize(more.size(), 0);
    for (size_t u = 0; u < more.size(); ++u) all[u] = std::max(all[u], more[u]);
  }

  void give_own(int thread, Knowledge& all) {
    all.resize(std::max(all.size(), now_.size()), 0);
    all[static_cast<size_t>(thread)] = now_[static_cast<size_t>(thread)];
    for (const Waited& own : own_[static_cast<size_t>(thread)]) {
      if (own.agent < 0) continue;
      uint32_t& until = all[static_cast<size_t>(own.agent)];
      until = std::max(until, own.until);
    }
  }

  int threads_ = 0;
  uint32_t first_ = 1;
  std::vector<uint32_t> now_;  // by agent: the threads, then the others
  std::vector<Agent> agents_;
  std::vector<std::array<Waited, kDeeds>> own_;  // by thread
  std::vector<std::shared_ptr<const Knowledge>> known_;
};

}  // namespace llmengine::sim
