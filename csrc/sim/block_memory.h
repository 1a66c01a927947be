// The shared memory of the blocks that run together: dynamic memory and __shared__ variables, at addresses of each
// block's own.
//
//   region:  | dynamic, block 0 | variables, block 0 | dynamic, block 1 | variables, block 1 | ...
//
//   A __shared__ variable is one static variable of the image (include/cuda_runtime.h), at one address in the code of
//   all blocks. In a cluster it holds what belongs to the block that runs: when another one goes on, its bytes change
//   places with those of the region. Checks, copies under way and other blocks know it by its address in the region
//   (`own`), marked as no pointer is, so that one that runs past the end of dynamic memory is never taken for it;
//   `real` takes it back where bytes are moved. Only variables that a block of the cluster has touched change places. A
//   block alone has its variables where they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "sim/image.h"
#include "sim/simulator.h"

namespace llmengine::sim {

// A variable or a block's dynamic memory, and where an address lies in it.
struct SharedPlace {
  std::string name;
  uint64_t offset, size;
};

class BlockMemory {
 public:
  BlockMemory();

  bool reserve(int blocks);  // whether addresses are others than before
  void begin_launch(uint64_t dynamic_bytes);
  void begin_cluster(int blocks);  // fills with NaN
  void enter(int block);           // which runs from here on

  char* dynamic(int block) const { return region_.get() + static_cast<size_t>(block) * stride_; }
  // Whether it is in what the blocks that run have of the region.
  bool holds(uintptr_t address) const { return in_region(address) < static_cast<size_t>(clustered_) * stride_; }
  bool holds_dynamic(uintptr_t address) const {
    return !is_marked(address) && holds(address) && in_stride(address) < kDynamic;
  }
  int block_of(uintptr_t address) const { return clustered_ == 1 ? 0 : static_cast<int>(in_region(address) / stride_); }
  uintptr_t in_block(uintptr_t address, int block) const {
    return address + (static_cast<uintptr_t>(block) - static_cast<uintptr_t>(block_of(address))) * stride_;
  }
  // Where the block's own lies that its code calls `address`; any other address stays as it is.
  uintptr_t own(uintptr_t address, int block);
  // Where the bytes of an address are now.
  uintptr_t real(uintptr_t address) const;
  // Whether so many bytes from there on are one variable's, or dynamic memory that the launch asked for.
  bool contains(uintptr_t address, uint64_t size) const;
  // Dynamic memory as a whole, whatever the launch asked for: what lies beyond its size is an overrun of shared memory.
  bool covers(uintptr_t address) const;
  // What of shared memory lies there, or past the end of what lies there; nothing elsewhere.
  std::optional<SharedPlace> place(uintptr_t address) const;

 private:
  static constexpr size_t kDynamic = 228 << 10;  // whole pages
  static_assert(kDynamic >= kDevice.shared_bytes_per_block);
  static constexpr uintptr_t kMark = uintptr_t{1} << 62;

  struct InVariable {
    const SharedVariable* variable;  // or null
    uint64_t offset;
  };
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(region_.get()); }
  static bool is_marked(uintptr_t address) { return (address & kMark) != 0; }
  uintptr_t in_region(uintptr_t address) const { return (address & ~kMark) - begin(); }
  size_t in_stride(uintptr_t address) const {  // of what the region holds
    return clustered_ == 1 ? in_region(address) : in_region(address) % stride_;
  }
  char* of_block(const SharedVariable& variable, int block) const;
  InVariable variable_at(uintptr_t address) const;
  void touched(const SharedVariable& variable);

  const std::vector<SharedVariable>& variables_;
  const size_t stride_;
  std::unique_ptr<char, Free> region_;
  int blocks_ = 0;  // that there is room for
  int clustered_ = 1, running_ = 0;
  uint64_t dynamic_bytes_ = 0;
  std::vector<const SharedVariable*> touched_;  // by a block of this launch
};

}  // namespace llmengine::sim
