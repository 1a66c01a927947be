// Machine's part for what a cluster's blocks share, and what a block has at its beginning and must not leave at its
// end.
#include "sim/cluster.h"

#include <algorithm>
#include <utility>

#include "sim/machine.h"

namespace llmengine::sim {

namespace {

constexpr int kNamedBarriers = 16;
constexpr int kRegisters = 64 << 10, kMostRegisters = 256;  // of a multiprocessor; of a thread

// What a kernel may have that is bound to one block a multiprocessor: an even share, in steps of 8.
int registers_at_launch(int threads) { return std::min(kRegisters / threads / 8 * 8, kMostRegisters); }

}  // namespace

void Machine::begin_blocks() {
  blocks_.clear();
  blocks_.resize(static_cast<size_t>(block_count_));
  for (Block& b : blocks_) b.named.assign(kNamedBarriers, {});
  warp_registers_.assign(ready_.size(), registers_at_launch(count_));
  cluster_ = {};
  cluster_.next.assign(static_cast<size_t>(total_), 0);
  cluster_.owes.assign(static_cast<size_t>(total_), false);
}

// ---- the end of a thread and of a block -----------------------------------------------------------------------------

void Machine::leave_nothing_under_way(const Thread& thread) {
  const Clocks& clocks = memory.clocks;
  if (thread.last_store > 0 && !clocks.has_waited(thread.number, Deeds::store_reads, thread.last_store)) {
    fault_ = position(thread.number) + " exits with no wait_store_reads for its store (" +
             source_line(thread.store_site) + "), which reads the block's shared memory";
  }
  if (thread.registers && !thread.registers->in_flight.empty()) {
    fault_ = position(thread.number) + " exits with no wgmma_wait for its product (" +
             source_line(thread.registers->in_flight.front().site) + ")";
  }
}

// Its shared memory goes: whatever others do there must be known to have been done.
void Machine::end_block(int block) {
  const Clocks& clocks = memory.clocks;
  const auto known = [&](int agent, uint32_t stamp) {
    for (int t = block * count_; t < (block + 1) * count_; ++t) {
      if (clocks.before(agent, stamp, t)) return true;
    }
    return false;
  };
  for (const RemoteAccess& access : blocks_[block].from_others) {
    if (known(access.agent, access.stamp)) continue;
    const int owner = clocks.thread_of(access.agent);
    fault_ = block_name(block) + " ends while " + (owner < 0 ? "a bulk copy" : position(owner)) +
             " uses its shared memory (" + source_line(access.site) + ") with no cluster_wait between";
  }
  for (const Mbarrier& b : mbarriers_) {
    if (block_of(b) != block || b.last_copy == 0 || known(b.carrier, b.last_copy)) continue;
    fault_ = block_name(block) + " ends with no mbarrier_wait for a bulk copy to it (" + source_line(b.copy_site) + ")";
  }
}

std::string Machine::missing_of_blocks() const {
  std::string result;
  for (int b = 0; b < block_count_; ++b) {
    if (blocks_[b].wait_for_registers.empty()) continue;
    result += "; " + block_name(b) + " has " + std::to_string(blocks_[b].free_registers) + " free registers";
  }
  return result;
}

// ---- the cluster's barrier ------------------------------------------------------------------------------------------

void Machine::cluster_arrive(bool orders, Site site) {
  const int self = current_->number;
  if (cluster_.owes[self]) fail("calls cluster_arrive (" + text(site) + ") twice with no cluster_wait between");
  cluster_.owes[self] = true;
  ++cluster_.next[self];
  ++cluster_.arrived;
  if (orders) memory.clocks.release(self, {&cluster_.gathered});
  try_cluster_barrier();
  if (preempts()) yield();
}

void Machine::cluster_wait(Site site) {
  const int self = current_->number;
  if (!cluster_.owes[self]) fail("calls cluster_wait (" + text(site) + ") with no cluster_arrive before");
  cluster_.owes[self] = false;
  if (cluster_.next[self] > cluster_.phase) {
    wait(Meeting::cluster, "cluster_wait", site);
    cluster_.waiting.push_back(self);
    yield();
  }
  memory.clocks.acquire(self, cluster_.released);
}

// It waits for the threads that have not exited.
void Machine::try_cluster_barrier() {
  if (cluster_.arrived == 0) return;
  for (const Thread& t : threads_) {
    if (t.state != State::exited && cluster_.next[t.number] == cluster_.phase) return;
  }
  cluster_.released = std::exchange(cluster_.gathered, {});
  cluster_.arrived = 0;
  ++cluster_.phase;
  for (const int t : std::exchange(cluster_.waiting, {})) make_ready(threads_[t]);
}

// ---- another block's shared memory ----------------------------------------------------------------------------------

uintptr_t Machine::map_to_block(uintptr_t shared, int block, uintptr_t site) {
  if (block < 0 || block >= block_count_) {
    fail("maps an address to block " + std::to_string(block) + " of a cluster that has " +
         std::to_string(block_count_) + " (" + source_line(site) + ")");
  }
  if (!memory.blocks.covers(shared)) fail("maps an address that is not in shared memory (" + source_line(site) + ")");
  if (block == this->block()) return shared;
  return memory.blocks.in_block(shared, block);
}

// An access of `agent` to shared memory that may be another block's: that block must have begun, and not ended.
void Machine::check_remote(uintptr_t address, int agent, const char* what, uintptr_t site) {
  if (block_count_ == 1 || !memory.blocks.holds(address)) return;
  const int block = memory.blocks.block_of(address), self = current_->number;
  if (block == this->block()) return;
  const Clocks& clocks = memory.clocks;
  const auto complain = [&](const std::string& problem) {
    fail(what + (" (" + source_line(site) + ") shared memory of ") + block_name(block) + ", which " + problem);
  };
  if (blocks_[block].exited == count_) complain("has ended");
  bool met = false;
  for (int t = block * count_; t < (block + 1) * count_; ++t) met = met || clocks.knows(self, t) >= clocks.first();
  if (!met) complain("may not have begun: there is no cluster_wait before");
  auto& accesses = blocks_[block].from_others;
  auto known = std::find_if(accesses.begin(), accesses.end(), [&](const auto& a) { return a.agent == agent; });
  if (known == accesses.end()) known = accesses.insert(known, RemoteAccess{});
  *known = {agent, clocks.now(agent), site};
}

uintptr_t Machine::touch_remote(const Access& access) {
  if (preempts()) yield();
  check_remote(access.address, current_->number, verb(access.kind), access.site);
  check(access, current_->number);
  return memory.blocks.real(access.address);
}

// ---- registers ------------------------------------------------------------------------------------------------------

void Machine::set_registers(int count, bool increase, Site site) {
  const int self = current_->number, warp = self / 32;
  const auto complain = [&](const std::string& problem) {
    fail((increase ? "asks for " : "keeps ") + std::to_string(count) + " registers (" + text(site) + "), " + problem);
  };
  if (count < 24 || count > 256 || count % 8 != 0) complain("which is not a multiple of 8 from 24 to 256");
  const int present = warp_registers_[warp];
  Block& block = blocks_[this->block()];
  if (!increase) {
    if (count > present) complain("more than the " + std::to_string(present) + " that it has");
    block.free_registers += 32 * (present - count);
    warp_registers_[warp] = count;
    for (const int t : std::exchange(block.wait_for_registers, {})) make_ready(threads_[t]);
    return;
  }
  if (count < present) complain("fewer than the " + std::to_string(present) + " that it has");
  while (!give_registers(warp, count)) {
    wait(Meeting::registers, "increase_registers", site);
    block.wait_for_registers.push_back(self);
    yield();
  }
}

// To a whole warp at once; whether it has them.
bool Machine::give_registers(int warp, int count) {
  Block& block = blocks_[this->block()];
  const int more = 32 * (count - warp_registers_[warp]);
  if (more > block.free_registers) return false;
  block.free_registers -= more;
  warp_registers_[warp] = count;
  return true;
}

// ---- what kernels call ----------------------------------------------------------------------------------------------

int block_in_cluster() { return Machine::the().block(); }
int blocks_of_cluster() { return static_cast<int>(Machine::the().launch().cluster.count()); }

void cluster_arrive(bool orders, Site site) {
  const Unwatched simulator;
  Machine::the().cluster_arrive(orders, site);
}

void cluster_wait(Site site) {
  const Unwatched simulator;
  Machine::the().cluster_wait(site);
}

uintptr_t map_to_block(const void* shared, int block, const void* return_address) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  return machine.map_to_block(machine.own(shared), block, number(return_address));
}

uintptr_t touch_remote(uintptr_t address, size_t size, Touch kind, const void* return_address) {
  const Unwatched simulator;
  const Kind as = kind == Touch::read ? Kind::read : kind == Touch::write ? Kind::write : Kind::atomic;
  Access access{address, size, as, number(return_address)};
  access.remote = true;
  return Machine::the().touch_remote(access);
}

void set_registers(const char* operation, int count, bool increase, Site site) {
  const Unwatched simulator;
  Machine::the().whole_warp(operation, nullptr, [](const auto&) {}, site);
  Machine::the().set_registers(count, increase, site);
}

bool elect_one(Site site) {
  const Unwatched simulator;
  Machine::the().whole_warp("elect_one", nullptr, [](const auto&) {}, site);
  return Machine::the().lane() == Machine::the().elected();
}

}  // namespace llmengine::sim
