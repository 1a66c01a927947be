// Runs the clusters of a launch: fibres, the schedule, barriers and warp collectives.
//
//   Blocks of a cluster run together; a launch that asks for no clusters has them of one block. Threads are numbered
//   through the cluster, block after block.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "sim/bulk.h"
#include "sim/cluster.h"
#include "sim/copies.h"
#include "sim/device.h"
#include "sim/fibre.h"
#include "sim/mbarrier.h"
#include "sim/memory.h"
#include "sim/wgmma.h"

namespace llmengine::sim {

// Whether a kernel's own code runs. The linker may give the simulator the instrumented copy of a standard library
// function that kernels' files use too; its accesses are nobody's.
extern constinit bool watching;

struct Unwatched {
  Unwatched() { watching = false; }
  ~Unwatched() { watching = true; }
};

std::string text(Index3 index);
std::string text(Site site);
uintptr_t number(const void* address);

class Machine {
 public:
  using CarryOut = void (*)(const std::array<uint64_t, 32>& brought);

  static Machine& the();

  void run(const Launch& launch);

  // For the thread that runs:
  Index3 thread_index() const { return current_->index; }
  Index3 block_index() const { return block_index(block()); }
  int block() const { return current_->block; }  // in its cluster
  const Launch& launch() const { return *launch_; }
  int lane() const { return current_->number % 32; }
  void block_barrier(Site site);
  void named_barrier(int id, int threads, bool wait, Site site);
  Gathered meet_warp(const char* operation, uint32_t mask, uint64_t value, bool orders, Site site);
  int elected() const;
  void whole_warp(const char* operation, void* brought, CarryOut carry_out, Site site);
  void touch(const Access& access);
  void touch_for_warp(const Access& access, int lane);  // of a lane of the warp that runs
  [[noreturn]] void fail(const std::string& what) { fail(current_->number, what); }

  // Copies by threads (machine.cpp).
  void copy_async(Copy copy, uintptr_t site);
  void commit_copies();
  void wait_copies(int pending);

  // Mbarriers (mbarrier.cpp); an address may be another block's.
  void mbarrier_init(uintptr_t address, int arrivals, uintptr_t site);
  void mbarrier_init_fence();
  void mbarrier_arrive(const char* operation, uintptr_t address, bool arrives, int bytes, bool publishes,
                       uintptr_t site);
  void mbarrier_arrive_for_copies(uintptr_t address, bool counted, uintptr_t site);
  bool mbarrier_try_wait(uintptr_t address, int parity, bool cluster, uintptr_t return_address, Site site);

  // Bulk copies (bulk.cpp).
  void copy_bulk(Transfer transfer, uintptr_t mbarrier, uintptr_t site);
  void load_tensor(uintptr_t shared, const TensorMapFields& map, const BoxPlace& at, uintptr_t mbarrier,
                   uint32_t blocks, uintptr_t site);
  void store_tensor(const TensorMapFields& map, const BoxPlace& at, uintptr_t shared, Adds adds, uintptr_t site);
  void store_bulk(uintptr_t global, uintptr_t shared, int bytes, Adds adds, uintptr_t site);
  void commit_stores();
  void wait_stores(int pending, bool reads_only);
  void fence_async(Reach reach) { memory.clocks.fence(current_->number, reach); }

  // Clusters (cluster.cpp).
  void cluster_arrive(bool orders, Site site);
  void cluster_wait(Site site);
  uintptr_t map_to_block(uintptr_t shared, int block, uintptr_t site);
  uintptr_t touch_remote(const Access& access);  // where the bytes are
  void set_registers(int count, bool increase, Site site);

  // Products of warpgroups (wgmma.cpp).
  void wgmma_fence();
  void settle_registers(const Access& access);
  void wgmma(const char* operation, const WgmmaShape& shape, WgmmaLane& lane, Site site);
  void wgmma_commit();
  void wgmma_wait(int pending);

  // The running thread's block's shared memory that its code calls so (block_memory.h).
  uintptr_t own(uintptr_t shared) { return memory.blocks.own(shared, block()); }
  uintptr_t own(const void* shared) { return own(number(shared)); }

  Memory memory;
  Schedule schedule;

 private:
  enum class State : uint8_t { ready, waiting, exited };
  enum class Meeting : uint8_t { block, named, warp, warpgroup, mbarrier, cluster, registers };

  struct Thread {
    int number = 0, block = 0;  // in the cluster
    Index3 index;               // in the block
    State state = State::ready;
    // What it waits for, while it waits:
    Meeting meeting = Meeting::block;
    const char* operation = "";
    Site site;
    uint32_t mask = 0;
    uint64_t value = 0;
    bool orders = false;
    CarryOut carry_out = nullptr;
    bool looked = false;  // at an mbarrier's phase that had not ended
    Gathered gathered = {};
    // Asynchronous deeds: the last clocks of the groups of copies and stores, and of the latest store.
    std::vector<uint32_t> copy_groups, store_groups;
    uint32_t last_store = 0;
    uintptr_t store_site = 0;
    std::unique_ptr<Registers> registers;  // of a thread that multiplies in a warpgroup
  };
  struct NamedBarrier {
    int threads = 0;
    std::vector<int> arrived, waiting;
  };
  struct Block {
    int at_barrier = 0, exited = 0;
    std::vector<NamedBarrier> named;
    int free_registers = 0;
    std::vector<int> wait_for_registers;
    std::vector<RemoteAccess> from_others;
  };
  struct Arrival {  // at an mbarrier, when the thread's copies up to a group have come
    int thread;
    uint32_t group;
    uintptr_t mbarrier;
  };

  void run_cluster();
  static void thread_body(void* argument);
  void exit_thread();
  void end_block(int block);
  void wait(Meeting meeting, const char* operation, Site site);
  void make_ready(Thread& thread);
  void yield();
  void stopped(int thread);
  bool something_may_finish();

  int pick();
  int pick_warp_by_warp(bool reversed, int last_of_all = -1);
  bool others_are_ready(int warp) const;
  int pick_random();
  int pick_next();
  bool preempts();
  // When an asynchronous deed takes effect: at once, or not before it must.
  struct Moment {
    bool at_once, late;
  };
  Moment choose_moment();

  void try_block_barrier(int block);
  void meet(uint32_t mask, uint64_t value, bool orders, CarryOut carry_out);
  void try_collective(const Thread& last);
  std::vector<int> lanes_of(int warp, uint32_t mask) const;
  bool meet_warpgroup(const char* operation, uint64_t value, Site site);

  Mbarrier* find_mbarrier(uintptr_t address);
  int block_of(const Mbarrier& mbarrier) const { return mbarrier.thread / count_; }  // who initialises it owns it
  Mbarrier& mbarrier_at(uintptr_t address, const char* operation, uintptr_t site, By by = By::thread);
  void try_end_phase(Mbarrier& mbarrier);
  void copies_have_come();
  std::string missing_of_mbarriers() const;

  void issue(BulkCopy copy);
  void need_fenced(const Mbarrier& mbarrier, const char* operation, uintptr_t site);
  void report_to(BulkCopy& copy, Mbarrier& mbarrier, uintptr_t site);
  void check_box(uintptr_t shared, const TensorMapFields& map, int rank, uintptr_t site);
  BulkCopy begin_store(uintptr_t shared, uint64_t bytes, Adds adds, uintptr_t site);
  void store_piece(BulkCopy& copy, const char* shared, const char* global, uint32_t bytes, uintptr_t site);
  bool bulk_copies_may_finish(bool last_moment);
  void finish_bulk_copy(size_t i);

  void begin_blocks();
  void leave_nothing_under_way(const Thread& thread);
  std::string missing_of_blocks() const;
  void try_cluster_barrier();
  void check_remote(uintptr_t address, int agent, const char* what, uintptr_t site);
  bool give_registers(int warp, int count);

  void touch_local(const Access& access);
  void check_registers(int thread, const WgmmaLane& lane, const WgmmaShape& shape, const char* operation);
  void touch_operand(const MatrixView& view, const char* operation, int agent, uintptr_t site);
  void products_may_finish();
  void finish_product(size_t warp);

  void check_own(Access access, int thread);
  void check(const Access& access, int thread);
  void check_copy(const Transfer& transfer, uint32_t alignment, By by, int agent, uintptr_t site);
  [[noreturn]] void fail(int thread, const std::string& what);
  Index3 index_of(int number) const;
  Index3 block_index(int block) const;
  std::string position(int number) const;
  std::string other_side(const Conflict& conflict) const;
  std::string block_name(int block) const { return "block " + text(block_index(block)); }
  std::string position_of_all() const;
  std::string source_line(uintptr_t site) const;

  const Launch* launch_ = nullptr;
  Index3 first_block_;               // of the cluster
  int count_ = 0;                    // threads of a block
  int block_count_ = 1, total_ = 0;  // blocks and threads of a cluster
  std::vector<Fibre> fibres_;
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  int last_ = -1;                                         // the thread that ran last
  int starved_ = 0;                                       // the warp that `starved` keeps waiting
  std::vector<uint32_t> ready_, in_collective_, exited_;  // masks of lanes, one per warp
  std::vector<Block> blocks_;
  uint64_t touches_ = 0;
  Copies copies_;
  std::vector<Arrival> arrivals_of_copies_;
  std::vector<Mbarrier> mbarriers_;
  std::vector<BulkCopy> bulk_copies_;
  ClusterBarrier cluster_;
  std::vector<std::vector<int>> at_warpgroup_;  // the threads that have come, by the warpgroup's first warp
  std::vector<std::vector<Product>> products_;  // under way, in order, by the same
  int products_under_way_ = 0;
  std::vector<int> warp_registers_;  // of each thread of a warp
  std::mt19937_64 random_;
  std::string fault_;
};

}  // namespace llmengine::sim
