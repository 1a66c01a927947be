// Attention, backward, of keys and values (formulas and flops: attention_sm80_backward.cuh).
//
//                  rows of all heads of the group ->     A block of four warps owns `keys` keys of one key head, a warp
//               +-------+-------+-------+---             blocks x 16 of them. Their tiles stay in shared memory, dK and
//     keys      |  S^T  |  S^T  |       |                dV in registers, in float32; so the sum over a group's heads
//      | K V    | dP^T  | dP^T  |       |                needs no atomics. Query and dO stream through two stages of
//      v        +-------+-------+-------+---             shared memory by cp.async, one ahead.
//                Q_0 dO_0  Q_1 dO_1
//
//   Scores are made transposed: P^T and G^T then are first operands of their products as they lie in accumulators.
//   Above head dims of 128 dK and dV do not both fit into registers: a pass for each, which makes S twice, 16 products'
//   flops in all.
//
//   bytes   keys, values and their gradients once; query, dO, base, delta and shift once a block, from the second-level
//   cache limit   shared memory: a warp reads 4 tiles of rows and twice its own keys, 1/13 to 1/16 byte a flop; its 128
//   bytes
//           a clock feed 1640 to 2048 flops, where an A100's tensor cores do 2048
#include <cmath>
#include <cstdint>

#include "cuda/attention_sm80_backward.cuh"
#ifndef __CUDACC_RTC__
#include "cuda/compiled.cuh"
#include "cuda/launch.cuh"
#endif

namespace llmengine::cuda::attention {
namespace {

inline constexpr int kValue = 1, kKey = 2, kBoth = 3;  // which gradients are wanted

template <int D, bool plain>
struct Shape {
  static constexpr int blocks = D <= 64 ? 2 : 1, keys = 16 * blocks * kWarps;
  static constexpr int rows = plain && D > 64 && D <= 128 ? 32 : 16;
  static constexpr bool at_once = D <= 144;  // both gradients' sums fit into registers
};

template <class T, int D, bool plain, int wanted>
struct Tiles {
  using S = Shape<D, plain>;
  Tile<T, S::keys, D> key, value;  // value: where dK is wanted
  char* stages;

  static constexpr int kLines = S::keys * D * 2, kTile = S::rows * D * 2;
  static constexpr int kStage = 2 * kTile + (plain ? 2 : 3) * S::rows * static_cast<int>(sizeof(float));
  static constexpr int kStages = kLines * (wanted != kValue ? 2 : 1), bytes = kStages + 2 * kStage;

  __device__ explicit Tiles(void* shared)
      : key(key.at(shared, 0)),
        value(value.at(shared, kStages - kLines)),
        stages(static_cast<char*>(shared) + kStages) {}
  __device__ Tile<T, S::rows, D> query(int stage) const { return Tile<T, S::rows, D>::at(stages, stage * kStage); }
  __device__ Tile<T, S::rows, D> grad(int stage) const { return query(stage).at(stages, stage * kStage + kTile); }
  __device__ float* base(int stage) const { return reinterpret_cast<float*>(stages + stage * kStage + 2 * kTile); }
  __device__ float* delta(int stage) const { return base(stage) + S::rows; }
  __device__ float* shift(int stage) const { return base(stage) + 2 * S::rows; }  // where logits are not plain
};

template <class T, int D, bool plain, int wanted>
__global__ void __launch_bounds__(kThreads) attention_keys_sm80(const Backward<T> p, const Schedule schedule) {
  using S = Shape<D, plain>;
  constexpr bool of_keys = wanted != kValue, of_values = wanted != kKey;
  const Place place = place_of(schedule, p.sizes, true, p.sizes.heads / p.sizes.group, S::keys);
  const Sequence s = sequence_of(p.sizes, place.sequence);
  const int first = place.tile * S::keys;
  if (first < 0 || first >= s.keys) return;   // an empty place
  if (place.sequence == p.sizes.sequences) {  // keys that belong to none
    const int count = least(S::keys, s.keys - first);
    if (of_keys) zero_rows<kThreads>(p.grad_key.lines(s.batch, place.head, s.key0 + first), count);
    if (of_values) zero_rows<kThreads>(p.grad_value.lines(s.batch, place.head, s.key0 + first), count);
    return;
  }

  const Tiles<T, D, plain, wanted> tiles(ptx::dynamic_shared());
  const int own = warp_of() * 16 * S::blocks, key = first + own;  // this warp's first key, in the tile and at all
  const Span block = rows_of_keys(s.band(p.options), first, S::keys);
  const Span reach = rows_of_keys(s.band(p.options), key, 16 * S::blocks);
  const int begin = block.begin / S::rows * S::rows;
  const int head_end = block.begin < block.end ? (place.head + 1) * p.sizes.group : 0;
  const auto begin_stage = [&](int stage, int head, int row) {
    const int left = s.rows - row;
    copy_rows<kThreads>(tiles.query(stage), p.query.lines(s.batch, head, s.row0 + row), left);
    copy_rows<kThreads>(tiles.grad(stage), p.grad_output.lines(s.batch, head, s.row0 + row), left);
    const int line = static_cast<int>(threadIdx.x);
    if (line < S::rows) {
      const int64_t at = (s.batch * p.sizes.heads + head) * p.sizes.rows + s.row0 + row + line;
      ptx::copy_async_4(tiles.base(stage) + line, p.base + at, line < left ? 4 : 0);
      if (of_keys) ptx::copy_async_4(tiles.delta(stage) + line, p.delta + at, line < left ? 4 : 0);
      if (!plain) ptx::copy_async_4(tiles.shift(stage) + line, p.shift + at, line < left ? 4 : 0);
    }
    ptx::commit_copies();
  };

  Sums<S::blocks, D> grad_key, grad_value;
  clear(grad_key);
  clear(grad_value);
  int head = place.head * p.sizes.group, row = begin, stage = 0;
  if (head < head_end) {
    copy_rows<kThreads>(tiles.key, p.key.lines(s.batch, place.head, s.key0 + first), s.keys - first);
    if (of_keys) copy_rows<kThreads>(tiles.value, p.value.lines(s.batch, place.head, s.key0 + first), s.keys - first);
    begin_stage(0, head, row);
  }
  for (int next_head, next_row; head < head_end; head = next_head, row = next_row, stage ^= 1) {
    const bool last = row + S::rows >= block.end;
    next_head = head + last;
    next_row = last ? begin : row + S::rows;
    ptx::wait_copies<0>();
    __syncthreads();  // this stage is there, and every warp is done with the other
    if (next_head < head_end) begin_stage(stage ^ 1, next_head, next_row);
    if (!reach.some(row, row + S::rows)) continue;

    using Scores = Sums<S::blocks, S::rows>;
    Scores products, x;
    product_of_rows<S::blocks>(products, tiles.key, own, tiles.query(stage));
    copy(products, x);
    if constexpr (!plain) make_logits<T, true>(x, p.options, s, head, key, row);
    if (!reach.all(row, row + S::rows)) hide_unseen<true>(x, s.band(p.options), key, row);
    to_probabilities_of_columns<plain>(x, p.options.factor, plain ? nullptr : tiles.shift(stage), tiles.base(stage));

    Dropped<S::blocks, S::rows / 8> dropped;
    if (p.options.dropout.seed) {
      const auto stream = static_cast<uint32_t>(s.index * p.sizes.heads + head);
      dropped = draw<true, S::blocks, S::rows / 8>(p.options.dropout, stream, key, row);
    }
    uint32_t rounded[S::blocks][S::rows / 16][4];
    if constexpr (of_values) {
      if (p.options.dropout.seed) {
        Scores kept;
        copy(x, kept);
        drop(kept, dropped, 1.0f);
        round_to_operands<T>(kept, rounded);
      } else {
        round_to_operands<T>(x, rounded);
      }
      add_product(grad_value, rounded, tiles.grad(stage));
    }
    if constexpr (of_keys) {
      Scores grad;
      product_of_rows<S::blocks>(grad, tiles.value, own, tiles.grad(stage));
      if (p.options.dropout.seed) drop(grad, dropped, p.options.dropout.keep_scale);
      const float* delta = tiles.delta(stage);
      each(grad, [&](float& g, int, int c) { g -= delta[c]; });
      through_softmax<plain>(grad, x, products, p.options);
      round_to_operands<T>(grad, rounded);
      add_product(grad_key, rounded, tiles.query(stage));
    }
  }

  const int lines = least(16 * S::blocks, s.keys - key);
  if (lines <= 0) return;
  if constexpr (of_keys) {
    const auto by = [&](int, int) { return p.options.scale; };
    store_rows(grad_key, by, tiles.key, own, p.grad_key.lines(s.batch, place.head, s.key0 + key), lines);
  }
  if constexpr (of_values) {
    const auto by = [&](int, int) { return p.options.dropout.keep_scale; };
    store_rows(grad_value, by, tiles.key, own, p.grad_value.lines(s.batch, place.head, s.key0 + key), lines);
  }
}

}  // namespace
#ifndef __CUDACC_RTC__
namespace {

// Whether its kernel can be had.
template <class T, int D, bool plain, int wanted>
bool run_pass(const AttentionBackward& p, Stream stream) {
  constexpr int kKeys = Shape<D, plain>::keys;
  const Backward<T> given = backward_of<T>(p, sizes_of_keys(p, kKeys));
  const Schedule schedule = order_of_keys(p, kKeys, (p.query.size(3) + p.value.size(3)) * 2);
  const LaunchSite at{"attention_keys_sm80",
                      grid_of(schedule),
                      kThreads,
                      cuda_stream(stream),
                      p.key,
                      Tiles<T, D, plain, wanted>::bytes};
  if constexpr (kBuiltAhead<D>) {
    launch(at, attention_keys_sm80<T, D, plain, wanted>, given, schedule);
    return true;
  } else {
    constexpr const char* kSource = "cuda/attention_sm80_keys.cu";
    return launch_compiled(at, {kSource, instance("attention::attention_keys_sm80", T{}, D, plain, wanted)}, given,
                           schedule);
  }
}

}  // namespace

void run_keys(const AttentionBackward& p, Stream stream) {
  visit(p, [&]<class T, int D, bool plain>(T, std::integral_constant<int, D>, std::bool_constant<plain>) {
    if constexpr (Shape<D, plain>::at_once) {
      return run_pass<T, D, plain, kBoth>(p, stream);
    } else {
      return run_pass<T, D, plain, kValue>(p, stream) && run_pass<T, D, plain, kKey>(p, stream);
    }
  });
}

#endif
}  // namespace llmengine::cuda::attention
