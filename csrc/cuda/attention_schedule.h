// Which tile of attention a block takes at its turn. Standard library only: tests run it as it is.
//
//   A tile is so many rows, or keys, of one owner (a head of a sequence). Blocks take turns in order: one for every
//   tile, begun as others end (sm_80), or few, which draw from a counter when they are done with their last (Hopper).
//   Turns go through owners by sections whose keys and values (of tiles of keys: queries and gradients) fit into the
//   second-level cache together, a smaller one first; within a section the longest tiles come first: where attention is
//   causal, the last rows, or the first keys. So what is left for the end is short.
//
//              owner 0   1 | 2   3   4   5     sections of two and of four owners, three tiles each, causal
//     tile 2      turn 0   1 | 6   7   8   9
//     tile 1           2   3 | 10  11  12  13
//     tile 0           4   5 | 14  15  16  17
//
//   A section has two tiles for each block that runs, whatever the cache holds: the long ones of the last would
//   otherwise begin where others end. Blocks then end within 5 % of the best that any order could do, or within three
//   quarters of the longest tile, which is more where a block has fewer than 15 of them; where windows do not cut some
//   tiles short by a part, always within 5 %. Lengths of packed sequences lie on the device and are in no order:
//   sm_80's blocks go through places (attention_places.h) of each head and may end a longest tile apart, and Hopper's
//   have an order of their own (attention_packed.h).
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

// What tiles go through: `bytes` for each of `group` owners, which share them.
struct Streams {
  int64_t bytes;
  int group;
};

// On a device whose cache has `cache` bytes, of which queries and outputs pass through three eighths, and which runs
// `blocks` at once.
struct Machine {
  int64_t cache;
  int blocks;
};

constexpr int owners_together(int tiles, int owners, const Streams& streams, const Machine& machine) {
  const int64_t cached = streams.bytes > 0 ? machine.cache * 5 / 8 / streams.bytes * streams.group : owners;
  const int64_t busy = (2 * static_cast<int64_t>(machine.blocks) + tiles - 1) / (tiles > 0 ? tiles : 1);
  const int64_t least = busy < streams.group ? streams.group : busy, most = cached < least ? least : cached;
  return static_cast<int>(most < owners ? most : owners > 0 ? owners : 1);
}

// `begins`, `ends`: whether a window hides keys far behind a row, and far ahead. Rows see most keys where they are
// last, but where only what lies behind is hidden; keys are seen by most rows where they are first, if any hides them.
// Where all are alike, packed sequences longer than others have the last.
constexpr Schedule schedule_of_rows(int tiles, int owners, bool begins, bool ends, const Streams& streams,
                                    const Machine& machine) {
  return {tiles, owners, owners_together(tiles, owners, streams, machine), ends || !begins};
}
constexpr Schedule schedule_of_keys(int tiles, int owners, bool ends, const Streams& streams, const Machine& machine) {
  return {tiles, owners, owners_together(tiles, owners, streams, machine), !ends};
}

}  // namespace llmengine::cuda::attention
