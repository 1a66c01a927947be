// Which tile of attention a block takes at its turn. Standard library only: tests run it as it is.
//
//   A tile is so many rows of one owner (a head of a sequence). Blocks draw turns from a counter, each when it is done
//   with its last tile, so that none waits for a slow one. Turns go through owners by sections whose keys and values
//   (of tiles of keys: queries and gradients) fit into the second-level cache together, a smaller one first; within a
//   section the longest tiles come first: where attention is causal, the last rows, or the first keys. So what is left
//   for the end is short.
//
//              owner 0   1 | 2   3   4   5     sections of two and of four owners, three tiles each, causal
//     tile 2      turn 0   1 | 6   7   8   9
//     tile 1           2   3 | 10  11  12  13
//     tile 0           4   5 | 14  15  16  17
#pragma once

#include <cstdint>

namespace llmengine::cuda::attention {

struct Schedule {
  int tiles, owners;  // of each owner; owners
  int together;       // owners of a section
  bool last_first;

  struct Tile {
    int tile, owner;
  };

  constexpr int count() const { return tiles * owners; }
  constexpr Tile at(int turn) const {
    const int fewer = (owners - 1) % together + 1;  // owners of the first section
    const bool first = turn < tiles * fewer;
    const int behind = first ? 0 : turn - tiles * fewer, section = behind / (tiles * together);
    const int within = first ? turn : behind - section * tiles * together, size = first ? fewer : together;
    const int place = within / size;
    return {last_first ? tiles - 1 - place : place, (first ? 0 : fewer + section * together) + within % size};
  }
};

// Owners whose keys and values, `bytes` each, lie in the cache together; whole groups of heads that share them.
constexpr int owners_together(int64_t bytes, int group, int owners) {
  constexpr int64_t kCache = 32 << 20;  // of the 50 MB that a Hopper has; queries and outputs pass through the rest
  const int64_t fit = bytes > 0 ? kCache / bytes * group : owners;
  return static_cast<int>(fit < group ? group : fit < owners ? fit : owners);
}

}  // namespace llmengine::cuda::attention
