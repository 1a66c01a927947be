// The asynchronous copies of a block's threads: which are under way, and when each takes effect.
//
//   A copy reads its source and writes its destination at one moment between its issue and the wait that covers its
//   group, or, if none does, the end of its cluster. The schedule chooses:
//     forward      the last legal moment
//     reversed     the issue
//     round_robin  when its thread next stops, the latest first
//     random       any of these, by the seed, or when some other thread stops
//   Races do not depend on it: they are told at the issue and by what comes after (memory.h).
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "sim/simulator.h"

namespace llmengine::sim {

struct Transfer {
  char* to;
  const char* from;
  uint32_t size, bytes;  // what is written, and how much of it is read; the rest is zeros

  void take_effect() const;
  // To the numbers that are there.
  template <class Number>
  void add() const;
};

struct Copy : Transfer {
  uint32_t group = 0;  // the clock of the agent that copies for the thread (clocks.h)
  bool late = false;   // takes effect at the last legal moment
};

class Copies {
 public:
  void begin_cluster(int threads) {
    under_way_.assign(static_cast<size_t>(threads), {});
    count_ = 0;
  }
  void issue(int thread, Copy copy, Order order, std::mt19937_64& random);
  void stopped(int thread, Order order, std::mt19937_64& random);  // a moment at which copies may take effect
  void wait(int thread, uint32_t group);                           // all of the thread's up to this group
  bool has_any(int thread, uint32_t group) const;                  // of these, under way
  void end_cluster();

 private:
  std::vector<std::vector<Copy>> under_way_;  // by thread
  size_t count_ = 0;
};

}  // namespace llmengine::sim
