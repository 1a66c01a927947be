// One step of AdamW over a list of parameters (formulas: ops/adamw.h), in place.
//
//   factors    a thread a parameter: its counter goes up, and what the step makes of the counter, the learning rate and
//              the multiplier, all read on the device, is written down: no block computes powers, the host waits for
//              nothing. 32 bytes a parameter
//   update     a block owns a chunk of one parameter (tensor_list.cuh), which it finds by bisection. A thread has n
//              neighbouring elements at a time: 16 bytes of the wider of the weight's and the moments' dtype, and 8 of
//              a narrower one, so that neighbours' accesses touch. All is asked for before the first of it is used.
//              moves, bytes an element: float 28; 16-bit weights with float masters and moments 28; all 16-bit 14
//   limit      memory bandwidth: 20 operations an element, a root and a division among them; stochastic rounding adds a
//              quarter (weights) or a half (moments too) of ten Philox rounds, 15 or 30 operations
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/adamw.h"
#include "cuda/dispatch.h"
#include "cuda/launch.cuh"
#include "cuda/row.cuh"
#include "cuda/tensor_list.cuh"
#include "ops/philox.h"

namespace llmengine::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;                     // on a multiprocessor, at least: 80 registers a thread
constexpr int64_t kChunk = 4096;               // elements of a block: a multiple of 4, as the draws'
constexpr int kTensors = 62, kCounters = 224;  // of a launch

// ---- what a step makes of a parameter's numbers ---------------------------------------------------------------------

struct Factors {
  float scale, keep, rate, root;  // of the gradient; 1 - lr decay; lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
  int64_t row, unused;            // of the draws
};

struct Counters {
  float* step[kCounters];
  int64_t number[kCounters];
  int count = 0;
  Factors* factors;
  const float *multiplier, *found_inf;
  const void* lr;
  bool lr_is_double;
  double rate, log_beta1, log_beta2, weight_decay;
  float sign;
};

__global__ void __launch_bounds__(kCounters) adamw_factors(const Counters p) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i >= p.count || (p.found_inf && *p.found_inf != 0.0f)) return;
  const float counted = *p.step[i] + 1.0f;
  *p.step[i] = counted;
  double lr = p.rate;
  if (p.lr) lr = p.lr_is_double ? *static_cast<const double*>(p.lr) : static_cast<const float*>(p.lr)[0];
  const double t = counted;
  Factors& f = p.factors[i];
  f.scale = p.multiplier ? p.sign * *p.multiplier : p.sign;
  f.keep = static_cast<float>(1.0 - lr * p.weight_decay);
  f.rate = static_cast<float>(lr / (1.0 - exp(t * p.log_beta1)));
  f.root = static_cast<float>(1.0 / sqrt(1.0 - exp(t * p.log_beta2)));
  f.row = static_cast<int64_t>((static_cast<uint64_t>(t) << 32) + static_cast<uint64_t>(p.number[i]));
}

// ---- n elements in a thread -----------------------------------------------------------------------------------------

template <class T, int n>
struct Group {  // 8, 16 or 32 bytes
  static constexpr int kPerWord = 4 / sizeof(T), kWords = n / kPerWord;
  uint32_t word[kWords];
};

// `count` of them, the others 0; all of them in one access, or two, where `whole`.
template <class T, int n>
__device__ __forceinline__ Group<T, n> load_group(const T* from, int count, bool whole) {
  using G = Group<T, n>;
  G group;
  if constexpr (G::kWords == 2) {
    if (whole) {
      const uint2 words = ptx::load_8(from);
      group.word[0] = words.x, group.word[1] = words.y;
      return group;
    }
  }
#pragma unroll
  for (int w = 0; w < G::kWords; w += 4) {
    const uint4 words = load_vector(from, w * G::kPerWord, count, whole);
    const uint32_t part[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4 && w + i < G::kWords; ++i) group.word[w + i] = part[i];
  }
  return group;
}

template <class T, int n>
__device__ __forceinline__ void store_group(T* to, const Group<T, n>& group, int count, bool whole) {
  using G = Group<T, n>;
  if constexpr (G::kWords == 2) {
    if (whole) return ptx::store_8(to, make_uint2(group.word[0], group.word[1]));
    store_vector(to, 0, count, false, make_uint4(group.word[0], group.word[1], 0, 0));
  } else {
#pragma unroll
    for (int w = 0; w < G::kWords; w += 4) {
      store_vector(to, w * G::kPerWord, count, whole,
                   make_uint4(group.word[w], group.word[w + 1], group.word[w + 2], group.word[w + 3]));
    }
  }
}

// Elements [4 q, 4 q + 4) of a group.
template <class T, int n>
__device__ __forceinline__ void quad_of(const Group<T, n>& group, int q, float (&x)[4]) {
  constexpr int kPerWord = Group<T, n>::kPerWord, kWords = 4 / kPerWord;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    float part[kPerWord];
    unpack_word(group.word[q * kWords + w], part, T{});
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) x[w * kPerWord + i] = part[i];
  }
}

// The bfloat16 that is left of the float's bits when 16 bits of noise have been added.
__device__ __forceinline__ uint32_t stochastic_bits(float x, uint32_t noise) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) != 0x7f800000u) return (bits + noise) >> 16;
  return x != x ? 0x7fc0u : bits >> 16;
}

// The same elements become x: rounded to nearest, or, in bfloat16 where `stochastic`, by the draws' half at `shift`.
template <class T, int n>
__device__ __forceinline__ void set_quad(Group<T, n>& group, int q, const float (&x)[4], bool stochastic = false,
                                         const ops::Philox4& draws = {}, int shift = 0) {
  constexpr int kPerWord = Group<T, n>::kPerWord, kWords = 4 / kPerWord;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    uint32_t& word = group.word[q * kWords + w];
    if constexpr (sizeof(T) == 4) {
      word = __float_as_uint(x[w]);
    } else {
      word = pair_of<T>(x[2 * w], x[2 * w + 1]);
      if constexpr (std::is_same_v<T, bf16>) {
        if (!stochastic) continue;
        const uint32_t low = draws.word[2 * w] >> shift & 0xffff, high = draws.word[2 * w + 1] >> shift & 0xffff;
        word = stochastic_bits(x[2 * w], low) | stochastic_bits(x[2 * w + 1], high) << 16;
      }
    }
  }
}

// ---- the step -------------------------------------------------------------------------------------------------------

// a + rest (b - a), from the nearer end: where b is all that counts, nothing of it is lost beside a large a.
struct Lerp {
  bool from_a;
  float way;

  explicit Lerp(double rest) : from_a(rest < 0.5), way(static_cast<float>(from_a ? rest : rest - 1.0)) {}

  __device__ float operator()(float a, float b) const { return (from_a ? a : b) + (b - a) * way; }
};

struct Tensors {
  void* parameter;
  const void* gradient;
  void *exp_avg, *exp_avg_sq, *peak;  // peak: null without amsgrad
  float* master;                      // null: none
  int64_t size;

  // whether all of them begin at multiples of 16 bytes
  __device__ bool aligned() const {
    const auto bits = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
    return (bits(parameter) | bits(gradient) | bits(exp_avg) | bits(exp_avg_sq) | bits(peak) | bits(master)) % 16 == 0;
  }
};

struct Step {
  Tensors tensors[kTensors];
  BlockTable<kTensors> table;
  const Factors* factors;  // of the first tensor
  int place[kTensors];     // of a tensor's factors
  const float* found_inf;
  Lerp mean;
  float beta2, beta2_rest, eps;
  uint64_t seed;
  bool stochastic;
};

// What is read and written of n elements.
template <class W, class G, class M, int n>
struct Elements {
  Group<W, n> parameter;
  Group<G, n> gradient;
  Group<M, n> exp_avg, exp_avg_sq, peak;
  Group<float, n> master;
};

// Elements [4 q, 4 q + 4); `place`: of the first of them in its parameter.
template <class W, class G, class M, int n>
__device__ __forceinline__ void update_quad(const Step& p, const Factors& f, bool has_peak, bool has_master,
                                            int64_t place, int q, Elements<W, G, M, n>& e) {
  float w[4], g[4], m[4], v[4];
  quad_of(e.gradient, q, g);
  quad_of(e.exp_avg, q, m);
  quad_of(e.exp_avg_sq, q, v);
  if (has_master) {
    quad_of(e.master, q, w);
  } else {
    quad_of(e.parameter, q, w);
  }
  ops::Philox4 draws[2] = {};  // of weight and m, of v and peak
  constexpr bool kMoments = std::is_same_v<M, bf16>;
  const auto draw = [&](uint32_t stream) {
    return ops::philox(p.seed, static_cast<uint32_t>(static_cast<uint64_t>(f.row) >> 32), stream,
                       static_cast<uint32_t>(f.row), static_cast<uint32_t>(place / 4));
  };
  if ((kMoments || std::is_same_v<W, bf16>) && p.stochastic) draws[0] = draw(0);
  if (kMoments && p.stochastic) draws[1] = draw(1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    g[i] *= f.scale;
    m[i] = p.mean(m[i], g[i]);
    v[i] = v[i] * p.beta2 + g[i] * g[i] * p.beta2_rest;
  }
  set_quad(e.exp_avg, q, m, p.stochastic, draws[0], 16);
  set_quad(e.exp_avg_sq, q, v, p.stochastic, draws[1], 0);
  if (has_peak) {
    float before[4];
    quad_of(e.peak, q, before);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = before[i] > v[i] || before[i] != before[i] ? before[i] : v[i];  // NaN stays
    set_quad(e.peak, q, v, p.stochastic, draws[1], 16);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = w[i] * f.keep - m[i] * f.rate / (sqrtf(v[i]) * f.root + p.eps);
  if (has_master) {
    set_quad(e.master, q, w);
    set_quad(e.parameter, q, w);
  } else {
    set_quad(e.parameter, q, w, p.stochastic, draws[0], 0);
  }
}

// Elements [at, at + count), count <= n.
template <class W, class G, class M, int n>
__device__ __forceinline__ void update_group(const Step& p, const Tensors& t, const Factors& f, int64_t at, int count,
                                             bool whole) {
  W* parameter = static_cast<W*>(t.parameter) + at;
  M *exp_avg = static_cast<M*>(t.exp_avg) + at, *exp_avg_sq = static_cast<M*>(t.exp_avg_sq) + at;
  M* peak = t.peak ? static_cast<M*>(t.peak) + at : nullptr;
  float* master = t.master ? t.master + at : nullptr;
  Elements<W, G, M, n> e;
  e.gradient = load_group<G, n>(static_cast<const G*>(t.gradient) + at, count, whole);
  e.exp_avg = load_group<M, n>(exp_avg, count, whole);
  e.exp_avg_sq = load_group<M, n>(exp_avg_sq, count, whole);
  if (peak) e.peak = load_group<M, n>(peak, count, whole);
  if (master) {
    e.master = load_group<float, n>(master, count, whole);
  } else {
    e.parameter = load_group<W, n>(parameter, count, whole);
  }
#pragma unroll
  for (int q = 0; q < n / 4; ++q) update_quad(p, f, peak, master, at + 4 * q, q, e);
  store_group(parameter, e.parameter, count, whole);
  store_group(exp_avg, e.exp_avg, count, whole);
  store_group(exp_avg_sq, e.exp_avg_sq, count, whole);
  if (peak) store_group(peak, e.peak, count, whole);
  if (master) store_group(master, e.master, count, whole);
}

// W: of the parameter, G: of the gradient, M: of the moments.
template <class W, class G, class M>
__global__ void __launch_bounds__(kThreads, kBlocks) adamw_update(const Step p) {
  constexpr int n = 16 / (sizeof(W) > sizeof(M) ? sizeof(W) : sizeof(M));
  if (p.found_inf && *p.found_inf != 0.0f) return;
  const int which = p.table.owner(blockIdx.x);
  const Tensors& t = p.tensors[which];
  const Factors f = p.factors[p.place[which]];
  const bool aligned = t.aligned();
  const int64_t begin = static_cast<int64_t>(blockIdx.x - p.table.first[which]) * kChunk;
  const int64_t end = begin + kChunk < t.size ? begin + kChunk : t.size;
  for (int64_t at = begin + static_cast<int64_t>(threadIdx.x) * n; at < end; at += kThreads * n) {
    const int count = end - at < n ? static_cast<int>(end - at) : n;
    update_group<W, G, M, n>(p, t, f, at, count, aligned && count == n);
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

void launch_factors(const AdamW& p, Stream stream) {
  Counters given{};
  static_assert(sizeof given <= kParameterBytes);
  given.multiplier = p.multiplier.as<float>();
  given.found_inf = p.found_inf.as<float>();
  given.lr = p.lr.data;
  given.lr_is_double = p.lr.dtype == DType::f64;
  given.rate = p.rate;
  given.log_beta1 = std::log(p.beta1);
  given.log_beta2 = std::log(p.beta2);
  given.weight_decay = p.weight_decay;
  given.sign = p.maximize ? -1.0f : 1.0f;
  for (size_t first = 0; first < p.steps.size(); first += kCounters) {
    given.count = static_cast<int>(std::min<size_t>(kCounters, p.steps.size() - first));
    given.factors = p.factors.as<Factors>() + first;
    for (int i = 0; i < given.count; ++i) {
      given.step[i] = p.steps[first + i].as<float>();
      given.number[i] = p.numbers[first + i];
    }
    launch({"adamw_factors", 1, kCounters, cuda_stream(stream), p.factors}, adamw_factors, given);
  }
}

template <class W, class G, class M>
void launch_update(const AdamW& p, Stream stream) {
  Step given{{},
             {},
             p.factors.as<Factors>(),
             {},
             p.found_inf.as<float>(),
             Lerp(1.0 - p.beta1),
             static_cast<float>(p.beta2),
             static_cast<float>(1.0 - p.beta2),
             static_cast<float>(p.eps),
             static_cast<uint64_t>(p.seed),
             p.stochastic};
  static_assert(sizeof given <= kParameterBytes);
  const auto flush = [&] {
    launch({"adamw_update", given.table.blocks, kThreads, cuda_stream(stream), p.parameters[0]}, adamw_update<W, G, M>,
           given);
    given.table = {};
  };
  for (size_t i = 0; i < p.parameters.size(); ++i) {
    const int64_t size = p.parameters[i].numel();
    if (size == 0) continue;
    if (given.table.full()) flush();
    const int place = given.table.add(size, kChunk);
    given.place[place] = static_cast<int>(i);
    given.tensors[place] = {p.parameters[i].data,
                            p.gradients[i].data,
                            p.exp_avgs[i].data,
                            p.exp_avg_sqs[i].data,
                            p.max_exp_avg_sqs.empty() ? nullptr : p.max_exp_avg_sqs[i].data,
                            p.masters.empty() ? nullptr : p.masters[i].as<float>(),
                            size};
  }
  flush();
}

}  // namespace

void validate(const AdamW& p) {
  ops::validate_lists(p, kFloatTypes);
  if (p.parameters.empty()) return;
  const Checker at{"adamw"};
  if (p.exp_avgs[0].dtype == DType::f16 && p.parameters[0].dtype != DType::f16) {
    at.fail_at("exp_avgs",
               std::string("may be float16 only where parameters are; these are ") + name(p.parameters[0].dtype));
  }
  at.defined(p.factors, "factors");
  at.dtype(p.factors, "factors", {DType::i64});
  at.shape(p.factors, "factors", {static_cast<int64_t>(p.parameters.size()), 4});
  at.contiguous(p.factors, "factors");
}

void run(const AdamW& p, Stream stream) {
  if (p.parameters.empty()) return;
  launch_factors(p, stream);
  visit_float(p.parameters[0].dtype, [&]<class W>(W) {
    visit_float(p.exp_avgs[0].dtype, [&]<class M>(M) {
      if constexpr (!std::is_same_v<M, f16> || std::is_same_v<W, f16>) {
        p.gradients[0].dtype == DType::f32 ? launch_update<W, float, M>(p, stream) : launch_update<W, W, M>(p, stream);
      }
    });
  });
}

}  // namespace llmengine::cuda
