// Which keys a query row may see: causality and sliding windows, shared by every backend.
//
//   Row i stands at position p = i + shift among the keys, shift = 0 (top left) or keys - rows (bottom right),
//   and sees keys p - left ... p + right. A negative left or right is unbounded; causal is right = 0.
//
//        keys ->                      begin(i) and end(i) never fall as i grows: a tile's first row has the least
//   rows  x x . . .                   begin and its last row the greatest end, which is all that a kernel needs to
//     |   . x x . .   left 0,         skip tiles, bound loops inside a tile, and find the tiles that need no mask.
//     v   . . x x .   right 1
#pragma once

#include <cstdint>

namespace llmengine::ops {

constexpr auto clamp_index(auto x, decltype(x) low, decltype(x) high) { return x < low ? low : x > high ? high : x; }

// What a tile sees across: some of its lines see [begin, end), all of them [full, full_end), which may be empty.
template <class Int>
struct SpanOf {
  Int begin = 0, end = 0, full = 0, full_end = 0;

  constexpr bool some(Int first, Int last) const { return first < end && last > begin; }
  constexpr bool all(Int first, Int last) const { return first >= full && last <= full_end; }
};

// Int: int64_t, or on a GPU int32_t, for up to 2^30 rows and keys and windows of as many.
template <class Int>
struct BandOf {
  Int rows, keys, left, right, shift;

  constexpr BandOf(Int rows, Int keys, Int left, Int right, bool bottom_right)
      : rows(rows), keys(keys), left(left), right(right), shift(bottom_right ? keys - rows : 0) {}

  // the keys [begin, end) of a row
  constexpr Int begin(Int row) const {
    return left < 0 ? 0 : left > row + shift ? 0 : clamp_index(row + shift - left, 0, keys);
  }
  constexpr Int end(Int row) const {
    return right < 0 || right >= keys - (row + shift) ? keys : clamp_index(row + shift + right + 1, 0, keys);
  }
  // the rows [first_row, last_row) that see a key
  constexpr Int first_row(Int key) const {
    return right < 0 || right >= key - shift ? 0 : clamp_index(key - shift - right, 0, rows);
  }
  constexpr Int last_row(Int key) const {
    return left < 0 || left >= rows - (key - shift) ? rows : clamp_index(key - shift + left + 1, 0, rows);
  }
  // the keys that rows [row, row_end) see, and the rows that see keys [key, key_end): empty of empty tiles
  constexpr SpanOf<Int> keys_of(Int row, Int row_end) const {
    if (row >= row_end) return {};
    return {begin(row), end(row_end - 1), begin(row_end - 1), end(row)};
  }
  constexpr SpanOf<Int> rows_of(Int key, Int key_end) const {
    if (key >= key_end) return {};
    return {first_row(key), last_row(key_end - 1), first_row(key_end - 1), last_row(key)};
  }
  // Do all rows [row, row_end) see all keys [key, key_end)?
  constexpr bool covers(Int row, Int row_end, Int key, Int key_end) const {
    return begin(row_end - 1) <= key && end(row) >= key_end;
  }
};

using Band = BandOf<int64_t>;

// One independent block of attention: a batch entry, or one of the packed sequences.
struct Sequence {
  int64_t index;       // of the dropout stream and the ALiBi slopes
  int64_t batch;       // where its rows lie: in this batch entry,
  int64_t row0, rows;  // from row0 on,
  int64_t key0, keys;  // and its keys from key0 on
};

}  // namespace llmengine::ops
