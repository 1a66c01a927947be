// Attention, backward, of what is added to the logits: an additive mask, and a bias by distance. Both are sums of
// G' = P (dO V^T Z - delta), the gradient of the logits (attention_sm80_backward.cuh), over all scores that shared an
// element; one block makes each sum, in a fixed order: no atomics.
//
//   attention_mask_sm80        A block owns a tile (rows, keys) of the mask and goes through the batch entries, heads
//                              and tiles of rows that share it; the tile's sum stays in registers.
//   attention_distances_sm80   A block owns `rows` rows of a head and a table of 2 M + 1 entries in shared memory.
//                              Keys stream by; a tile of G' is laid down in shared memory, a thread sums each of its
//                              diagonals, which all have one distance, and adds the sum to the entry. Entries of
//                              distances beyond M are many diagonals': one warp adds those.
//
//                   keys ->
//        rows   0 1 2 3 4        diagonal c - r + rows - 1 of a tile of `rows` x `keys`; rows + keys - 1 of them
//         |    -1 0 1 2 3
//         v    -2-1 0 1 2
//
//   flops   4 rows keys head_dim a tile: both products are made again
//   bytes   keys and values once a block and, of a mask, head, from the second-level cache; sums once
//   limit   the tensor cores, if copies and products of several blocks overlap: within one they take turns
#include <cmath>
#include <cstdint>

#include "cuda/attention_sm80_backward.cuh"
#ifndef __CUDACC_RTC__
#include "cuda/compiled.cuh"
#include "cuda/launch.cuh"
#endif

namespace llmengine::cuda::attention {
namespace {

template <int D>
struct Shape {
  static constexpr int rows = 16 * kWarps, keys = D <= 128 ? 32 : 16;
  // Blocks of a multiprocessor that have registers: for more the assembler would spill. 0: as it thinks best.
  static constexpr int at_once = D > 128 || D == 112 ? 3 : 0;
};

template <class T, int D>
struct Tiles {
  using S = Shape<D>;
  Tile<T, S::rows, D> query, grad;
  Tile<T, S::keys, D> key, value;

  static constexpr int bytes = 4 * (S::rows + S::keys) * D;

  __device__ explicit Tiles(void* shared)
      : query(query.at(shared, 0)),
        grad(grad.at(shared, query.bytes)),
        key(key.at(shared, 2 * query.bytes)),
        value(value.at(shared, 2 * query.bytes + key.bytes)) {}

  __device__ __forceinline__ void begin_rows(const Backward<T>& p, const Sequence& s, int head, int row) const {
    copy_rows<kThreads>(query, p.query.lines(s.batch, head, s.row0 + row), s.rows - row);
    copy_rows<kThreads>(grad, p.grad_output.lines(s.batch, head, s.row0 + row), s.rows - row);
  }
  __device__ __forceinline__ void begin_keys(const Backward<T>& p, const Sequence& s, int head, int first) const {
    copy_rows<kThreads>(key, p.key.lines(s.batch, head / p.sizes.group, s.key0 + first), s.keys - first);
    copy_rows<kThreads>(value, p.value.lines(s.batch, head / p.sizes.group, s.key0 + first), s.keys - first);
  }
};

// Adds G' of this warp's 16 rows of a block's tile of scores, which begins at (row, key), to `sum`.
template <class T, int D>
__device__ __forceinline__ void add_gradient(Sums<1, Shape<D>::keys>& sum, const Tiles<T, D>& tiles,
                                             const Backward<T>& p, const Sequence& s, int head, int row, int key) {
  constexpr int kKeys = Shape<D>::keys;
  const int own = 16 * warp_of();
  const Span reach = keys_of_rows(s.band(p.options), row + own, 16);
  if (!reach.some(key, key + kKeys)) return;
  const int64_t lines = (s.batch * p.sizes.heads + head) * p.sizes.rows + s.row0 + row + own;
  const RowStatistics<1, false> statistics(p, lines, s.rows - row - own);
  Sums<1, kKeys> products, probabilities, grad;
  scores_of_rows<false, 1>(products, probabilities, grad, tiles.query, tiles.grad, own, tiles.key, tiles.value,
                           p.options, p.sizes, s, {head, row + own, key, reach.all(key, key + kKeys)}, statistics);
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[0][j][i] += probabilities[0][j][i] * grad[0][j][i];
}

// ---- mask -----------------------------------------------------------------------------------------------------------

struct MaskSums {
  float* grad;  // contiguous, of these sizes; 1: shared by all
  int batches, heads, rows;
  int row_tiles, key_tiles;
  const int* wanted;  // null: it is; else whether it is
};

// The sum over a tile's rows, in the first `keys` threads.
template <int keys>
__device__ __forceinline__ float sum_over_rows(const Sums<1, keys>& x, float (&slots)[kWarps][keys]) {
#pragma unroll
  for (int j = 0; j < keys / 8; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = x[0][j][i] + x[0][j][i + 2];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(kWholeWarp, sum, lanes);
      if (lane_of() < 4) slots[warp_of()][8 * j + 2 * lane_of() + i] = sum;
    }
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < kWarps && threadIdx.x < keys; ++warp) sum += slots[warp][threadIdx.x];
  return sum;
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, Shape<D>::at_once)
    attention_mask_sm80(const Backward<T> p, const MaskSums m) {
  if (m.wanted && *m.wanted == 0) return;
  constexpr int kRows = Shape<D>::rows, kKeys = Shape<D>::keys;
  __shared__ float slots[kWarps][kKeys];
  const Tiles<T, D> tiles(ptx::dynamic_shared());
  const int block = static_cast<int>(blockIdx.x), part = block / m.key_tiles / m.row_tiles;
  const int key = block % m.key_tiles * kKeys, own_row = block / m.key_tiles % m.row_tiles * kRows;
  const int own_batch = part / m.heads, batch_end = m.batches == 1 ? p.sizes.sequences : own_batch + 1;
  const int own_head = part % m.heads, head_end = m.heads == 1 ? p.sizes.heads : own_head + 1;
  const int row_end = m.rows == 1 ? p.sizes.rows : own_row + 1;

  Sums<1, kKeys> sum;
  clear(sum);
#pragma unroll 1
  for (int batch = own_batch; batch < batch_end; ++batch) {
    const Sequence s = sequence_of(p.sizes, batch);
#pragma unroll 1
    for (int head = own_head; head < head_end; ++head) {
#pragma unroll 1
      for (int row = own_row; row < row_end; row += kRows) {
        if (!keys_of_rows(s.band(p.options), row, kRows).some(key, key + kKeys)) continue;
        tiles.begin_rows(p, s, head, row);
        tiles.begin_keys(p, s, head, key);
        ptx::commit_copies();
        ptx::wait_copies<0>();
        __syncthreads();  // the tiles are there
        add_gradient(sum, tiles, p, s, head, row, key);
        __syncthreads();  // every warp is done with them
      }
    }
  }

  float* to = m.grad + static_cast<int64_t>(part) * m.rows * p.sizes.keys;
  if (m.rows == 1) {
    const float total = sum_over_rows(sum, slots);
    const int column = key + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kKeys && column < p.sizes.keys) to[column] = total;
    return;
  }
  each(sum, [&](const float& x, int r, int c) {
    const int row = own_row + 16 * warp_of() + r, column = key + c;
    if (row < m.rows && column < p.sizes.keys) to[static_cast<int64_t>(row) * p.sizes.keys + column] = x;
  });
}

// ---- bias by distance -----------------------------------------------------------------------------------------------

// Shared memory behind the operands' tiles. A row of the tile is one float longer than its keys, so that a step down
// a diagonal of neighbours is a step of one bank.
template <int D>
struct Diagonals {
  static constexpr int kRows = Shape<D>::rows, kKeys = Shape<D>::keys, kCount = kRows + kKeys - 1;

  float *tile, *sums, *table;

  static constexpr int bytes_without_table = (kRows * (kKeys + 1) + kCount) * static_cast<int>(sizeof(float));

  __device__ explicit Diagonals(void* shared, int offset)
      : tile(reinterpret_cast<float*>(static_cast<char*>(shared) + offset)),
        sums(tile + kRows * (kKeys + 1)),
        table(sums + kCount) {}

  __device__ __forceinline__ float sum_of(int diagonal) const {
    float sum = 0.0f;
    for (int c = 0; c < kKeys; ++c) {
      const int r = c - diagonal + kRows - 1;
      if (r >= 0 && r < kRows) sum += tile[r * (kKeys + 1) + c];
    }
    return sum;
  }

  // Adds a tile, whose diagonals have the distances `least`, `least` + 1 ..., to the table; by the whole block.
  __device__ __forceinline__ void add_to_table(int least_distance, int farthest) const {
    const int diagonal = static_cast<int>(threadIdx.x), distance = least_distance + diagonal;
    const bool between = distance > -farthest && distance < farthest;
    if (diagonal < kCount) {
      const float sum = sum_of(diagonal);
      if (between) table[distance + farthest] += sum;
      sums[diagonal] = between ? 0.0f : sum;
    }
    __syncthreads();
    if (warp_of() != 0) return;
    float left = 0.0f, right = 0.0f;  // of the distances at both ends and beyond
    for (int d = lane_of(); d < kCount; d += 32) (least_distance + d <= -farthest ? left : right) += sums[d];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      left += __shfl_xor_sync(kWholeWarp, left, lanes);
      right += __shfl_xor_sync(kWholeWarp, right, lanes);
    }
    if (lane_of() != 0) return;
    table[0] += left;
    table[2 * farthest] += right;
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    attention_distances_sm80(const Backward<T> p, const Schedule schedule, float* partial) {
  constexpr int kRows = Shape<D>::rows, kKeys = Shape<D>::keys;
  static_assert(Diagonals<D>::kCount <= kThreads);
  const Tiles<T, D> tiles(ptx::dynamic_shared());
  const Diagonals<D> diagonals(ptx::dynamic_shared(), Tiles<T, D>::bytes);
  const auto [tile, owner] = schedule.at(static_cast<int>(blockIdx.x));
  const int heads = p.sizes.heads, head = owner % heads, place = owner / heads * schedule.tiles + tile;
  const Spot spot = spot_of(p.sizes, false, place, kRows, true);
  const Sequence s = sequence_of(p.sizes, spot.sequence);
  const int row = spot.tile * kRows, farthest = p.options.distances ? p.options.farthest : 0;
  const bool some = row >= 0 && spot.sequence < p.sizes.sequences;  // rows that belong to none see no key
  const Span block = some ? keys_of_rows(s.band(p.options), row, kRows) : Span{};
  const int begin = begin_of_walk(block, kKeys), shift = p.options.bottom_right ? s.keys - s.rows : 0;

  for (int i = static_cast<int>(threadIdx.x); i <= 2 * farthest; i += kThreads) diagonals.table[i] = 0.0f;
  if (begin < block.end) tiles.begin_rows(p, s, head, row);
#pragma unroll 1
  for (int key = begin; key < block.end; key += kKeys) {
    tiles.begin_keys(p, s, head, key);
    ptx::commit_copies();
    ptx::wait_copies<0>();
    __syncthreads();  // the keys are there
    Sums<1, kKeys> grad;
    clear(grad);
    add_gradient(grad, tiles, p, s, head, row, key);
    each(grad, [&](const float& x, int r, int c) { diagonals.tile[(16 * warp_of() + r) * (kKeys + 1) + c] = x; });
    __syncthreads();  // the tile of gradients is there
    diagonals.add_to_table(key - row - shift - kRows + 1, farthest);
  }
  __syncthreads();  // the table is whole
  float* to = partial + (static_cast<int64_t>(place) * heads + head) * (2 * static_cast<int64_t>(farthest) + 1);
  for (int i = static_cast<int>(threadIdx.x); i <= 2 * farthest; i += kThreads) to[i] = diagonals.table[i];
}

// ---- launches -------------------------------------------------------------------------------------------------------

}  // namespace
#ifndef __CUDACC_RTC__

inline constexpr const char* kSource = "cuda/attention_sm80_bias.cu";

void run_mask(const AttentionBackward& p, Stream stream, const int* wanted) {
  visit_classes(p, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    constexpr int kRows = Shape<D>::rows, kKeys = Shape<D>::keys;
    const TensorView& grad = p.grad_mask;
    const Backward<T> given = backward_of<T>(p, sizes_of_rows(p, kRows));
    const MaskSums sums{grad.as<float>(),
                        static_cast<int>(grad.size(0)),
                        static_cast<int>(grad.size(1)),
                        static_cast<int>(grad.size(2)),
                        static_cast<int>((grad.size(2) + kRows - 1) / kRows),
                        static_cast<int>((grad.size(3) + kKeys - 1) / kKeys),
                        wanted};
    const LaunchSite at{"attention_mask_sm80",
                        grid_of_tiles(grad.size(0) * grad.size(1) * sums.row_tiles * sums.key_tiles),
                        kThreads,
                        cuda_stream(stream),
                        grad,
                        Tiles<T, D>::bytes};
    if constexpr (kBuiltAhead<D>) {
      launch(at, attention_mask_sm80<T, D>, given, sums);
      return true;
    } else {
      return launch_compiled(at, {kSource, instance("attention::attention_mask_sm80", T{}, D)}, given, sums);
    }
  });
}

void run_distances(const AttentionBackward& p, Stream stream) {
  static_assert(Shape<64>::rows == kDistanceRows);
  visit_classes(p, [&]<class T, int D>(T, std::integral_constant<int, D>) {
    const Backward<T> given = backward_of<T>(p, sizes_of_rows(p, kDistanceRows));
    const TensorView& partial = p.partial_distances;
    const int64_t parts = count_places(p.sequences() + p.packed(), p.query.size(2), kDistanceRows, p.packed());
    Checker{"attention backward"}.shape(partial, "partial_distances", {parts, p.heads(), p.distance_bias.size(1)});
    const size_t table = p.distance_bias.size(1) * sizeof(float);
    const Schedule schedule = order_of_rows(p, kDistanceRows);
    const LaunchSite at{
        "attention_distances_sm80", grid_of(schedule), kThreads,
        cuda_stream(stream),        partial,           Tiles<T, D>::bytes + Diagonals<D>::bytes_without_table + table};
    if constexpr (kBuiltAhead<D>) {
      launch(at, attention_distances_sm80<T, D>, given, schedule, partial.as<float>());
      return true;
    } else {
      return launch_compiled(at, {kSource, instance("attention::attention_distances_sm80", T{}, D)}, given, schedule,
                             partial.as<float>());
    }
  });
}

#endif
}  // namespace llmengine::cuda::attention
