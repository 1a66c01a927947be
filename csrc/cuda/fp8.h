// Products of 8-bit floats on Hopper, and the numbers that they are made of (fp8_quantise_sm90a.cu,
// fp8_product_sm90a.cu).
//
//   A matrix (lines, k) is bytes, e4m3 or e5m2, in rows of a multiple of 16, and float32 scales by which its numbers
//   are multiplied: one for all, or one for each `block` of lines, 1 or 128, and 128 of k. Scales lie by k: (k / 128
//   rounded up, blocks of lines), or (1, 1). Bytes come as a tensor of uint8: DLPack has names for 8-bit floats only of
//   late.
#pragma once

#include <string>
#include <tuple>

#include "common/check.h"
#include "cuda/device.h"
#include "ops/fields.h"

namespace llmengine::cuda {

inline constexpr int kScaleDepth = 128;  // of k, that share a scale

inline void check_bytes(const Checker& at, const TensorView& t, const char* argument) {
  if (!t.defined() || t.dtype == DType::boolean) return;  // whatever has 8 bits
  at.fail_at(argument, std::string("has dtype ") + name(t.dtype) + "; allowed: uint8");
}

struct Fp8Quantise {
  TensorView x;        // (lines, k), any float
  std::string format;  // "e4m3" or "e5m2"
  int64_t block = 0;   // of lines: 1 or 128; 0: the matrix has one scale
  TensorView maxima;   // float32 (1 to 512,): room, where block is 0
  TensorView rows;     // bytes (lines, k, rounded up to 16): zeros past k; or none
  TensorView row_scales;
  TensorView columns;  // x^T, likewise: bytes (k, lines rounded up to 16); or none
  TensorView column_scales;

  static constexpr auto fields() {
    using P = Fp8Quantise;
    return std::tuple{ops::field("x", &P::x),
                      ops::field("format", &P::format),
                      ops::field("block", &P::block),
                      ops::field("maxima", &P::maxima),
                      ops::field("rows", &P::rows),
                      ops::field("row_scales", &P::row_scales),
                      ops::field("columns", &P::columns),
                      ops::field("column_scales", &P::column_scales)};
  }
};

// out = a b^T + bias + added
struct Fp8Product {
  TensorView a, b;       // bytes (m, k), (n, k)
  std::string a_format;  // "e4m3" or "e5m2"; b is e4m3
  TensorView a_scales, b_scales;
  TensorView bias;   // (n,), of out's dtype or float32, or none
  TensorView added;  // float32 (m, n), or none; may be out
  TensorView out;    // (m, n), any float
  TensorView room;   // float32, for sums of parts of k, or none: it is not cut

  static constexpr auto fields() {
    using P = Fp8Product;
    return std::tuple{ops::field("a", &P::a),
                      ops::field("b", &P::b),
                      ops::field("a_format", &P::a_format),
                      ops::field("a_scales", &P::a_scales),
                      ops::field("b_scales", &P::b_scales),
                      ops::field("bias", &P::bias),
                      ops::field("added", &P::added),
                      ops::field("out", &P::out),
                      ops::field("room", &P::room)};
  }
};

void validate(const Fp8Quantise& p);
void validate(const Fp8Product& p);
void run(const Fp8Quantise& p, Stream stream);
void run(const Fp8Product& p, Stream stream);

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace llmengine::cuda
