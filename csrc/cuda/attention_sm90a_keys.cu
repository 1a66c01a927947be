// Attention, backward, of keys and values, on Hopper: attention_keys_sm80 (attention_sm80_keys.cu) as a walk of
// attention_sm90a_backward.cuh. K and V of 128 keys stay; Q and dO of all rows of all heads of the group pass, with the
// statistics of the rows, which here are columns.
//
//     S^T = K Q^T, dP^T = V dO^T are begun;  P^T;  dV += P^T dO is begun;  G^T = P^T (dP^T - delta);  dK += G^T Q
//
//   Scores are made transposed: P^T and G^T then are first operands as they lie in accumulators. Registers: S^T, dP^T,
//   dK and dV in float32, P^T and G^T in 16 bits, rows (1 + 1/4) + head_dim a thread.
//
//   flops   8 rows keys head_dim a tile
//   bytes   keys, values and their gradients once; Q, dO and the statistics once a block, from the second-level cache:
//           128 keys do 256 flops a byte
//   limit   shared memory in half of the products, the tensor cores in the others: at head dim 128, one of 64 keys and
//           48 rows reads for 28 clocks and multiplies for 24; one that adds to dK or dV, for 32 and for 64
#include <cstdint>

#include "cuda/attention_sm90a_keys.cuh"

namespace llmengine::cuda::attention {
namespace {

template <int D, bool simple>
inline constexpr int kPassing = D <= 64   ? (simple ? 96 : 48)
                                : D <= 96 ? (simple ? 64 : 32)
                                          : (simple ? 48 : 32);
template <int D, bool simple>
using Shape = Walk<Owner::keys, D, kPassing<D, simple>, D, simple>;

// dK, but for scale, and dV, but for what is kept, of a warpgroup's keys, each a sum over the group's heads.
template <class S, class T, int D, bool simple>
__device__ __forceinline__ void add_up(Shared<S>& shared, const Walked<T>& p, const Work& w, int place, int group,
                                       int key, Turn<S::stages>& turn, Sums<1, D>& grad_key, Sums<1, D>& grad_value) {
  const Span reach = rows_of_keys(w.s.band(p.backward.options), key, 16);
  int head = w.from, row = w.begin;
#pragma unroll 1
  while (head < w.to) {
    const int stage = turn.stage();
    Sums<1, S::passing> x, grad;
    uint32_t rounded[1][S::passing / 16][4], rounded_grad[1][S::passing / 16][4];
    ptx::mbarrier_wait(&shared.full[stage][0], turn.parity());
    ptx::mbarrier_wait(&shared.full[stage][1], turn.parity());
    ptx::settle_registers(flat(grad));
    ptx::wgmma_fence(flat(x));
    const int here = ptx::made_here(place);
    begin_product_of_rows<T, D>(x, shared.lines(here, 0, group), shared.passing[stage][0]);
    begin_product_of_rows<T, D>(grad, shared.lines(here, 1, group), shared.passing[stage][1]);
    to_gradients<T, D, simple, S>(
        x, grad, rounded, rounded_grad, grad_value, p, w, reach,
        {head, key, row, shared.shift[stage], shared.base[stage], shared.delta[stage], shared.passing[stage][1]}, [] {},
        [] {});
    ptx::wgmma_fence(flat(grad_key));
    begin_adding_product<T, D>(grad_key, rounded_grad, shared.passing[stage][0]);
    ptx::wgmma_wait<1>(flat(grad_value));
    give_back_by_warps(&shared.free[stage][1]);
    ptx::wgmma_wait<0>(flat(grad_key));
    give_back_by_warps(&shared.free[stage][0]);
    ++turn.number;
    row += S::passing;
    if (row >= w.end) ++head, row = w.begin;
  }
}

template <class S, class T, int D, bool simple>
__device__ __forceinline__ void multiply(Shared<S>& shared, const Walked<T>& p, const Work& w, int place, int group,
                                         int own, Turn<S::stages>& turn) {
  const int first = w.first + group * kGroupRows + own;
  Sums<1, D> grad_key, grad_value;
  clear(grad_key);
  clear(grad_value);
  if (w.some()) {
    add_up<S, T, D, simple>(shared, p, w, place, group, first, turn, grad_key, grad_value);
  }
  ptx::barrier_sync(1 + group, 128);                      // all its warps are done with the keys and values
  const Work again = work_of<S>(p, shared.taken[place]);  // sooner than in registers all the while
  const int line = ptx::made_here(warp_of() % 4 * 16), key = again.first + group * kGroupRows + line;
  const int count = least(16, again.s.keys - key);
  if (count <= 0) return;
  if (p.seen.keys) {  // a key's P is its own sums' alone
    clear_hidden(grad_key, p.seen, again.s, key);
    clear_hidden(grad_value, p.seen, again.s, key);
  }
  const Options& o = p.backward.options;
  const auto store = [&](const Sums<1, D>& sums, float by, int tile, const Operand<T>& to) {
    store_rows(
        sums, [&](int, int) { return by; }, Tile<T, kGroupRows, D>::at(shared.lines(place, tile, group), 0), line,
        to.lines(again.s.batch, again.head, again.s.key0 + key), count);
  };
  store(grad_key, o.scale, 0, p.backward.grad_key);
  store(grad_value, o.dropout.keep_scale, 1, p.backward.grad_value);
}

template <class T, int D, bool simple>
__global__ void __launch_bounds__(Shape<D, simple>::threads, 1)
    attention_keys_sm90a(const __grid_constant__ ptx::TensorMap key, const __grid_constant__ ptx::TensorMap value,
                         const __grid_constant__ ptx::TensorMap query,
                         const __grid_constant__ ptx::TensorMap grad_output, const __grid_constant__ Walked<T> p) {
  using S = Shape<D, simple>;
  auto& shared = *static_cast<Shared<S>*>(ptx::dynamic_shared_1024());
  clear_rest_of_keys<S>(p);
  walk(shared, {{&key, &value}, {&query, &grad_output}}, p,
       [&](const Work& w, int place, int group, int own, Turn<S::stages>& turn) {
         multiply<S, T, D, simple>(shared, p, w, place, group, own, turn);
       });
}

}  // namespace

void run_keys(const AttentionBackwardSm90a& p, Stream stream) {
  visit_hopper<64, 96, 128>(
      p, [&]<class T, int D, bool simple>(T, std::integral_constant<int, D>, auto, std::bool_constant<simple>) {
        using S = Shape<D, simple>;
        const auto walked = walked_of<S, T>(p, stream);
        launch_walk<S, Shared<S>>("attention_keys_sm90a", attention_keys_sm90a<T, D, simple>, p, stream, walked);
      });
}

}  // namespace llmengine::cuda::attention
