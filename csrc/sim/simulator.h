// The simulator's host side: what a launch may touch, and in which order its threads run.
//
//   A launch runs cluster after cluster, of one block where it asks for none; each CUDA thread of a cluster is a fibre
//   (fibre.h), and threads change only where a kernel waits (barrier, warp collective) or, by the schedule, before a
//   memory access. Kernels are compiled with instrumentation that calls us before every access (instrument.cpp), so
//   each one is checked:
//     bounds      global memory: inside a tensor of the call, strides respected; shared: inside one array (memory.h)
//     races       two accesses of one byte, one of them a plain write, that no barrier orders (clocks.h): reported
//                 whichever order the schedule happened to run them in
//     fences      what threads wrote and the asynchronous unit reads or overwrites, with no fence_async (clocks.h)
//     shared      a read of a byte that no thread of the block wrote
//     alignment   of every access to its own size
//   Asynchronous copies take effect when the schedule says (copies.h, mbarrier.h, bulk.h), and so do products of
//   warpgroups (wgmma.h); both race with all that is not told of their end. Warp matrix instructions want their whole
//   warp (matrix.h). A fault ends the launch with a std::runtime_error that names kernel, thread, block, memory and
//   source lines.
//
//   Not modelled: order between clusters (an access by two of them, one writing, is a race unless both are atomic),
//   time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "common/tensor.h"

namespace llmengine::sim {

enum class Order : uint8_t {
  forward,      // one warp until it waits, then the next; lanes upward
  reversed,     // the same from the last warp, lanes downward
  round_robin,  // every thread a few memory accesses at a time
  random,       // any ready thread at every wait, and now and then at a memory access
  starved,      // one warp, which the seed chooses, only where no other thread can go on; the others as in `forward`
};

struct Schedule {
  Order order = Order::random;
  uint64_t seed = 0;  // of `random` and `starved`
};

// The schedule of the launches that follow. Throws std::invalid_argument for an order that it does not know.
void set_schedule(const std::string& order, uint64_t seed);

struct NamedView {
  const char* name;
  TensorView tensor;
};

// While it lives, kernels may touch these tensors and no other global memory. One at a time in the process: it holds
// the simulator's lock.
class Tensors {
 public:
  explicit Tensors(const std::vector<NamedView>& tensors);
  ~Tensors();
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
};

struct Index3 {
  unsigned x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// Every __shared__ variable begins so many bytes of its own, more than a block's may have together: what lies behind it
// there belongs to none, and an overrun is seen.
inline constexpr size_t kSharedRoom = 64 << 10;
inline constexpr size_t kStaticSharedBytes = 48 << 10;  // that a kernel's variables may have together
size_t static_shared_bytes(const void* kernel);

struct Launch {
  const void* kernel;  // the function, for its name
  Index3 grid, block, cluster;
  size_t shared_bytes;
  void (*call)(void*);  // runs one thread of the kernel
  void* parameters;     // given to call; the kernel's constant bank
  size_t parameter_bytes;
  const void* stream;  // told back, and nothing else
};

void run(const Launch& launch);
inline const void* last_stream = nullptr;  // of the last launch

// What a launch moved to and from one tensor, as its threads and copies asked: there are no caches. An atomic counts on
// both sides.
struct Moved {
  const void* kernel;
  std::string tensor;
  uint64_t reads = 0, bytes_read = 0, writes = 0, bytes_written = 0;
};
// Of the launches since the latest Tensors were told, in order.
const std::vector<Moved>& moved();
std::string name_of(const void* kernel);

struct Device {
  int multiprocessors = 3;  // few, so that persistent blocks take several rows of small tests
  size_t shared_bytes_per_block = 227 << 10;
  int compute_capability = 90;
  int cache_bytes = 50 << 20;
};
inline constexpr Device kDevice;
inline int multiprocessors = kDevice.multiprocessors;  // tests may have more

}  // namespace llmengine::sim
