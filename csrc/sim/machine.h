// Runs the blocks of a launch: fibres, the schedule, barriers and warp collectives.
#pragma once

#include <random>
#include <string>
#include <vector>

#include "sim/copies.h"
#include "sim/device.h"
#include "sim/fibre.h"
#include "sim/memory.h"

namespace llmengine::sim {

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
  [[noreturn]] void fail(const std::string& what) { fail(current_->number, what); }

  Memory memory;
  Schedule schedule;

 private:
  enum class State : uint8_t { ready, waiting, exited };
  enum class Meeting : uint8_t { block, named, warp };

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

  void check(const Access& access, int thread);
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
  std::mt19937_64 random_;
  std::string fault_;
};

}  // namespace llmengine::sim
