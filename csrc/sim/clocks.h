// Which accesses of a block's threads are ordered (Lamport 1978; the epochs of FastTrack, Flanagan & Freund 2009).
//
//   A thread stamps what it does with its clock. Where threads meet at a barrier, each learns everything that the
//   others knew or did; then their clocks step. An access of thread u with stamp c comes before what thread t does now
//   exactly when t knows u's clock to have passed c. Clocks of later blocks start above all clocks of earlier ones, so
//   a stamp tells its block.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace llmengine::sim {

class Clocks {
 public:
  void begin_launch() {
    first_ = 1;
    now_.clear();
  }

  void begin_block(int threads) {
    for (uint32_t c : now_) first_ = std::max(first_, c + 1);
    now_.assign(static_cast<size_t>(threads), first_);
    known_.assign(static_cast<size_t>(threads), std::make_shared<const Knowledge>(threads, 0));
  }

  uint32_t now(int thread) const { return now_[static_cast<size_t>(thread)]; }
  bool of_this_block(uint32_t stamp) const { return stamp >= first_; }
  bool before(int earlier, uint32_t stamp, int thread) const {
    return earlier == thread || (*known_[static_cast<size_t>(thread)])[static_cast<size_t>(earlier)] >= stamp;
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
    for (int g : givers) (*all)[static_cast<size_t>(g)] = now_[static_cast<size_t>(g)]++;
    for (int t : takers) known_[static_cast<size_t>(t)] = all;
  }

 private:
  using Knowledge = std::vector<uint32_t>;

  uint32_t first_ = 1;
  std::vector<uint32_t> now_;
  std::vector<std::shared_ptr<const Knowledge>> known_;
};

}  // namespace llmengine::sim
