// Runs the blocks of a launch: fibres, the schedule, barriers and warp collectives.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "sim/copies.h"
#include "sim/device.h"
#include "sim/fibre.h"
#include "sim/mbarrier.h"
#include "sim/memory.h"

namespace llmengine::sim {

// Whether a kernel's own code runs. The linker may give the simulator the instrumented copy of a standard library
// function that kernels' files use too; its accesses are nobody's.
extern constinit bool watching;

struct Unwatched {
  Unwatched() { watching = false; }
  ~Unwatched() { watching = true; }
};

std::string text(Index3 index);

class Machine {
 public:
  using CarryOut = void (*)(const std::array<uint64_t, 32>& brought);

  static Machine& the();

  void run(const Launch& launch);

  // For the thread that runs:
  Index3 thread_index() const;
  Index3 block_index() const { return block_; }
  const Launch& launch() const { return *launch_; }
  int lane() const { return current_->number % 32; }
  void block_barrier(Site site);
  void named_barrier(int id, int threads, bool wait, Site site);
  Gathered meet_warp(const char* operation, uint32_t mask, uint64_t value, bool orders, Site site);
  void whole_warp(const char* operation, void* brought, CarryOut carry_out, Site site);
  void touch(const Access& access);
  void touch_for_warp(const Access& access, int lane);  // of a lane of the warp that runs
  void copy_async(Copy copy, uintptr_t site);
  void commit_copies() { memory.clocks.commit(current_->number); }
  void wait_copies(int pending);
  void mbarrier_init(uintptr_t address, int arrivals, uintptr_t site);
  void mbarrier_init_fence();
  void mbarrier_arrive(uintptr_t address, int bytes, uintptr_t site);
  bool mbarrier_try_wait(uintptr_t address, int parity, uintptr_t return_address, Site site);
  void copy_bulk(Transfer transfer, uintptr_t mbarrier, uintptr_t site);
  [[noreturn]] void fail(const std::string& what) { fail(current_->number, what); }

  Memory memory;
  Schedule schedule;

 private:
  enum class State : uint8_t { ready, waiting, exited };
  enum class Meeting : uint8_t { block, named, warp, mbarrier };

  struct Thread {
    int number = 0;
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
  };
  struct NamedBarrier {
    int threads = 0;
    std::vector<int> arrived, waiting;
  };

  void run_block();
  static void thread_body(void* argument);
  void exit_thread();
  void wait(Meeting meeting, const char* operation, Site site);
  void make_ready(Thread& thread);
  void yield();

  int pick();
  int pick_warp_by_warp(bool reversed);
  int pick_random();
  int pick_next();
  bool preempts();

  void try_block_barrier();
  void meet(uint32_t mask, uint64_t value, bool orders, CarryOut carry_out);
  void try_collective(const Thread& last);
  std::vector<int> lanes_of(int warp, uint32_t mask) const;

  Mbarrier& mbarrier_at(uintptr_t address, const char* operation, uintptr_t site);
  void try_end_phase(Mbarrier& mbarrier);
  bool bulk_copies_may_finish(bool last_moment);
  void finish_bulk_copy(size_t i);
  std::string missing_of_mbarriers() const;

  void check(const Access& access, int thread);
  void check_copy(const Transfer& transfer, uint32_t alignment, int agent, uintptr_t site);
  [[noreturn]] void fail(int thread, const std::string& what);
  Index3 index_of(int number) const;
  std::string position(int number) const;
  std::string position_of_all() const;
  std::string source_line(uintptr_t site) const;

  const Launch* launch_ = nullptr;
  Index3 block_;
  int count_ = 0;  // threads of the block
  std::vector<Fibre> fibres_;
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  int last_ = -1;                                         // the thread that ran last
  std::vector<uint32_t> ready_, in_collective_, exited_;  // masks of lanes, one per warp
  std::vector<NamedBarrier> named_;                       // by id
  int at_barrier_ = 0;
  uint64_t touches_ = 0;
  Copies copies_;
  std::vector<Mbarrier> mbarriers_;
  std::vector<BulkCopy> bulk_copies_;
  std::mt19937_64 random_;
  std::string fault_;
};

}  // namespace llmengine::sim
