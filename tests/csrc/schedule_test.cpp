// In which order tiles of attention are taken (csrc/cuda/attention_schedule.h): each once, and how evenly blocks end,
// each beginning the next tile when it is done with its last. Built and fed by tests/cuda/test_attention_schedule.py.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <string_view>
#include <vector>

#include "block_ends.h"
#include "cuda/attention_places.h"
#include "cuda/attention_schedule.h"
#include "ops/attention_band.h"

using namespace llmengine;
using cuda::attention::Schedule;

namespace {

// A call: sequences of `lengths`, so many heads with tiles of their own, which pass `group` heads' lines of the other
// side; windows; tiles of `own` lines, which pass tiles of `passing`; a device. `packed`: lengths are not known.
struct Call {
  std::vector<int> lengths;
  int heads, group, own, passing, left, right;
  bool keys;  // own the tiles
  int64_t line_bytes, cache;
  int blocks;
  bool packed;

  int longest() const { return *std::max_element(lengths.begin(), lengths.end()); }
  int64_t tokens() const { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }

  // As order_of_rows() and order_of_keys() of cuda/attention_call.h make it.
  Schedule schedule() const {
    const int sequences = static_cast<int>(lengths.size());
    const auto places = static_cast<int>(cuda::attention::count_places(sequences + 1, tokens(), own, true));
    const int tiles = packed ? places : (longest() + own - 1) / own, owners = packed ? heads : heads * sequences;
    const int64_t bytes = longest() * line_bytes;
    if (keys) return cuda::attention::schedule_of_keys(tiles, owners, right >= 0, {bytes * group, 1}, {cache, blocks});
    return cuda::attention::schedule_of_rows(tiles, owners, left >= 0, right >= 0, {bytes, group}, {cache, blocks});
  }

  // Which sequence's tile it is, as place_of() of cuda/attention_logits.cuh finds it.
  Schedule::Tile of_sequence(Schedule::Tile at) const {
    if (!packed) return {at.tile, at.owner / heads};
    const int sequences = static_cast<int>(lengths.size());
    const auto first = [&](int sequence) { return std::accumulate(lengths.begin(), lengths.begin() + sequence, 0); };
    const int sequence = cuda::attention::sequence_of_place(at.tile, sequences + 1, own, first);
    return {at.tile - cuda::attention::first_place(sequence, first(sequence), 0, own, true), sequence};
  }

  // What a tile takes: the tiles that pass it, and one more for what a block does beside them; nothing past the end.
  int64_t work(Schedule::Tile at) const {
    const auto [tile, sequence] = of_sequence(at);
    const int length = sequence < static_cast<int>(lengths.size()) ? lengths[static_cast<size_t>(sequence)] : 0;
    const int first = tile * own;
    if (first >= length) return 0;
    const ops::BandOf<int> band(length, length, left, right, false);
    const int last = std::min(first + own, length);
    const auto span = keys ? band.rows_of(first, last) : band.keys_of(first, last);
    const int begin = span.begin / passing * passing, count = std::max(0, span.end - begin);
    return 1 + int64_t{keys ? group : 1} * ((count + passing - 1) / passing);
  }
};

void print_balance(const Call& c) {
  const Schedule s = c.schedule();
  std::vector<int64_t> work;
  std::vector<bool> taken(static_cast<size_t>(s.count()));
  int64_t tiles = 0;  // that have lines
  bool once = true;
  for (int turn = 0; turn < s.count(); ++turn) {
    const auto at = s.at(turn);
    const auto number = static_cast<size_t>(at.tile * s.owners + at.owner);
    once = once && at.tile >= 0 && at.tile < s.tiles && at.owner >= 0 && at.owner < s.owners && !taken[number];
    if (!once) break;
    taken[number] = true;
    work.push_back(c.work(at));
    tiles += work.back() > 0;
  }
  for (int length : c.lengths) tiles -= int64_t{c.heads} * ((length + c.own - 1) / c.own);
  once = once && tiles == 0;
  const auto longest = work.empty() ? 0 : *std::max_element(work.begin(), work.end());
  std::printf("%d %lld %.2f %lld\n", once, (long long)end_of_last(work, c.blocks), least_end(work, c.blocks),
              (long long)longest);
}

}  // namespace

// Reads schedules (tiles, owners, owners of a section, last first), whose turns it prints, and calls, packed or not.
int main() {
  char word[16];
  while (std::scanf("%15s", word) == 1) {
    if (std::string_view(word) == "turns") {
      int tiles, owners, together, last_first;
      if (std::scanf("%d %d %d %d", &tiles, &owners, &together, &last_first) != 4) return 1;
      const Schedule s{tiles, owners, together, last_first != 0};
      for (int turn = 0; turn < s.count(); ++turn) std::printf("%d %d ", s.at(turn).tile, s.at(turn).owner);
      std::printf("\n");
      continue;
    }
    Call c{};
    c.packed = std::string_view(word) == "packed";
    int keys, sequences;
    long long line_bytes, cache;
    if (std::scanf("%d %d %d %d %d %d %d %lld %lld %d %d", &keys, &c.heads, &c.group, &c.own, &c.passing, &c.left,
                   &c.right, &line_bytes, &cache, &c.blocks, &sequences) != 11) {
      return 1;
    }
    c.keys = keys != 0, c.line_bytes = line_bytes, c.cache = cache;
    c.lengths.resize(static_cast<size_t>(sequences));
    for (int& length : c.lengths)
      if (std::scanf("%d", &length) != 1) return 1;
    print_balance(c);
  }
}
