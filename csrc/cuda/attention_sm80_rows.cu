// Attention, backward, of queries (formulas and flops: attention_sm80_backward.cuh), and what both halves of the
// backward read of each row.
//
//   attention_statistics_sm80   shift and base: of plain logits 0 and lse in units of log 2, of others lse and its
//                               second part (attention_logits.cuh). base is infinite where a row sees no key, so that
//                               its P are 0;
//                               delta = rowsum(dO O) - grad_lse. The sum is the diagonal of dO O^T by the same tensor
//                               core products as dO V^T: where a row has one key, and O is its value, both err alike
//                               and their difference is 0. Bytes: dO and O once; limit: memory.
//
//                      keys ->                    A block of four warps owns `rows` rows of one head, a warp
//               +-------+-------+-------+---      blocks x 16 of them. Query and dO stay in shared memory, dQ in
//     rows      |   S   |   S   |       |         registers, in float32. Keys and values stream through two stages of
//      | Q dO   |  dP   |  dP   |       |         shared memory by cp.async, one ahead; G goes from accumulators to
//      v        +-------+-------+-------+---      dQ += G K in registers.
//                K_0 V_0  K_1 V_1
//
//   bytes   query, dO, dQ once; keys and values once a block, from the second-level cache
//   limit   the tensor cores; with one block of rows a warp (head dims above 64) shared memory, at 1/12 byte a flop
#include <cmath>
#include <cstdint>

#include "cuda/attention_sm80_backward.cuh"
#ifndef __CUDACC_RTC__
#include "cuda/compiled.cuh"
#include "cuda/launch.cuh"
#endif

namespace llmengine::cuda {
namespace attention {
namespace {

// ---- statistics -----------------------------------------------------------------------------------------------------

inline constexpr int kStatisticsRows = 16 * kWarps;

template <class T>
struct Statistics {
  Operand<const T> output, grad_output;
  const float *lse, *lse_low, *grad_lse;  // grad_lse: null where there is none
  float *shift, *base, *delta;
  bool plain;
  int tiles, heads, rows;
  Operand<const T> query;
  float *grad_squares, *query_squares;  // null where they are not wanted
};

// Two elements side by side of a row, zeros past its end.
template <class T>
__device__ __forceinline__ uint32_t pair_at(const Lines<const T>& from, int line, int column, int count) {
  if (line >= count || column >= from.columns) return 0;
  const T* at = from.data + line * from.stride + column;
  if (from.aligned && column + 1 < from.columns) return *reinterpret_cast<const uint32_t*>(at);
  return at[0].bits | (column + 1 < from.columns ? static_cast<uint32_t>(at[1].bits) << 16 : 0u);
}

// A warp's 16 rows, each by the four lanes that hold it.
template <class T>
__device__ __forceinline__ void store_squares(const Lines<const T>& from, int count, float* to) {
  const int line = lane_of() / 4, column = lane_of() % 4 * 2;
  float sums[2] = {};
#pragma unroll 1
  for (int k = 0; k < from.columns; k += 8)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[2];
      unpack_word(pair_at(from, line + 8 * half, k + column, count), x, T{});
      sums[half] += x[0] * x[0] + x[1] * x[1];
    }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[half] += __shfl_xor_sync(kWholeWarp, sums[half], 1);
    sums[half] += __shfl_xor_sync(kWholeWarp, sums[half], 2);
    if (lane_of() % 4 == 0 && line + 8 * half < count) to[line + 8 * half] = sums[half];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) attention_statistics_sm80(const Statistics<T> p) {
  const Place place = place_of(p.tiles, p.heads);
  const int first = place.tile * kStatisticsRows + 16 * warp_of(), count = p.rows - first;
  if (count <= 0) return;
  const Lines<const T> o = p.output.lines(place.sequence, place.head, first);
  const Lines<const T> g = p.grad_output.lines(place.sequence, place.head, first);
  const int line = lane_of() / 4, column = lane_of() % 4 * 2;
  float upper[4] = {}, lower[4] = {};  // dO of all rows, with O of the first eight and of the others
#pragma unroll 1
  for (int k = 0; k < o.columns; k += 16) {
    uint32_t a[4], b[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a[i] = pair_at(g, line + i % 2 * 8, k + column + i / 2 * 8, count);
      b[i] = pair_at(o, line + i / 2 * 8, k + column + i % 2 * 8, count);
    }
    multiply_add_two<T>(upper, lower, a, b);
  }
  const int64_t statistics = (static_cast<int64_t>(place.sequence) * p.heads + place.head) * p.rows + first;
  if (p.grad_squares) {
    store_squares(g, count, p.grad_squares + statistics);
    store_squares(p.query.lines(place.sequence, place.head, first), count, p.query_squares + statistics);
  }
  // of row g the diagonal lies in lane 4 g + g mod 8 / 2, element g mod 2
  if (lane_of() % 4 != line / 2) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = line + 8 * half;
    if (row >= count) continue;
    const int64_t at = statistics + row;
    const float sum = line % 2 ? (half ? lower[3] : upper[1]) : half ? lower[2] : upper[0], lse = p.lse[at];
    p.delta[at] = p.grad_lse ? sum - p.grad_lse[at] : sum;
    const bool sees = lse != -INFINITY;
    p.shift[at] = sees && !p.plain ? lse : 0.0f;
    p.base[at] = sees ? (p.plain ? lse : p.lse_low[at]) * kLog2e : INFINITY;
  }
}

// ---- rows -----------------------------------------------------------------------------------------------------------

template <int D, bool plain>
struct Shape {
  static constexpr int blocks = D <= 64 ? 2 : 1, rows = 16 * blocks * kWarps;
  static constexpr int keys = D > 128 || (D > 64 && !plain) ? 16 : 32;
  // Blocks of a multiprocessor that have registers: for more the assembler would spill. 0: as it thinks best.
  static constexpr int at_once = D == 160 && !plain ? 2 : 0;
};

template <class T, int D, bool plain>
struct Tiles {
  using S = Shape<D, plain>;
  Tile<T, S::rows, D> query, grad;
  void* stages;

  static constexpr int kLines = S::rows * D * 2, kStage = S::keys * D * 2, bytes = 2 * kLines + 4 * kStage;

  __device__ explicit Tiles(void* shared)
      : query(query.at(shared, 0)), grad(grad.at(shared, kLines)), stages(grad.data + S::rows * D) {}
  __device__ Tile<T, S::keys, D> key(int stage) const { return Tile<T, S::keys, D>::at(stages, 2 * stage * kStage); }
  __device__ Tile<T, S::keys, D> value(int stage) const {
    return Tile<T, S::keys, D>::at(stages, (2 * stage + 1) * kStage);
  }
};

template <class T, int D, bool plain>
__global__ void __launch_bounds__(kThreads, Shape<D, plain>::at_once)
    attention_rows_sm80(const Backward<T> p, const Schedule schedule) {
  using S = Shape<D, plain>;
  const Place place = place_of(schedule, p.sizes, false, p.sizes.heads, S::rows);
  const Sequence s = sequence_of(p.sizes, place.sequence);
  const int first = place.tile * S::rows;
  if (first < 0 || first >= s.rows) return;   // an empty place
  if (place.sequence == p.sizes.sequences) {  // rows that belong to none
    return zero_rows<kThreads>(p.grad_query.lines(s.batch, place.head, s.row0 + first), least(S::rows, s.rows - first));
  }

  const Tiles<T, D, plain> tiles(ptx::dynamic_shared());
  const int key_head = place.head / p.sizes.group;
  const int own = warp_of() * 16 * S::blocks, row = first + own;  // this warp's first row, in the tile and at all
  const int count = least(16 * S::blocks, s.rows - row);
  const Span block = keys_of_rows(s.band(p.options), first, S::rows);
  const Span reach = keys_of_rows(s.band(p.options), row, 16 * S::blocks);
  const int begin = begin_of_walk(block, S::keys);
  const auto begin_stage = [&](int key) {
    const int left = s.keys - key, stage = key / S::keys % 2;
    copy_rows<kThreads>(tiles.key(stage), p.key.lines(s.batch, key_head, s.key0 + key), left);
    copy_rows<kThreads>(tiles.value(stage), p.value.lines(s.batch, key_head, s.key0 + key), left);
    ptx::commit_copies();
  };

  const int64_t lines = (s.batch * p.sizes.heads + place.head) * p.sizes.rows + s.row0 + row;
  const RowStatistics<S::blocks, plain> statistics(p, lines, count);
  Sums<S::blocks, D> grad_query;
  clear(grad_query);
  if (begin < block.end) {
    copy_rows<kThreads>(tiles.query, p.query.lines(s.batch, place.head, s.row0 + first), s.rows - first);
    copy_rows<kThreads>(tiles.grad, p.grad_output.lines(s.batch, place.head, s.row0 + first), s.rows - first);
    begin_stage(begin);
  }
#pragma unroll 1
  for (int key = begin; key < block.end; key += S::keys) {
    const int stage = key / S::keys % 2;
    ptx::wait_copies<0>();
    __syncthreads();  // this stage is there, and every warp is done with the other
    if (key + S::keys < block.end) begin_stage(key + S::keys);
    if (!reach.some(key, key + S::keys)) continue;

    using Scores = Sums<S::blocks, S::keys>;
    Scores products, x, grad;
    scores_of_rows<plain, S::blocks>(products, x, grad, tiles.query, tiles.grad, own, tiles.key(stage),
                                     tiles.value(stage), p.options, p.sizes, s,
                                     {place.head, row, key, reach.all(key, key + S::keys)}, statistics);
    through_softmax<plain>(grad, x, products, p.options);
    uint32_t rounded[S::blocks][S::keys / 16][4];
    round_to_operands<T>(grad, rounded);
    add_product(grad_query, rounded, tiles.key(stage));
  }

  if (count <= 0) return;
  const auto by = [&](int, int) { return p.options.scale; };
  store_rows(grad_query, by, tiles.query, own, p.grad_query.lines(s.batch, place.head, s.row0 + row), count);
}

}  // namespace
}  // namespace attention
#ifndef __CUDACC_RTC__
namespace attention {

void run_statistics(const AttentionBackward& p, Stream stream, Padding padding, float* squares) {
  const auto of_type = [&]<class T>(T) {
    const int tiles = static_cast<int>((p.query.size(2) + kStatisticsRows - 1) / kStatisticsRows);
    const Statistics<T> given{operand_of<const T>(p.output),
                              operand_of<const T>(p.grad_output),
                              p.lse.as<float>(),
                              p.lse_low.as<float>(),
                              p.grad_lse.defined() ? p.grad_lse.as<float>() : nullptr,
                              p.shift.as<float>(),
                              p.base.as<float>(),
                              p.delta.as<float>(),
                              is_plain(p, padding),
                              tiles,
                              static_cast<int>(p.heads()),
                              static_cast<int>(p.query.size(2)),
                              operand_of<const T>(p.query),
                              squares,
                              squares ? squares + p.heads() * p.query.size(0) * p.query.size(2) : nullptr};
    const dim3 grid = grid_of_tiles(tiles * p.heads() * p.query.size(0));
    launch({"attention_statistics_sm80", grid, kThreads, cuda_stream(stream), p.output}, attention_statistics_sm80<T>,
           given);
  };
  p.query.dtype == DType::bf16 ? of_type(bf16{}) : of_type(f16{});
}

void run_rows(const AttentionBackward& p, Stream stream) {
  constexpr const char* kSource = "cuda/attention_sm80_rows.cu";
  visit(p, [&]<class T, int D, bool plain>(T, std::integral_constant<int, D>, std::bool_constant<plain>) {
    constexpr int kRows = Shape<D, plain>::rows;
    const Backward<T> given = backward_of<T>(p, sizes_of_rows(p, kRows));
    const Schedule schedule = order_of_rows(p, kRows);
    const LaunchSite at{"attention_rows_sm80", grid_of(schedule), kThreads,
                        cuda_stream(stream),   p.query,           Tiles<T, D, plain>::bytes};
    if constexpr (kBuiltAhead<D>) {
      launch(at, attention_rows_sm80<T, D, plain>, given, schedule);
      return true;
    } else {
      return launch_compiled(at, {kSource, instance("attention::attention_rows_sm80", T{}, D, plain)}, given, schedule);
    }
  });
}

}  // namespace attention

void validate(const AttentionBackward& p) {
  ops::validate(p, attention::kTypes);
  const Checker at{"attention backward"};
  for (auto [t, argument] : NamedTensors{{&p.shift, "shift"}, {&p.base, "base"}, {&p.delta, "delta"}}) {
    at.defined(*t, argument);
    ops::check_statistics(at, *t, argument, p.query);
  }
}

void run(const AttentionBackward& p, Stream stream) {
  attention::run_statistics(p, stream);
  attention::run_keys(p, stream);
  attention::run_rows(p, stream);
  if (p.grad_mask.defined()) attention::run_mask(p, stream);
  if (p.partial_distances.defined()) attention::run_distances(p, stream);
}

#endif
}  // namespace llmengine::cuda
