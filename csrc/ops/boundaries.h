// The boundaries of packed sequences: sequence n holds the tokens cu_seqlens[n] to cu_seqlens[n + 1].
#pragma once

#include <string>

#include "common/check.h"
#include "common/tensor.h"

namespace llmengine::ops {

// Reads the boundaries, int32 (sequences + 1,), and refuses what does not cut the tokens into sequences of at most
// `longest`: for backends whose boundaries lie in memory that this process can read.
inline void check_boundaries(const Checker& at, const TensorView& boundaries, const char* argument, int64_t tokens,
                             int64_t longest) {
  const int32_t* ends = boundaries.as<int32_t>();
  const int64_t count = boundaries.size(0) - 1;
  if (ends[0] != 0) at.fail_at(argument, "must begin with 0, got " + std::to_string(ends[0]));
  for (int64_t n = 0; n < count; ++n) {
    const int64_t length = static_cast<int64_t>(ends[n + 1]) - ends[n];
    if (length >= 0 && length <= longest) continue;
    at.fail_at(argument, "gives sequence " + std::to_string(n) + " " + std::to_string(length) + " tokens" +
                             (length < 0 ? ": it must never fall" : ", above its maximum " + std::to_string(longest)));
  }
  if (ends[count] > tokens) {
    at.fail_at(argument, "ends at " + std::to_string(ends[count]) + ", past the " + std::to_string(tokens) + " tokens");
  }
}

}  // namespace llmengine::ops
