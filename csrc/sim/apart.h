// Copies of a call's tensors that lie far apart: wherever the heap put the tensors, an access past the end of one lands
// in no other, however far it goes, up to the size of the largest and 64 KiB.
//
//   Tensors that share memory go together, so that they still do. Alignment to a page and strides stay as they were.
//   Only elements are copied: what lies between them may be gigabytes, or another's.
#pragma once

#include <cstddef>
#include <vector>

#include "common/tensor.h"

namespace llmengine::sim {

class Apart {
 public:
  explicit Apart(const std::vector<TensorView*>& tensors);  // points them at their copies, while it lives
  ~Apart();
  Apart(const Apart&) = delete;
  Apart& operator=(const Apart&) = delete;

  void give_back() const;  // what has changed, and nothing else: an original may be memory that none may write

 private:
  struct Pair {
    TensorView original;
    char* copy;
  };

  std::vector<Pair> pairs_;
  void* map_ = nullptr;
  size_t map_bytes_ = 0;
};

}  // namespace llmengine::sim
