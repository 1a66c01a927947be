// Fibres: stacks that one operating-system thread switches between. Every CUDA thread of a block is one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace llmengine::sim {

// A stack of its own with an unmapped page below it, so that an overflow stops the process at once.
class Fibre {
 public:
  static constexpr size_t kStackBytes = 64 << 10;

  Fibre();
  ~Fibre();
  Fibre(Fibre&& other) noexcept;
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;

  // Makes the next resume() begin `body(argument)`, which must never return: it ends in its last suspend().
  void prepare(void (*body)(void*), void* argument);
  void resume();   // from the scheduler: runs the fibre until it suspends
  void suspend();  // from the fibre: back into the scheduler

  bool holds(uintptr_t address) const { return address - low_ < kStackBytes; }
  size_t offset_of(uintptr_t address) const { return address - low_; }

 private:
  struct Portable;  // ucontext, where switch.S has no code for the processor

  void* map_ = nullptr;
  uintptr_t low_ = 0;
  void* inside_ = nullptr;   // where the fibre stopped
  void* outside_ = nullptr;  // where the scheduler stopped
  Portable* portable_ = nullptr;
};

}  // namespace llmengine::sim
