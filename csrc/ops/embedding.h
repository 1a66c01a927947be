// Rows of a table by token id, and the table's gradient.
//
//   y[t] = scale weight[id[t]]
//   backward: grad_weight[v] = scale sum_{t: id[t] = v} grad_output[t], and zero for v = padding_idx
//
// The sums are float32, of an id's tokens in an order that depends on the ids alone, and rounded once.
#pragma once

#include <string>

#include "common/check.h"
#include "common/tensor.h"
#include "ops/fields.h"

namespace llmengine::ops {

struct EmbeddingForward {
  TensorView input;   // int64 (tokens,)
  TensorView weight;  // (rows, columns), unit last stride
  double scale = 1.0;
  TensorView output;  // (tokens, columns), contiguous

  static constexpr auto fields() {
    using P = EmbeddingForward;
    return std::tuple{field("input", &P::input), field("weight", &P::weight), field("scale", &P::scale),
                      field("output", &P::output)};
  }
};

struct EmbeddingBackward {
  TensorView grad_output;    // (tokens, columns), unit last stride
  TensorView input;          // int64 (tokens,)
  int64_t padding_idx = -1;  // -1: none
  double scale = 1.0;
  TensorView grad_weight;  // (rows, columns), contiguous

  static constexpr auto fields() {
    using P = EmbeddingBackward;
    return std::tuple{field("grad_output", &P::grad_output), field("input", &P::input),
                      field("padding_idx", &P::padding_idx), field("scale", &P::scale),
                      field("grad_weight", &P::grad_weight)};
  }
};

// `dense` (tokens, columns) and `table` (rows, columns), of one dtype.
inline void validate_embedding(const Checker& at, const NamedTensor& dense, const NamedTensor& table,
                               std::initializer_list<DType> dtypes) {
  for (auto [t, argument] : NamedTensors{dense, table}) {
    at.defined(*t, argument);
    at.dtype(*t, argument, dtypes);
    at.dtype(*t, argument, {dense.tensor->dtype});
    if (t->ndim != 2) at.fail_at(argument, "must have 2 dimensions, got shape " + t->shape());
    at.unit_last_stride(*t, argument);
  }
  at.shape(*table.tensor, table.name, {table.tensor->size(0), dense.tensor->size(1)});
}

inline void validate_ids(const Checker& at, const TensorView& ids, const char* name, int64_t tokens, DType dtype) {
  at.defined(ids, name);
  at.dtype(ids, name, {dtype});
  at.shape(ids, name, {tokens});
  at.contiguous(ids, name);
}

inline void validate(const EmbeddingForward& p, std::initializer_list<DType> dtypes = {DType::f32, DType::bf16}) {
  const Checker at{"embedding"};
  validate_embedding(at, {&p.output, "output"}, {&p.weight, "weight"}, dtypes);
  validate_ids(at, p.input, "input", p.output.size(0), DType::i64);
  at.contiguous(p.output, "output");
}

inline void validate(const EmbeddingBackward& p, std::initializer_list<DType> dtypes = {DType::f32, DType::bf16}) {
  const Checker at{"embedding backward"};
  validate_embedding(at, {&p.grad_output, "grad_output"}, {&p.grad_weight, "grad_weight"}, dtypes);
  validate_ids(at, p.input, "input", p.grad_output.size(0), DType::i64);
  at.contiguous(p.grad_weight, "grad_weight");
}

// Of ids in the host's memory: an error (ValueError in Python) for one that is no row.
inline void check_ids(const char* op, const TensorView& input, int64_t rows) {
  const auto* ids = input.as<int64_t>();
  for (int64_t t = 0; t < input.size(0); ++t) {
    if (ids[t] >= 0 && ids[t] < rows) continue;
    fail(std::string(op) + ": input holds " + std::to_string(ids[t]) + " at place " + std::to_string(t) +
         "; allowed: 0 to " + std::to_string(rows - 1) + " (weight has " + std::to_string(rows) + " rows)");
  }
}

}  // namespace llmengine::ops
