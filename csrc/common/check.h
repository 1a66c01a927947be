// The contract's checks. Each failure is a std::invalid_argument (ValueError in Python) that names the operator,
// the argument, what was given and what is allowed. They run before any kernel touches memory.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/tensor.h"

namespace llmengine {

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline void check(bool condition, const std::string& message) {
  if (!condition) fail(message);
}

struct NamedTensor {
  const TensorView* tensor;
  const char* name;
};
using NamedTensors = std::initializer_list<NamedTensor>;

// Checks on one operator's arguments; the operator's name heads every message.
struct Checker {
  const char* op;

  [[noreturn]] void fail_at(const char* argument, const std::string& problem) const {
    fail(std::string(op) + ": " + argument + " " + problem);
  }

  void dtype(const TensorView& t, const char* argument, std::initializer_list<DType> allowed) const {
    if (!t.defined()) return;
    for (DType d : allowed) {
      if (t.dtype == d) return;
    }
    std::string names;
    for (DType d : allowed) names += (names.empty() ? "" : ", ") + std::string(name(d));
    fail_at(argument, std::string("has dtype ") + name(t.dtype) + "; allowed: " + names);
  }

  void defined(const TensorView& t, const char* argument) const {
    if (!t.defined()) fail_at(argument, "is required but None was given");
  }

  void shape(const TensorView& t, const char* argument, std::initializer_list<int64_t> expected) const {
    if (!t.defined()) return;
    if (t.ndim == static_cast<int>(expected.size()) && std::equal(expected.begin(), expected.end(), t.sizes)) return;
    std::string text;
    for (int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
    fail_at(argument, "has shape " + t.shape() + "; expected (" + text + (expected.size() == 1 ? ",)" : ")"));
  }

  void contiguous(const TensorView& t, const char* argument) const {
    if (t.defined() && !t.contiguous()) fail_at(argument, "must be contiguous");
  }

  void unit_last_stride(const TensorView& t, const char* argument) const {
    if (t.defined() && t.ndim > 0 && t.size(-1) > 1 && t.stride(-1) != 1 && t.numel() > 0) {
      fail_at(argument, "must have last stride 1, got " + std::to_string(t.stride(-1)));
    }
  }

  void probability(double p, const char* argument) const {
    if (!(p >= 0.0 && p < 1.0)) fail_at(argument, "must lie in [0, 1), got " + std::to_string(p));
  }
};

}  // namespace llmengine
