// From run-time values to the compile-time ones that kernels are made for.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/tensor.h"

namespace llmengine::cuda {

// body(T{}) for the float type of `dtype`; the contract has admitted no other.
template <class Body>
void visit_float(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: throw std::invalid_argument(std::string("no CUDA kernel for dtype ") + name(dtype));
  }
}

// body(std::integral_constant) for the least of the ascending `choices` that is at least `n`.
template <int... choices, class Body>
void visit_at_least(int n, const Body& body) {
  bool found = false;
  ((!found && n <= choices ? (found = true, body(std::integral_constant<int, choices>{})) : void()), ...);
  if (!found) throw std::invalid_argument("no CUDA kernel is made for " + std::to_string(n));
}

}  // namespace llmengine::cuda
