// Attention of a few new tokens over a cache (ops/decode_attention.h), its keys split among blocks (flash-decoding: Dao
// et al. 2023), on every GPU from sm_80 on.
//
//   A block owns a share of one sequence's keys for one key head, and 16 rows: those of all query heads of its group,
//   head after head, so that grouped heads read keys and values once. Shares follow from the length that the device
//   reads: the grid depends on shapes alone, so that nothing waits for it and a graph may replay it.
//
//                      keys of the share ->           Each warp goes by itself through every fourth (of wide heads
//        16 rows  | w0 | w1 | w2 | w3 | w0 | ...      second) 16 keys, with a softmax of its own: two stages of keys
//                                                     and values by cp.async, and no barrier but the warp's.
//
//     S = Q K^T;  m' = max(m, rowmax S);  P = exp2(S - m');  O = exp2(m - m') O + P V
//
//   At the end the warps' maxima, sums and outputs meet in shared memory, and, where there are several shares, those of
//   the blocks in global memory, which a second kernel adds up. All in a fixed order: equal calls give equal bits.
//
//   flops   64 keys head_dim a share by mma.sync m16n8k16, of which rows / 16 count
//   bytes   keys and values once, a share's 4 rows (value_dim + 2) written and read besides. Shared memory: 34 KiB at
//           head dims to 64, 68 KiB to 128, 72 KiB to 256
//   limit   reading the cache: 512 bytes a key at head_dim 128, which take 35 clocks of a multiprocessor's share of an
//           H100's memory, and 4 clocks of an A100's tensor cores
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/attention_forward.cuh"
#include "cuda/decode_attention.h"
#include "cuda/launch.cuh"

namespace llmengine::cuda {
namespace attention {
namespace {

constexpr int kRows = 16, kKeys = 16, kStages = 2;  // of a block, of a warp's step

template <int D>
struct Shape {
  static constexpr int warps = D <= 128 ? 4 : 2, threads = 32 * warps, chunks = D / 8;
  static constexpr int tile = kKeys * D * 2, query = kRows * D * 2;                        // bytes
  static constexpr int parts = warps * kRows * (D + 2) * static_cast<int>(sizeof(float));  // of the warps, at the end
  static constexpr int bytes = query + warps * kStages * 2 * tile;
  static_assert(parts <= bytes);
};

template <class T>
struct Cache {
  const T* data;
  ops::CacheSteps steps;
  int columns;
  bool aligned;  // every key begins at a multiple of 16 bytes
};

// table: null where page b is all that sequence b has.
struct Pages {
  const int32_t* table;
  int of_sequence, size, count;

  // Wrong entries are clamped: a kernel cannot refuse them.
  __device__ __forceinline__ int64_t offset(const ops::CacheSteps& steps, int b, int key) const {
    if (!table) return b * steps.page + key * steps.slot;
    const int n = key / size, page = table[static_cast<int64_t>(b) * of_sequence + n];
    return least(largest(page, 0), count - 1) * steps.page + (key - n * size) * steps.slot;
  }
};

// What blocks leave of each row: (splits, all rows), sums `width` floats apart.
struct Partials {
  float *sums, *statistics;
  int width;
  int64_t rows;
};

template <class T>
struct Decode {
  Operand<const T> query;
  Operand<T> output;
  float* lse;
  Cache<T> key, value;
  Pages pages;
  const int32_t* lengths;
  Options options;  // no mask, no dropout
  Partials partials;
  int splits, tiles, heads, group, rows, capacity;
};

// Row i of a group: the heads' rows one after another.
struct Row {
  int head, row;
  bool exists;
};
template <class T>
__device__ __forceinline__ Row row_of(const Decode<T>& p, int key_head, int i) {
  return {key_head * p.group + i / p.rows, i % p.rows, i < p.group * p.rows};
}

// ---- a warp's keys --------------------------------------------------------------------------------------------------

// Zeros below the last key and beside the last column.
template <class T, int D>
__device__ __forceinline__ void copy_keys(const Tile<T, kKeys, D>& to, const Cache<T>& cache, const Pages& pages, int b,
                                          int head, int first, int end) {
  constexpr int kChunks = D / 8, kStep = 32 / kChunks;
  const int c = lane_of() % kChunks, left = cache.columns - c * 8, wide = 2 * (left < 0 ? 0 : left < 8 ? left : 8);
#pragma unroll
  for (int n = 0; n < kKeys / kStep; ++n) {
    const int row = n * kStep + lane_of() / kChunks, key = first + row;
    const T* at = cache.data + head * cache.steps.head + (key < end ? pages.offset(cache.steps, b, key) : 0);
    if (cache.aligned) {
      ptx::copy_async_16(to.chunk(row, c), wide ? at + c * 8 : at, key < end ? wide : 0);
    } else {
      uint4 vector = make_uint4(0, 0, 0, 0);
      if (key < end) vector = load_vector(at, c * 8, cache.columns, false);
      *reinterpret_cast<uint4*>(to.chunk(row, c)) = vector;
    }
  }
}

// A thread's two rows, 8 apart: what stands between their products and logits.
struct Scores {
  int position[2];  // -1 or less: sees no key
  float slope[2];
  const float* distances[2];  // the bias of distance 0, or null

  template <class T>
  __device__ __forceinline__ Scores(const Decode<T>& p, int b, int key_head, int first, int length) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Options& o = p.options;
      const Row row = row_of(p, key_head, first + lane_of() / 4 + 8 * half);
      position[half] = row.exists ? length - p.rows + row.row : -1;
      slope[half] = o.slopes && row.exists ? o.slopes[b * o.slope_sequence + row.head * o.slope_head] : 0.0f;
      const int64_t table = row.exists ? row.head * (2 * static_cast<int64_t>(o.farthest) + 1) + o.farthest : 0;
      distances[half] = o.distances ? o.distances + table : nullptr;
    }
  }

  // Products with the keys from `first` on become logits, -inf where a key is not seen.
  template <int n>
  __device__ __forceinline__ void to_logits(float (&x)[1][n][4], const Options& o, int first) const {
    const float by = o.softcap > 0.0f ? o.scale / o.softcap : o.scale;
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int half = i / 2, key = first + 8 * j + lane_of() % 4 * 2 + i % 2, back = position[half] - key;
        float u = x[0][j][i] * by;
        if (o.softcap > 0.0f) u = o.softcap * tanh_of(u);
        u -= slope[half] * static_cast<float>(back);
        const bool seen = back >= 0 && (o.left < 0 || back <= o.left);
        if (distances[half] && seen) u = biased(u, distances[half][-least(back, o.farthest)]);
        x[0][j][i] = seen ? u : -INFINITY;
      }
  }
};

// ---- parts become one -----------------------------------------------------------------------------------------------

// Eight columns of a row, and its statistics, of several parts of its keys; and a logit that joins them, or -inf.
struct Merged {
  float base, sum, x[8];

  __device__ Merged(int parts, const float* statistics, int64_t statistics_step, const float* sums, int64_t sums_step,
                    float sink) {
    base = sink;
    for (int n = 0; n < parts; ++n) base = fmaxf(base, statistics[n * statistics_step]);
    const float from = base == -INFINITY ? 0.0f : base;
    sum = ptx::exp2_approx((sink - from) * kLog2e);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = 0.0f;
#pragma unroll 4
    for (int n = 0; n < parts; ++n) {
      const float* part = statistics + n * statistics_step;
      const float weight = ptx::exp2_approx((part[0] - from) * kLog2e);
      sum = fmaf(part[1], weight, sum);
#pragma unroll
      for (int four = 0; four < 8; four += 4) {
        float values[4];
        unpack<float>(*reinterpret_cast<const uint4*>(sums + n * sums_step + four), values);
#pragma unroll
        for (int i = 0; i < 4; ++i) x[four + i] = fmaf(values[i], weight, x[four + i]);
      }
    }
  }

  __device__ void store(float* statistics, float* sums, bool first) const {
    if (first) statistics[0] = base, statistics[1] = sum;
#pragma unroll
    for (int four = 0; four < 8; four += 4) {
      const float values[4] = {x[four], x[four + 1], x[four + 2], x[four + 3]};
      ptx::store_16(sums + four, pack<float>(values));
    }
  }

  template <class T>
  __device__ void finish(const Decode<T>& p, int b, int head, int row, int column) {
    const float share = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= share;
    const Lines<T> line = p.output.lines(b, head, row);
    store_vector(line.data, column, line.columns, line.aligned, pack<T>(x));
    if (column > 0) return;
    p.lse[(static_cast<int64_t>(b) * p.heads + head) * p.rows + row] = static_cast<float>(lse_of(base, sum));
  }
};

// ---- kernels --------------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(Shape<D>::threads) decode_attention_sm80(const Decode<T> p) {
  using S = Shape<D>;
  const int key_heads = p.heads / p.group, block = static_cast<int>(blockIdx.x), owner = block / p.splits;
  const int share = block % p.splits, key_head = owner % key_heads;
  const int first = owner / key_heads % p.tiles * kRows, b = owner / key_heads / p.tiles;
  const int length = least(largest(p.lengths[b], 0), p.capacity);
  constexpr int kRound = S::warps * kKeys;
  const auto [from, end] = ops::share_of(length, p.rows, p.options.left, kRound, share, p.splits);

  char* shared = static_cast<char*>(ptx::dynamic_shared());
  const auto query = Tile<T, kRows, D>::at(shared, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kRows * S::chunks; i += S::threads) {
    const Row row = row_of(p, key_head, first + i / S::chunks);
    uint4 vector = make_uint4(0, 0, 0, 0);
    if (row.exists) {
      const Lines<const T> line = p.query.lines(b, row.head, row.row);
      vector = load_vector(line.data, i % S::chunks * 8, line.columns, line.aligned, false);
    }
    *reinterpret_cast<uint4*>(query.chunk(i / S::chunks, i % S::chunks)) = vector;
  }
  __syncthreads();

  const auto tile_of = [&](int stage, int which) {  // keys, values
    return Tile<T, kKeys, D>::at(shared, S::query + ((warp_of() * kStages + stage) * 2 + which) * S::tile);
  };
  const auto begin_stage = [&](int stage, int key) {
    if (key < end) {
      copy_keys(tile_of(stage, 0), p.key, p.pages, b, key_head, key, end);
      copy_keys(tile_of(stage, 1), p.value, p.pages, b, key_head, key, end);
    }
    ptx::commit_copies();
  };
  const Scores scores(p, b, key_head, first, length);
  Softmax<1> softmax;  // sinks join what all parts together make
  Sums<1, D> output;
  clear(output);
  int stage = 0;
  begin_stage(0, from + warp_of() * kKeys);
#pragma unroll 1
  for (int key = from + warp_of() * kKeys; key < end; key += kRound, stage ^= 1) {
    begin_stage(stage ^ 1, key + kRound);
    ptx::wait_copies<1>();
    __syncwarp();  // this stage is there
    Sums<1, kKeys> x;
    product_of_rows<1>(x, query, 0, tile_of(stage, 0));
    scores.to_logits(x, p.options, key);
    float rescaling[1][2];
    softmax.add(x, kLog2e, rescaling, false);
    rescale(output, rescaling);
    uint32_t probabilities[1][kKeys / 16][4];
    round_to_operands<T>(x, probabilities);
    add_product(output, probabilities, tile_of(stage, 1));
    __syncwarp();  // every lane is done with it
  }
  softmax.gather();

  __syncthreads();  // every warp is done with its stages, in whose place the warps' parts meet
  float *sums = reinterpret_cast<float*>(shared), *statistics = sums + S::warps * kRows * D;
  each(output, [&](float& x, int row, int column) { sums[(warp_of() * kRows + row) * D + column] = x; });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (lane_of() % 4 != 0) continue;
    float* own = statistics + (warp_of() * kRows + lane_of() / 4 + 8 * half) * 2;
    own[0] = softmax.base[0][half], own[1] = softmax.sum[0][half];
  }
  __syncthreads();  // all parts are there
  for (int i = static_cast<int>(threadIdx.x); i < kRows * S::chunks; i += S::threads) {
    const int line = i / S::chunks, column = i % S::chunks * 8;
    const Row row = row_of(p, key_head, first + line);
    if (!row.exists || column >= p.value.columns) continue;
    const bool whole = p.splits == 1;
    Merged merged(S::warps, statistics + line * 2, kRows * 2, sums + line * D + column, kRows * D,
                  whole ? sink_of(p.options, row.head) : -INFINITY);
    if (whole) {
      merged.finish(p, b, row.head, row.row, column);
    } else {
      const int64_t place = share * p.partials.rows + (static_cast<int64_t>(b) * p.heads + row.head) * p.rows + row.row;
      merged.store(p.partials.statistics + place * 2, p.partials.sums + place * p.partials.width + column, column == 0);
    }
  }
}

// A thread adds up eight columns of a row.
constexpr int kMergers = 128;

template <class T>
__global__ void __launch_bounds__(kMergers) decode_attention_merge(const Decode<T> p) {
  const int chunks = p.partials.width / 8;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kMergers + threadIdx.x, place = i / chunks;
  if (place >= p.partials.rows) return;
  const int column = static_cast<int>(i % chunks) * 8, row = static_cast<int>(place % p.rows);
  const int64_t owner = place / p.rows;
  const int head = static_cast<int>(owner % p.heads), b = static_cast<int>(owner / p.heads);
  Merged merged(p.splits, p.partials.statistics + place * 2, p.partials.rows * 2,
                p.partials.sums + place * p.partials.width + column, p.partials.rows * p.partials.width,
                sink_of(p.options, head));
  merged.finish(p, b, head, row, column);
}

// ---- host -----------------------------------------------------------------------------------------------------------

template <class T>
Cache<T> cache_of(const DecodeAttention& p, const TensorView& t) {
  return {t.as<const T>(), p.steps(t), static_cast<int>(t.size(3)), rows_aligned(t)};
}

Options options_of(const DecodeAttention& p) {
  Options o{};
  o.slopes = p.alibi_slopes.defined() ? p.alibi_slopes.as<float>() : nullptr;
  o.slope_sequence = o.slopes ? p.alibi_slopes.stride(0) : 0;
  o.slope_head = o.slopes ? p.alibi_slopes.stride(1) : 0;
  o.distances = p.distance_bias.defined() ? p.distance_bias.as<float>() : nullptr;
  o.farthest = o.distances ? static_cast<int>(p.farthest()) : 0;
  o.sinks = p.sinks.defined() ? p.sinks.as<float>() : nullptr;
  o.left = static_cast<int>(std::min(p.window_left, kMostTokens));
  o.scale = static_cast<float>(p.scale);
  o.softcap = static_cast<float>(p.softcap);
  return o;
}

template <class T>
Decode<T> decode_of(const DecodeAttention& p) {
  const int64_t width = (p.value_cache.size(3) + 7) / 8 * 8;
  return {operand_of<const T>(p.query),
          operand_of<T>(p.output),
          p.lse.as<float>(),
          cache_of<T>(p, p.key_cache),
          cache_of<T>(p, p.value_cache),
          {p.paged() ? p.block_table.as<int32_t>() : nullptr, static_cast<int>(p.paged() ? p.block_table.size(1) : 1),
           static_cast<int>(p.page_size()), static_cast<int>(p.pages())},
          p.cache_lengths.as<int32_t>(),
          options_of(p),
          {p.partial_sums.as<float>(), p.partial_statistics.as<float>(), static_cast<int>(width),
           p.batch() * p.heads() * p.rows()},
          static_cast<int>(p.splits()),
          static_cast<int>((p.group() * p.rows() + kRows - 1) / kRows),
          static_cast<int>(p.heads()),
          static_cast<int>(p.group()),
          static_cast<int>(p.rows()),
          static_cast<int>(p.pages() ? p.capacity() : 0)};
}

dim3 grid_of(int64_t blocks) {
  check(blocks <= std::numeric_limits<int>::max(), "decode_attention: more than 2^31 blocks are not supported on CUDA");
  return dim3(static_cast<unsigned>(blocks));
}

}  // namespace
}  // namespace attention

void validate(const DecodeAttention& p) {
  const Checker at{"decode_attention"};
  ops::validate(p, attention::kOperandTypes);
  const int64_t slots = p.capacity(), rows = p.rows() * p.heads();
  for (int64_t count : {slots, rows, p.pages()}) {
    if (count > attention::kMostTokens) at.fail_at("key_cache", "has more slots, rows or pages than CUDA's 2^30");
  }
  if (p.partial_sums.defined() != p.partial_statistics.defined()) at.fail_at("partial_sums", "and statistics differ");
  const int64_t width = (p.value_cache.size(3) + 7) / 8 * 8;
  at.dtype(p.partial_sums, "partial_sums", {DType::f32});
  at.shape(p.partial_sums, "partial_sums", {p.splits(), p.batch(), p.heads(), p.rows(), width});
  at.contiguous(p.partial_sums, "partial_sums");
  at.dtype(p.partial_statistics, "partial_statistics", {DType::f32});
  at.shape(p.partial_statistics, "partial_statistics", {p.splits(), p.batch(), p.heads(), p.rows(), 2});
  at.contiguous(p.partial_statistics, "partial_statistics");
}

void run(const DecodeAttention& p, Stream stream) {
  using namespace attention;
  if (p.batch() * p.heads() * p.rows() == 0) return;
  const auto with = [&]<class T>(T) {
    const Decode<T> given = decode_of<T>(p);
    const int widest = static_cast<int>(std::max(p.query.size(3), p.value_cache.size(3)));
    visit_at_least<64, 128, 256>(widest, [&]<int D>(std::integral_constant<int, D>) {
      const LaunchSite at{"decode_attention_sm80",
                          grid_of(p.splits() * given.tiles * p.key_heads() * p.batch()),
                          Shape<D>::threads,
                          cuda_stream(stream),
                          p.query,
                          Shape<D>::bytes};
      launch(at, decode_attention_sm80<T, D>, given);
    });
    if (given.splits == 1) return;
    const int64_t items = given.partials.rows * (given.partials.width / 8);
    const LaunchSite at{"decode_attention_merge", grid_of((items + kMergers - 1) / kMergers), kMergers,
                        cuda_stream(stream), p.query};
    launch(at, decode_attention_merge<T>, given);
  };
  p.query.dtype == DType::bf16 ? with(bf16{}) : with(f16{});
}

}  // namespace llmengine::cuda
