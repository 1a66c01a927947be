// The products of a linear layer's cross-entropy, on Hopper (the operator: linear_cross_entropy.cu; products:
// gemm_sm90a.cuh).
//
//   logits_of_span   a cluster owns 256 tokens and a span of the classes, one tile of 256 after the other. A thread has
//                    64 logits of each of two tokens a tile, and keeps what it knows of them in registers: the largest,
//                    the sum of exponentials below it, with label smoothing the sum of w z. The four threads of a token
//                    meet at the span's end.
//   logits_gradient  a tile of logits again, and from lse their gradient. The factors of a warpgroup's 64 tokens lie in
//                    shared memory. Tiles of tokens without a label are multiplied as any.
//
//   limit   the tensor cores, which stand still in an epilogue: of the forward 32768 exponentials, 2048 clocks, beside
//           16 d for a tile's products
#include <cmath>
#include <cstdint>

#include "cuda/gemm_host.h"
#include "cuda/gemm_sm90a_host.h"
#include "cuda/linear_cross_entropy_products.cuh"

namespace llmengine::cuda {
namespace {

using namespace gemm_sm90a;

__device__ __forceinline__ int lane_of_four() { return static_cast<int>(threadIdx.x) % 4; }

// ---- forward --------------------------------------------------------------------------------------------------------

template <class T>
struct Forward {
  Operands operands;
  Tiles tiles;
  int tokens;
  Line bias;
  LossOptions options;
  float *partial, *target_logits;
};

// What is known of a thread's two tokens from its columns of their logits.
template <class T>
struct Known {
  const Forward<T>& p;
  int label[2];
  float largest[2], total[2], weighted[2];

  __device__ explicit Known(const Forward<T>& forward) : p(forward) {}

  __device__ __forceinline__ int token(const Place& place, int half) const {
    return place.row + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 +
           8 * half;
  }

  __device__ __forceinline__ void begin(const Place& place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      label[half] = label_of(p.options, token(place, half), p.tokens);
      largest[half] = -INFINITY, total[half] = weighted[half] = 0.0f;
    }
  }

  template <int count>
  __device__ __forceinline__ void finish(float (&d)[count], Room&, const Place& place) {
#pragma unroll 1
    for (int panel = 0; panel < count / 32; ++panel) {
      float z[32];
#pragma unroll
      for (int q = 0; q < count / 32; ++q) {  // registers have no number at run time
        if (panel != q) continue;
#pragma unroll
        for (int i = 0; i < 32; ++i) z[i] = d[32 * q + i];
      }
      const int first = place.column + panel * kPanel + lane_of_four() * 2;
      finish_logits(z, first);
      add<0>(z, token(place, 0), first);
      add<1>(z, token(place, 1), first);
    }
  }

  __device__ __forceinline__ void finish_logits(float (&z)[32], int first) const {
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first + 8 * j + i;
        const bool inside = column < p.options.classes;
        const float bias = p.bias.data && inside ? element_of<T>(p.bias, column) : 0.0f;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          z[4 * j + 2 * half + i] = logit_of(p.options, z[4 * j + 2 * half + i], bias, inside);
        }
      }
  }

  // Sixteen logits of one of the tokens join what is known of it.
  template <int half>
  __device__ __forceinline__ void add(const float (&z)[32], int token, int first) {
    float higher = largest[half];
#pragma unroll
    for (int j = 0; j < 8; ++j) higher = fmaxf(higher, fmaxf(z[4 * j + 2 * half], z[4 * j + 2 * half + 1]));
    float sum = total[half] * exp_below(largest[half], higher);
    const int place = label[half] - first;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float logit = z[4 * j + 2 * half + i];
        sum += exp_below(logit, higher);
        if (label[half] >= 0 && place == 8 * j + i) p.target_logits[token] = logit;
      }
    largest[half] = higher, total[half] = sum;
    if (p.options.share <= 0.0f) return;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first + 8 * j + i;
        if (column >= p.options.classes) continue;
        weighted[half] += z[4 * j + 2 * half + i] * (p.options.weight ? p.options.weight[column] : 1.0f);
      }
  }

  __device__ __forceinline__ void end(const Place& place) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float higher = fmaxf(largest[half], __shfl_xor_sync(kWholeWarp, largest[half], 1));
      higher = fmaxf(higher, __shfl_xor_sync(kWholeWarp, higher, 2));
      const float sum = sum_of_four(total[half] * exp_below(largest[half], higher)), w = sum_of_four(weighted[half]);
      const int64_t token = this->token(place, half), tokens = p.tokens;
      if (lane_of_four() != 0 || token >= tokens) continue;
      float* to = p.partial + place.span * 3 * tokens + token;
      to[0] = higher, to[tokens] = sum, to[2 * tokens] = w;
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) logits_of_span_sm90a(const __grid_constant__ Forward<T> p) {
  auto& shared = *static_cast<Shared<kColumns>*>(ptx::dynamic_shared_1024());
  multiply<T, kColumns, false, false, false>(shared, p.operands, p.tiles, Known<T>(p));
}

// ---- backward -------------------------------------------------------------------------------------------------------

template <class T>
struct Backward {
  Operands operands;
  Tiles tiles;
  LogitsGradient<T> to;
};

struct SharedWithTokens {
  Shared<kColumns> product;
  Tokens<64> tokens[kWarpgroups];
};

template <class T>
struct FinishGradient {
  const LogitsGradient<T>& to;
  Tokens<64>* tokens;

  __device__ FinishGradient(const LogitsGradient<T>& gradient, Tokens<64>* of_warpgroups)
      : to(gradient), tokens(of_warpgroups) {}

  __device__ __forceinline__ Tokens<64>& own() const { return tokens[threadIdx.x / 128 - 1]; }

  __device__ __forceinline__ void begin(const Place& place) {
    const int line = static_cast<int>(threadIdx.x) % 128, group = static_cast<int>(threadIdx.x) / 128;
    ptx::barrier_sync(group, 128);  // the tokens before have been looked at
    if (line < 64) begin_token(to, own(), line, place.row + line);
    ptx::barrier_sync(group, 128);
  }
  __device__ __forceinline__ void end(const Place&) {}

  template <int count>
  __device__ __forceinline__ void finish(float (&d)[count], Room& room, const Place& place) {
    float sums[8] = {};
    const auto turn = [&](int r, int v, float (&x)[1][8], int) {
      finish_gradient(to, own(), r, place.row + r, place.column + v, x[0], sums);
    };
    each_vector<1, 1>(
        d, room, [](int, int) { return 0; }, turn,
        [&](int v) {
          const Rows<float>& partial = to.partial_bias;
          if (!partial.data) return;
          const int line = place.row / 64, columns = line < to.lines ? to.columns : 0;
          store_column_sums(sums, room, partial[line], place.column + v, columns, partial.aligned);
        });
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) logits_gradient_sm90a(const __grid_constant__ Backward<T> p) {
  auto& shared = *static_cast<SharedWithTokens*>(ptx::dynamic_shared_1024());
  multiply<T, kColumns, false, false, false>(shared.product, p.operands, p.tiles,
                                             FinishGradient<T>(p.to, shared.tokens));
}

}  // namespace

// ---- launches -------------------------------------------------------------------------------------------------------

int logits_of_spans_sm90a(const LinearCrossEntropyForward& p, Stream stream) {
  const int64_t tokens = p.input.size(0), classes = p.linear_weight.size(0);
  Tiles tiles = tiles_of(tokens, classes, p.input.size(1));
  tiles.span = ceil_divide(tiles.columns, p.partial.size(0));
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    const Forward<T> given{operands_of(p.input, false, p.linear_weight, false),
                           tiles,
                           static_cast<int>(tokens),
                           line_of(p.linear_bias),
                           options_of(p, p.weight_sum, static_cast<int>(classes)),
                           p.partial.as<float>(),
                           p.target_logits.as<float>()};
    launch(site("logits_of_span_sm90a", tiles, p.input, sizeof(Shared<kColumns>), stream), logits_of_span_sm90a<T>,
           given);
  });
  return ceil_divide(tiles.columns, tiles.span);
}

void logits_gradient_sm90a(const LinearCrossEntropyBackward& p, const LogitsPart& part, Stream stream) {
  const Tiles tiles = tiles_of(part.tokens, part.classes, p.input.size(1));
  const TensorView input = rows_from(p.input, part.token, part.tokens);
  const TensorView weight = rows_from(p.linear_weight, part.first, part.classes);
  gemm::visit_type(p.input.dtype, [&]<class T>(T) {
    const Backward<T> given{operands_of(input, false, weight, false), tiles, logits_gradient_of<T>(p, part)};
    launch(site("logits_gradient_sm90a", tiles, p.input, sizeof(SharedWithTokens), stream), logits_gradient_sm90a<T>,
           given);
  });
}

}  // namespace llmengine::cuda
