// Which tiles a persistent block of attention takes, and in which order. Standard library only: tests run it as it is.
//
//   A tile is so many rows of one owner (a head of a sequence). Blocks take turns: in round r block b takes turn
//   r blocks + b, and in every other round they stand the other way round, so that what the first ones had more in one
//   round they have less in the next. Turns go through owners by sections whose keys and values fit into the
//   second-level cache together; within a section the longest tiles come first: where attention is causal, the last.
//
//              owner 0   1   2   3 | 4   5 ...     two sections of four owners, three tiles each, causal
//     tile 2      turn 0   1   2   3 | 12  13
//     tile 1           4   5   6   7 | 16
//     tile 0           8   9  10  11 | 20
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
  constexpr int rounds(int blocks) const { return (count() + blocks - 1) / blocks; }
  // count() or more where a block has no tile in a round
  constexpr int turn(int round, int block, int blocks) const {
    return round * blocks + (round % 2 ? blocks - 1 - block : block);
  }
  constexpr Tile at(int turn) const {
    const int section = turn / (tiles * together), within = turn - section * tiles * together;
    const int left = owners - section * together, size = left < together ? left : together;
    const int place = within / size;
    return {last_first ? tiles - 1 - place : place, section * together + within % size};
  }
};

// Owners whose keys and values, `bytes` each, lie in the cache together; whole groups of heads that share them.
constexpr int owners_together(int64_t bytes, int group, int owners) {
  constexpr int64_t kCache = 32 << 20;  // of the 50 MB that a Hopper has; queries and outputs pass through the rest
  const int64_t fit = bytes > 0 ? kCache / bytes * group : owners;
  return static_cast<int>(fit < group ? group : fit < owners ? fit : owners);
}

}  // namespace llmengine::cuda::attention
