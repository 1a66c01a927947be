// Where what is known of each tile of packed sequences has its place, for whoever does not know how long they are.
// Standard library only: tests run it as it is.
//
//   Lengths lie on the device, and the host does not wait for them. It knows how many lines there are in all, and how
//   many sequences: so a sequence's tiles have places from (its first line) / lines + (its number) on, which are at
//   least as many as it has tiles, and one more at most. What a place holds is found by bisection.
//
//                 0     128    256    384          tiles of 128 lines
//     sequence 0  |--------|                       150 lines: places 0 and 1
//     sequence 1           |-----------------|     290: places 2, 3, 4
//     sequence 2                             |     0: none, place 5 stays empty
//
//   Lines behind the last sequence are one more, where they want places.
#pragma once

#include <cstdint>

namespace llmengine::cuda::attention {

// The first of a sequence's, whose `count` lines begin at `first`; of a batch all have as many.
constexpr int first_place(int sequence, int first, int count, int lines, bool packed) {
  return packed ? first / lines + sequence : sequence * ((count + lines - 1) / lines);
}

// How many there are, of all `tokens` of packed sequences, or of each that a batch has.
constexpr int64_t count_places(int64_t sequences, int64_t tokens, int lines, bool packed) {
  return packed ? tokens / lines + sequences : sequences * ((tokens + lines - 1) / lines);
}

// The packed sequence that a place belongs to: the last whose first one is no later. first(sequence): its first line.
template <class First>
constexpr int sequence_of_place(int place, int sequences, int lines, const First& first) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    first_place(middle, first(middle), 0, lines, true) <= place ? low = middle : high = middle - 1;
  }
  return low;
}

}  // namespace llmengine::cuda::attention
