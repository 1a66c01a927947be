// What a tensor map says (CUDA driver API, "cuTensorMapEncodeTiled"): where a tensor lies, and which boxes of it are
// copied to and from shared memory, laid out how. Checked here, so that an error names what is wrong; the driver would
// say "invalid value". On the device a map is made by ptx/tensor_map.cuh, and used by ptx/tensor_copy.cuh.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/tensor.h"

namespace llmengine {

// How a box's rows lie in shared memory: the 16-byte chunks of a row of so many bytes trade places, by the row's
// number, so that a column of chunks is in all banks.
enum class Swizzle : uint8_t { none, bytes_32, bytes_64, bytes_128 };

// Bytes of a row, 0 for any; and after how many the pattern repeats, to which tiles are aligned.
constexpr int swizzle_span(Swizzle s) { return s == Swizzle::none ? 0 : 16 << static_cast<int>(s); }
constexpr int swizzle_period(Swizzle s) { return s == Swizzle::none ? 128 : 8 * swizzle_span(s); }

// Bits of an address that are XORed with those three places higher.
constexpr uint32_t swizzle_mask(Swizzle s) { return s == Swizzle::none ? 0 : swizzle_span(s) - 16; }

// Dimensions go from the fastest running one, of stride 1, outward.
struct TensorMapFields {
  DType dtype = DType::f32;
  int rank = 0;
  const void* data = nullptr;
  std::array<int64_t, 5> sizes{}, strides{};  // in elements; in bytes, that of dimension 0 being an element's
  std::array<int, 5> box{}, steps{};          // a box covers so many elements, and takes every so manieth of them
  Swizzle swizzle = Swizzle::none;
};

// A map for boxes of this shape, given like the tensor's from the outermost dimension on; `steps` likewise, or none.
inline TensorMapFields tensor_map_fields(const char* name, const TensorView& tensor, const std::vector<int>& box,
                                         Swizzle swizzle, const std::vector<int>& steps = {}) {
  const auto complain = [&](const std::string& problem) {
    throw std::invalid_argument("tensor map of " + std::string(name) + " " + tensor.shape() + ": " + problem);
  };
  const auto must = [&](bool holds, const std::string& given, const std::string& allowed) {
    if (!holds) complain(given + "; allowed: " + allowed);
  };
  const auto text = [](auto number) { return std::to_string(number); };
  const int rank = tensor.ndim, element = static_cast<int>(size_of(tensor.dtype));
  must(rank >= 1 && rank <= 5, text(rank) + " dimensions", "1 to 5");
  must(static_cast<int>(box.size()) == rank, "a box of " + text(box.size()) + " dimensions", "the tensor's");
  must(steps.empty() || static_cast<int>(steps.size()) == rank, text(steps.size()) + " steps", "one a dimension");
  must(reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0, "data at an odd address", "multiples of 16 bytes");

  TensorMapFields map;
  map.dtype = tensor.dtype, map.rank = rank, map.data = tensor.data, map.swizzle = swizzle;
  int64_t packed = element;
  for (int d = 0; d < rank; ++d) {
    const int outward = rank - 1 - d;
    const std::string dimension = "dimension " + text(outward);
    map.sizes[d] = tensor.sizes[outward];
    map.box[d] = box[static_cast<size_t>(outward)];
    map.steps[d] = steps.empty() ? 1 : steps[static_cast<size_t>(outward)];
    // The stride of a dimension of one element is anything.
    map.strides[d] = map.sizes[d] == 1 ? packed : tensor.strides[outward] * element;
    if (d > 0 && map.sizes[d] == 1) map.strides[d] = (packed + 15) / 16 * 16;
    packed = map.strides[d] * map.sizes[d];
    must(map.sizes[d] >= 1 && map.sizes[d] <= int64_t{1} << 32, dimension + " has size " + text(map.sizes[d]),
         "1 to 2^32");
    must(map.box[d] >= 1 && map.box[d] <= 256, "the box covers " + text(map.box[d]) + " elements of " + dimension,
         "1 to 256");
    must(map.steps[d] >= 1 && map.steps[d] <= 8, "steps of " + text(map.steps[d]) + " in " + dimension, "1 to 8");
    if (d == 0) must(map.strides[0] == element, "the last dimension has stride " + text(tensor.strides[outward]), "1");
    if (d == 0) continue;
    must(map.strides[d] > 0 && map.strides[d] % 16 == 0 && map.strides[d] < int64_t{1} << 40,
         dimension + " has a stride of " + text(map.strides[d]) + " bytes", "multiples of 16, above 0 and below 2^40");
  }
  must(map.steps[0] == 1, "steps of " + text(map.steps[0]) + " in the last dimension", "1");
  const int row = map.box[0] * element, span = swizzle_span(swizzle);
  must(row % 16 == 0, "the box has rows of " + text(row) + " bytes", "multiples of 16");
  // Shorter rows the driver takes too, but how they lie is not documented.
  must(span == 0 || row == span, "the box has rows of " + text(row) + " bytes", "the swizzle's " + text(span));
  return map;
}

}  // namespace llmengine
