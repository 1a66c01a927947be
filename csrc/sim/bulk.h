// What the asynchronous unit copies: in bulk, and boxes of tensors (PTX ISA, "cp.async.bulk", "cp.async.bulk.tensor").
//
//   A copy takes effect as the schedule says, like other copies (copies.h). To shared memory it reports to an mbarrier,
//   and the last legal moment is when no thread can go on; to several blocks it goes as several copies. To global
//   memory it belongs to a group of its thread, and the last moment is the wait for that group, or for the reads of it.
//   It may add to what is there, number by number and each one atomically: in which order, nobody says.
//
//   A tensor map (ptx/tensor_map.cuh) says where the tensor lies, how large a box is, and how it is laid out in shared
//   memory. There a box is dense, its first dimension running fastest; swizzled, the 16-byte chunk of an address is
//   XORed with the address's bits from 7 up: three of them for 128-byte rows, two for 64, one for 32. What of a box
//   lies outside of the tensor is zero in shared memory, and is not written to global memory.
//
//   Writes of threads must be fenced (clocks.h) for what this unit reads or overwrites; that it overwrites what threads
//   have read needs only an order, as in every ring of buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "sim/copies.h"
#include "sim/device.h"

namespace llmengine::sim {

struct BulkCopy {
  std::vector<Transfer> pieces;
  uint32_t bytes = 0;
  int mbarrier = -1;  // to shared memory: where it reports to
  // To global memory: whose it is.
  int thread = -1;
  uint32_t group = 0;
  Adds adds = Adds::nothing;
  bool late = false;
};

}  // namespace llmengine::sim
