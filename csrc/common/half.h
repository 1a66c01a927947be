// Storage of the 16-bit floats: kernels widen to float on load and round to nearest even on store.
#pragma once

#include <cstdint>

namespace llmengine {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

}  // namespace llmengine
