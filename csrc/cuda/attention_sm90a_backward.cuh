// What the backward attention kernels for Hopper share (formulas: attention_sm80_backward.cuh). Both are one walk:
//
//                              lines that pass ->     A block owns 128 lines of a head: a pair of tiles that stays, 64
//                    own       +-----+-----+-----     lines a warpgroup. Lines of the other side pass by in tiles, a
//   attention_rows   Q, dO     | K V | K V |          pair each, through a ring of stages. The sums stay in registers;
//   attention_keys   K, V      | Q dO| Q dO|          S and dP come from accumulators to operands in registers.
//
//   Above head dims of 128 registers hold the sums of 64 keys: both warpgroups then own the same ones
//   (attention_sm90a_wide_keys.cu).
//
//   own_full[o], own_free[o]     a pair has come; every warp has stored what it made of it, by way of its place
//   full[s][i], free[s][i]       tile i of a stage's pair has come, every warp is done with it
//
//   A block draws its tiles as the forward does (attention_sm90a_forward.cu), and its fetching warp clears the rows of
//   a packed neighbour from tiles that pass: their P is 0, but 0 V would be NaN where V is. Each sum is made by one
//   block, in one order: no atomics, equal bits in every run.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/attention_grid.h"
#include "cuda/attention_sm80_backward.cuh"
#include "cuda/attention_sm90a.cuh"
#include "cuda/attention_sm90a.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/warp.cuh"

namespace llmengine::cuda::attention {

enum class Owner : uint8_t { rows, keys };

// Of head dims up to D, values' up to DV, with `passing` lines in a tile that passes. Of a pair the first tile is D
// wide, the second, values or gradients of outputs, DV. `simple`: of visit_hopper().
template <Owner owner_, int D, int passing_, int DV, bool simple_>
struct Walk {
  static_assert(DV <= D);  // both tiles have the first one's room
  static constexpr Owner owner = owner_;
  static constexpr bool wide = D > 128, simple = simple_;
  static constexpr int groups = 2, boxes = wide && owner == Owner::keys ? 1 : groups;  // boxes of 64 lines
  static constexpr int own = boxes * kGroupRows, threads = 128 * (1 + groups);
  static constexpr int passing = passing_;
  static constexpr int panels = (D + kPanel - 1) / kPanel, value_panels = (DV + kPanel - 1) / kPanel;
  static constexpr int owned = wide && own * D > 64 * 192 ? 1 : 2, stages = D <= 64 ? 4 : 2;  // pairs of tiles
  static constexpr int own_bytes = own * panels * 128, stage_bytes = passing * panels * 128;
  // Fetching statistics takes some more than boxes alone; either way all that 384 threads have is shared out.
  static constexpr int few_registers = owner == Owner::keys ? 56 : kFewRegisters;
  static constexpr int many_registers = owner == Owner::keys ? 224 : kManyRegisters;
  static constexpr int statistics =
      owner == Owner::keys ? passing : 1;  // of a stage: rows' owners read them themselves
  static constexpr int shifts = simple ? 1 : statistics;
};

template <class S>
struct Shared {
  uint16_t own[S::owned][2][S::own_bytes / 2];  // a warpgroup's lines lie together, in panels
  uint16_t passing[S::stages][2][S::stage_bytes / 2];
  float base[S::stages][S::statistics], delta[S::stages][S::statistics];  // they come with the first of a pair
  float shift[S::stages][S::shifts];                                      // unless simple
  ptx::Mbarrier own_full[S::owned], own_free[S::owned];
  ptx::Mbarrier full[S::stages][2], free[S::stages][2];
  ptx::Mbarrier landed;   // a tile that is to be cleared in part
  Place taken[S::owned];  // whose pair this is, to be read between own_full and own_free

  // A warpgroup's 64 lines.
  __device__ __forceinline__ uint16_t* lines(int pair, int tile, int group) {
    return own[pair][tile] + (S::boxes == 1 ? 0 : group) * (S::own_bytes / 2 / S::boxes);
  }
};

template <class T>
struct Walked {
  Backward<T> backward;
  bool plain;  // logits are multiples of products
  Seen seen;
  Turns turns;
  const int* remade;  // null: every tile is made; else how many are, and for each whether it is, at remade_place()
};

struct Maps {
  const ptx::TensorMap *own[2], *passing[2];
};

// ---- work -----------------------------------------------------------------------------------------------------------

// Lines from `first` on of a head, and what passes them: lines [begin, end) of heads [from, to).
struct Work {
  Sequence s;
  int head, first, from, to, begin, end;

  __device__ bool some() const { return begin < end; }
};

// Of a head's tile of kRemadeRows rows that may be made anew, behind how many are.
__device__ __forceinline__ int remade_place(const Sizes& sizes, const Sequence& s, int head, int tile) {
  const int first = first_place(s.index, s.row0, s.rows, kRemadeRows, sizes.cu_seqlens_q != nullptr);
  return 1 + (first + tile) * sizes.heads + head;
}

template <class S, class T>
__device__ __forceinline__ Work work_of(const Walked<T>& p, const Place& place) {
  constexpr bool keys = S::owner == Owner::keys;
  const Sizes& sizes = p.backward.sizes;
  const int group = ptx::made_here(sizes.group), head = place.head, from = keys ? head * group : head / group;
  Sequence s = sequence_of(sizes, place.sequence);
  if constexpr (!keys) {
    static_assert(S::own == kRemadeRows);
    if (p.remade && !p.remade[remade_place(sizes, s, head, place.tile)]) s.rows = 0;
  }
  const int first = place.tile * S::own;
  const Band band = s.band(p.backward.options);
  const Span span = keys ? seen_rows(p.seen, s, rows_of_keys(band, first, S::own), first, S::own)
                         : seen_keys(p.seen, s, keys_of_rows(band, first, S::own));
  return {s, head, first, from, keys ? from + group : from + 1, begin_of_walk(span, S::passing), span.end};
}

// ---- the warp that fetches ------------------------------------------------------------------------------------------

// One tile of a pair, `left` lines before its sequence ends; what lies behind them is a neighbour's where it is packed.
template <int tile, class S>
__device__ __forceinline__ void fetch_passing(Shared<S>& shared, const Turn<S::stages>& turn, const Maps& maps, int row,
                                              int head, int batch, int left, bool packed, bool elected, int& landed) {
  constexpr int panels = tile == 0 ? S::panels : S::value_panels;
  const int stage = turn.stage();
  uint16_t* to = shared.passing[stage][tile];
  ptx::Mbarrier* full = &shared.full[stage][tile];
  const bool neighbours = packed && left < S::passing;
  ptx::mbarrier_wait(&shared.free[stage][tile], turn.parity() ^ 1);
  if (elected) {
    ptx::Mbarrier* told = neighbours ? &shared.landed : full;
    ptx::mbarrier_arrive_expect_tx(told, S::passing * panels * 128);
    fetch<panels>(to, S::passing * 128, maps.passing[tile], told, row, head, batch);
  }
  if (!neighbours) return;
  __syncwarp();
  ptx::mbarrier_wait(&shared.landed, landed);
  landed ^= 1;
  clear_rows<panels, S::passing>(to, left);
  ptx::fence_async_shared();
  __syncwarp();
  if (elected) ptx::mbarrier_arrive(full);
}

// base, delta and shift of a stage's rows; every lane arrives when its own have come.
template <class S, class T>
__device__ __forceinline__ void fetch_statistics(Shared<S>& shared, const Backward<T>& p, int stage, int64_t from,
                                                 int left) {
  for (int line = lane_of(); line < S::passing; line += 32) {
    const int bytes = line < left ? 4 : 0;
    ptx::copy_async_4(shared.base[stage] + line, p.base + from + line, bytes);
    ptx::copy_async_4(shared.delta[stage] + line, p.delta + from + line, bytes);
    if (!S::simple) ptx::copy_async_4(shared.shift[stage] + line, p.shift + from + line, bytes);
  }
  ptx::mbarrier_arrive_for_copies(&shared.full[stage][0]);
}

// What a block owns of one of a pair's tensors.
template <int panels, class S>
__device__ __forceinline__ void fetch_own(Shared<S>& shared, int place, int tile, const Maps& maps, int row, int head,
                                          int64_t batch) {
#pragma unroll 1
  for (int g = 0; g < S::boxes; ++g)
    fetch<panels>(shared.lines(place, tile, g), kGroupRows * 128, maps.own[tile], &shared.own_full[place],
                  row + g * kGroupRows, head, batch);
}

template <class S, class T>
__device__ __forceinline__ void fetch_all(Shared<S>& shared, const Maps& maps, const Walked<T>& p) {
  constexpr bool keys = S::owner == Owner::keys;
  const Sizes& sizes = p.backward.sizes;
  const bool elected = ptx::elect_one();
  Turn<S::stages> turn;
  Turn<S::owned> pair;
  int landed = 0, number = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (;; ++pair.number) {
    ptx::Mbarrier* own_full = &shared.own_full[pair.stage()];
    const Place place = p.turns.at(number);
    ptx::mbarrier_wait(&shared.own_free[pair.stage()], pair.parity() ^ 1);
    if (elected) shared.taken[pair.stage()] = place;
    if (place.tile < 0) break;
    const Work w = work_of<S>(p, place);
    if (elected && w.some()) {
      ptx::mbarrier_arrive_expect_tx(own_full, S::own * (S::panels + S::value_panels) * 128);
      const int row = (keys ? w.s.key0 : w.s.row0) + w.first;
      fetch_own<S::panels>(shared, pair.stage(), 0, maps, row, w.head, w.s.batch);
      fetch_own<S::value_panels>(shared, pair.stage(), 1, maps, row, w.head, w.s.batch);
    } else if (elected) {
      ptx::mbarrier_arrive(own_full);
    }
    const int count = keys ? w.s.rows : w.s.keys, first = keys ? w.s.row0 : w.s.key0;
    const int batch = static_cast<int>(w.s.batch);
#pragma unroll 1
    for (int head = w.from; head < w.to; ++head)
#pragma unroll 1
      for (int line = w.begin; line < w.end; line += S::passing, ++turn.number) {
        const int row = first + line, left = count - line;
        const bool packed = sizes.cu_seqlens_k != nullptr;
        fetch_passing<0>(shared, turn, maps, row, head, batch, left, packed, elected, landed);
        if (keys) {
          const int64_t at = (static_cast<int64_t>(batch) * sizes.heads + head) * sizes.rows + row;
          fetch_statistics(shared, p.backward, turn.stage(), at, left);
        }
        fetch_passing<1>(shared, turn, maps, row, head, batch, left, packed, elected, landed);
      }
    number = p.turns.draw(elected);
  }
  if (elected) ptx::mbarrier_arrive(&shared.own_full[pair.stage()]);
}

// ---- the warpgroups that multiply -----------------------------------------------------------------------------------

// multiply(work, pair's place, group, this warp's first line in its warpgroup, turn) for every tile that is drawn; what
// the block made of it is stored when it returns.
template <class S, class T, class Multiply>
__device__ __forceinline__ void multiply_all(Shared<S>& shared, const Walked<T>& p, const Multiply& multiply) {
  const int group = warp_of() / 4 - 1;
  Turn<S::stages> turn;
  Turn<S::owned> pair;
#pragma unroll 1
  for (;; ++pair.number) {
    const int place = pair.stage();
    ptx::mbarrier_wait(&shared.own_full[place], pair.parity());
    if (shared.taken[place].tile < 0) break;
    multiply(work_of<S>(p, shared.taken[place]), place, group, ptx::made_here(warp_of() % 4 * 16), turn);
    ptx::fence_async_shared();
    give_back_by_warps(&shared.own_free[place]);
  }
}

// ---- the soft cap ---------------------------------------------------------------------------------------------------

// Its slopes at products x lie in shared memory until they are wanted, a thread's 16 bytes `step` of them apart:
// registers hold logits meanwhile.
template <int step, int n>
__device__ __forceinline__ void keep_slopes(const float (&x)[1][n][4], float4* slopes, const Options& o) {
#pragma unroll
  for (int j = 0; j < n; ++j)
    slopes[j * step] = make_float4(slope_of_cap(o, x[0][j][0]), slope_of_cap(o, x[0][j][1]),
                                   slope_of_cap(o, x[0][j][2]), slope_of_cap(o, x[0][j][3]));
}

// x times its slopes.
template <int step, int n>
__device__ __forceinline__ void take_slopes(float (&x)[1][n][4], const float4* slopes) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float4 by = slopes[j * step];
    x[0][j][0] *= by.x, x[0][j][1] *= by.y, x[0][j][2] *= by.z, x[0][j][3] *= by.w;
  }
}

// `arrivals` at the first tile of a pair that passes.
template <class S>
__device__ __forceinline__ void begin_barriers(Shared<S>& shared, int arrivals) {
  if (threadIdx.x == 0) {
    for (int o = 0; o < S::owned; ++o) {
      ptx::mbarrier_init(&shared.own_full[o], 1);
      ptx::mbarrier_init(&shared.own_free[o], 4 * S::groups);
    }
    for (int s = 0; s < S::stages; ++s)
      for (int tile = 0; tile < 2; ++tile) {
        ptx::mbarrier_init(&shared.full[s][tile], tile == 0 ? arrivals : 1);
        ptx::mbarrier_init(&shared.free[s][tile], 4 * S::groups);
      }
    ptx::mbarrier_init(&shared.landed, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
}

// The whole of a kernel, but for tokens of no sequence.
template <class S, class T, class Multiply>
__device__ __forceinline__ void walk(Shared<S>& shared, const Maps& maps, const Walked<T>& p,
                                     const Multiply& multiply) {
  begin_barriers(shared, S::owner == Owner::keys ? 33 : 1);  // the box's and each lane's, whose statistics come with it
  if (warp_of() >= 4) {
    ptx::increase_registers<S::many_registers>();
    multiply_all<S>(shared, p, multiply);
    return;
  }
  ptx::decrease_registers<S::few_registers>();
  if (warp_of() == 0) {
    if (lane_of() == 0) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        ptx::prefetch_tensor_map(maps.own[tile]);
        ptx::prefetch_tensor_map(maps.passing[tile]);
      }
    }
    fetch_all<S>(shared, maps, p);
  }
}

// Zeros for lines of no sequence, by all blocks of the grid.
template <int threads, class T>
__device__ __forceinline__ void leave_empty(const Operand<T>& to, const Sequence& rest, int heads, int row0, int count,
                                            int step) {
  for (int head = 0; head < heads; ++head)
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * step; first < count;
         first += static_cast<int64_t>(gridDim.x) * step) {
      const int line = static_cast<int>(first);
      zero_rows<threads>(to.lines(rest.batch, head, row0 + line), least(step, count - line));
    }
}

template <class S, class T>
__device__ __forceinline__ void clear_rest_of_keys(const Walked<T>& p) {
  const Sizes& sizes = p.backward.sizes;
  if (!sizes.cu_seqlens_k) return;
  const Sequence rest = sequence_of(sizes, sizes.sequences);
  for (const Operand<T>* to : {&p.backward.grad_key, &p.backward.grad_value})
    leave_empty<S::threads>(*to, rest, sizes.heads / sizes.group, rest.key0, rest.keys, S::own);
}

// ---- launches -------------------------------------------------------------------------------------------------------

// body(T{}, the classes of the head dim and of values', whether a scale and a band are all that lies between products
// and exponentials)
template <int... dims, class Body>
void visit_hopper(const AttentionBackwardSm90a& p, const Body& body) {
  const bool simple = is_plain(p, Padding::apart) && p.dropout_p == 0;
  visit_pairs_of_dims<dims...>(p, [&](auto type, auto dim, auto value_dim) {
    simple ? body(type, dim, value_dim, std::true_type{}) : body(type, dim, value_dim, std::false_type{});
  });
}

// `grid_bytes`: of each line that passes, beside those of its pair.
template <class S>
TilesOf tiles_of(const AttentionBackwardSm90a& p, int64_t grid_bytes = 0) {
  return {S::owner == Owner::keys, S::own, S::passing, (p.query.size(3) + p.value.size(3)) * 2 + grid_bytes};
}

template <class S, class T>
Walked<T> walked_of(const AttentionBackwardSm90a& p, Stream stream, int64_t grid_bytes = 0) {
  constexpr bool keys = S::owner == Owner::keys;
  const Sizes sizes = keys ? sizes_of_keys(p, S::own) : sizes_of_rows(p, S::own);
  int* room = p.turns.as<int>() + (keys ? turns_room(p) : 0);
  return {backward_of<T>(p, sizes, Padding::apart), is_plain(p, Padding::apart), seen_of(p, p.spans),
          turns_of(p, tiles_of<S>(p, grid_bytes), room, stream), nullptr};
}

template <class S, class Memory>
LaunchSite launch_site(const char* name, const AttentionBackwardSm90a& p, Stream stream) {
  constexpr bool keys = S::owner == Owner::keys;
  static_assert(sizeof(Memory) <= 227 << 10);
  const dim3 blocks = persistent_blocks(p, tiles_of<S>(p));
  return {name, blocks, S::threads, cuda_stream(stream), keys ? p.key : p.query, sizeof(Memory)};
}

// `given`: the kernel's arguments behind its tensor maps.
template <class S, class Memory, class Kernel>
void launch_walk(const char* name, const Kernel& kernel, const AttentionBackwardSm90a& p, Stream stream,
                 const auto& given) {
  constexpr bool keys = S::owner == Owner::keys;
  constexpr int own = kGroupRows, passing = S::passing;
  const auto key = map_of_tokens("key", p.key, keys ? own : passing);
  const auto value = map_of_tokens("value", p.value, keys ? own : passing);
  const auto query = map_of_tokens("query", p.query, keys ? passing : own);
  const auto grad_output = map_of_tokens("grad_output", p.grad_output, keys ? passing : own);
  const LaunchSite at = launch_site<S, Memory>(name, p, stream);
  keys ? launch(at, kernel, key, value, query, grad_output, given)
       : launch(at, kernel, query, grad_output, key, value, given);
}

// Launched by run() in turn.
void run_rows(const AttentionBackwardSm90a& p, Stream stream, const int* remade = nullptr);
void run_keys(const AttentionBackwardSm90a& p, Stream stream);
void run_wide_keys(const AttentionBackwardSm90a& p, Stream stream);  // of head dims above 128

}  // namespace llmengine::cuda::attention
