// The memory that a launch may touch, and for every byte of it who wrote and read it last.
//
//   global   the tensors of the call: an access must hit elements, not the padding between rows
//   shared   every __shared__ variable, whose size stands in the symbol table, and an array of the launch's size of
//            dynamic memory, for each block of a cluster (block_memory.h); filled with NaN before each cluster
//   constant the kernel's parameters, and what the image never writes
//
// An asynchronous copy is checked and remembered when it is issued, as a write and a read of the agent that copies
// (clocks.h): whoever then touches what it touches, and was not told that it is done, races with it.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "sim/block_memory.h"
#include "sim/clocks.h"
#include "sim/simulator.h"

namespace llmengine::sim {

enum class Kind : uint8_t { read, write, atomic };
const char* verb(Kind kind);

// Whose access it is: the thread's own, that of its warp as a whole (matrix.h), that of a copy it issues, or that of
// the asynchronous unit, for the thread (bulk copies) or for its warpgroup (products), which sees only what is fenced.
enum class By : uint8_t { thread, warp, copy, bulk, product };

struct Access {
  uintptr_t address;
  uint64_t size;
  Kind kind;
  uintptr_t site;  // return address of the access
  By by = By::thread;
  int agent = -1;       // of what goes on asynchronously: in whose name it is remembered (clocks.h)
  bool remote = false;  // it may be in another block's shared memory
};

// An earlier access that nothing orders before this one.
struct Conflict {
  Kind kind;
  int agent;  // -1: of another cluster
  uint32_t stamp;
  uintptr_t site;
  bool unfenced = false;  // ordered, but not for the asynchronous unit
  uint64_t offset = 0;    // of the byte, in the access
};

// First and one past the last byte that a tensor's elements touch.
std::pair<uintptr_t, uintptr_t> extent(const TensorView& tensor);

class Memory {
 public:
  void begin_launch(const Launch& launch);
  void end_launch(const Launch& launch);
  void begin_cluster(int threads_of_block, int block_count);

  // What is wrong with an access of `thread`, or nothing: then it is remembered. `conflict` tells the other side of a
  // race.
  std::optional<std::string> check(const Access& access, int thread, std::optional<Conflict>& conflict);

  bool is_global(uintptr_t address) const { return region_at(address, 1); }
  bool is_shared(uintptr_t address) const { return blocks.covers(address); }
  std::string name_of(uintptr_t address) const;  // "byte 12 of shared slots", of an address that check() let pass

  BlockMemory blocks;

  int first_of_warpgroup(int thread) const { return thread - thread % threads_ % 128; }

  void set_tensors(const std::vector<NamedView>& tensors);
  const std::vector<Moved>& moved() const { return moved_; }

  Clocks clocks;

 private:
  static constexpr int kReaders = 2;  // of different threads: enough that a later writer is unordered with one of them

  struct Cell {  // a byte; a stamp of 0 is "never"
    uint32_t write_stamp, read_stamp[kReaders];
    uint32_t write_site, read_site[kReaders];
    uint16_t writer, reader[kReaders];  // agents (clocks.h)
    bool atomic;

    bool operator==(const Cell&) const = default;
  };
  struct Page {
    Cell cells[4096];
  };

  struct Region {  // a tensor of the call
    std::string name;
    TensorView tensor;
    uintptr_t begin, end;
    std::vector<int> by_stride;  // the dimensions of more than one element, the largest stride first
    bool dense;                  // every byte between begin and end is an element's
    mutable Moved moved = {};    // by the launch

    explicit Region(const NamedView& view);
    bool holds(uintptr_t address, uint64_t size) const;
    int64_t run_at(int64_t offset) const;
  };

  static void count(const Access& access, const Region& region);
  const Region* region_at(uintptr_t address, uint64_t size) const;
  std::string outside(const Access& access) const;
  std::string outside_tensors(const Access& access) const;
  std::optional<std::string> foreign(const Access& access, int thread) const;
  bool is_constant(const Access& access) const;

  Cell& cell(uintptr_t address);
  std::optional<Conflict> conflict_at(const Cell& cell, const Access& access, int thread) const;
  Reach reach_of(int writer, uintptr_t address) const;
  bool comes_after(const Access& access, int agent, uint32_t stamp, int thread) const;
  void remember(Cell& cell, const Access& access, int thread, uint32_t site);
  uint32_t site_number(uintptr_t site);

  int threads_ = 0, block_count_ = 1;  // of a block, of the cluster
  std::vector<Region> regions_;
  std::vector<Moved> moved_;
  mutable const Region* last_region_ = nullptr;
  uintptr_t parameters_ = 0, parameters_end_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_page_ = 0;
  Page* last_ = nullptr;
  struct Known {  // to the `count` threads from `first` on
    int agent = -1;
    uint32_t stamp = 0;
    int first = 0, count = 0;

    bool operator==(const Known&) const = default;
  };
  mutable Known known_to_all_;
  std::vector<uintptr_t> sites_;
  std::unordered_map<uintptr_t, uint32_t> site_numbers_;
};

}  // namespace llmengine::sim
