// Many tensors in one launch. What a launch knows of them is in the kernel's parameters: nothing is copied to the
// device, kept or freed, and a stream may be capturing. The elements are cut into chunks, a block each.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmengine::cuda {

inline constexpr int kParameterBytes = 4096;  // of a kernel, on every driver

// Which blocks are whose: the first of each of up to `capacity` tensors.
template <int capacity>
struct BlockTable {
  uint32_t first[capacity];
  int tensors = 0;
  uint32_t blocks = 0;

  bool full() const { return tensors == capacity; }

  // A further tensor, which must not be empty; returns its place.
  int add(int64_t elements, int64_t chunk) {
    first[tensors] = blocks;
    blocks += static_cast<uint32_t>((elements + chunk - 1) / chunk);
    return tensors++;
  }

  // The last tensor that begins at or before the block.
  __device__ int owner(uint32_t block) const {
    int low = 0, high = tensors;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first[middle] <= block) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

}  // namespace llmengine::cuda
