// Rotary position embedding, forward and backward (formulas: ops/rotary.h).
//
//   A block owns tokens, all their heads. threadIdx.z is a token, threadIdx.x a place of n pairs in its heads (n: the
//   elements of 16 bytes), and threadIdx.y takes every so manieth head: a thread loads its n cosines and sines once and
//   turns that place of each of its heads, two 16-byte vectors read and two written. Nothing is shared or waited for.
//   The backward is the same kernel with the angles' sign turned.
//   moves 2e bytes an element (e: bytes of an element), and 4 bytes of angles an element of one head
//   limit: memory bandwidth; 3 operations an element
#include <cstdint>

#include "cuda/dispatch.h"
#include "cuda/launch.cuh"
#include "cuda/rotary.h"
#include "cuda/row.cuh"
#include "cuda/row_shape.h"

namespace llmengine::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct Turn {
  const T* from;
  T* to;  // contiguous
  const float *cos, *sin;
  int64_t tokens_of_all, tokens;  // of all sequences, of one
  int64_t batch_stride, token_stride, head_stride;
  int heads, head_dim, pairs;
  float sign;
  bool from_aligned, to_aligned, angles_aligned;  // of every head, of every token: its beginning

  // whether a vector that begins at `feature` of every head may be loaded, or stored, whole
  __device__ bool whole(bool aligned, int feature) const { return aligned && feature % kLanes<T> == 0; }
};

// Pairs [pair, pair + n) of one head, in two vectors.
template <class T, bool kInterleaved>
__device__ __forceinline__ void turn_pairs(const Turn<T>& p, const T* from, T* to, int pair,
                                           const float (&cos)[kLanes<T>], const float (&sin)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  // The second vector: of the other half, or the next. Each half has `pairs` features, or both together have all.
  const int second = kInterleaved ? 0 : p.pairs, end = kInterleaved ? 2 * p.pairs : p.pairs;
  const int one = kInterleaved ? 2 * pair : pair, other = kInterleaved ? one + n : pair;
  const bool load_whole = p.whole(p.from_aligned, second), store_whole = p.whole(p.to_aligned, second);
  const uint4 raw_one = load_vector(from, one, end, p.from_aligned);
  const uint4 raw_other = load_vector(from + second, other, end, load_whole);
  float x[2 * n], y[2 * n], part[n];
  unpack<T>(raw_one, part);
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = part[i];
  unpack<T>(raw_other, part);
#pragma unroll
  for (int i = 0; i < n; ++i) x[n + i] = part[i];
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const int a = kInterleaved ? 2 * k : k, b = kInterleaved ? 2 * k + 1 : n + k;
    y[a] = x[a] * cos[k] - x[b] * sin[k];
    y[b] = x[b] * cos[k] + x[a] * sin[k];
  }
#pragma unroll
  for (int i = 0; i < n; ++i) part[i] = y[i];
  store_vector(to, one, end, p.to_aligned, pack<T>(part));
#pragma unroll
  for (int i = 0; i < n; ++i) part[i] = y[n + i];
  store_vector(to + second, other, end, store_whole, pack<T>(part));
}

template <class T, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rotary(const Turn<T> p) {
  constexpr int n = kLanes<T>;
  const int first = static_cast<int>(threadIdx.x) * n, step = static_cast<int>(blockDim.x) * n;
  const int first_head = static_cast<int>(threadIdx.y), heads_step = static_cast<int>(blockDim.y);
  const int turned = 2 * p.pairs, rest = p.head_dim - turned;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z; token < p.tokens_of_all;
       token += static_cast<int64_t>(gridDim.x) * blockDim.z) {
    const int64_t sequence = token / p.tokens, place = token - sequence * p.tokens;
    const T* from = p.from + sequence * p.batch_stride + place * p.token_stride;
    T* to = p.to + token * p.heads * p.head_dim;
    for (int pair = first; pair < p.pairs; pair += step) {
      float cos[n], sin[n];
      load_floats(p.cos + place * p.pairs, pair, p.pairs, p.angles_aligned, cos);
      load_floats(p.sin + place * p.pairs, pair, p.pairs, p.angles_aligned, sin);
#pragma unroll
      for (int k = 0; k < n; ++k) sin[k] *= p.sign;
      for (int head = first_head; head < p.heads; head += heads_step) {
        turn_pairs<T, kInterleaved>(p, from + head * p.head_stride, to + static_cast<int64_t>(head) * p.head_dim, pair,
                                    cos, sin);
      }
    }
    for (int feature = first; feature < rest; feature += step) {
      for (int head = first_head; head < p.heads; head += heads_step) {
        const uint4 passed =
            load_vector(from + head * p.head_stride + turned, feature, rest, p.whole(p.from_aligned, turned));
        store_vector(to + static_cast<int64_t>(head) * p.head_dim + turned, feature, rest,
                     p.whole(p.to_aligned, turned), passed);
      }
    }
  }
}

// Whether every head begins at a multiple of 16 bytes.
bool has_aligned_heads(const TensorView& t) {
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0) return false;
  for (int d = 0; d < t.ndim - 1; ++d) {
    if (t.sizes[d] > 1 && t.strides[d] * size_of(t.dtype) % 16 != 0) return false;
  }
  return true;
}

// Threads for n pairs each, then for heads, then for tokens.
dim3 block_of(int heads, int head_dim, int lanes) {
  const int places = (head_dim / 2 + lanes - 1) / lanes;
  int x = 1, y = 1, z = 1;
  while (x < places && x < 32) x *= 2;
  while (y < heads && x * y < kThreads) y *= 2;
  while (x * y * z < kThreads && z < 64) z *= 2;
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

void turn(const char* kernel, const TensorView& from, const TensorView& cos, const TensorView& sin,
          const TensorView& to, bool interleaved, float sign, Stream stream) {
  if (to.numel() == 0) return;
  for (int dim : {2, 3}) {
    check(from.size(dim) <= 1 << 24, std::string(kernel) + ": at most " + std::to_string(1 << 24) +
                                         " heads and features are supported on CUDA, got " + from.shape());
  }
  visit_float(from.dtype, [&]<class T>(T) {
    const auto heads = static_cast<int>(from.size(2)), head_dim = static_cast<int>(from.size(3));
    const auto pairs = static_cast<int>(cos.size(1));
    const bool angles_aligned = has_aligned_rows(cos) && has_aligned_rows(sin);
    const Turn<T> given{from.as<T>(),
                        to.as<T>(),
                        cos.as<float>(),
                        sin.as<float>(),
                        from.size(0) * from.size(1),
                        from.size(1),
                        from.stride(0),
                        from.stride(1),
                        from.stride(2),
                        heads,
                        head_dim,
                        pairs,
                        sign,
                        has_aligned_heads(from),
                        has_aligned_heads(to),
                        angles_aligned};
    const dim3 block = block_of(heads, head_dim, kLanes<T>);
    const LaunchSite at{kernel, grid_of(given.tokens_of_all, static_cast<int>(block.z)), block, cuda_stream(stream),
                        from};
    if (interleaved) {
      launch(at, rotary<T, true>, given);
    } else {
      launch(at, rotary<T, false>, given);
    }
  });
}

}  // namespace

void validate(const RotaryForward& p) { ops::validate(p, kFloatTypes); }
void validate(const RotaryBackward& p) { ops::validate(p, kFloatTypes); }

void run(const RotaryForward& p, Stream stream) {
  turn("rotary", p.input, p.cos, p.sin, p.output, p.interleaved, 1.0f, stream);
}

void run(const RotaryBackward& p, Stream stream) {
  turn("rotary backward", p.grad_output, p.cos, p.sin, p.grad_input, p.interleaved, -1.0f, stream);
}

}  // namespace llmengine::cuda
