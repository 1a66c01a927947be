// Blocks that run together: their barrier, and who touches whose shared memory.
//
//   A block's shared memory is there from its first instruction to the end of its last thread. Another block may touch
//   it only when it knows that the block has begun (they have met), and the block must not end before it knows that
//   the access was made: both are checked by what is known (clocks.h), whatever the schedule.
#pragma once

#include <cstdint>
#include <vector>

#include "sim/clocks.h"

namespace llmengine::sim {

struct ClusterBarrier {
  int arrived = 0;
  uint32_t phase = 0;
  std::vector<uint32_t> next;  // by thread: the phase that it arrives at next,
  std::vector<bool> owes;      // and whether it has arrived and not waited
  std::vector<int> waiting;
  Clocks::Knowledge gathered, released;  // by this phase; by the last
};

// The latest access of an agent to a block's shared memory from outside.
struct RemoteAccess {
  int agent;
  uint32_t stamp;
  uintptr_t site;
};

}  // namespace llmengine::sim
