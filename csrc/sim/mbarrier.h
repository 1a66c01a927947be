// The mbarriers of a block, and bulk copies under way that report to them. What they order stands in clocks.h: a phase
// gathers what its arrivals release, and who waits for its end acquires that.
#pragma once

#include <cstdint>
#include <vector>

#include "sim/clocks.h"
#include "sim/copies.h"

namespace llmengine::sim {

struct Mbarrier {
  uintptr_t address;
  int number;  // in its block
  // Where it was initialised, and whether a fence has shown it to the unit that carries out bulk copies.
  int thread;
  uint32_t stamp;
  uintptr_t site;
  bool fenced = false;

  int arrivals, missing;  // of every phase; of this one
  int64_t bytes = 0;      // expected in this phase and not come
  uint32_t phase = 0;
  int under_way = 0;  // copies that will report here
  std::vector<int> waiting;
  Clocks::Knowledge gathered, released;  // by this phase; by the last
};

// Takes effect as the schedule says, like other copies (copies.h), but that the last legal moment is when no thread can
// go on.
struct BulkCopy : Transfer {
  int mbarrier = 0;
  bool late = false;
};

}  // namespace llmengine::sim
