// In which order Hopper's blocks take the tiles of packed sequences. Standard library only: tests run it as it is.
//
//   Blocks take turns at real tiles alone, one for every head of each, in an order that a kernel makes before
//   (attention_sm90a_order.cu). It goes through sections: as many places (attention_places.h) as have keys and values
//   (of tiles of keys: queries and gradients) that the second-level cache holds for a head or some; the last ones
//   first, where last tiles are the longest. Within a section the tiles with most work come first, whichever sequence
//   has them, by classes an eighth apart: blocks end together, however skewed lengths are. A section's heads are
//   together as owners are (attention_schedule.h).
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/attention_places.h"
#include "cuda/attention_schedule.h"

namespace llmengine::cuda::attention {

// Of a list that has every tile of one head: which, and where its section lies in the list.
struct PackedTile {
  int tile, sequence, begin, end;
};

inline constexpr int kWorkClasses = 256;

// 0: most work. Two of a class differ by less than an eighth.
constexpr int class_of_work(int64_t work) {
  const int shift = static_cast<int>(std::bit_width(static_cast<uint64_t>(work))) - 4;
  const int64_t grade = shift > 0 ? 8 * shift + (work >> shift) : work;
  return grade < kWorkClasses ? kWorkClasses - 1 - static_cast<int>(grade) : 0;
}

struct PackedOrder {
  int sections, together;  // heads that go through a section together
};

// Of `heads` that have `tiles` or more each. `all`: what passes the tiles of one section of all places.
constexpr PackedOrder order_of_packed(int64_t tiles, int heads, const Streams& all, const Machine& machine) {
  const int64_t cached = machine.cache * 5 / 8, wanted = (all.bytes + cached - 1) / cached;
  const int64_t most = tiles * all.group / (2 * static_cast<int64_t>(machine.blocks));  // two tiles a block
  const int64_t fewer = wanted < most ? wanted : most, sections = fewer > 1 ? fewer : 1;
  const Streams of_section{all.bytes / sections, all.group};
  return {static_cast<int>(sections), owners_together(static_cast<int>(tiles / sections), heads, of_section, machine)};
}

// So many that the last section has two of its longest tile's work for each block: that tile would otherwise begin
// where others end. `work`: of a head.
constexpr int raised_together(int together, int heads, int64_t work, int64_t longest, int blocks) {
  const int64_t least = work > 0 ? (2 * blocks * longest + work - 1) / work : 1;
  const int raised = static_cast<int>(least < heads ? least : heads);
  return together < raised ? raised : together;
}

// A section's places begin where those before it end.
constexpr int begin_of_section(int64_t places, int sections, int section) {
  return static_cast<int>(places * section / sections);
}

struct PackedTurn {
  int tile, head, sequence;
};

constexpr PackedTurn packed_turn(const PackedTile* tiles, int heads, int together, int turn) {
  const PackedTile near = tiles[turn / heads];  // in the same section
  const Schedule section{near.end - near.begin, heads, together, false};
  const auto [place, head] = section.at(turn - near.begin * heads);
  const PackedTile at = tiles[near.begin + place];
  return {at.tile, head, at.sequence};
}

}  // namespace llmengine::cuda::attention
