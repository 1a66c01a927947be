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

constexpr int64_t clamp_index(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

struct Band {
  int64_t rows, keys, left, right, shift;

  constexpr Band(int64_t rows, int64_t keys, int64_t left, int64_t right, bool bottom_right)
      : rows(rows), keys(keys), left(left), right(right), shift(bottom_right ? keys - rows : 0) {}

  // the keys [begin, end) of a row
  constexpr int64_t begin(int64_t row) const {
    return left < 0 ? 0 : left > row + shift ? 0 : clamp_index(row + shift - left, 0, keys);
  }
  constexpr int64_t end(int64_t row) const {
    return right < 0 || right >= keys - (row + shift) ? keys : clamp_index(row + shift + right + 1, 0, keys);
  }
  // the rows [first_row, last_row) that see a key
  constexpr int64_t first_row(int64_t key) const {
    return right < 0 || right >= key - shift ? 0 : clamp_index(key - shift - right, 0, rows);
  }
  constexpr int64_t last_row(int64_t key) const {
    return left < 0 || left >= rows - (key - shift) ? rows : clamp_index(key - shift + left + 1, 0, rows);
  }
  // Do all rows [row, row_end) see all keys [key, key_end)?
  constexpr bool covers(int64_t row, int64_t row_end, int64_t key, int64_t key_end) const {
    return begin(row_end - 1) <= key && end(row) >= key_end;
  }
};

// One independent block of attention: a batch entry, or one of the packed sequences.
struct Sequence {
  int64_t index;       // of the dropout stream and the ALiBi slopes
  int64_t batch;       // where its rows lie: in this batch entry,
  int64_t row0, rows;  // from row0 on,
  int64_t key0, keys;  // and its keys from key0 on
};

}  // namespace llmengine::ops
