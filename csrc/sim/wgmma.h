// Products of warpgroups (PTX ISA, "wgmma.mma_async"): d, 64 x n, += or = a, 64 x k, times b, k x n.
//
//   Four warps issue one together, at one line, behind a wgmma_fence of each thread; it is carried out at any moment
//   until the wait for its group (the schedule chooses, like for copies), after those before it. Until then a thread
//   that touches its accumulators or its registers of a errs, and so does who writes the operands in shared memory,
//   which are read as the asynchronous unit reads (clocks.h). Accumulators are local arrays of the kernel: the
//   instrumentation announces their accesses too, so both rules are exact, and so is that of wgmma_fence: nothing that
//   a product takes may have been touched since.
//
//   An operand in shared memory is told by a descriptor of 64 bits. Its rows are those of m or n where k runs fastest
//   ("k-major"), else those of k. In 16-byte chunks, with span 1, 2, 4, 8 for swizzles of 0, 32, 64, 128 bytes:
//     k-major    row r, chunk c    at  r % 8 * span + r / 8 * stride + c            (no swizzle: + c * leading)
//     mn-major   row k, chunk c    at  k % 8 * span + k / 8 * stride + c % span + c / span * leading
//                                      (no swizzle: k % 8 + k / 8 * leading + c * stride)
//   and then the swizzle of bulk.h, by the bits of the address less the base offset (in units of 128 bytes): tiles must
//   begin where their pattern repeats, that many units behind a multiple of 1024, 512 or 256 bytes.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <vector>

#include "sim/fibre.h"
#include "sim/matrix.h"

namespace llmengine::sim {

// As descriptors have it: a shared address of 32 bits.
uint32_t window_address(const void* shared);

struct WgmmaShape {
  Element left, right;  // elements of a and of b, of one size
  int n;
  bool a_mn_major, b_mn_major;
};

struct WgmmaLane {
  float* d;
  const uint32_t* a_registers;  // or null: a is in shared memory
  uint64_t a, b;                // descriptors
  bool add;
  const void* return_address;
};

// An operand in shared memory: rows of k (mn-major) or of m or n, of so many elements.
struct MatrixView {
  uintptr_t window;  // where the block's dynamic shared memory begins
  uint64_t descriptor;
  bool mn_major;
  int rows, columns, element_bytes;

  uint32_t swizzle() const { return static_cast<uint32_t>(descriptor >> 62); }
  uintptr_t base() const { return (descriptor >> 49 & 7) * 128; }
  uintptr_t address(int row, int column) const;
};

struct Product {
  WgmmaShape shape;
  uint32_t group = 0;
  bool add = false, late = false;
  MatrixView a{}, b{};
  std::array<float*, 128> d{};
  std::array<const uint32_t*, 128> a_registers{};

  void take_effect() const;
};

// What a thread knows of its own registers.
struct Registers {
  struct InFlight {
    uintptr_t begin, end;
    uint32_t group;
    uintptr_t site;
    bool accumulators;
  };

  std::bitset<Fibre::kStackBytes / 4> touched;  // words of its stack, since its last wgmma_fence
  std::vector<InFlight> in_flight;
  uint32_t groups = 0;  // that it has committed
};

// For every thread of the warpgroup. The fence, the commit and the wait want whole warps.
void wgmma_fence(Site site);
void wgmma(const char* operation, const WgmmaShape& shape, WgmmaLane lane, Site site);
// That none of these registers is in flight, where the compiler is told that they change.
void settle_registers(const float* d, int count, const void* return_address);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);

}  // namespace llmengine::sim
