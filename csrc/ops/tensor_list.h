// Lists of tensors, as an optimizer has them: parameters, gradients, state.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"

namespace llmengine::ops {

using TensorList = std::vector<TensorView>;

// A list that has one tensor for each parameter, contiguous and of its size, all of the first one's dtype.
inline void validate_list(const Checker& at, const TensorList& list, const char* name, const TensorList& parameters,
                          std::initializer_list<DType> allowed) {
  if (list.size() != parameters.size()) {
    at.fail_at(name, "has " + std::to_string(list.size()) + " tensors; expected " + std::to_string(parameters.size()));
  }
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string place = std::string(name) + "[" + std::to_string(i) + "]";
    const TensorView& t = list[i];
    at.defined(t, place.c_str());
    at.dtype(t, place.c_str(), allowed);
    if (t.dtype != list[0].dtype)
      at.fail_at(place.c_str(), "must have the dtype of the first, " + std::string(llmengine::name(list[0].dtype)));
    if (t.numel() != parameters[i].numel()) {
      at.fail_at(place.c_str(),
                 "has shape " + t.shape() + "; expected that of its parameter, " + parameters[i].shape());
    }
    at.contiguous(t, place.c_str());
  }
}

}  // namespace llmengine::ops
