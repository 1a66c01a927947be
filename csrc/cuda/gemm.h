// Products of matrices of bfloat16 and float16 on CUDA, and sums over the rows of one: what operators with matrices are
// made of (gemm.cu, column_sums.cu).
#pragma once

#include <string>
#include <tuple>

#include "common/check.h"
#include "cuda/device.h"
#include "ops/fields.h"

namespace llmengine::cuda {

inline constexpr std::initializer_list<DType> kProductTypes = {DType::bf16, DType::f16};

// out = a b + a2 b2 + bias + added
struct Gemm {
  TensorView a, b;    // (m, k), (k, n), of one dtype; each with a unit stride, a's along m only with b's along n
  TensorView a2, b2;  // once more, lying alike, or none
  TensorView bias;    // (n,), of their dtype or float32, or none
  TensorView added;   // (m, n), of their dtype or float32, or none; may be out
  TensorView out;     // (m, n), of their dtype or float32
  TensorView room;    // float32, for sums of parts of k, or none: it is not cut
  // Sums of several products that end in 16 bits: until the last of them `out` has the upper half of each float32 and
  // `low`, uint8 (m, n), the next 8 bits. Not Python's.
  TensorView low;
  bool goes_on = false, ends = true;  // adds to what they hold; leaves the result in `out`
  std::string core;  // "sm80" or "sm90a": whose kernels multiply, but for what the second refuses (gemm_cores.h)

  static constexpr auto fields() {
    using P = Gemm;
    return std::tuple{ops::field("a", &P::a),     ops::field("b", &P::b),       ops::field("a2", &P::a2),
                      ops::field("b2", &P::b2),   ops::field("bias", &P::bias), ops::field("added", &P::added),
                      ops::field("out", &P::out), ops::field("room", &P::room), ops::field("core", &P::core)};
  }
};

struct ColumnSums {
  TensorView rows;     // (rows, columns), any float
  TensorView partial;  // float32 (parts, columns): room for the sums of parts of the rows; none: one part
  TensorView sums;     // float32 (columns,)

  static constexpr auto fields() {
    using P = ColumnSums;
    return std::tuple{ops::field("rows", &P::rows), ops::field("partial", &P::partial), ops::field("sums", &P::sums)};
  }
};

inline TensorView transposed(TensorView t) {
  std::swap(t.sizes[0], t.sizes[1]);
  std::swap(t.strides[0], t.strides[1]);
  return t;
}

// Rows [first, first + count) of a matrix.
inline TensorView rows_from(TensorView t, int64_t first, int64_t count) {
  if (!t.defined()) return t;
  t.data = static_cast<char*>(t.data) + first * t.strides[0] * size_of(t.dtype);
  t.sizes[0] = count;
  return t;
}

void validate(const Gemm& p);
void validate(const ColumnSums& p);
void run(const Gemm& p, Stream stream);
void run(const ColumnSums& p, Stream stream);

}  // namespace llmengine::cuda
