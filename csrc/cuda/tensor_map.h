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

// Strides in bytes, from the fastest running dimension outward, that of one element being the next that a map takes: it
// may be anything.
inline std::array<int64_t, 5> map_strides(const TensorView& tensor) {
  std::array<int64_t, 5> strides{};
  int64_t packed = static_cast<int64_t>(size_of(tensor.dtype));
  for (int d = 0; d < tensor.ndim; ++d) {
    const int outward = tensor.ndim - 1 - d;
    const int64_t size = tensor.sizes[outward], whole = d == 0 ? packed : (packed + 15) / 16 * 16;
    strides[d] = size == 1 ? whole : tensor.strides[outward] * static_cast<int64_t>(size_of(tensor.dtype));
    packed = strides[d] * size;
  }
  return strides;
}

// Why no map can tell where a tensor lies, and TMA cannot fetch it, or nothing.
inline std::string tensor_map_refuses(const TensorView& tensor) {
  const auto text = [](auto number) { return std::to_string(number); };
  const int rank = tensor.ndim;
  if (rank < 1 || rank > 5) return text(rank) + " dimensions; allowed: 1 to 5";
  for (int d = 0; d < rank; ++d) {
    if (tensor.sizes[d] >= 1 && tensor.sizes[d] <= int64_t{1} << 32) continue;
    return "dimension " + text(d) + " has size " + text(tensor.sizes[d]) + "; allowed: 1 to 2^32";
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % 16 != 0)
    return "data at an odd address; allowed: multiples of 16 bytes";
  const auto strides = map_strides(tensor);
  if (strides[0] != static_cast<int64_t>(size_of(tensor.dtype))) {
    return "the last dimension has stride " + text(tensor.strides[rank - 1]) + "; allowed: 1";
  }
  for (int d = 1; d < rank; ++d) {
    if (strides[d] > 0 && strides[d] % 16 == 0 && strides[d] < int64_t{1} << 40) continue;
    return "dimension " + text(rank - 1 - d) + " has a stride of " + text(strides[d]) +
           " bytes; allowed: multiples of 16, above 0 and below 2^40";
  }
  return "";
}

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
  if (const std::string reason = tensor_map_refuses(tensor); !reason.empty()) complain(reason);
  must(static_cast<int>(box.size()) == rank, "a box of " + text(box.size()) + " dimensions", "the tensor's");
  must(steps.empty() || static_cast<int>(steps.size()) == rank, text(steps.size()) + " steps", "one a dimension");

  TensorMapFields map;
  map.dtype = tensor.dtype, map.rank = rank, map.data = tensor.data, map.swizzle = swizzle;
  map.strides = map_strides(tensor);
  for (int d = 0; d < rank; ++d) {
    const int outward = rank - 1 - d;
    const std::string dimension = "dimension " + text(outward);
    map.sizes[d] = tensor.sizes[outward];
    map.box[d] = box[static_cast<size_t>(outward)];
    map.steps[d] = steps.empty() ? 1 : steps[static_cast<size_t>(outward)];
    must(map.box[d] >= 1 && map.box[d] <= 256, "the box covers " + text(map.box[d]) + " elements of " + dimension,
         "1 to 256");
    must(map.steps[d] >= 1 && map.steps[d] <= 8, "steps of " + text(map.steps[d]) + " in " + dimension, "1 to 8");
  }
  must(map.steps[0] == 1, "steps of " + text(map.steps[0]) + " in the last dimension", "1");
  const int row = map.box[0] * element, span = swizzle_span(swizzle);
  must(row % 16 == 0, "the box has rows of " + text(row) + " bytes", "multiples of 16");
  // Shorter rows the driver takes too, but how they lie is not documented.
  must(span == 0 || row == span, "the box has rows of " + text(row) + " bytes", "the swizzle's " + text(span));
  return map;
}

}  // namespace llmengine
