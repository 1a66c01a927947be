// The mbarriers of a cluster. What they order stands in clocks.h: a phase gathers what its arrivals release, and who
// waits for its end acquires that.
#pragma once

#include <cstdint>
#include <vector>

#include "sim/clocks.h"

namespace llmengine::sim {

inline constexpr int kMbarriers = 64;               // of a block
inline constexpr int kMostCounted = (1 << 20) - 1;  // arrivals, and bytes expected

struct Mbarrier {
  uintptr_t address = 0;
  int carrier = 0;  // of the copies that report to it (clocks.h)
  // Where it was initialised, and whether a fence has shown it to the unit that carries out bulk copies.
  int thread = 0;
  uint32_t stamp = 0;
  uintptr_t site = 0;
  bool fenced = false;

  int arrivals = 0, missing = 0;  // of every phase; of this one
  int64_t bytes = 0;              // expected in this phase and not come
  uint32_t phase = 0;
  int under_way = 0;       // copies that will report here
  uint32_t last_copy = 0;  // the stamp of the latest one, and where it was issued
  uintptr_t copy_site = 0;
  std::vector<int> waiting;
  // What arrivals told: in this phase, in the last; of all threads, and of those of the mbarrier's own block, which is
  // what a wait of the block's scope acquires.
  struct Told {
    Clocks::Knowledge all, own;
  };
  Told gathered, released;
};

}  // namespace llmengine::sim
