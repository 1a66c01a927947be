// Which keys rows see, which tiles kernels visit, and how blocks share keys (csrc/ops/attention_band.h,
// decode_attention.h), against the definition, pair by pair. Reads calls of a property, a line each, and prints what
// failed; the exit code counts it. Built and fed by tests/test_attention_band.py.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <vector>

#include "ops/attention_band.h"
#include "ops/decode_attention.h"

using namespace llmengine::ops;

namespace {

int failures = 0;

void expect(bool holds, const char* what, int64_t a, int64_t b) {
  if (holds) return;
  if (++failures <= 10) std::printf("FAILED %s at %lld, %lld\n", what, (long long)a, (long long)b);
}

// ---- the definition -------------------------------------------------------------------------------------------------

struct Case {
  int64_t rows, keys, left, right;
  bool bottom_right;

  bool sees(int64_t row, int64_t key) const {
    const int64_t position = row + (bottom_right ? keys - rows : 0);
    return (left < 0 || key >= position - left) && (right < 0 || key <= position + right);
  }
};

// ---- spans of rows, of keys and of tiles ----------------------------------------------------------------------------

template <class Int>
void try_spans(const Case& c, int64_t tile_rows, int64_t tile_keys) {
  const auto n = [](int64_t x) { return static_cast<Int>(x); };
  const BandOf<Int> band(n(c.rows), n(c.keys), n(c.left), n(c.right), c.bottom_right);
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.keys; ++j) {
      expect((band.begin(n(i)) <= j && j < band.end(n(i))) == c.sees(i, j), "keys of a row", i, j);
      expect((band.first_row(n(j)) <= i && i < band.last_row(n(j))) == c.sees(i, j), "rows of a key", i, j);
    }
  }
  const auto count = [&](int64_t i, int64_t i_end, int64_t j, int64_t j_end) {
    int64_t seen = 0;
    for (int64_t r = i; r < i_end; ++r) {
      for (int64_t k = j; k < j_end; ++k) seen += c.sees(r, k);
    }
    return seen;
  };
  for (int64_t i = 0; i < c.rows; i += tile_rows) {
    const int64_t i_end = std::min(i + tile_rows, c.rows);
    const auto keys = band.keys_of(n(i), n(i_end));
    for (int64_t j = 0; j < c.keys; j += tile_keys) {
      const int64_t j_end = std::min(j + tile_keys, c.keys);
      const auto rows = band.rows_of(n(j), n(j_end));
      const int64_t seen = count(i, i_end, j, j_end), all = (i_end - i) * (j_end - j);
      expect(seen == 0 || keys.some(n(j), n(j_end)), "keys that a tile of rows misses", i, j);
      expect(seen == 0 || rows.some(n(i), n(i_end)), "rows that a tile of keys misses", i, j);
      expect(keys.all(n(j), n(j_end)) == (seen == all), "keys that all rows see", i, j);
      expect(rows.all(n(i), n(i_end)) == (seen == all), "rows that see all keys", i, j);
      expect(band.covers(n(i), n(i_end), n(j), n(j_end)) == (seen == all), "a tile without edges", i, j);
    }
    // no wider than it must be: both ends are seen by some row
    if (keys.begin < keys.end) {
      expect(count(i, i_end, keys.begin, keys.begin + 1) > 0, "the first key of a tile", i, keys.begin);
      expect(count(i, i_end, keys.end - 1, keys.end) > 0, "the last key of a tile", i, keys.end);
    }
  }
}

// Kernels own tiles of rows, or of keys, and go through the others from the tile that holds the span's beginning on:
// every pair is met once.
void try_visits(const Case& c, int64_t tile_rows, int64_t tile_keys) {
  const Band band(c.rows, c.keys, c.left, c.right, c.bottom_right);
  std::vector<int> by_rows(static_cast<size_t>(c.rows * c.keys)), by_keys(by_rows);
  const auto visit = [&](std::vector<int>& met, int64_t i, int64_t j) {
    for (int64_t r = i; r < std::min(i + tile_rows, c.rows); ++r) {
      for (int64_t k = j; k < std::min(j + tile_keys, c.keys); ++k) ++met[static_cast<size_t>(r * c.keys + k)];
    }
  };
  for (int64_t i = 0; i < c.rows; i += tile_rows) {
    const auto keys = band.keys_of(i, std::min(i + tile_rows, c.rows));
    for (int64_t j = keys.begin / tile_keys * tile_keys; j < keys.end; j += tile_keys) visit(by_rows, i, j);
  }
  for (int64_t j = 0; j < c.keys; j += tile_keys) {
    const auto rows = band.rows_of(j, std::min(j + tile_keys, c.keys));
    for (int64_t i = rows.begin / tile_rows * tile_rows; i < rows.end; i += tile_rows) visit(by_keys, i, j);
  }
  for (int64_t i = 0; i < c.rows; ++i) {
    for (int64_t j = 0; j < c.keys; ++j) {
      const auto at = static_cast<size_t>(i * c.keys + j);
      expect(by_rows[at] <= 1 && by_keys[at] <= 1, "a pair met twice", i, j);
      expect(!c.sees(i, j) || (by_rows[at] == 1 && by_keys[at] == 1), "a pair never met", i, j);
    }
  }
}

// 32-bit numbers, which GPUs take, say what 64-bit ones say, up to 2^30 tokens and windows of as many.
void try_widths(const Case& c, int64_t row, int64_t key) {
  const BandOf<int64_t> wide(c.rows, c.keys, c.left, c.right, c.bottom_right);
  const auto n = [](int64_t x) { return static_cast<int32_t>(x); };
  const BandOf<int32_t> narrow(n(c.rows), n(c.keys), n(c.left), n(c.right), c.bottom_right);
  row = clamp_index(row, 0, c.rows - 1), key = clamp_index(key, 0, c.keys - 1);
  expect(wide.begin(row) == narrow.begin(n(row)) && wide.end(row) == narrow.end(n(row)), "keys in 32 bits", row, key);
  expect(wide.first_row(key) == narrow.first_row(n(key)) && wide.last_row(key) == narrow.last_row(n(key)),
         "rows in 32 bits", row, key);
  expect((wide.begin(row) <= key && key < wide.end(row)) == c.sees(row, key), "a pair far out", row, key);
}

// ---- shares of a cache ----------------------------------------------------------------------------------------------

void try_shares(int length, int rows, int left, int round, int splits) {
  std::vector<int> met(static_cast<size_t>(length));
  int most = 0;
  for (int share = 0; share < splits; ++share) {
    const KeyShare s = share_of(length, rows, left, round, share, splits);
    expect(s.end <= length && (s.begin >= 0 || s.begin >= s.end), "a share outside the cache", s.begin, s.end);
    for (int key = s.begin; key < s.end; ++key) ++met[static_cast<size_t>(key)];
    most = std::max(most, s.end - s.begin);
  }
  int seen = 0;
  for (int key = 0; key < length; ++key) {
    bool sees = false;
    for (int row = length - rows; row < length; ++row) sees |= row >= key && (left < 0 || key >= row - left);
    expect(met[static_cast<size_t>(key)] <= 1, "a key in two shares", key, splits);
    expect(!sees || met[static_cast<size_t>(key)] == 1, "a key in no share", key, splits);
    seen += sees;
  }
  expect(most <= (seen + splits - 1) / splits + round, "a share longer by more than a round", most, seen);
}

}  // namespace

int main() {
  char property[32];
  long long v[9];
  while (std::scanf("%31s %lld %lld %lld %lld %lld %lld %lld %lld %lld", property, v, v + 1, v + 2, v + 3, v + 4, v + 5,
                    v + 6, v + 7, v + 8) == 10) {
    const Case c{v[0], v[1], v[2], v[3], v[4] != 0};
    const std::string_view name = property;
    if (name == "spans") try_spans<int64_t>(c, v[5], v[6]), try_spans<int32_t>(c, v[5], v[6]);
    if (name == "visits") try_visits(c, v[5], v[6]);
    if (name == "widths") try_widths(c, v[5], v[6]);
    if (name == "shares") {
      try_shares(static_cast<int>(v[0]), static_cast<int>(v[1]), static_cast<int>(v[2]), static_cast<int>(v[3]),
                 static_cast<int>(v[4]));
    }
  }
  if (!failures) std::printf("passed\n");
  return failures > 0;
}
