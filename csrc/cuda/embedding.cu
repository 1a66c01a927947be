// Rows of a table by token id, and the table's gradient (formulas: ops/embedding.h).
//
//   A warp has a line of 32 vectors of 16 bytes of one row, and wider rows have several warps.
//
//   forward    four rows a warp, all on their way before the first is stored. 2e bytes an element (e: bytes of an
//              element); rows that many tokens share come from the L2 cache
//   backward   no float atomics: the tokens come sorted by id, equal ids in their order, and are cut into chunks of 16.
//     runs     a warp adds up a chunk's rows, four on their way at a time. Where the id changes, a sum is done: it is
//              stored in the gradient, or, if its run reaches beyond the chunk, in `partial`
//     join     a run that goes on beyond its chunk is added up from `partial` by the block of the chunk in which it
//              begins: 8 warps take turns at the chunks, then one adds the 8 sums
//              reads e bytes an element of the tokens and writes e bytes an element of the ids that occur, beside the
//              zeros that the table's gradient begins with; `partial` is at most an eighth of a float an element
//   limit      memory bandwidth
#include <cstdint>

#include "cuda/dispatch.h"
#include "cuda/embedding.h"
#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

constexpr int kWarps = 8;  // of a block
constexpr int kRows = 4;   // of a warp, in the forward
constexpr int kAhead = 4;  // rows that a backward's warp asks for at once
constexpr int kChunk = kEmbeddingChunk;
static_assert(kChunk % kAhead == 0);

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Gather {
  const int64_t* ids;
  Rows<const T> weight;
  Rows<T> output;
  int64_t tokens, rows;
  int columns;
  float scale;
};

template <class T>
__device__ __forceinline__ uint4 scaled(const uint4& vector, float scale) {
  float x[kLanes<T>];
  unpack<T>(vector, x);
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) x[i] *= scale;
  return pack<T>(x);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) embedding_forward(const Gather<T> p) {
  const int column = static_cast<int>(blockIdx.y * 32 + threadIdx.x) * kLanes<T>;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps * kRows + threadIdx.y; first < p.tokens;
       first += static_cast<int64_t>(gridDim.x) * kWarps * kRows) {
    uint4 row[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t token = first + k * kWarps;
      if (token >= p.tokens) continue;
      const int64_t id = p.ids[token];
      row[k] = make_uint4(~0u, ~0u, ~0u, ~0u);  // NaN in every dtype
      if (id >= 0 && id < p.rows) row[k] = load_vector(p.weight[id], column, p.columns, p.weight.aligned, false);
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t token = first + k * kWarps;
      if (token >= p.tokens) continue;
      if (p.scale != 1.0f) row[k] = scaled<T>(row[k], p.scale);
      store_vector(p.output[token], column, p.columns, p.output.aligned, row[k]);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Scatter {
  Rows<const T> grad_output;
  const int* ids;
  const int64_t* token;
  float* partial;
  bool partial_aligned;
  Rows<T> grad_weight;
  int64_t tokens;
  int columns, rows, padding_idx;
  float scale;

  __device__ bool counts(int id) const { return id >= 0 && id < rows && id != padding_idx; }
  // whether the places next to each other around the beginning of `place` have one id
  __device__ bool goes_on(int64_t place) const { return place > 0 && place < tokens && ids[place - 1] == ids[place]; }
  // of a chunk: the sum of a run that it inherits (0), or of one that begins in it and goes on (1)
  __device__ float* part(int64_t chunk, int which) const { return partial + (2 * chunk + which) * columns; }
};

template <class T, int n>
__device__ __forceinline__ void store_sum(const Scatter<T>& p, int id, int column, float (&total)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) total[i] *= p.scale;
  store_vector(p.grad_weight[id], column, p.columns, p.grad_weight.aligned, pack<T>(total));
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) embedding_backward_runs(const Scatter<T> p) {
  constexpr int n = kLanes<T>;
  const int column = static_cast<int>(blockIdx.y * 32 + threadIdx.x) * n;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y, first = chunk * kChunk;
  const int count = p.tokens - first < kChunk ? static_cast<int>(p.tokens - first) : kChunk;
  bool inherited = p.goes_on(first);
  float total[n] = {};
  for (int group = 0; group < count; group += kAhead) {
    uint4 row[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      row[k] = make_uint4(0, 0, 0, 0);
      if (group + k >= count) continue;
      const int64_t place = first + group + k;
      if (!p.counts(p.ids[place])) continue;
      row[k] = load_vector(p.grad_output[p.token[place]], column, p.columns, p.grad_output.aligned);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (group + k >= count) continue;
      const int64_t place = first + group + k;
      float x[n];
      unpack<T>(row[k], x);
#pragma unroll
      for (int i = 0; i < n; ++i) total[i] += x[i];
      const bool goes_on = p.goes_on(place + 1);
      if (goes_on && group + k + 1 < count) continue;
      if (goes_on || inherited) {
        store_floats(p.part(chunk, inherited ? 0 : 1), column, p.columns, p.partial_aligned, total);
      } else if (p.counts(p.ids[place])) {
        store_sum(p, p.ids[place], column, total);
      }
      inherited = false;
#pragma unroll
      for (int i = 0; i < n; ++i) total[i] = 0.0f;
    }
  }
}

// The first place after `place`, which has that id, where another stands.
template <class T>
__device__ __forceinline__ int64_t end_of_run(const Scatter<T>& p, int64_t place, int id) {
  int64_t low = place + 1, high = p.tokens;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.ids[middle] == id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) embedding_backward_join(const Scatter<T> p) {
  constexpr int n = kLanes<T>;
  __shared__ float sums[kWarps][n][32];
  const int64_t chunk = blockIdx.x, first = chunk * kChunk, next = first + kChunk;
  if (!p.goes_on(next)) return;
  const int id = p.ids[next];
  if (!p.counts(id) || (p.goes_on(first) && p.ids[first] == id)) return;  // began in an earlier chunk
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.y * 32 + threadIdx.x) * n;
  const int64_t last = (end_of_run(p, next, id) - 1) / kChunk;
  float total[n] = {};
#pragma unroll 2
  for (int64_t c = chunk + warp; c <= last; c += kWarps) {
    float part[n];
    load_floats(p.part(c, c == chunk ? 1 : 0), column, p.columns, p.partial_aligned, part);
#pragma unroll
    for (int i = 0; i < n; ++i) total[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < n; ++i) sums[warp][i][lane] = total[i];
  __syncthreads();
  if (warp > 0) return;
  for (int other = 1; other < kWarps; ++other) {
#pragma unroll
    for (int i = 0; i < n; ++i) total[i] += sums[other][i][lane];
  }
  store_sum(p, id, column, total);
}

// ---- launches -------------------------------------------------------------------------------------------------------

// Lines of 32 vectors in a row.
unsigned lines_of(const char* op, const TensorView& rows, int columns) {
  const int64_t width = 32 * (16 / size_of(rows.dtype)), lines = (columns + width - 1) / width;
  check(lines <= 65535,
        std::string(op) + ": rows of " + std::to_string(columns) + " columns are not supported on CUDA");
  return static_cast<unsigned>(lines);
}

}  // namespace

void validate(const EmbeddingForward& p) { ops::validate(p, kFloatTypes); }

void validate(const EmbeddingBackward& p) {
  const Checker at{"embedding backward"};
  ops::validate_embedding(at, {&p.grad_output, "grad_output"}, {&p.grad_weight, "grad_weight"}, kFloatTypes);
  const int64_t tokens = p.grad_output.size(0), columns = p.grad_output.size(1);
  ops::validate_ids(at, p.ids, "ids", tokens, DType::i32);
  ops::validate_ids(at, p.tokens, "tokens", tokens, DType::i64);
  at.contiguous(p.grad_weight, "grad_weight");
  at.defined(p.partial, "partial");
  at.dtype(p.partial, "partial", {DType::f32});
  at.shape(p.partial, "partial", {(tokens + kChunk - 1) / kChunk, 2, columns});
  at.contiguous(p.partial, "partial");
  check(p.grad_weight.size(0) <= INT32_MAX,
        "embedding backward: tables have at most 2^31 - 1 rows on CUDA, got " + p.grad_weight.shape());
}

void run(const EmbeddingForward& p, Stream stream) {
  const int columns = columns_of("embedding", p.weight);
  visit_float(p.weight.dtype, [&]<class T>(T) {
    const Gather<T> given{p.input.as<int64_t>(),      rows_of<const T>(p.weight),
                          rows_of<T>(p.output),       p.input.size(0),
                          p.weight.size(0),           columns,
                          static_cast<float>(p.scale)};
    const dim3 grid(grid_of(given.tokens, kWarps * kRows), lines_of("embedding", p.weight, columns));
    launch({"embedding_forward", grid, dim3(32, kWarps), cuda_stream(stream), p.output}, embedding_forward<T>, given);
  });
}

void run(const EmbeddingBackward& p, Stream stream) {
  const int columns = columns_of("embedding backward", p.grad_output);
  const unsigned lines = lines_of("embedding backward", p.grad_output, columns);
  const int64_t chunks = p.partial.size(0);
  visit_float(p.grad_output.dtype, [&]<class T>(T) {
    const Scatter<T> given{rows_of<const T>(p.grad_output),
                           p.ids.as<int>(),
                           p.tokens.as<int64_t>(),
                           p.partial.as<float>(),
                           has_aligned_rows(p.partial) && columns % 4 == 0,
                           rows_of<T>(p.grad_weight),
                           p.grad_output.size(0),
                           columns,
                           static_cast<int>(p.grad_weight.size(0)),
                           static_cast<int>(p.padding_idx),
                           static_cast<float>(p.scale)};
    const dim3 block(32, kWarps), runs((static_cast<unsigned>(chunks) + kWarps - 1) / kWarps, lines);
    launch({"embedding_backward_runs", runs, block, cuda_stream(stream), p.grad_output}, embedding_backward_runs<T>,
           given);
    const dim3 joins(static_cast<unsigned>(chunks), lines);
    launch({"embedding_backward_join", joins, block, cuda_stream(stream), p.grad_output}, embedding_backward_join<T>,
           given);
  });
}

}  // namespace llmengine::cuda
