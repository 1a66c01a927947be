// Attention, backward, of keys and values, on Hopper, of head dims above 128: attention_sm90a_keys.cu's sums where
// registers hold dK and dV of 64 keys and no more. A walk of attention_sm90a_backward.cuh whose warpgroups own the same
// keys, and one kind of sum each; scores are made once.
//
//     warpgroup 1    S^T_0 = K Q_0^T;  P^T_0    S^T_1 and  dV += P^T_0 dO_0  are begun;  P^T_1 while they are made; ...
//                                        |  handed over                                    |
//     warpgroup 2   dP^T_0 = V dO_0^T;  G^T_0  dP^T_1 and  dK += G^T_0 Q_0   are begun;  G^T_1 while they are made; ...
//
//   handed_full[s]   P^T of a stage's rows is in shared memory: in float32, times the soft cap's slope, and below 0
//                    where it is dropped, so that warpgroup 2 knows nothing of logits. A thread hands over to the one
//                    in its place, whose accumulators lie alike: 16 bytes at a time, no two in a bank. That the last
//                    one's was taken follows from free[s][0], by way of the fetching warp.
//
//   Registers: of the wider sum head_dim / 2 a thread, scores in float32 and in 16 bits, rows (1/2 + 1/4): 176 at head
//   dim 256, where both sums would be 256 alone.
//   Shared memory, of 227 KB, at head dim 192 and at 256: K and V twice and once, 96 and 64 KB; two stages of 64 rows,
//   96 and 128; P^T of each, 32.
//
//   flops   8 rows keys head_dim a tile; either warpgroup half of them, also where values are narrower
//   bytes   keys, values and their gradients once; Q, dO and the statistics once a block, from the second-level cache:
//           64 keys do 128 flops a byte, as the forward's 128 rows
//   limit   the tensor cores: 64 rows at head dim 256 multiply for 2048 clocks, and shared memory is read and written
//           for 1800 (a product of 64 keys and 64 rows reads as long as it multiplies, one that adds to a sum half as
//           long, and P^T passes through it)
#include <cmath>
#include <cstdint>

#include "cuda/attention_sm90a_backward.cuh"

namespace llmengine::cuda::attention {
namespace {

template <int D, int DV, bool simple>
using Shape = Walk<Owner::keys, D, 64, DV, simple>;

template <class S>
struct WideShared : Shared<S> {
  float4 handed[S::stages][S::passing / 8 * 128];
  ptx::Mbarrier handed_full[S::stages];
};

// Whose sums a warpgroup makes, by which of a pair its scores are products of; the other one is added.
enum Kind : int { values, keys };

// ---- of warpgroup 1 -------------------------------------------------------------------------------------------------

// P^T of a warp's 16 keys, handed over, and as it weighs dO.
template <bool simple, class S, class T>
__device__ __forceinline__ void to_probabilities(Sums<1, S::passing>& x, WideShared<S>& shared, int stage,
                                                 const Walked<T>& p, const Work& w, const Span& reach, int head,
                                                 int key, int row) {
  const Options& o = p.backward.options;
  float4* handed = shared.handed[stage] + threadIdx.x % 128;
  const bool capped = !simple && o.softcap > 0.0f, drops = !simple && o.dropout.seed != nullptr;
  if (capped) keep_slopes<128>(x, handed, o);
  if (!simple && !p.plain) {
    Sequence s = w.s;
    s.batch = ptx::made_here(static_cast<int>(s.batch));  // where its mask begins stays in no register between tiles
    make_logits<T, true>(x, o, s, ptx::made_here(head), key, row);
  }
  if (!reach.all(row, row + S::passing)) hide_unseen<true>(x, w.s.band(o), key, row);
  to_probabilities_of_columns<simple>(x, o.factor, shared.shift[stage], shared.base[stage]);

  Dropped<1, S::passing / 8> dropped{};
  if (drops) {
    const auto stream = static_cast<uint32_t>(w.s.index * p.backward.sizes.heads + head);
    dropped = draw<true, 1, S::passing / 8, 1>(o.dropout, stream, key, row);
  }
#pragma unroll
  for (int j = 0; j < S::passing / 8; ++j) {
    float4 slope = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    if (capped) slope = handed[j * 128];
    const auto signed_by = [&](int i, float by) {
      return drops && dropped.at(0, j, i) ? -x[0][j][i] * by : x[0][j][i] * by;
    };
    handed[j * 128] =
        make_float4(signed_by(0, slope.x), signed_by(1, slope.y), signed_by(2, slope.z), signed_by(3, slope.w));
  }
  give_back_by_warps(&shared.handed_full[stage]);
  if (drops) drop(x, dropped, 1.0f);
}

// ---- of warpgroup 2 -------------------------------------------------------------------------------------------------

// V dO^T of them to G^T.
template <bool simple, class S>
__device__ __forceinline__ void to_gradient(Sums<1, S::passing>& grad, WideShared<S>& shared,
                                            const Turn<S::stages>& turn, const Dropout& dropout) {
  const int stage = turn.stage();
  const bool drops = !simple && dropout.seed != nullptr;
  ptx::mbarrier_wait(&shared.handed_full[stage], turn.parity());  // P^T was made when the statistics had come
  const float* delta = shared.delta[stage] + lane_of() % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::passing / 8; ++j) {
    const float4 handed = shared.handed[stage][j * 128 + threadIdx.x % 128];
    const float p[4] = {handed.x, handed.y, handed.z, handed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& g = grad[0][j][i];
      if (drops) g = std::signbit(p[i]) ? 0.0f : g * dropout.keep_scale;
      g = (g - delta[8 * j + i % 2]) * (drops ? fabsf(p[i]) : p[i]);
    }
  }
}

// ---- of both --------------------------------------------------------------------------------------------------------

// A sum of a warpgroup's keys over the group's heads. score(scores, turn, head, row) makes of products what weighs the
// other tile. The products of a tile are begun together with the sum of the tile before it.
template <Kind kind, class T, int product_dim, int D, class S, class Score>
__device__ __forceinline__ void add_up(WideShared<S>& shared, const Work& w, int place, Turn<S::stages>& turn,
                                       Sums<1, D>& sum, const Score& score) {
  constexpr int other = 1 - kind;
  Sums<1, S::passing> x;
  uint32_t rounded[1][S::passing / 16][4];
  int head = w.from, row = w.begin;

  ptx::mbarrier_wait(&shared.full[turn.stage()][kind], turn.parity());
  ptx::wgmma_fence(flat(x));
  begin_product_of_rows<T, product_dim>(x, shared.lines(ptx::made_here(place), kind, 0),
                                        shared.passing[turn.stage()][kind]);
  ptx::wgmma_wait<0>(flat(x));
  give_back_by_warps(&shared.free[turn.stage()][kind]);
  score(x, turn, head, row);
  round_to_operands<T>(x, rounded);

#pragma unroll 1
  for (;;) {
    row += S::passing;
    if (row >= w.end) ++head, row = w.begin;
    if (head >= w.to) break;
    const Turn<S::stages> before = turn;
    ++turn.number;
    ptx::mbarrier_wait(&shared.full[turn.stage()][kind], turn.parity());
    ptx::mbarrier_wait(&shared.full[before.stage()][other], before.parity());
    ptx::settle_registers(flat(sum));
    ptx::wgmma_fence(flat(x));
    begin_product_of_rows<T, product_dim>(x, shared.lines(ptx::made_here(place), kind, 0),
                                          shared.passing[turn.stage()][kind]);
    begin_adding_product<T, D>(sum, rounded, shared.passing[before.stage()][other]);
    ptx::wgmma_wait<1>(flat(x));
    give_back_by_warps(&shared.free[turn.stage()][kind]);
    score(x, turn, head, row);
    ptx::wgmma_wait<0>(flat(sum));
    give_back_by_warps(&shared.free[before.stage()][other]);
    round_to_operands<T>(x, rounded);
  }

  ptx::mbarrier_wait(&shared.full[turn.stage()][other], turn.parity());
  ptx::wgmma_fence(flat(sum));
  begin_adding_product<T, D>(sum, rounded, shared.passing[turn.stage()][other]);
  ptx::wgmma_wait<0>(flat(sum));
  give_back_by_warps(&shared.free[turn.stage()][other]);
  ++turn.number;
}

template <Kind kind, class T, int D, int DV, bool simple, class S>
__device__ __forceinline__ void multiply(WideShared<S>& shared, const Walked<T>& p, const Work& w, int place, int own,
                                         Turn<S::stages>& turn) {
  constexpr int product_dim = kind == values ? D : DV, dim = kind == values ? DV : D;
  const Options& o = p.backward.options;
  const int key = w.first + own;
  Sums<1, dim> sum;
  clear(sum);
  if (w.some()) {
    const Span reach = rows_of_keys(w.s.band(o), key, 16);
    add_up<kind, T, product_dim, dim>(shared, w, place, turn, sum,
                                      [&](Sums<1, S::passing>& x, const Turn<S::stages>& at, int head, int row) {
                                        if constexpr (kind == values) {
                                          to_probabilities<simple>(x, shared, at.stage(), p, w, reach, head, key, row);
                                        } else {
                                          to_gradient<simple>(x, shared, at, o.dropout);
                                        }
                                      });
  }
  ptx::barrier_sync(1 + kind, 128);                       // all its warps are done with what it owns
  const Work again = work_of<S>(p, shared.taken[place]);  // sooner than in registers all the while
  const int count = least(16, again.s.keys - key);
  if (count <= 0) return;
  if (p.seen.keys) clear_hidden(sum, p.seen, again.s, key);  // a key's P is its own sums' alone
  const Operand<T>& to = kind == values ? p.backward.grad_value : p.backward.grad_key;
  store_rows(
      sum, [&](int, int) { return kind == values ? o.dropout.keep_scale : o.scale; },
      Tile<T, kGroupRows, dim>::at(shared.lines(place, kind, 0), 0), key - again.first,
      to.lines(again.s.batch, again.head, again.s.key0 + key), count);
}

template <class T, int D, int DV, bool simple>
__global__ void __launch_bounds__(Shape<D, DV, simple>::threads, 1)
    attention_wide_keys_sm90a(const __grid_constant__ ptx::TensorMap key, const __grid_constant__ ptx::TensorMap value,
                              const __grid_constant__ ptx::TensorMap query,
                              const __grid_constant__ ptx::TensorMap grad_output, const __grid_constant__ Walked<T> p) {
  using S = Shape<D, DV, simple>;
  auto& shared = *static_cast<WideShared<S>*>(ptx::dynamic_shared_1024());
  if (threadIdx.x == 0) {  // told to others as those of walk() are
    for (ptx::Mbarrier& full : shared.handed_full) ptx::mbarrier_init(&full, 4);
  }
  clear_rest_of_keys<S>(p);
  walk(static_cast<Shared<S>&>(shared), {{&key, &value}, {&query, &grad_output}}, p,
       [&](const Work& w, int place, int, int own, Turn<S::stages>& turn) {
         ptx::made_here(warp_of()) < 8 ? multiply<values, T, D, DV, simple>(shared, p, w, place, own, turn)
                                       : multiply<keys, T, D, DV, simple>(shared, p, w, place, own, turn);
       });
}

}  // namespace

void run_wide_keys(const AttentionBackwardSm90a& p, Stream stream) {
  visit_hopper<192, 256>(
      p, [&]<class T, int D, int DV, bool simple>(T, std::integral_constant<int, D>, std::integral_constant<int, DV>,
                                                  std::bool_constant<simple>) {
        using S = Shape<D, DV, simple>;
        const auto walked = walked_of<S, T>(p, stream);
        launch_walk<S, WideShared<S>>("attention_wide_keys_sm90a", attention_wide_keys_sm90a<T, D, DV, simple>, p,
                                      stream, walked);
      });
}

}  // namespace llmengine::cuda::attention
