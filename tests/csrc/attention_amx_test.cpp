// Attention of bf16 by AMX's kernels (csrc/cpu/attention_amx.h and attention_amx_backward.h), in emulation, on random
// calls: masks and biases of every kind, soft cap, sinks, dropout, windows, packed sequences, head dims up to 256. Each
// result is held to a bound on what its roundings to bf16 can add up to, in float64; outputs begin as NaN, buffers end
// with their tensors, rows without keys are 0, and the number of threads changes no bit. Compiled by
// tests/test_attention_amx.py.
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/amx.h"
#include "cpu/parallel.h"
#include "ops/attention.h"
#include "ops/philox.h"

using namespace llmengine;
using cpu::LLMENGINE_ISA::narrow;
using cpu::LLMENGINE_ISA::widen;

namespace {

int calls_with_nan = 0;
std::mt19937 chance(1);
int64_t below(int64_t n) { return static_cast<int64_t>(chance() % n); }
double normal() { return std::normal_distribution<double>()(chance); }
template <class T>
T one_of(std::initializer_list<T> all) {
  return all.begin()[below(std::ssize(all))];
}

// A contiguous tensor of normal numbers.
struct Tensor {
  std::vector<unsigned char> memory;
  TensorView view;

  Tensor() = default;
  Tensor(DType dtype, std::initializer_list<int64_t> sizes) {
    view.dtype = dtype, view.ndim = 0;
    for (int64_t n : sizes) view.sizes[view.ndim++] = n;
    int64_t stride = 1;
    for (int d = view.ndim - 1; d >= 0; --d) view.strides[d] = stride, stride *= view.sizes[d];
    memory.resize(static_cast<size_t>(view.numel() * size_of(dtype)));
    view.data = memory.data();
    for (int64_t i = 0; i < view.numel(); ++i) set(i, normal());
  }
  void set(int64_t i, double x) {
    const float value = static_cast<float>(x);
    switch (view.dtype) {
      case DType::f32: view.as<float>()[i] = value; break;
      case DType::bf16: narrow(value, view.as<bf16>() + i); break;
      default: view.as<uint8_t>()[i] = x > -0.5;
    }
  }
  void fill(double x) {
    for (int64_t i = 0; view.defined() && i < view.numel(); ++i) set(i, x);
  }
};

double at(const TensorView& t, int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
  const int64_t places[] = {a, b, c, d};
  int64_t offset = 0;
  for (int i = 0; i < t.ndim; ++i) offset += (t.size(i) == 1 ? 0 : places[i]) * t.stride(i);
  switch (t.dtype) {
    case DType::f32: return t.as<float>()[offset];
    case DType::bf16: return widen(t.as<bf16>()[offset]);
    default: return t.as<uint8_t>()[offset] ? 0.0 : -INFINITY;
  }
}

// A result in float64, and beside each element what its terms' magnitudes add up to.
struct Exact {
  std::vector<double> value, magnitude;
  explicit Exact(const TensorView& like)
      : value(static_cast<size_t>(like.defined() ? like.numel() : 0)), magnitude(value.size()) {}
  void add(int64_t i, double x, double size) { value[i] += x, magnitude[i] += size; }
};

struct Call {
  ops::AttentionForward forward;
  ops::AttentionBackward backward;
  Tensor query, key, value, mask, slopes, distances, sinks, seed, cu_q, cu_k, output, lse, lse_low, grad_output,
      grad_lse, grad_query, grad_key, grad_value, grad_sinks, grad_distances;

  Call() {
    const bool packed = below(3) == 0;
    const int64_t group = 1 + below(2), key_heads = 1 + below(2), heads = group * key_heads;
    const int64_t batch = packed ? 1 : 1 + below(2);
    const int64_t rows = below(10) ? one_of<int64_t>({1, 20, 33, 70}) : 270,
                  keys = one_of<int64_t>({1, 31, 64, 75, 150});
    const int64_t dim = one_of<int64_t>({1, 8, 40, 64, 96, 129, 200, 256}),
                  width = below(2) ? dim : one_of<int64_t>({3, 64, 130, 256});
    query = {DType::bf16, {batch, heads, rows, dim}};
    key = {DType::bf16, {batch, key_heads, keys, dim}}, value = {DType::bf16, {batch, key_heads, keys, width}};
    ops::AttentionOptions p;
    p.query = query.view, p.key = key.view, p.value = value.view;
    p.scale = one_of({1.0 / std::sqrt(static_cast<double>(dim)), 0.3, -0.2});
    if (packed) {
      cut(&cu_q, rows), cut(&cu_k, keys);
      p.cu_seqlens_q = cu_q.view, p.cu_seqlens_k = cu_k.view, p.max_seqlen_q = rows, p.max_seqlen_k = keys;
    } else if (const int64_t kind = below(5)) {
      const auto size = [](int64_t n) { return below(2) ? n : 1; };
      mask = {kind < 3    ? DType::boolean
              : kind == 3 ? DType::f32
                          : DType::bf16,
              {size(batch), size(heads), size(rows), kind == 1 || below(4) ? keys : 1}};
      if (kind == 1 && mask.view.size(2) == 1) pad();
      if (kind == 2) hide_blocks();
      p.mask = mask.view;
    }
    if (below(3) == 0) slopes = {DType::f32, {p.sequences(), heads}}, p.alibi_slopes = slopes.view;
    if (below(3) == 0) distances = {DType::f32, {heads, 2 * below(50) + 1}}, p.distance_bias = distances.view;
    if (below(3) == 0) sinks = {DType::f32, {heads}}, p.sinks = sinks.view;
    if (below(3) == 0) p.softcap = 2.0;
    if (below(2)) p.dropout_p = 0.3;
    seed.memory.resize(8), seed.view.data = seed.memory.data(), seed.view.ndim = 1, seed.view.sizes[0] = 1;
    const int64_t number = static_cast<int64_t>(chance());
    std::memcpy(seed.memory.data(), &number, 8);
    seed.view.dtype = DType::i64, p.seed = seed.view;
    if (below(2)) p.window_right = one_of<int64_t>({0, 9});
    if (below(3) == 0) p.window_left = one_of<int64_t>({0, 40});
    p.bottom_right = below(2);

    output = {DType::bf16, {batch, heads, rows, width}}, grad_output = {DType::bf16, {batch, heads, rows, width}};
    for (Tensor* t : {&lse, &lse_low, &grad_lse}) *t = {DType::f32, {batch, heads, rows}};
    grad_query = {DType::bf16, {batch, heads, rows, dim}};
    grad_key = {DType::bf16, {batch, key_heads, keys, dim}};
    grad_value = {DType::bf16, {batch, key_heads, keys, width}};
    if (p.sinks.defined()) grad_sinks = {DType::f32, {heads}};
    const bool table = p.distance_bias.defined() && below(2);
    if (table) grad_distances = {DType::f32, {heads, distances.view.size(1)}};
    static_cast<ops::AttentionOptions&>(forward) = p, static_cast<ops::AttentionOptions&>(backward) = p;
    forward.output = backward.output = output.view;
    forward.lse = backward.lse = lse.view, forward.lse_low = backward.lse_low = lse_low.view;
    backward.grad_output = grad_output.view;
    if (below(2)) backward.grad_lse = grad_lse.view;
    backward.grad_query = grad_query.view, backward.grad_key = grad_key.view, backward.grad_value = grad_value.view;
    backward.grad_sinks = grad_sinks.view, backward.grad_distance_bias = grad_distances.view;
  }

  // What the kernels write, from NaN on.
  std::vector<unsigned char> run(int threads) {
    cpu::set_num_threads(threads);
    for (Tensor* t : results()) t->fill(NAN);
    constexpr int isa = static_cast<int>(cpu::Isa::LLMENGINE_ISA);
    cpu::KernelTable<ops::AttentionForward>::entries[isa](forward);
    cpu::KernelTable<ops::AttentionBackward>::entries[isa](backward);
    std::vector<unsigned char> all;
    for (Tensor* t : results()) all.insert(all.end(), t->memory.begin(), t->memory.end());
    return all;
  }
  // Where results are NaN.
  std::vector<bool> nans() {
    std::vector<bool> places;
    for (Tensor* t : results()) {
      for (int64_t i = 0; t->view.defined() && i < t->view.numel(); ++i) {
        places.push_back(
            std::isnan(t->view.dtype == DType::bf16 ? widen(t->view.as<bf16>()[i]) : t->view.as<float>()[i]));
      }
    }
    return places;
  }

 private:
  std::array<Tensor*, 8> results() {
    return {&output, &lse, &lse_low, &grad_query, &grad_key, &grad_value, &grad_sinks, &grad_distances};
  }
  static void cut(Tensor* to, int64_t tokens) {  // into three sequences, one of which may be empty, and tokens beyond
    *to = {DType::f32, {4}};
    const int64_t first = below(tokens + 1), second = first + below(tokens - first + 1);
    const int32_t ends[] = {0, static_cast<int32_t>(first), static_cast<int32_t>(second),
                            static_cast<int32_t>(tokens - (below(2) && second < tokens))};
    std::memcpy(to->memory.data(), ends, sizeof ends);
    to->view.dtype = DType::i32;
  }
  void hide_blocks() {  // of 16 rows and 32 keys, most of them
    const int64_t rows = mask.view.size(2), keys = mask.view.size(3), hash = below(1000);
    for (int64_t i = 0; i < mask.view.numel(); ++i) {
      const int64_t block = i % keys / 32 + 7 * (i / keys % rows / 16) + 3 * (i / keys / rows) + hash;
      if (block * block % 5 > 1) mask.set(i, -1);
    }
  }
  void pad() {  // all of a batch entry's keys may be padding
    const int64_t keys = mask.view.size(3);
    for (int64_t b = 0; b < mask.view.numel() / keys; ++b) {
      const int64_t length = below(keys + 1);
      for (int64_t k = 0; k < keys; ++k) mask.set(b * keys + k, k < length ? 1 : -1);
    }
  }
};

double logit(const ops::AttentionOptions& p, const ops::Sequence& s, int64_t head, int64_t r, int64_t k,
             double* slope) {
  const ops::Band band = p.band(s);
  if (k < band.begin(r) || k >= band.end(r)) return -INFINITY;
  double u = 0;
  const int64_t key_head = head / p.group();
  for (int64_t c = 0; c < p.query.size(3); ++c) {
    u += at(p.query, s.batch, head, s.row0 + r, c) * at(p.key, s.batch, key_head, s.key0 + k, c);
  }
  u *= p.scale, *slope = 1.0;
  if (p.softcap > 0) {
    const double t = std::tanh(u / p.softcap);
    u = p.softcap * t, *slope = 1.0 - t * t;
  }
  const int64_t distance = k - (r + band.shift);
  if (p.alibi_slopes.defined()) u -= at(p.alibi_slopes, s.index, head) * std::fabs(static_cast<double>(distance));
  if (p.distance_bias.defined()) {
    u += at(p.distance_bias, head, ops::clamp_index(distance, -p.farthest(), p.farthest()) + p.farthest());
  }
  return p.mask.defined() ? u + at(p.mask, s.batch, head, r, k) : u;
}

bool within(const char* what, const TensorView& ours, const Exact& exact, double relative) {
  for (int64_t i = 0; ours.defined() && i < ours.numel(); ++i) {
    const double y = ours.dtype == DType::bf16 ? widen(ours.as<bf16>()[i]) : ours.as<float>()[i], o = exact.value[i];
    if (y == o || std::fabs(y - o) <= relative * exact.magnitude[i] + (o == 0 ? 0 : 1e-30)) continue;
    std::printf("%s at %ld: %.9g, expected %.9g within %.2g\n", what, static_cast<long>(i), y, o,
                relative * exact.magnitude[i]);
    return false;
  }
  return true;
}

bool right(Call& call) {
  const std::vector<unsigned char> once = call.run(1);
  const ops::AttentionBackward& p = call.backward;
  Exact output(p.output), lse(p.lse), grad_query(p.grad_query), grad_key(p.grad_key), grad_value(p.grad_value),
      grad_sinks(p.sinks), grad_distances(p.distance_bias);
  const int64_t dim = p.query.size(3), width = p.value.size(3);
  for (const ops::Sequence& s : ops::sequences_of(p)) {
    std::vector<double> logits(s.keys), slopes(s.keys);
    for (int64_t n = 0; n < p.heads() * s.rows; ++n) {
      const int64_t head = n / s.rows, r = n % s.rows, key_head = head / p.group();
      const int64_t row = (s.batch * p.heads() + head) * p.query.size(2) + s.row0 + r;
      const double sink = p.sink(s, head);
      double highest = sink, total = 0;
      for (int64_t k = 0; k < s.keys; ++k)
        highest = std::fmax(highest, logits[k] = logit(p, s, head, r, k, &slopes[k]));
      for (int64_t k = 0; k < s.keys; ++k) total += highest == -INFINITY ? 0 : std::exp(logits[k] - highest);
      if (sink != -INFINITY) total += std::exp(sink - highest);
      const double sum = total > 0 ? highest + std::log(total) : -INFINITY;
      lse.add(row, sum, total > 0 ? 1 + std::fabs(sum) : 0);
      if (total == 0) continue;
      const auto key_row = [&](int64_t k) { return (s.batch * p.key_heads() + key_head) * p.key.size(2) + s.key0 + k; };
      std::vector<double> keep(s.keys, 1.0);
      for (int64_t k = 0; p.dropout_p > 0 && k < s.keys; ++k) {
        uint64_t seed;
        std::memcpy(&seed, p.seed.data, 8);
        const uint32_t stream = static_cast<uint32_t>(s.index * p.heads() + head);
        const auto draws = ops::philox(seed, 0, stream, static_cast<uint32_t>(r), static_cast<uint32_t>(k / 4));
        keep[k] = draws.word[k % 4] < ops::drop_threshold(p.dropout_p) ? 0.0 : 1.0 / (1.0 - p.dropout_p);
      }
      double delta = 0, size = 0;  // rowsum(grad_output output), and what its terms add up to
      for (int64_t k = 0; k < s.keys; ++k) {
        const double weight = std::exp(logits[k] - sum) * keep[k];
        for (int64_t c = 0; weight > 0 && c < width; ++c) {
          const double v = at(p.value, s.batch, key_head, s.key0 + k, c);
          const double g = at(p.grad_output, s.batch, head, s.row0 + r, c);
          output.add(row * width + c, weight * v, weight * std::fabs(v));
          grad_value.add(key_row(k) * width + c, weight * g, weight * std::fabs(g));
          delta += weight * v * g, size += weight * std::fabs(v * g);
        }
      }
      if (p.grad_lse.defined()) {
        const double g = p.grad_lse.as<float>()[row];
        delta -= g, size += std::fabs(g);
      }
      if (sink != -INFINITY) grad_sinks.add(head, -std::exp(sink - sum) * delta, std::exp(sink - sum) * size);
      for (int64_t k = 0; k < s.keys; ++k) {
        const double weight = std::exp(logits[k] - sum);
        if (weight == 0) continue;
        double d = 0, terms = size;
        for (int64_t c = 0; c < width; ++c) {
          const double x =
              at(p.grad_output, s.batch, head, s.row0 + r, c) * at(p.value, s.batch, key_head, s.key0 + k, c) * keep[k];
          d += x, terms += std::fabs(x);
        }
        const double g = weight * (d - delta);
        if (p.grad_distance_bias.defined()) {
          const int64_t m = ops::clamp_index(k - (r + p.band(s).shift), -p.farthest(), p.farthest()) + p.farthest();
          grad_distances.add(head * p.distance_bias.size(1) + m, g, weight * terms);
        }
        for (int64_t c = 0; c < dim; ++c) {
          const double q = at(p.query, s.batch, head, s.row0 + r, c) * p.scale;
          const double x = at(p.key, s.batch, key_head, s.key0 + k, c) * p.scale;
          const double most = weight * terms * (slopes[k] + 1e-4);  // in float, 1 - tanh^2 has errors of its own
          grad_query.add(row * dim + c, g * slopes[k] * x, most * std::fabs(x));
          grad_key.add(key_row(k) * dim + c, g * slopes[k] * q, most * std::fabs(q));
        }
      }
    }
  }
  constexpr double kRoundings = 1.0 / 64;  // four of bf16
  bool all = within("output", p.output, output, kRoundings) && within("lse", p.lse, lse, 1e-6) &&
             within("grad_query", p.grad_query, grad_query, kRoundings) &&
             within("grad_key", p.grad_key, grad_key, kRoundings) &&
             within("grad_value", p.grad_value, grad_value, kRoundings) &&
             within("grad_sinks", p.grad_sinks, grad_sinks, kRoundings) &&
             within("grad_distance_bias", p.grad_distance_bias, grad_distances, kRoundings);
  if (call.run(3) != once) std::printf("three threads give other bits\n"), all = false;
  return all;
}

// A NaN in a bias is one whatever its bits.
bool keeps_nan(Call& call) {
  if (!call.mask.view.defined() || call.mask.view.dtype != DType::f32) return true;
  std::vector<bool> places[2];
  for (const uint32_t nan : {0x7fc00000u, 0x7fffffffu}) {
    std::memcpy(call.mask.memory.data(), &nan, sizeof nan);
    call.run(1);
    places[nan == 0x7fffffffu] = call.nans();
  }
  ++calls_with_nan;
  if (places[0] != places[1]) std::printf("a NaN of all bits is not one everywhere\n");
  return places[0] == places[1];
}

}  // namespace

int main() {
  if (!cpu::supported(cpu::Isa::LLMENGINE_ISA)) return 2;  // asks for AMX's tiles, too
  int failures = 0, cases = 0;
  for (; cases < 60; ++cases) {
    Call call;
    if (right(call) && keeps_nan(call)) continue;
    const ops::AttentionForward& p = call.forward;
    std::printf(
        "FAILED call %d: query %s, value %s, mask %s %s, alibi %d, distances %d, sinks %d, softcap %g, dropout %g, "
        "window %ld %ld, packed %d\n",
        cases, p.query.shape().c_str(), p.value.shape().c_str(), p.mask.shape().c_str(), name(p.mask.dtype),
        p.alibi_slopes.defined(), p.distance_bias.defined(), p.sinks.defined(), p.softcap, p.dropout_p,
        static_cast<long>(p.window_left), static_cast<long>(p.window_right), p.packed());
    ++failures;
  }
  if (!failures) std::printf("passed %d cases, %d of them with NaN\n", cases, calls_with_nan);
  return failures != 0;
}
