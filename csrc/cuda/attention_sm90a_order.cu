// In which order Hopper's attention kernels take the tiles of packed sequences (attention_packed.h).
//
//   A block goes through the sections. Of each it counts the tiles of every class of work, and then lays them down
//   class after class; in which order those of one class lie is nobody's matter.
//
//   bytes   16 a tile, and 16 log2(sequences) from the first-level cache
//   limit   latency: two bisections for every 1024 places, some microseconds
#include <algorithm>
#include <cstdint>

#include "cuda/attention_sm90a.cuh"
#include "cuda/launch.cuh"

namespace llmengine::cuda::attention {
namespace {

inline constexpr int kOrderThreads = 1024;

struct Order {
  Options options;
  Sizes sizes;
  TilesOf of;
  int places, sections, together, heads, blocks;
  bool last_first;
  int* room;  // kTurnsRoom of each
};

struct OrderRoom {
  int counts[kWorkClasses], total, longest;
  unsigned long long work;
};

struct Item {
  int tile, sequence, count;  // count: 0, where a place is empty, or 1
  int work;
};

// What a tile takes: the tiles that pass it, and one more for what a block does beside them.
__device__ __forceinline__ Item item_at(const Order& p, int place) {
  const bool keys = p.of.keys;
  const PlaceAt at = at_place(p.sizes, keys, place, p.of.own);
  const Band band = at.s.band(p.options);
  const int first = at.tile * p.of.own;
  if (first < 0 || first >= (keys ? at.s.keys : at.s.rows)) return {};
  const Span span = keys ? rows_of_keys(band, first, p.of.own) : keys_of_rows(band, first, p.of.own);
  const int begin = begin_of_walk(span, p.of.passing), passing = largest(span.end - begin, 0);
  const int tiles = 1 + (keys ? p.sizes.group : 1) * ((passing + p.of.passing - 1) / p.of.passing);
  return {at.tile, at.s.index, 1, tiles};
}

// Counts to where each class begins, by one warp.
__device__ __forceinline__ void to_begins(OrderRoom& room) {
  constexpr int kEach = kWorkClasses / 32;
  int* own = room.counts + lane_of() * kEach;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += own[i];
  int before = 0;  // of lanes below
#pragma unroll
  for (int lane = 0; lane < 32; ++lane) {
    const int of_lane = __shfl_sync(kWholeWarp, sum, lane);
    before += lane < lane_of() ? of_lane : 0;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int count = own[i];
    own[i] = before;
    before += count;
  }
  if (lane_of() == 31) room.total = before;
}

__global__ void __launch_bounds__(kOrderThreads) attention_order_sm90a(const Order p) {
  __shared__ OrderRoom room;
  const int thread = static_cast<int>(threadIdx.x);
  auto* tiles = reinterpret_cast<PackedTile*>(p.room + kTurnsRoom);
  int begin = 0;  // of a section in the list
#pragma unroll 1
  for (int n = 0; n < p.sections; ++n) {
    const int section = p.last_first ? p.sections - 1 - n : n;
    const int first = begin_of_section(p.places, p.sections, section);
    const int last = begin_of_section(p.places, p.sections, section + 1);
    for (int i = thread; i < kWorkClasses; i += kOrderThreads) room.counts[i] = 0;
    if (thread == 0) room.work = 0, room.longest = 0;
    __syncthreads();
    for (int place = first + thread; place < last; place += kOrderThreads) {
      const Item item = item_at(p, place);
      if (!item.count) continue;
      atomicAdd(room.counts + class_of_work(item.work), 1);
      atomicAdd(&room.work, static_cast<unsigned long long>(item.work));
      atomicMax(&room.longest, item.work);
    }
    __syncthreads();
    if (warp_of() == 0) to_begins(room);
    __syncthreads();
    const int end = begin + room.total;
    for (int place = first + thread; place < last; place += kOrderThreads) {
      const Item item = item_at(p, place);
      if (!item.count) continue;
      const int at = begin + atomicAdd(room.counts + class_of_work(item.work), 1);
      tiles[at] = {item.tile, item.sequence, begin, end};
    }
    __syncthreads();  // all know the end
    begin = end;
  }
  if (thread != 0) return;
  const auto work = static_cast<int64_t>(room.work);
  p.room[0] = 0, p.room[1] = begin;
  p.room[2] = raised_together(p.together, p.heads, work, room.longest, p.blocks);
}

}  // namespace

Turns turns_of(const ops::AttentionOptions& p, const TilesOf& of, int* room, Stream stream) {
  const int64_t passing = (of.keys ? p.query : p.key).size(2), own = (of.keys ? p.key : p.query).size(2);
  const int heads = static_cast<int>(of.keys ? p.key_heads() : p.heads()), group = static_cast<int>(p.group());
  const Streams streams{passing * of.line_bytes * (of.keys ? group : 1), of.keys ? 1 : group};
  const Machine machine{cache_bytes(), multiprocessors()};
  const bool begins = p.window_left >= 0, ends = p.window_right >= 0;
  const Sizes sizes = of.keys ? sizes_of_keys(p, of.own) : sizes_of_rows(p, of.own);
  const int owners = heads * sizes.sequences;
  const Schedule schedule = of.keys ? schedule_of_keys(sizes.tiles, owners, ends, streams, machine)
                                    : schedule_of_rows(sizes.tiles, owners, begins, ends, streams, machine);
  if (!p.packed()) return {schedule, room, heads, false};

  const PackedOrder order = order_of_packed(own / of.own, heads, streams, machine);
  const auto places = static_cast<int>(places_of(p, of.keys, of.own));
  const Order given{options_of(p),       sizes, of, places, order.sections, order.together, heads, machine.blocks,
                    schedule.last_first, room};
  launch({"attention_order_sm90a", dim3(1), kOrderThreads, cuda_stream(stream), of.keys ? p.key : p.query},
         attention_order_sm90a, given);
  return {schedule, room, heads, true};
}

int64_t turns_room(const ops::AttentionOptions& p) {
  if (!p.packed()) return kTurnsRoom;
  const int64_t tokens = std::max(p.query.size(2), p.key.size(2));
  return kTurnsRoom + 4 * count_places(p.sequences(), tokens, kLeastOwn, true);
}

}  // namespace llmengine::cuda::attention
