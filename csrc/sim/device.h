// The simulator's device side: what kernels reach through include/cuda_runtime.h and the twins of cuda/ptx/.
// Every call that waits takes the place it is called from, so that a deadlock can be told line by line.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <source_location>

#include "sim/simulator.h"

namespace llmengine {
struct TensorMapFields;
}

namespace llmengine::sim {

using Site = std::source_location;

Index3 thread_index();
Index3 block_index();
Index3 block_shape();
Index3 grid_shape();
int lane();

// Every thread of the block meets here, all at the same line.
void block_barrier(Site site);

// Barrier `id` completes when `threads` threads have come, whole warps at a time; those that only arrive go on at once.
void named_barrier(int id, int threads, bool wait, Site site);

// Every lane of `mask` meets here with the same operation, mask and line; each gets what all gave. A mask that names a
// lane which has exited is a fault: CUDA leaves such lanes out, but they are a mistake more often than not.
// Only an operation that `orders` memory (__syncwarp) makes writes before it visible after it.
struct Gathered {
  uint32_t lanes;  // that took part
  std::array<uint64_t, 32> value;
};
Gathered meet_warp(const char* operation, uint32_t mask, uint64_t value, bool orders, Site site);

// An instruction of the whole warp, for which every lane of it must come to the same line: the last one carries it out
// for all, on what each has brought, in the order of lanes.
void whole_warp(const char* operation, void* brought, void (*carry_out)(const std::array<uint64_t, 32>& brought),
                Site site);

// The value of another lane, for shuffles: to read a lane that takes no part is a fault.
uint64_t value_of_lane(const char* operation, const Gathered& gathered, int source, Site site);

enum class Touch : uint8_t { read, write, atomic };
// Checks an access before it is made. The instrumentation calls it for plain accesses, the twins for their own.
void touch(const void* address, size_t size, Touch kind, const void* return_address);

// An asynchronous copy of `size` bytes, of which `bytes` are read and the others are zeros; groups of copies.
void copy_async(void* shared, const void* global, int size, int bytes, const void* return_address);
void commit_copies();
void wait_copies(int pending);

// Mbarriers. Only where one is initialised do its bytes count for memory. An address may be another block's.
void mbarrier_init(void* mbarrier, int arrivals, const void* return_address);
void mbarrier_init_fence();
void mbarrier_arrive(const char* operation, uintptr_t mbarrier, bool arrives, int expected_bytes,
                     const void* return_address);
// At an mbarrier of any block of the cluster. publishes: tells the others all that the thread knew or did.
void mbarrier_arrive_cluster(const char* operation, uintptr_t mbarrier, bool publishes, const void* return_address);
void mbarrier_arrive_for_copies(void* mbarrier, bool counted, const void* return_address);
bool mbarrier_try_wait(void* mbarrier, int parity, bool cluster, const void* return_address, Site site);

// What the asynchronous unit copies (bulk.h). `blocks`: the cluster's blocks that a box goes to, 0 for the own.
struct BoxPlace {
  int rank;
  int place[5];
};
void copy_bulk(void* shared, const void* global, int bytes, void* mbarrier, const void* return_address);
void load_tensor(void* shared, const TensorMapFields& map, const BoxPlace& at, void* mbarrier, uint32_t blocks,
                 const void* return_address);
enum class Adds : uint8_t { nothing, floats, integers };  // to what is there
void store_tensor(const TensorMapFields& map, const BoxPlace& at, const void* shared, Adds adds,
                  const void* return_address);
void store_bulk(void* global, const void* shared, int bytes, Adds adds, const void* return_address);
void commit_stores();
void wait_stores(int pending, bool reads_only);
enum class Reach : uint8_t {
  block,
  cluster,
  global
};  // of a fence: shared memory of the thread's block, all, all memory
void fence_async(Reach reach);

// Blocks of a cluster (cluster.h).
int block_in_cluster();
int blocks_of_cluster();
void cluster_arrive(bool orders, Site site);
void cluster_wait(Site site);
uintptr_t map_to_block(const void* shared, int block, const void* return_address);
uintptr_t touch_remote(uintptr_t address, size_t size, Touch kind, const void* return_address);  // where the bytes are

// Of whole warps: the registers of each thread, and one lane of them.
void set_registers(const char* operation, int count, bool increase, Site site);
bool elect_one(Site site);

void* dynamic_shared();

}  // namespace llmengine::sim
