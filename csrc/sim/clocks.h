// Which accesses of a block's threads are ordered (Lamport 1978; the epochs of FastTrack, Flanagan & Freund 2009).
//
//   A thread stamps what it does with its clock. Where threads meet at a barrier, each learns everything that the
//   others knew or did; then their clocks step. An access of thread u with stamp c comes before what thread t does now
//   exactly when t knows u's clock to have passed c. Clocks of later blocks start above all clocks of earlier ones, so
//   a stamp tells its block.
//
//   The asynchronous copies of thread t are the deeds of an agent of its own, copier(t), whose clock steps at every
//   commit: the stamp of a copy is its group. The thread alone learns of its copier's groups, by waiting for them, and
//   hands the knowledge on where it meets others. Likewise the bulk copies that report to mbarrier b are those of
//   carrier(b), whose clock steps at the end of every phase; who waits for the end learns of it, and of what the
//   threads knew or did that arrived.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace llmengine::sim {

class Clocks {
 public:
  static constexpr int kMbarriers = 64;  // of a block

  using Knowledge = std::vector<uint32_t>;  // by agent: the last clock that is known to have passed

  void begin_launch() {
    first_ = 1;
    now_.clear();
  }

  void begin_block(int threads) {
    for (uint32_t c : now_) first_ = std::max(first_, c + 1);
    threads_ = threads;
    now_.assign(2 * static_cast<size_t>(threads) + kMbarriers, first_);
    arrived_.assign(static_cast<size_t>(threads), first_ - 1);
    known_.assign(static_cast<size_t>(threads), std::make_shared<const Knowledge>(now_.size(), 0));
  }

  int copier(int thread) const { return threads_ + thread; }
  int carrier(int mbarrier) const { return 2 * threads_ + mbarrier; }
  bool is_copier(int agent) const { return agent >= threads_ && !is_carrier(agent); }
  bool is_carrier(int agent) const { return agent >= 2 * threads_; }
  int thread_of(int agent) const { return is_carrier(agent) ? -1 : is_copier(agent) ? agent - threads_ : agent; }

  uint32_t now(int agent) const { return now_[static_cast<size_t>(agent)]; }
  bool of_this_block(uint32_t stamp) const { return stamp >= first_; }

  bool before(int earlier, uint32_t stamp, int thread) const {
    if (earlier == thread) return true;
    if (earlier == copier(thread)) return has_waited(thread, stamp);
    return (*known_[static_cast<size_t>(thread)])[static_cast<size_t>(earlier)] >= stamp;
  }

  // Before what the whole warp of `thread` does together: every lane must know.
  bool before_warp(int earlier, uint32_t stamp, int thread) const {
    const int first = thread / 32 * 32, end = std::min(first + 32, threads_), owner = thread_of(earlier);
    const Knowledge* asked = nullptr;
    for (int t = first; t < end; ++t) {
      const Knowledge* theirs = known_[static_cast<size_t>(t)].get();
      if (theirs == asked && t != owner) continue;  // knows what the lane before knew
      if (!before(earlier, stamp, t)) return false;
      if (t != owner) asked = theirs;
    }
    return true;
  }

  // A barrier: `givers` arrived, `takers` waited for them.
  void meet(const std::vector<int>& givers, const std::vector<int>& takers) {
    auto all = std::make_shared<Knowledge>(*known_[static_cast<size_t>(givers.front())]);
    const Knowledge* merged = known_[static_cast<size_t>(givers.front())].get();
    for (int g : givers) {
      const Knowledge* theirs = known_[static_cast<size_t>(g)].get();
      if (theirs == merged) continue;  // met before, as a whole: the common case
      for (size_t u = 0; u < all->size(); ++u) (*all)[u] = std::max((*all)[u], (*theirs)[u]);
      merged = theirs;
    }
    for (int g : givers) {
      (*all)[static_cast<size_t>(g)] = now_[static_cast<size_t>(g)]++;
      (*all)[static_cast<size_t>(copier(g))] = arrived_[static_cast<size_t>(g)];
    }
    for (int t : takers) known_[static_cast<size_t>(t)] = all;
  }

  // ---- copies ----

  void commit(int thread) { ++now_[static_cast<size_t>(copier(thread))]; }

  // Waits for all groups but the latest `pending`; the last one waited for.
  uint32_t wait(int thread, uint32_t pending) {
    uint32_t& arrived = arrived_[static_cast<size_t>(thread)];
    const uint32_t committed = now(copier(thread)) - 1;
    return arrived = std::max(arrived, committed - std::min(pending, committed));
  }

  bool has_waited(int thread, uint32_t group) const { return arrived_[static_cast<size_t>(thread)] >= group; }

  // ---- mbarriers ----

  Knowledge nothing() const { return Knowledge(now_.size(), 0); }

  // Thread arrives: what it knew or did joins what the phase will tell.
  void release(int thread, Knowledge& phase) {
    const Knowledge& own = *known_[static_cast<size_t>(thread)];
    for (size_t u = 0; u < own.size(); ++u) phase[u] = std::max(phase[u], own[u]);
    phase[static_cast<size_t>(thread)] = now_[static_cast<size_t>(thread)]++;
    phase[static_cast<size_t>(copier(thread))] = arrived_[static_cast<size_t>(thread)];
  }

  void end_phase(int mbarrier, Knowledge& phase) {
    phase[static_cast<size_t>(carrier(mbarrier))] = now_[static_cast<size_t>(carrier(mbarrier))]++;
  }

  void acquire(int thread, const Knowledge& phase) {
    auto both = std::make_shared<Knowledge>(*known_[static_cast<size_t>(thread)]);
    for (size_t u = 0; u < both->size(); ++u) (*both)[u] = std::max((*both)[u], phase[u]);
    known_[static_cast<size_t>(thread)] = both;
  }

 private:
  int threads_ = 0;
  uint32_t first_ = 1;
  std::vector<uint32_t> now_;      // by agent: the threads, their copiers, the carriers
  std::vector<uint32_t> arrived_;  // by thread: the last group that it waited for
  std::vector<std::shared_ptr<const Knowledge>> known_;
};

}  // namespace llmengine::sim
