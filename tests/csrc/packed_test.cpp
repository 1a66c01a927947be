// Places and order of packed sequences' tiles (csrc/cuda/attention_packed.h): what every place holds, whether each tile
// is taken once, and how evenly blocks end, each beginning the next tile when it is done with its last. Built and fed
// by tests/cuda/test_attention_schedule.py.
#include <algorithm>
#include <cstdio>
#include <random>
#include <string_view>
#include <vector>

#include "block_ends.h"
#include "cuda/attention_packed.h"
#include "ops/attention_band.h"

using namespace llmengine;
using namespace llmengine::cuda::attention;

namespace {

// A call: sequences of so many rows and keys, as many as `heads` of which have tiles of `own` lines, which tiles of
// `passing` pass, in `group` heads where keys own them; windows; a device.
struct Call {
  std::vector<int> rows, keys;
  int heads, group, own, passing, left, right;
  bool keys_own;
  int64_t line_bytes;
  Machine machine;

  const std::vector<int>& lines() const { return keys_own ? keys : rows; }
  int sequences() const { return static_cast<int>(rows.size()); }

  int64_t work(int sequence, int tile) const {
    const int of_rows = rows[sequence], of_keys = keys[sequence], first = tile * own;
    const int last = std::min(first + own, lines()[sequence]);
    const ops::BandOf<int> band(of_rows, of_keys, left, right, false);
    const auto span = keys_own ? band.rows_of(first, last) : band.keys_of(first, last);
    const int begin = span.begin < span.end ? span.begin / passing * passing : span.end;
    return 1 + int64_t{keys_own ? group : 1} * ((span.end - begin + passing - 1) / passing);
  }
};

std::vector<int> begins_of(const std::vector<int>& lengths) {
  std::vector<int> begins{0};
  for (int length : lengths) begins.push_back(begins.back() + length);
  return begins;
}

// As attention_order_sm90a makes it, tiles of a class in any order.
std::vector<PackedTile> list_of(const Call& c, PackedOrder& order, bool last_first) {
  const std::vector<int> begins = begins_of(c.lines());
  const auto places = count_places(c.sequences(), begins.back(), c.own, true);
  std::vector<PackedTile> list;
  int64_t work = 0, longest = 0;  // of a section
  std::mt19937 chance(static_cast<unsigned>(places));
  for (int n = 0; n < order.sections; ++n) {
    const int section = last_first ? order.sections - 1 - n : n, begin = static_cast<int>(list.size());
    std::vector<std::vector<PackedTile>> classes(kWorkClasses);
    work = longest = 0;
    for (int place = begin_of_section(places, order.sections, section);
         place < begin_of_section(places, order.sections, section + 1); ++place) {
      const int s = sequence_of_place(place, c.sequences(), c.own, [&](int sequence) { return begins[sequence]; });
      const int tile = place - first_place(s, begins[s], 0, c.own, true);
      if (tile < 0 || tile * c.own >= c.lines()[s]) continue;
      const int64_t taken = c.work(s, tile);
      classes[class_of_work(taken)].push_back({tile, s, begin, 0});
      work += taken, longest = std::max(longest, taken);
    }
    for (auto& tiles : classes) {
      std::shuffle(tiles.begin(), tiles.end(), chance);
      list.insert(list.end(), tiles.begin(), tiles.end());
    }
    for (size_t i = begin; i < list.size(); ++i) list[i].end = static_cast<int>(list.size());
  }
  order.together = raised_together(order.together, c.heads, work, longest, c.machine.blocks);
  return list;
}

void print_call(const Call& c) {
  const int64_t own_tokens = begins_of(c.lines()).back(), passing = begins_of(c.keys_own ? c.rows : c.keys).back();
  const Streams streams{passing * c.line_bytes * (c.keys_own ? c.group : 1), c.keys_own ? 1 : c.group};
  PackedOrder order = order_of_packed(own_tokens / c.own, c.heads, streams, c.machine);
  const bool begins = c.left >= 0, ends = c.right >= 0;
  const bool last_first = c.keys_own ? schedule_of_keys(1, 1, ends, streams, c.machine).last_first
                                     : schedule_of_rows(1, 1, begins, ends, streams, c.machine).last_first;
  const std::vector<PackedTile> list = list_of(c, order, last_first);

  std::vector<std::vector<int>> taken;  // of each sequence's tiles of each head
  for (int length : c.lines()) taken.emplace_back(static_cast<size_t>((length + c.own - 1) / c.own * c.heads));
  const int turns = static_cast<int>(list.size()) * c.heads;
  std::vector<int64_t> work;
  bool once = true;
  for (int turn = 0; turn < turns && once; ++turn) {
    const PackedTurn at = packed_turn(list.data(), c.heads, order.together, turn);
    once = at.sequence >= 0 && at.sequence < c.sequences() && at.head >= 0 && at.head < c.heads && at.tile >= 0;
    if (!once) break;
    auto& of_sequence = taken[at.sequence];
    const auto number = static_cast<size_t>(at.tile * c.heads + at.head);
    once = number < of_sequence.size() && of_sequence[number]++ == 0;
    if (once) work.push_back(c.work(at.sequence, at.tile));
  }
  for (const auto& of_sequence : taken)
    for (int times : of_sequence) once = once && times == 1;
  const auto longest = work.empty() ? 0 : *std::max_element(work.begin(), work.end());
  std::printf("%d %d %lld %d %d %lld %.2f %lld\n", once, turns,
              (long long)count_places(c.sequences(), own_tokens, c.own, true), order.sections, order.together,
              (long long)end_of_last(work, c.machine.blocks), least_end(work, c.machine.blocks), (long long)longest);
}

}  // namespace

// Reads works, whose classes it prints, sequences, whose first places, and calls: whether each tile is taken once,
// turns, places, sections, heads together, when the last block ends, the least that it could be, and the longest tile.
int main() {
  char word[16];
  while (std::scanf("%15s", word) == 1) {
    if (std::string_view(word) == "class") {
      long long work;
      if (std::scanf("%lld", &work) != 1) return 1;
      std::printf("%d\n", class_of_work(work));
      continue;
    }
    if (std::string_view(word) == "first") {
      int sequence, first, count, lines, packed;
      if (std::scanf("%d %d %d %d %d", &sequence, &first, &count, &lines, &packed) != 5) return 1;
      std::printf("%d\n", first_place(sequence, first, count, lines, packed != 0));
      continue;
    }
    Call c{};
    int keys, sequences;
    long long line_bytes, cache;
    if (std::scanf("%d %d %d %d %d %d %d %lld %lld %d %d", &keys, &c.heads, &c.group, &c.own, &c.passing, &c.left,
                   &c.right, &line_bytes, &cache, &c.machine.blocks, &sequences) != 11) {
      return 1;
    }
    c.keys_own = keys != 0, c.line_bytes = line_bytes, c.machine.cache = cache;
    for (auto* lengths : {&c.rows, &c.keys}) {
      lengths->resize(static_cast<size_t>(sequences));
      for (int& length : *lengths)
        if (std::scanf("%d", &length) != 1) return 1;
    }
    print_call(c);
  }
}
