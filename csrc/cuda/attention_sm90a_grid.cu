// Attention, backward, in one pass, on Hopper: what stands around attention_one_pass_sm90a
// (attention_sm90a_one_pass.cu).
//
//   attention_largest_sm90a      of each head of keys of each sequence the largest |k_jd|, |k_j| and |v_j|, but
//                                for keys that padding hides. Keys and values once; limit: memory
//   attention_of_rows_sm90a      base, delta, steps (attention_grid.h) and shift as tiles of the grid's rows have them.
//                                A thread a row, 36 bytes
//   attention_mask_from_sums_sm90a   of a mask that is shared, integers to its gradient; limit: memory
//   attention_from_grid_sm90a    the grid's integers to dQ, and which tiles are to be made anew. A block has 128 rows;
//                                bytes: 4 head_dim a row, and dQ once; limit: memory
#include <cmath>
#include <cstdint>
#include <string>

#include "cuda/attention_sm90a_grid.cuh"

namespace llmengine::cuda {
namespace attention {
namespace {

// ---- the largest keys and values ------------------------------------------------------------------------------------

// Bits of |x|: they compare as integers as the numbers do, and NaN are above all.
__device__ __forceinline__ int bits_of_size(float x) { return static_cast<int>(__float_as_uint(x) & 0x7fffffffu); }

struct Sizes3 {
  int of[3];

  __device__ __forceinline__ void raise(int i, float x) { of[i] = largest(of[i], bits_of_size(x)); }
};

// Sixteen lanes have a row of up to 128 columns; its square, in each of them.
template <class T>
__device__ __forceinline__ float square_of_row(const Lines<const T>& from, int line, float& most) {
  float x[kLanes<T>], square = 0.0f;
  const int column = lane_of() % 16 * kLanes<T>;
  unpack<T>(load_vector(from.data + line * from.stride, column, from.columns, from.aligned), x);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) {
    square += x[i] * x[i];
    if (bits_of_size(x[i]) > bits_of_size(most)) most = x[i];
  }
#pragma unroll
  for (int lanes = 8; lanes > 0; lanes /= 2) square += __shfl_xor_sync(kWholeWarp, square, lanes);
  return square;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    attention_largest_sm90a(const Operand<const T> key, const Operand<const T> value, const Sizes sizes,
                            const Seen seen, int32_t* to) {
  const int heads = sizes.heads / sizes.group, head = static_cast<int>(blockIdx.x) % heads;
  const auto [s, tile] = at_place(sizes, true, static_cast<int>(blockIdx.x) / heads, kRemadeRows);
  const int first = tile * kRemadeRows, count = least(kRemadeRows, s.keys - first);
  if (first < 0 || count <= 0) return;
  const Lines<const T> keys = key.lines(s.batch, head, s.key0 + first);
  const Lines<const T> values = value.lines(s.batch, head, s.key0 + first);
  Sizes3 sizes_of{};
#pragma unroll 1
  for (int step = 0; step < kRemadeRows / (2 * kWarps); ++step) {
    const int line = least(2 * (step * kWarps + warp_of()) + lane_of() / 16, count - 1);
    float most = 0.0f, any = 0.0f;
    const float key_square = square_of_row(keys, line, most), value_square = square_of_row(values, line, any);
    if (seen.keys && !is_seen(seen, s, first + line)) continue;
    sizes_of.raise(0, most);
    sizes_of.raise(1, key_square);
    sizes_of.raise(2, value_square);
  }
#pragma unroll
  for (int i = 0; i < 3; ++i) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      sizes_of.of[i] = largest(sizes_of.of[i], __shfl_xor_sync(kWholeWarp, sizes_of.of[i], lanes));
    if (lane_of() == i) atomicMax(to + 3 * (static_cast<int64_t>(s.index) * heads + head) + i, sizes_of.of[i]);
  }
}

// ---- what is known of rows ------------------------------------------------------------------------------------------

struct OfRows {
  const float *shift, *base, *delta, *grad_squares, *query_squares;
  Sizes sizes;
  Grid grid;
  MaskGradient mask;
  int passing;
  float scale, softcap, keep_scale;
};

__global__ void __launch_bounds__(kRemadeRows) attention_of_rows_sm90a(const OfRows p) {
  const int block = static_cast<int>(blockIdx.x), head = block % p.sizes.heads;
  const auto [s, tile] = at_place(p.sizes, false, block / p.sizes.heads, kRemadeRows);
  const int row = tile * kRemadeRows + static_cast<int>(threadIdx.x);
  if (tile < 0 || row >= (s.rows + kGridRows - 1) / kGridRows * kGridRows) return;
  float base = INFINITY, delta = 0.0f, steps = 0.0f, shift = 0.0f;
  if (row < s.rows) {
    const int64_t at = (s.batch * p.sizes.heads + head) * p.sizes.rows + s.row0 + row;
    const int heads = p.sizes.heads / p.sizes.group;
    const int32_t* sizes = p.grid.largest + 3 * (static_cast<int64_t>(s.index) * heads + head / p.sizes.group);
    const float key = __uint_as_float(static_cast<uint32_t>(sizes[0]));
    const float key_square = __uint_as_float(static_cast<uint32_t>(sizes[1]));
    const float value_square = __uint_as_float(static_cast<uint32_t>(sizes[2]));
    base = p.base[at], delta = p.delta[at], shift = p.shift[at];
    const float of_score = p.keep_scale * sqrtf(p.grad_squares[at]) * sqrtf(value_square) + fabsf(delta);
    const float bound = of_score * key;
    const float reach = kLog2e * (fabsf(p.scale) * sqrtf(p.query_squares[at]) * sqrtf(key_square) + p.softcap);
    const bool seen = base != INFINITY;
    const bool strange =
        seen && !(bound < INFINITY && reach <= kGridReach && fabsf(shift * kLog2e + base) <= kGridReach);
    if (seen && !strange) steps = steps_of(bound);
    if (strange) atomicExch(p.grid.remade + remade_place(p.sizes, s, head, tile), 1);
    if (seen && p.mask.sums) {
      const int64_t line = strange ? p.mask.lines : p.mask.line_of(s, head, row);
      atomicMax(p.mask.bounds + line, strange ? 1 : bits_of_size(of_score));
    }
  }
  const int64_t on_grid = Grid::row_of(p.sizes, s, head, row / p.passing * p.passing);
  float* to = p.grid.rows + kOfRow * on_grid + row % p.passing;
  to[0] = base, to[p.passing] = delta, to[2 * p.passing] = steps, to[3 * p.passing] = shift;
}

// ---- from the grid --------------------------------------------------------------------------------------------------

inline constexpr int kFromGridThreads = 256;

template <class T>
struct FromGrid {
  Operand<T> grad_query;
  Options options;
  Sizes sizes;
  Grid grid;
};

template <class T, int D, int passing>
struct FromGridRoom {
  uint16_t tile[kGridRows * D];
  float largest[kFromGridThreads / 32], coarsest[kFromGridThreads / 32];
};

// Of up to `kGridRows` rows: what this thread has of the largest number but for scale, and of the largest step.
template <class T, int D, int passing>
__device__ __forceinline__ void rows_from_grid(const Tile<T, kGridRows, D>& tile, const FromGrid<T>& p, int64_t on_grid,
                                               float& most, float& coarsest) {
  using P = Part<D, passing>;
  constexpr int kQuads = passing * D / 4, kFirst = P::numbers(0) / 4;  // of a tile that passes, of its first part
  const uint4* numbers = reinterpret_cast<const uint4*>(p.grid.numbers + on_grid * D);
  const float* rows = p.grid.rows + kOfRow * on_grid;
#pragma unroll 1
  for (int q = static_cast<int>(threadIdx.x); q < kGridRows / passing * kQuads; q += kFromGridThreads) {
    const int tile_that_passed = q / kQuads, group = q % kQuads >= kFirst, within = q % kQuads - group * kFirst;
    const int j = within / P::threads(group), thread = within % P::threads(group);
    const uint4 quad = ptx::load_16_once(numbers + q);
    const int row = 8 * j + thread % 4 * 2 + P::first_row(group);
    const int column = thread / 32 * 16 + thread % 32 / 4 + P::first_column(group);
    const uint32_t words[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float steps = rows[tile_that_passed * kOfRow * passing + 2 * passing + row + i];
      const float step = steps > 0.0f ? 1.0f / steps : 0.0f;
      coarsest = fmaxf(coarsest, step);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = static_cast<float>(static_cast<int32_t>(words[2 * half + i])) * step;
        most = fmaxf(most, fabsf(x));
        const int c = column + 8 * half;
        T* to = tile.chunk(tile_that_passed * passing + row + i, c / 8) + c % 8;
        *to = narrowed<T>(x * p.options.scale);
      }
    }
  }
}

template <class T, int D, int passing>
__global__ void __launch_bounds__(kFromGridThreads) attention_from_grid_sm90a(const FromGrid<T> p) {
  __shared__ FromGridRoom<T, D, passing> room;
  const int block = static_cast<int>(blockIdx.x), head = block % p.sizes.heads;
  const auto at = at_place(p.sizes, false, block / p.sizes.heads, kRemadeRows);
  const Sequence& s = at.s;
  const int first = at.tile * kRemadeRows, thread = static_cast<int>(threadIdx.x);
  if (first < 0 || first >= s.rows) return;
  const Tile<T, kGridRows, D> tile{reinterpret_cast<T*>(room.tile)};
  float most = 0.0f, coarsest = 0.0f;
#pragma unroll 1
  for (int row = first; row < least(first + kRemadeRows, s.rows); row += kGridRows) {
    rows_from_grid<T, D, passing>(tile, p, Grid::row_of(p.sizes, s, head, row), most, coarsest);
    __syncthreads();
    const Lines<T> to = p.grad_query.lines(s.batch, head, s.row0 + row);
    const int count = least(kGridRows, s.rows - row);
    for (int i = thread; i < count * (D / 8); i += kFromGridThreads) {
      const int line = i / (D / 8), c = i % (D / 8);
      store_vector(to.data + line * to.stride, c * 8, to.columns, to.aligned,
                   *reinterpret_cast<const uint4*>(tile.chunk(line, c)));
    }
    __syncthreads();
  }
  float both[2] = {most, coarsest};
  warp_reduce<Max>(both);
  if (lane_of() == 0) room.largest[warp_of()] = both[0], room.coarsest[warp_of()] = both[1];
  __syncthreads();
  if (thread != 0) return;
  const Span seen = keys_of_rows(s.band(p.options), first, kRemadeRows);
  const auto parts = static_cast<float>((seen.end - seen.begin) / kRemadeRows + 2);
  const float error = largest_of(room.coarsest) * sqrtf(parts);
  int* flag = p.grid.remade + remade_place(p.sizes, s, head, at.tile);
  if (!is_too_coarse(largest_of(room.largest), error, std::is_same_v<T, bf16> ? 8 : 11) && *flag == 0) return;
  *flag = 1;
  atomicAdd(p.grid.remade, 1);
}

// A block for every row of the mask.
__global__ void __launch_bounds__(kThreads) attention_mask_from_sums_sm90a(const MaskGradient p, float* to) {
  const int64_t line = blockIdx.x;
  const float steps = p.steps(line), step = steps > 0.0f ? 1.0f / steps : 0.0f;
  for (int key = static_cast<int>(threadIdx.x); key < p.keys; key += kThreads)
    to[line * p.keys + key] = static_cast<float>(p.sums[line * p.keys + key]) * step;
}

// ---- launches -------------------------------------------------------------------------------------------------------

void run_largest(const AttentionBackwardOnePass& p, Stream stream) {
  const auto of_type = [&]<class T>(T) {
    const Sizes sizes = sizes_of_keys(p, kRemadeRows);
    launch({"attention_largest_sm90a", grid_of_places(p, true, kRemadeRows), kThreads, cuda_stream(stream), p.key},
           attention_largest_sm90a<T>, operand_of<const T>(p.key), operand_of<const T>(p.value), sizes,
           seen_of(p, p.spans), p.largest.as<int32_t>());
  };
  p.query.dtype == DType::bf16 ? of_type(bf16{}) : of_type(f16{});
}

void run_of_rows(const AttentionBackwardOnePass& p, Stream stream, int passing) {
  const Sizes sizes = sizes_of_rows(p, kRemadeRows);
  const float* squares = p.squares.as<float>();
  const OfRows given{p.shift.as<float>(),
                     p.base.as<float>(),
                     p.delta.as<float>(),
                     squares,
                     squares + p.heads() * p.query.size(0) * p.query.size(2),
                     sizes,
                     grid_of_call(p),
                     mask_gradient_of(p),
                     passing,
                     static_cast<float>(p.scale),
                     static_cast<float>(p.softcap),
                     options_of(p).dropout.keep_scale};
  launch({"attention_of_rows_sm90a", grid_of_places(p, false, kRemadeRows), kRemadeRows, cuda_stream(stream), p.query},
         attention_of_rows_sm90a, given);
}

void run_mask_from_sums(const AttentionBackwardOnePass& p, const MaskGradient& mask, Stream stream) {
  const dim3 blocks(static_cast<unsigned>(mask.lines));
  launch({"attention_mask_from_sums_sm90a", blocks, kThreads, cuda_stream(stream), p.grad_mask},
         attention_mask_from_sums_sm90a, mask, p.grad_mask.as<float>());
  run_mask(p, stream, mask.bounds + mask.lines);
}

template <class T, int D, int passing>
void run_from_grid(const AttentionBackwardOnePass& p, Stream stream) {
  const Sizes sizes = sizes_of_rows(p, kRemadeRows);
  const FromGrid<T> given{operand_of<T>(p.grad_query), options_of(p), sizes, grid_of_call(p)};
  launch({"attention_from_grid_sm90a", grid_of_places(p, false, kRemadeRows), kFromGridThreads, cuda_stream(stream),
          p.query},
         attention_from_grid_sm90a<T, D, passing>, given);
}

}  // namespace
}  // namespace attention

void validate(const AttentionBackwardOnePass& p) {
  validate(static_cast<const AttentionBackwardSm90a&>(p));
  const Checker at{"attention backward in one pass"};
  const int64_t rows = p.query.size(2), heads = p.heads(), widest = std::max(p.query.size(3), p.value.size(3)),
                dim = widest <= 64   ? 64
                      : widest <= 96 ? 96
                                     : 128;
  const auto places = [&](int lines) { return attention::count_places(p.sequences(), rows, lines, p.packed()); };
  const int64_t tiles = places(attention::kGridRows);
  struct Given {
    const TensorView* t;
    const char* argument;
    DType dtype;
  };
  for (const Given& g : {Given{&p.grid, "grid", DType::i32}, Given{&p.remade, "remade", DType::i32},
                         Given{&p.largest, "largest", DType::i32}, Given{&p.squares, "squares", DType::f32},
                         Given{&p.of_rows, "of_rows", DType::f32}}) {
    at.defined(*g.t, g.argument);
    at.dtype(*g.t, g.argument, {g.dtype});
    at.contiguous(*g.t, g.argument);
  }
  if (widest > 128) at.fail_at("query", "has head dims above 128");
  if (tiles * heads * attention::kGridRows > std::numeric_limits<int>::max()) {
    at.fail_at("query", "has 2^31 rows of all heads or more");
  }
  at.shape(p.grid, "grid", {tiles, heads, attention::kGridRows, dim});
  at.shape(p.remade, "remade", {1 + places(attention::kRemadeRows) * heads});
  at.shape(p.largest, "largest", {p.sequences(), p.key_heads(), 3});
  at.shape(p.squares, "squares", {2, p.query.size(0), heads, rows});
  at.shape(p.of_rows, "of_rows", {tiles, heads, attention::kOfRow, attention::kGridRows});
  const TensorView& grad = p.grad_mask;
  if (!attention::is_gradient_of_the_pass(p) || (grad.size(0) == p.query.size(0) && grad.size(1) == heads)) return;
  for (auto [t, argument] : NamedTensors{{&p.mask_sums, "mask_sums"}, {&p.mask_bounds, "mask_bounds"}}) {
    at.defined(*t, argument);
    at.contiguous(*t, argument);
  }
  at.dtype(p.mask_sums, "mask_sums", {DType::i64});
  at.dtype(p.mask_bounds, "mask_bounds", {DType::i32});
  at.shape(p.mask_sums, "mask_sums", {grad.size(0), grad.size(1), grad.size(2), grad.size(3)});
  at.shape(p.mask_bounds, "mask_bounds", {grad.size(0) * grad.size(1) * grad.size(2) + 1});
}

void run(const AttentionBackwardOnePass& p, Stream stream) {
  using namespace attention;
  check_is_hopper("attention_backward_one_pass");
  run_statistics(p, stream, Padding::apart, p.squares.as<float>());
  run_seen(p, p.spans, stream);
  run_largest(p, stream);
  visit_hopper<64, 96, 128>(
      p, [&]<class T, int D, bool simple>(T, std::integral_constant<int, D>, auto, std::bool_constant<simple>) {
        constexpr int passing = kGridPassing<D, simple>;
        run_of_rows(p, stream, passing);
        run_one_pass(p, stream);
        run_from_grid<T, D, passing>(p, stream);
      });
  run_rows(p, stream, p.remade.as<int>());
  const MaskGradient mask = mask_gradient_of(p);
  if (mask.sums) run_mask_from_sums(p, mask, stream);
  if (p.grad_mask.defined() && !is_gradient_of_the_pass(p)) run_mask(p, stream);
  if (p.partial_distances.defined()) run_distances(p, stream);
}

}  // namespace llmengine::cuda
