// The shared memory of the blocks that run together: dynamic memory and __shared__ variables, at addresses of each
// block's own.
//
//   region:  | dynamic, block 0 | variables, block 0 | dynamic, block 1 | variables, block 1 | ...
//
//   A __shared__ variable is one static variable of the image (include/cuda_runtime.h), at one address in the code of
//   all blocks. In a cluster it holds what belongs to the block that runs: when another one goes on, its bytes change
//   places with those of the region. Checks, copies under way and other blocks know it by its address in the region
//   (`own`), which `real` takes back where bytes are moved. Only variables that a block of the cluster has touched
//   change places. A block alone has its variables where they are.
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
  bool holds(uintptr_t address) const { return address - begin() < static_cast<size_t>(blocks_) * stride_; }
  bool holds_dynamic(uintptr_t address) const { return holds(address) && (address - begin()) % stride_ < kDynamic; }
  int block_of(uintptr_t address) const { return static_cast<int>((address - begin()) / stride_); }
  uintptr_t in_block(uintptr_t address, int block) const {
    return address + (static_cast<uintptr_t>(block) - static_cast<uintptr_t>(block_of(address))) * stride_;
  }
  // Where the block's own lies that its code calls `address`; any other address stays as it is.
  uintptr_t own(uintptr_t address, int block);
  // Where the bytes of an address are now.
  uintptr_t real(uintptr_t address) const;
  // Dynamic memory as a whole, whatever the launch asked for: what lies beyond its size is an overrun of shared memory.
  bool covers(uintptr_t address) const;
  // What of shared memory lies there, or past the end of what lies there; nothing elsewhere.
  std::optional<SharedPlace> place(uintptr_t address) const;

 private:
  static constexpr size_t kDynamic = 228 << 10;  // whole pages
  static_assert(kDynamic >= kDevice.shared_bytes_per_block);

  struct InVariable {
    const SharedVariable* variable;  // or null
    uint64_t offset;
  };
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(region_.get()); }
  char* of_block(const SharedVariable& variable, int block) const;
  InVariable variable_at(uintptr_t address) const;
  void touched(const SharedVariable& variable);

  const std::vector<SharedVariable>& variables_;
  std::vector<size_t> offsets_;  // of each variable among a block's, and the end
  size_t stride_ = 0;
  std::unique_ptr<char, Free> region_;
  int blocks_ = 0;  // that there is room for
  int clustered_ = 1, running_ = 0;
  uint64_t dynamic_bytes_ = 0;
  std::vector<const SharedVariable*> touched_;  // by a block of this launch
};

}  // namespace llmengine::sim
