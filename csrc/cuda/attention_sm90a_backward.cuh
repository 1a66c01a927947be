// What the backward attention kernels for Hopper share (formulas: attention_sm80_backward.cuh). Both are one walk:
//
//                              lines that pass ->     A block owns 128 lines of a head: a pair of tiles that stays, 64
//                    own       +-----+-----+-----     lines a warpgroup. Lines of the other side pass by in tiles, a
//   attention_rows   Q, dO     | K V | K V |          pair each, through a ring of stages. The sums stay in registers;
//   attention_keys   K, V      | Q dO| Q dO|          S and dP come from accumulators to operands in registers.
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

#include "cuda/attention_sm80_backward.cuh"
#include "cuda/attention_sm90a.cuh"
#include "cuda/attention_sm90a.h"
#include "cuda/launch.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/warp.cuh"

namespace llmengine::cuda::attention {

enum class Owner : uint8_t { rows, keys };

// Of a head dim up to D, with `passing` lines in a tile that passes.
template <Owner owner_, int D, int passing_>
struct Walk {
  static constexpr Owner owner = owner_;
  static constexpr int groups = 2, own = groups * kGroupRows, threads = 128 * (1 + groups);
  static constexpr int passing = passing_, panels = D / kPanel;
  static constexpr int owned = 2, stages = D <= 64 ? 4 : 2;  // pairs of tiles
  static constexpr int own_bytes = own * panels * 128, stage_bytes = passing * panels * 128;
  // Fetching statistics takes some more than boxes alone; either way all that 384 threads have is shared out.
  static constexpr int few_registers = owner == Owner::keys ? 56 : kFewRegisters;
  static constexpr int many_registers = owner == Owner::keys ? 224 : kManyRegisters;
  static constexpr int statistics =
      owner == Owner::keys ? passing : 1;  // of a stage: rows' owners read them themselves
};

template <class S>
struct Shared {
  uint16_t own[S::owned][2][S::own_bytes / 2];  // a warpgroup's lines lie together, in panels
  uint16_t passing[S::stages][2][S::stage_bytes / 2];
  float base[S::stages][S::statistics], delta[S::stages][S::statistics];  // they come with the first of a pair
  ptx::Mbarrier own_full[S::owned], own_free[S::owned];
  ptx::Mbarrier full[S::stages][2], free[S::stages][2];
  ptx::Mbarrier landed;  // a tile that is to be cleared in part
  int turn[S::owned];    // whose pair this is, to be read between own_full and own_free

  // A warpgroup's 64 lines.
  __device__ __forceinline__ uint16_t* lines(int pair, int tile, int group) {
    return own[pair][tile] + group * (S::own_bytes / 2 / S::groups);
  }
};

template <class T>
struct Walked {
  Backward<T> backward;
  bool plain;  // logits are multiples of products
  Schedule schedule;
  int* turns;         // drawn so far, beside each block's first
  const int* remade;  // null: every tile is made; else how many are, and for each tile of each owner whether it is
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

// What follows from it alone stays in no register between tiles: the fetching warp has few.
template <class T>
__device__ __forceinline__ Schedule schedule_of(const Walked<T>& p) {
  const Schedule& s = p.schedule;
  return {ptx::made_here(s.tiles), s.owners, ptx::made_here(s.together), s.last_first};
}

template <class S, class T>
__device__ __forceinline__ Work work_of(const Walked<T>& p, int turn) {
  constexpr bool keys = S::owner == Owner::keys;
  const Sizes& sizes = p.backward.sizes;
  const int group = ptx::made_here(sizes.group), heads = keys ? sizes.heads / group : sizes.heads;
  const auto [tile, owner] = schedule_of(p).at(turn);
  Sequence s = sequence_of(sizes, owner / heads);
  if (!keys && p.remade && !p.remade[1 + owner * sizes.tiles + tile]) s.rows = 0;
  const int head = owner % heads, first = tile * S::own, from = keys ? head * group : head / group;
  const Band band = s.band(p.backward.options);
  const Span span = keys ? rows_of_keys(band, first, S::own) : keys_of_rows(band, first, S::own);
  return {s, head, first, from, keys ? from + group : from + 1, begin_of_walk(span, S::passing), span.end};
}

// ---- the warp that fetches ------------------------------------------------------------------------------------------

// One tile of a pair, `left` lines before its sequence ends; what lies behind them is a neighbour's where it is packed.
template <class S>
__device__ __forceinline__ void fetch_passing(Shared<S>& shared, uint16_t* to, ptx::Mbarrier* full,
                                              const ptx::TensorMap* map, int row, int head, int batch, int left,
                                              bool packed, bool elected, int& landed) {
  const bool neighbours = packed && left < S::passing;
  if (elected) {
    ptx::Mbarrier* told = neighbours ? &shared.landed : full;
    ptx::mbarrier_arrive_expect_tx(told, S::stage_bytes);
    fetch<S::panels>(to, S::passing * 128, map, told, row, head, batch);
  }
  if (!neighbours) return;
  __syncwarp();
  ptx::mbarrier_wait(&shared.landed, landed);
  landed ^= 1;
  clear_rows<S::panels, S::passing>(to, left);
  ptx::fence_async_shared();
  __syncwarp();
  if (elected) ptx::mbarrier_arrive(full);
}

// base and delta of a stage's rows; every lane arrives when its own have come.
template <class S, class T>
__device__ __forceinline__ void fetch_statistics(Shared<S>& shared, const Backward<T>& p, int stage, int64_t from,
                                                 int left) {
  for (int line = lane_of(); line < S::passing; line += 32) {
    const int bytes = line < left ? 4 : 0;
    ptx::copy_async_4(shared.base[stage] + line, p.base + from + line, bytes);
    ptx::copy_async_4(shared.delta[stage] + line, p.delta + from + line, bytes);
  }
  ptx::mbarrier_arrive_for_copies(&shared.full[stage][0]);
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
    ptx::mbarrier_wait(&shared.own_free[pair.stage()], pair.parity() ^ 1);
    if (elected) shared.turn[pair.stage()] = number;
    if (number >= schedule_of(p).count()) break;
    const Work w = work_of<S>(p, number);
    if (elected && w.some()) {
      ptx::mbarrier_arrive_expect_tx(own_full, 2 * S::own_bytes);
      const int row = (keys ? w.s.key0 : w.s.row0) + w.first;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll 1
        for (int g = 0; g < S::groups; ++g)
          fetch<S::panels>(shared.lines(pair.stage(), tile, g), kGroupRows * 128, maps.own[tile], own_full,
                           row + g * kGroupRows, w.head, w.s.batch);
    } else if (elected) {
      ptx::mbarrier_arrive(own_full);
    }
    const int count = keys ? w.s.rows : w.s.keys, first = keys ? w.s.row0 : w.s.key0;
    const int batch = static_cast<int>(w.s.batch);
#pragma unroll 1
    for (int head = w.from; head < w.to; ++head)
#pragma unroll 1
      for (int line = w.begin; line < w.end; line += S::passing, ++turn.number) {
        const int stage = turn.stage(), left = count - line;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          ptx::mbarrier_wait(&shared.free[stage][tile], turn.parity() ^ 1);
          if (keys && tile == 0) {
            const int64_t at = (static_cast<int64_t>(batch) * sizes.heads + head) * sizes.rows + first + line;
            fetch_statistics(shared, p.backward, stage, at, left);
          }
          fetch_passing(shared, shared.passing[stage][tile], &shared.full[stage][tile], maps.passing[tile],
                        first + line, head, batch, left, sizes.cu_seqlens_k != nullptr, elected, landed);
        }
      }
    number = draw_turn(p.turns, elected);
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
    if (shared.turn[place] >= schedule_of(p).count()) break;
    multiply(work_of<S>(p, shared.turn[place]), place, group, ptx::made_here(warp_of() % 4 * 16), turn);
    ptx::fence_async_shared();
    give_back_by_warps(&shared.own_free[place]);
  }
}

// The whole of a kernel, but for tokens of no sequence.
template <class S, class T, class Multiply>
__device__ __forceinline__ void walk(Shared<S>& shared, const Maps& maps, const Walked<T>& p,
                                     const Multiply& multiply) {
  if (threadIdx.x == 0) {
    for (int o = 0; o < S::owned; ++o) {
      ptx::mbarrier_init(&shared.own_full[o], 1);
      ptx::mbarrier_init(&shared.own_free[o], 4 * S::groups);
    }
    for (int s = 0; s < S::stages; ++s)
      for (int tile = 0; tile < 2; ++tile) {
        ptx::mbarrier_init(&shared.full[s][tile], S::owner == Owner::keys && tile == 0 ? 33 : 1);
        ptx::mbarrier_init(&shared.free[s][tile], 4 * S::groups);
      }
    ptx::mbarrier_init(&shared.landed, 1);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
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

// ---- launches -------------------------------------------------------------------------------------------------------

// body(T{}, the class of the head dim, whether a scale and a band are all that lies between products and exponentials)
template <class Body>
void visit_hopper(const AttentionBackwardSm90a& p, const Body& body) {
  const bool simple = is_plain(p) && p.dropout_p == 0;
  visit_dims<64, 128>(
      p, [&](auto type, auto dim) { simple ? body(type, dim, std::true_type{}) : body(type, dim, std::false_type{}); });
}

// What passes, `bytes` in all for each owner, is shared by `group` owners.
template <class S, class T>
Walked<T> walked_of(const AttentionBackwardSm90a& p, int64_t bytes, int group, bool last_first) {
  constexpr bool keys = S::owner == Owner::keys;
  const Sizes sizes = keys ? sizes_of_keys(p, S::own) : sizes_of_rows(p, S::own);
  const int owners = (keys ? sizes.heads / sizes.group : sizes.heads) * sizes.sequences;
  return {backward_of<T>(p, sizes), is_plain(p),
          Schedule{sizes.tiles, owners, owners_together(bytes, group, owners), last_first},
          p.turns.as<int>() + (keys ? 1 : 0), nullptr};
}

template <class S, class T>
LaunchSite launch_site(const char* name, const AttentionBackwardSm90a& p, const Walked<T>& walked, Stream stream) {
  constexpr bool keys = S::owner == Owner::keys;
  // packed tokens that belong to no sequence want blocks even where there are no sequences
  const int64_t tiles = grid_of(p, walked.backward.sizes.tiles, keys ? p.key_heads() : p.heads(), multiprocessors()).x;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors()));
  return {name, dim3(blocks), S::threads, cuda_stream(stream), keys ? p.key : p.query, sizeof(Shared<S>)};
}

// Launched by run() in turn.
void run_rows(const AttentionBackwardSm90a& p, Stream stream, const int* remade = nullptr);
void run_keys(const AttentionBackwardSm90a& p, Stream stream);

}  // namespace llmengine::cuda::attention
