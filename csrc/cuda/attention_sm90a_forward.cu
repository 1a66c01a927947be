// Attention, forward, on Hopper: the online softmax of attention_sm80_forward.cu, with boxes copied by TMA and products
// of warpgroups (Shah et al. 2024).
//
//                          keys ->                  Warpgroup 0 has one warp at work, which fetches: a tile of queries,
//   warpgroup      +-------+-------+-------+---     then keys and values through a ring of stages each. The others own
//     1   64 rows  |   S   |   S   |   S   |        64 query rows of the same head: their output sums, S and P stay in
//                  +-------+-------+-------+---     registers, P as first operand of the second product. Registers that
//     2   64 rows  |   S   |   S   |   S   |        fetching needs not they take over.
//                  +-------+-------+-------+---
//                  K_0 V_0 K_1 V_1 K_2 V_2
//
//     S_0 = Q K_0^T;  P_0 = softmax
//     S_1 = Q K_1^T  and  O = P_0 V_0  are begun;  P_1 = softmax of S_1 while O is made;  ...
//
//   Where a head dim leaves the exponentials as long as the products (up to 128), warpgroups take turns to begin
//   products, so that one's softmax lies under another's.
//
//   query_full[q], key_full[s], value_full[s]   bytes have come
//   query_free[q]                               every warp has stored what it made of the queries, by way of
//                                               their place
//   key_free[s], value_free[s]                  every warpgroup has multiplied them
//
//   Blocks are persistent: the fetching warp draws one tile after another (attention_schedule.h) and tells which beside
//   its queries. The rings go on through tiles: the next one's operands come while the last one's outputs are stored.
//   Past the end of a tensor boxes bring zeros. Past the end of a packed sequence they bring the next one's rows: keys
//   there are hidden as logits, but 0 V would be NaN where V is, so the fetching warp clears such rows before it shows
//   them.
//
//   flops   4 rows keys head_dim a tile
//   bytes   queries and outputs once; keys and values once a block, from the second-level cache: 128 rows do 128 flops
//           a byte
//   limit   the tensor cores, 4096 dense flops a clock and multiprocessor, as long as exponentials, 16 a clock, hide
//           under them: they take as long as the products at head dim 64, half as long at 128, a quarter at 256
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/attention_forward.cuh"
#include "cuda/attention_sm90a.h"
#include "cuda/attention_sm90a_forward.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/warp.cuh"

namespace llmengine::cuda {
namespace attention {
namespace {

// Of a head dim up to D, values' up to DV. `simple`: nothing but a scale and a band lies between products and
// exponentials; what else may takes registers, and leaves room for fewer keys.
template <int D, int DV, bool simple>
struct Shape {
  static constexpr int groups = 2, rows = groups * kGroupRows, threads = 128 * (1 + groups);
  static constexpr int panels = (D + kPanel - 1) / kPanel, value_panels = (DV + kPanel - 1) / kPanel;
  static constexpr int most_keys = DV <= 128 ? 128 : DV <= 192 ? 96 : 64;
  static constexpr int keys = simple || D <= 96 ? most_keys : most_keys - 16;
  static constexpr int stages = 2, queries = D <= 128 ? 2 : 1;
  static constexpr bool by_turns = DV <= 128;
  static constexpr int query_bytes = rows * panels * 128;
  static constexpr int key_bytes = keys * panels * 128, value_bytes = keys * value_panels * 128;  // of a stage
};

template <class S>
struct Shared {
  uint16_t query[S::queries][S::query_bytes / 2];  // a warpgroup's rows lie together, in panels
  uint16_t key[S::stages][S::key_bytes / 2], value[S::stages][S::value_bytes / 2];
  ptx::Mbarrier query_full[S::queries], query_free[S::queries];
  ptx::Mbarrier key_full[S::stages], key_free[S::stages];
  ptx::Mbarrier value_full[S::stages], value_free[S::stages];
  ptx::Mbarrier landed;     // values that are to be cleared in part
  Place taken[S::queries];  // whose queries these are, to be read between query_full and query_free
};

template <class T>
struct Forward {
  Results<T> results;
  Options options;
  bool plain;  // logits are multiples of products
  Seen seen;
  Sizes sizes;
  Turns turns;
};

struct Maps {
  const ptx::TensorMap *query, *key, *value;
};

// ---- the warp that fetches ------------------------------------------------------------------------------------------

template <class S, class T>
__device__ __forceinline__ void fetch_all(Shared<S>& shared, const Maps& maps, const Forward<T>& p) {
  const bool elected = ptx::elect_one(), packed = p.sizes.cu_seqlens_k != nullptr;
  Turn<S::stages> turn;
  Turn<S::queries> query;
  int landed = 0, number = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (;; ++query.number) {
    const int stage = query.stage();
    const Place place = p.turns.at(number);
    if (elected) {
      ptx::mbarrier_wait(&shared.query_free[stage], query.parity() ^ 1);
      shared.taken[stage] = place;
    }
    if (place.tile < 0) break;
    const RowsWork w = work_of<S>(p, place);
    const int key_head = w.head / p.sizes.group;
    if (elected) {
      ptx::Mbarrier* full = &shared.query_full[stage];
      if (w.some()) {
        ptx::mbarrier_arrive_expect_tx(full, S::query_bytes);
#pragma unroll
        for (int g = 0; g < S::groups; ++g)
          fetch<S::panels>(shared.query[stage] + g * (S::query_bytes / 2 / S::groups), kGroupRows * 128, maps.query,
                           full, w.s.row0 + w.first + g * kGroupRows, w.head, w.s.batch);
      } else {
        ptx::mbarrier_arrive(full);
      }
    }
#pragma unroll 1
    for (int key = w.begin; key < w.end; key += S::keys, ++turn.number) {
      const int stage = turn.stage(), row = w.s.key0 + key;
      const bool neighbours = packed && w.s.keys - key < S::keys;
      if (elected) {
        ptx::mbarrier_wait(&shared.key_free[stage], turn.parity() ^ 1);
        ptx::mbarrier_arrive_expect_tx(&shared.key_full[stage], S::key_bytes);
        fetch<S::panels>(shared.key[stage], S::keys * 128, maps.key, &shared.key_full[stage], row, key_head, w.s.batch);
        ptx::Mbarrier* full = neighbours ? &shared.landed : &shared.value_full[stage];
        ptx::mbarrier_wait(&shared.value_free[stage], turn.parity() ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, S::value_bytes);
        fetch<S::value_panels>(shared.value[stage], S::keys * 128, maps.value, full, row, key_head, w.s.batch);
      }
      if (neighbours) {
        __syncwarp();
        ptx::mbarrier_wait(&shared.landed, landed);
        landed ^= 1;
        clear_rows<S::value_panels, S::keys>(shared.value[stage], w.s.keys - key);
        ptx::fence_async_shared();
        __syncwarp();
        if (elected) ptx::mbarrier_arrive(&shared.value_full[stage]);
      }
    }
    number = p.turns.draw(elected);
  }
  if (elected) ptx::mbarrier_arrive(&shared.query_full[query.stage()]);
}

// ---- the warpgroups that multiply -----------------------------------------------------------------------------------

// Scores of a warp's rows to what their values weigh.
template <class S, class T, bool simple>
__device__ __forceinline__ void weigh(Sums<1, S::keys>& x, float (&rescaling)[1][2], Softmax<1>& softmax,
                                      const Forward<T>& p, const RowsWork& w, const Span& reach, int row, int key) {
  if (!simple && !p.plain) make_logits<T, false>(x, p.options, w.s, ptx::made_here(w.head), row, key);
  if (!reach.all(key, key + S::keys)) hide_unseen<false>(x, w.s.band(p.options), row, key);
  if (p.seen.keys) hide_padding(x, p.seen, w.s, key);
  softmax.add(x, p.options.factor, rescaling, simple || p.plain);
  if (!simple && p.options.dropout.seed) {
    const auto stream = static_cast<uint32_t>(w.s.index * p.sizes.heads + w.head);
    drop(x, draw<false, 1, S::keys / 8, 1>(p.options.dropout, stream, row, key), 1.0f);
  }
}

template <class S, class T, int D, int DV, bool simple>
__device__ __forceinline__ void attend(Shared<S>& shared, const Forward<T>& p, const RowsWork& w, const uint16_t* query,
                                       int row, const Order<S>& order, Turn<S::stages>& turn, Softmax<1>& softmax,
                                       Sums<1, DV>& output) {
  const Span reach = keys_of_rows(w.s.band(p.options), row, 16);
  Sums<1, S::keys> x;
  uint32_t probabilities[1][S::keys / 16][4];
  float rescaling[1][2];

  ptx::mbarrier_wait(&shared.key_full[turn.stage()], turn.parity());
  order.take();
  ptx::wgmma_fence(flat(x));
  begin_product_of_rows<T, D>(x, query, shared.key[turn.stage()]);
  order.pass();
  ptx::wgmma_wait<0>(flat(x));
  give_back(&shared.key_free[turn.stage()]);
  weigh<S, T, simple>(x, rescaling, softmax, p, w, reach, row, w.begin);
  round_to_operands<T>(x, probabilities);

#pragma unroll 1
  for (int key = w.begin + S::keys; key < w.end; key += S::keys) {
    const Turn<S::stages> values = turn;
    ++turn.number;
    ptx::mbarrier_wait(&shared.key_full[turn.stage()], turn.parity());
    order.take();
    ptx::settle_registers(flat(output));
    ptx::wgmma_fence(flat(x));
    begin_product_of_rows<T, D>(x, query, shared.key[turn.stage()]);
    ptx::mbarrier_wait(&shared.value_full[values.stage()], values.parity());
    ptx::wgmma_fence();  // of the scores' fence the assembler knows no more behind the wait
    begin_adding_product<T, DV>(output, probabilities, shared.value[values.stage()]);
    order.pass();
    ptx::wgmma_wait<1>(flat(x));
    give_back(&shared.key_free[turn.stage()]);
    weigh<S, T, simple>(x, rescaling, softmax, p, w, reach, row, key);
    ptx::wgmma_wait<0>(flat(output));
    give_back(&shared.value_free[values.stage()]);
    round_to_operands<T>(x, probabilities);
    rescale(output, rescaling);
  }

  ptx::mbarrier_wait(&shared.value_full[turn.stage()], turn.parity());
  ptx::wgmma_fence(flat(output));
  begin_adding_product<T, DV>(output, probabilities, shared.value[turn.stage()]);
  ptx::wgmma_wait<0>(flat(output));
  give_back(&shared.value_free[turn.stage()]);
  ++turn.number;
}

template <class S, class T, int D, int DV, bool simple>
__device__ __forceinline__ void multiply_all(Shared<S>& shared, const Forward<T>& p) {
  const int group = warp_of() / 4 - 1;
  const Order<S> order{group};
  Turn<S::stages> turn;
  Turn<S::queries> query;
  order.begin();
#pragma unroll 1
  for (;; ++query.number) {
    const int stage = query.stage();
    ptx::mbarrier_wait(&shared.query_full[stage], query.parity());
    if (shared.taken[stage].tile < 0) break;
    const RowsWork w = work_of<S>(p, shared.taken[stage]);
    const auto tile_of = [&](int of) { return shared.query[stage] + of * (S::query_bytes / 2 / S::groups); };
    Softmax<1> softmax;
    Sums<1, DV> output;
    clear(output);
    if (w.some()) {
      const int row = w.first + group * kGroupRows + ptx::made_here(warp_of() % 4 * 16);  // this warp's first one
      attend<S, T, D, DV, simple>(shared, p, w, tile_of(group), row, order, turn, softmax, output);
    }
    const int warp = ptx::made_here(warp_of()), of = warp / 4 - 1, own = warp % 4 * 16;
    ptx::barrier_sync(1 + of, 128);                             // all its warps are done with the queries
    const RowsWork again = work_of<S>(p, shared.taken[stage]);  // sooner than in registers all the while
    const int row = again.first + of * kGroupRows + own, count = least(16, again.s.rows - row);
    if (count > 0) {
      store_results(p.results, p.sizes, again.s, again.head, row, count, softmax, sink_of(p.options, again.head),
                    p.options.dropout.keep_scale, output, Tile<T, kGroupRows, DV>::at(tile_of(of), 0), own,
                    simple || p.plain);
    }
    ptx::fence_async_shared();
    give_back_by_warps(&shared.query_free[stage]);
  }
  order.end();
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class T, int D, int DV, bool simple>
__global__ void __launch_bounds__(Shape<D, DV, simple>::threads, 1)
    attention_forward_sm90a(const __grid_constant__ ptx::TensorMap query, const __grid_constant__ ptx::TensorMap key,
                            const __grid_constant__ ptx::TensorMap value, const __grid_constant__ Forward<T> p) {
  using S = Shape<D, DV, simple>;
  auto& shared = *static_cast<Shared<S>*>(ptx::dynamic_shared_1024());
  if (threadIdx.x == 0) {
    for (int q = 0; q < S::queries; ++q) {
      ptx::mbarrier_init(&shared.query_full[q], 1);
      ptx::mbarrier_init(&shared.query_free[q], 4 * S::groups);
    }
    for (int s = 0; s < S::stages; ++s) {
      for (auto* full : {shared.key_full, shared.value_full}) ptx::mbarrier_init(full + s, 1);
      for (auto* free : {shared.key_free, shared.value_free}) ptx::mbarrier_init(free + s, S::groups);
    }
    ptx::mbarrier_init(&shared.landed, 1);
    ptx::mbarrier_init_fence();
  }
  if (p.sizes.cu_seqlens_q) {
    const Sequence rest = sequence_of(p.sizes, p.sizes.sequences);
    for (int head = 0; head < p.sizes.heads; ++head)
      leave_empty<S::threads>(p.results, p.sizes, rest, head, S::rows, static_cast<int>(blockIdx.x),
                              static_cast<int>(gridDim.x));
  }
  __syncthreads();
  if (warp_of() >= 4) {
    ptx::increase_registers<kManyRegisters>();
    multiply_all<S, T, D, DV, simple>(shared, p);
    return;
  }
  ptx::decrease_registers<kFewRegisters>();
  if (warp_of() == 0) {
    const Maps maps{&query, &key, &value};
    if (lane_of() == 0) {
      for (const auto* map : {maps.query, maps.key, maps.value}) ptx::prefetch_tensor_map(map);
    }
    fetch_all<S>(shared, maps, p);
  }
}

template <class T, int D, int DV, bool simple>
void launch_forward(const AttentionForwardSm90a& p, Stream stream) {
  using S = Shape<D, DV, simple>;
  static_assert(sizeof(Shared<S>) <= 227 << 10);
  const TilesOf tiles{false, S::rows, S::keys, (p.key.size(3) + p.value.size(3)) * 2};
  const Forward<T> given{
      results_of<T>(p),    options_of(p, Padding::apart), is_plain(p, Padding::apart),
      seen_of(p, p.spans), sizes_of_rows(p, S::rows),     turns_of(p, tiles, p.turns.as<int>(), stream)};
  const LaunchSite at{"attention_forward_sm90a", persistent_blocks(p, tiles), S::threads, cuda_stream(stream), p.query,
                      sizeof(Shared<S>)};
  launch(at, attention_forward_sm90a<T, D, DV, simple>, map_of_tokens("query", p.query, kGroupRows),
         map_of_tokens("key", p.key, S::keys), map_of_tokens("value", p.value, S::keys), given);
}

}  // namespace
}  // namespace attention

void validate(const AttentionForwardSm90a& p) {
  ops::validate(p, attention::kTypes);
  const Checker at{"attention"};
  at.defined(p.turns, "turns");
  at.dtype(p.turns, "turns", {DType::i32});
  at.shape(p.turns, "turns", {1, attention::turns_room(p)});
  at.contiguous(p.turns, "turns");
  attention::check_spans(at, p, p.spans);
}

void run(const AttentionForwardSm90a& p, Stream stream) {
  using namespace attention;
  if (p.query.numel() == 0) return;
  check_is_hopper("attention_forward_sm90a");
  run_seen(p, p.spans, stream);
  const bool simple = is_plain(p, Padding::apart) && p.dropout_p == 0;
  visit_pairs_of_dims<64, 96, 128, 192, 256>(
      p, [&]<class T, int D, int DV>(T, std::integral_constant<int, D>, std::integral_constant<int, DV>) {
        simple ? launch_forward<T, D, DV, true>(p, stream) : launch_forward<T, D, DV, false>(p, stream);
      });
}

}  // namespace llmengine::cuda
