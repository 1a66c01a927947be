// Attention, backward, of queries, on Hopper: attention_rows_sm80 (attention_sm80_rows.cu) as a walk of
// attention_sm90a_backward.cuh. Q and dO of 128 rows stay, keys and values pass.
//
//     S_0 = Q K_0^T, dP_0 = dO V_0^T;  P_0, G_0 = P_0 (dP_0 - delta)
//     S_1 = Q K_1^T, dQ += G_0 K_0, dP_1 = dO V_1^T are begun;  P_1 while the last two are made;  G_1;  ...
//
//   While a warpgroup makes G, the other's products fill the tensor cores. Registers: S, dP, dQ in float32 and G in 16
//   bits, keys (1 + 1/4) + head_dim / 2 a thread: 188 with 48 keys at head dim 256. A soft cap's slopes wait in shared
//   memory, of which 128 rows take 128 KB there, and two stages of 48 keys 96 of the 227.
//
//   flops   6 rows keys head_dim a tile
//   bytes   Q, dO and dQ once; keys and values once a block, from the second-level cache: 128 rows do 192 flops a byte
//   limit   the tensor cores, where shared memory feeds them: 80 keys a product of 64 rows read 36 of its 40 clocks; at
//           head dim 256, a tile of 48 keys is read for 1090 clocks and multiplied for 1150
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cuda/attention_sm90a_backward.cuh"

namespace llmengine::cuda {
namespace attention {
namespace {

template <int D, bool simple>
inline constexpr int kPassing = D <= 64    ? (simple ? 96 : 64)
                                : D <= 96  ? (simple ? 96 : 48)
                                : D <= 128 ? (simple ? 80 : 48)
                                : D <= 192 ? (simple ? 64 : 48)
                                           : (simple ? 48 : 32);
template <int D, int DV, bool simple>
using Shape = Walk<Owner::rows, D, kPassing<D, simple>, DV, simple>;

// Where what a thread's logits meet waits for them, registers being few: slopes of the soft cap and, of head dims
// above 192, shift and base.
template <class S, bool simple>
struct RowsShared : Shared<S> {
  float4 slopes[simple ? 1 : S::passing / 8 * S::groups * 128];
  static constexpr bool waits = !simple && S::panels == 4;
  float statistics[4][waits ? S::groups * 128 : 1];

  __device__ __forceinline__ float4* own_slopes() { return slopes + threadIdx.x - 128; }
  __device__ __forceinline__ float& own_shift(int half) { return statistics[half][threadIdx.x - 128]; }
  __device__ __forceinline__ float& own_base(int half) { return statistics[2 + half][threadIdx.x - 128]; }
};

// P of a warp's 16 rows.
template <bool simple, class S, class T>
__device__ __forceinline__ void to_probabilities(Sums<1, S::passing>& x, RowsShared<S, simple>& shared,
                                                 const Walked<T>& p, const Work& w, const Span& reach, int row, int key,
                                                 RowStatistics<1, simple> statistics) {
  const Options& o = p.backward.options;
  if (!simple && o.softcap > 0.0f) keep_slopes<S::groups * 128>(x, shared.own_slopes(), o);
  if (!simple && !p.plain) make_logits<T, false>(x, o, w.s, ptx::made_here(w.head), row, key);
  if (!reach.all(key, key + S::passing)) hide_unseen<false>(x, w.s.band(o), row, key);
  if (p.seen.keys) hide_padding(x, p.seen, w.s, key);
  for (int half = 0; half < 2 && shared.waits; ++half) {
    statistics.shift[0][half] = shared.own_shift(half), statistics.base[0][half] = shared.own_base(half);
  }
  statistics.to_probabilities(x, o.factor);
}

// dO V^T of them to G.
template <bool simple, class S, class T>
__device__ __forceinline__ void to_gradient(Sums<1, S::passing>& grad, Sums<1, S::passing>& x,
                                            RowsShared<S, simple>& shared, const Walked<T>& p, const Work& w, int row,
                                            int key, const RowStatistics<1, simple>& statistics) {
  const Options& o = p.backward.options;
  if (!simple && o.dropout.seed) {
    const auto stream = static_cast<uint32_t>(w.s.index * p.backward.sizes.heads + w.head);
    drop(grad, draw<false, 1, S::passing / 8, 1>(o.dropout, stream, row, key), o.dropout.keep_scale);
  }
  if (!simple && o.softcap > 0.0f) take_slopes<S::groups * 128>(x, shared.own_slopes());
#pragma unroll
  for (int j = 0; j < S::passing / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) grad[0][j][i] = (grad[0][j][i] - statistics.delta[0][i / 2]) * x[0][j][i];
}

// dQ of a warpgroup's rows, but for scale. The products of a tile are begun together with dQ of the tile before it.
template <class S, class T, int D, int DV, bool simple>
__device__ __forceinline__ void add_up(RowsShared<S, simple>& shared, const Walked<T>& p, const Work& w,
                                       const uint16_t* query, const uint16_t* grad_output, int row,
                                       Turn<S::stages>& turn, Sums<1, D>& grad_query) {
  const Backward<T>& b = p.backward;
  const Span reach = keys_of_rows(w.s.band(b.options), row, 16);
  const int64_t lines = (w.s.batch * b.sizes.heads + w.head) * b.sizes.rows + w.s.row0 + row;
  const RowStatistics<1, simple> statistics(b, lines, least(16, w.s.rows - row));
  for (int half = 0; half < 2 && shared.waits; ++half) {
    shared.own_shift(half) = statistics.shift[0][half], shared.own_base(half) = statistics.base[0][half];
  }
  Sums<1, S::passing> x, grad;
  uint32_t rounded[1][S::passing / 16][4];

  ptx::mbarrier_wait(&shared.full[turn.stage()][0], turn.parity());
  ptx::mbarrier_wait(&shared.full[turn.stage()][1], turn.parity());
  ptx::settle_registers(flat(grad));
  ptx::wgmma_fence(flat(x));
  begin_product_of_rows<T, D>(x, query, shared.passing[turn.stage()][0]);
  begin_product_of_rows<T, DV>(grad, grad_output, shared.passing[turn.stage()][1]);
  ptx::wgmma_wait<1>(flat(x));
  to_probabilities<simple>(x, shared, p, w, reach, row, w.begin, statistics);
  ptx::wgmma_wait<0>(flat(grad));
  give_back_by_warps(&shared.free[turn.stage()][1]);
  to_gradient<simple>(grad, x, shared, p, w, row, w.begin, statistics);
  round_to_operands<T>(grad, rounded);

#pragma unroll 1
  for (int key = w.begin + S::passing; key < w.end; key += S::passing) {
    const Turn<S::stages> before = turn;
    ++turn.number;
    ptx::mbarrier_wait(&shared.full[turn.stage()][0], turn.parity());
    ptx::mbarrier_wait(&shared.full[turn.stage()][1], turn.parity());
    ptx::settle_registers(flat(grad));
    ptx::settle_registers(flat(grad_query));
    ptx::wgmma_fence(flat(x));
    begin_product_of_rows<T, D>(x, query, shared.passing[turn.stage()][0]);
    begin_adding_product<T, D>(grad_query, rounded, shared.passing[before.stage()][0]);
    begin_product_of_rows<T, DV>(grad, grad_output, shared.passing[turn.stage()][1]);
    ptx::wgmma_wait<2>(flat(x));
    to_probabilities<simple>(x, shared, p, w, reach, row, key, statistics);
    ptx::wgmma_wait<1>(flat(grad_query));
    give_back_by_warps(&shared.free[before.stage()][0]);
    ptx::wgmma_wait<0>(flat(grad));
    give_back_by_warps(&shared.free[turn.stage()][1]);
    to_gradient<simple>(grad, x, shared, p, w, row, key, statistics);
    round_to_operands<T>(grad, rounded);
  }

  ptx::wgmma_fence(flat(grad_query));
  begin_adding_product<T, D>(grad_query, rounded, shared.passing[turn.stage()][0]);
  ptx::wgmma_wait<0>(flat(grad_query));
  give_back_by_warps(&shared.free[turn.stage()][0]);
  ++turn.number;
}

template <class S, class T, int D, int DV, bool simple>
__device__ __forceinline__ void multiply(RowsShared<S, simple>& shared, const Walked<T>& p, const Work& w, int place,
                                         int group, int own, Turn<S::stages>& turn) {
  Sums<1, D> grad_query;
  clear(grad_query);
  if (w.some()) {
    add_up<S, T, D, DV, simple>(shared, p, w, shared.lines(place, 0, group), shared.lines(place, 1, group),
                                w.first + group * kGroupRows + own, turn, grad_query);
  }
  const int warp = ptx::made_here(warp_of()), of = warp / 4 - 1, line = warp % 4 * 16;
  ptx::barrier_sync(1 + of, 128);                         // all its warps are done with the queries
  const Work again = work_of<S>(p, shared.taken[place]);  // sooner than in registers all the while
  const int row = again.first + of * kGroupRows + line, count = least(16, again.s.rows - row);
  if (count <= 0) return;
  const auto by = [&](int, int) { return p.backward.options.scale; };
  store_rows(grad_query, by, Tile<T, kGroupRows, D>::at(shared.lines(place, 0, of), 0), line,
             p.backward.grad_query.lines(again.s.batch, again.head, again.s.row0 + row), count);
}

template <class T, int D, int DV, bool simple>
__global__ void __launch_bounds__(Shape<D, DV, simple>::threads, 1)
    attention_rows_sm90a(const __grid_constant__ ptx::TensorMap query,
                         const __grid_constant__ ptx::TensorMap grad_output, const __grid_constant__ ptx::TensorMap key,
                         const __grid_constant__ ptx::TensorMap value, const __grid_constant__ Walked<T> p) {
  using S = Shape<D, DV, simple>;
  auto& shared = *static_cast<RowsShared<S, simple>*>(ptx::dynamic_shared_1024());
  const Sizes& sizes = p.backward.sizes;
  if (sizes.cu_seqlens_q) {
    const Sequence rest = sequence_of(sizes, sizes.sequences);
    leave_empty<S::threads>(p.backward.grad_query, rest, sizes.heads, rest.row0, rest.rows, S::own);
  }
  if (p.remade && *p.remade == 0) return;
  walk(static_cast<Shared<S>&>(shared), {{&query, &grad_output}, {&key, &value}}, p,
       [&](const Work& w, int place, int group, int own, Turn<S::stages>& turn) {
         multiply<S, T, D, DV, simple>(shared, p, w, place, group, own, turn);
       });
}

}  // namespace

void run_rows(const AttentionBackwardSm90a& p, Stream stream, const int* remade) {
  visit_hopper<64, 96, 128, 192, 256>(
      p, [&]<class T, int D, int DV, bool simple>(T, std::integral_constant<int, D>, std::integral_constant<int, DV>,
                                                  std::bool_constant<simple>) {
        using S = Shape<D, DV, simple>;
        auto walked = walked_of<S, T>(p, stream);
        walked.remade = remade;
        launch_walk<S, RowsShared<S, simple>>("attention_rows_sm90a", attention_rows_sm90a<T, D, DV, simple>, p, stream,
                                              walked);
      });
}

}  // namespace attention

void validate(const AttentionBackwardSm90a& p) {
  validate(static_cast<const AttentionBackward&>(p));
  const Checker at{"attention backward"};
  at.defined(p.turns, "turns");
  at.dtype(p.turns, "turns", {DType::i32});
  at.shape(p.turns, "turns", {2, attention::turns_room(p)});
  at.contiguous(p.turns, "turns");
  attention::check_spans(at, p, p.spans);
}

void run(const AttentionBackwardSm90a& p, Stream stream) {
  using namespace attention;
  check_is_hopper("attention_backward_sm90a");
  run_statistics(p, stream, Padding::apart);
  run_seen(p, p.spans, stream);
  std::max(p.query.size(3), p.value.size(3)) <= 128 ? run_keys(p, stream) : run_wide_keys(p, stream);
  run_rows(p, stream);
  if (p.grad_mask.defined()) run_mask(p, stream);
  if (p.partial_distances.defined()) run_distances(p, stream);
}

}  // namespace llmengine::cuda
