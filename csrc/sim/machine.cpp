#include "sim/machine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <mutex>
#include <numeric>
#include <sstream>
#include <stdexcept>

#include "sim/image.h"

namespace llmengine::sim {

namespace {

constexpr int kNamedBarriers = 16;

bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same_line(Site a, Site b) { return a.line() == b.line() && same_text(a.file_name(), b.file_name()); }

// "0-31, 40"
std::string ranges(const std::vector<int>& numbers) {
  std::string result;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    result += (result.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (j > i) result += "-" + std::to_string(numbers[j]);
    i = j + 1;
  }
  return result;
}

}  // namespace

constinit bool watching = false;

std::string text(Index3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(Site site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

uintptr_t number(const void* address) { return reinterpret_cast<uintptr_t>(address); }

// Stacks that stay for the next launch: making one costs some microseconds.
constexpr size_t kStacksKept = 32;

Machine& Machine::the() {
  static Machine machine;
  return machine;
}

// The symbols are read when the program starts: later, a rebuilt file may have taken the place of the one that runs.
[[maybe_unused]] static const Image& kImage = Image::own();

// ---- launches and clusters ------------------------------------------------------------------------------------------

void Machine::run(const Launch& launch) {
  launch_ = &launch;
  count_ = static_cast<int>(launch.block.count());
  block_count_ = static_cast<int>(launch.cluster.count());
  total_ = count_ * block_count_;
  while (static_cast<int>(fibres_.size()) < total_) fibres_.emplace_back();
  memory.begin_launch(launch);
  random_.seed(schedule.seed);
  fault_.clear();
  const Index3 grid{launch.grid.x / launch.cluster.x, launch.grid.y / launch.cluster.y,
                    launch.grid.z / launch.cluster.z};
  std::vector<uint64_t> clusters(grid.count());
  std::iota(clusters.begin(), clusters.end(), 0);
  if (schedule.order == Order::reversed) std::reverse(clusters.begin(), clusters.end());
  if (schedule.order == Order::random) std::shuffle(clusters.begin(), clusters.end(), random_);
  for (const uint64_t c : clusters) {
    first_block_ = {static_cast<unsigned>(c % grid.x) * launch.cluster.x,
                    static_cast<unsigned>(c / grid.x % grid.y) * launch.cluster.y,
                    static_cast<unsigned>(c / grid.x / grid.y) * launch.cluster.z};
    run_cluster();
    current_ = nullptr;
    if (!fault_.empty()) break;
  }
  // A test that breaks kernels loads a module for each, and a process may have so many mappings: two for a stack.
  while (fibres_.size() > kStacksKept) fibres_.pop_back();
  if (!fault_.empty()) throw std::runtime_error(name_of(launch.kernel) + ": " + fault_);
  memory.end_launch(launch);
}

void Machine::run_cluster() {
  memory.begin_cluster(count_, block_count_);
  threads_.clear();
  threads_.resize(static_cast<size_t>(total_));
  ready_.assign(static_cast<size_t>((total_ + 31) / 32), 0);
  in_collective_.assign(ready_.size(), 0);
  exited_.assign(ready_.size(), 0);
  begin_blocks();
  copies_.begin_cluster(total_);
  arrivals_of_copies_.clear();
  mbarriers_.clear();
  mbarriers_.reserve(static_cast<size_t>(kMbarriers * block_count_));  // threads hold references while they stop
  bulk_copies_.clear();
  at_warpgroup_.assign(ready_.size(), {});
  products_.assign(ready_.size(), {});
  products_under_way_ = 0;
  last_ = schedule.order == Order::reversed ? total_ : -1;
  starved_ = static_cast<int>(schedule.seed % ready_.size());
  for (int t = 0; t < total_; ++t) {
    threads_[t].number = t, threads_[t].block = t / count_, threads_[t].index = index_of(t);
    fibres_[t].prepare(thread_body, this);
    make_ready(threads_[t]);
  }
  while (fault_.empty()) {
    const int t = pick();
    if (t < 0 && something_may_finish()) continue;
    if (t < 0) break;
    last_ = t;
    current_ = &threads_[t];
    memory.blocks.enter(current_->block);
    fibres_[t].resume();
    stopped(t);
  }
  copies_.end_cluster();
  const bool all_exited =
      std::all_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == State::exited; });
  if (fault_.empty() && !all_exited) {
    fault_ = "deadlock in " + block_name(0) + ": " + position_of_all() + missing_of_mbarriers() + missing_of_blocks();
  }
}

// What is under way may take effect whenever a thread stops.
void Machine::stopped(int thread) {
  copies_.stopped(thread, schedule.order, random_);
  if (!arrivals_of_copies_.empty()) copies_have_come();
  if (!bulk_copies_.empty()) bulk_copies_may_finish(false);
  if (products_under_way_ > 0) products_may_finish();
}

// No thread can go on: whether something that is under way takes effect.
bool Machine::something_may_finish() {
  if (bulk_copies_may_finish(true)) return true;
  if (arrivals_of_copies_.empty()) return false;
  copies_.wait(arrivals_of_copies_.front().thread, arrivals_of_copies_.front().group);
  copies_have_come();
  return true;
}

void Machine::thread_body(void* argument) {
  auto& machine = *static_cast<Machine*>(argument);
  watching = true;
  machine.launch_->call(machine.launch_->parameters);
  watching = false;
  machine.exit_thread();
}

void Machine::exit_thread() {
  Thread& self = *current_;
  self.state = State::exited;
  ready_[self.number / 32] &= ~(1u << (self.number % 32));
  exited_[self.number / 32] |= 1u << (self.number % 32);
  for (int l : lanes_of(self.number / 32, in_collective_[self.number / 32])) {
    if (!(threads_[l].mask >> (self.number % 32) & 1)) continue;
    fault_ = position(self.number) + " exits while " + position(l) + " waits for it at " + threads_[l].operation +
             " (" + text(threads_[l].site) + ")";
  }
  if (fault_.empty()) leave_nothing_under_way(self);
  if (fault_.empty() && ++blocks_[block()].exited == count_) end_block(block());
  if (fault_.empty()) try_cluster_barrier();
  yield();
}

void Machine::make_ready(Thread& thread) {
  thread.state = State::ready;
  ready_[thread.number / 32] |= 1u << (thread.number % 32);
}

void Machine::wait(Meeting meeting, const char* operation, Site site) {
  Thread& self = *current_;
  self.state = State::waiting;
  self.meeting = meeting;
  self.operation = operation;
  self.site = site;
  ready_[self.number / 32] &= ~(1u << (self.number % 32));
}

void Machine::yield() { fibres_[current_->number].suspend(); }

void Machine::fail(int thread, const std::string& what) {
  fault_ = position(thread) + " " + what;
  for (;;) yield();  // never resumed: the launch is over
}

// ---- meetings -------------------------------------------------------------------------------------------------------

void Machine::block_barrier(Site site) {
  wait(Meeting::block, "__syncthreads", site);
  ++blocks_[block()].at_barrier;
  try_block_barrier(block());
  yield();
}

void Machine::try_block_barrier(int block) {
  if (blocks_[block].at_barrier < count_) return;
  std::vector<int> all(static_cast<size_t>(count_));
  std::iota(all.begin(), all.end(), block * count_);
  for (const int t : all) {
    if (!same_line(threads_[t].site, threads_[all[0]].site)) {
      fault_ = "divergent barrier in " + block_name(block) + ": " + position_of_all();
      return;
    }
  }
  memory.clocks.meet(all, all);
  blocks_[block].at_barrier = 0;
  for (const int t : all) make_ready(threads_[t]);
}

void Machine::named_barrier(int id, int threads, bool wait_here, Site site) {
  if (id < 0 || id >= kNamedBarriers)
    fail("uses barrier " + std::to_string(id) + "; there are 16 (" + text(site) + ")");
  if (threads <= 0 || threads % 32 != 0) {
    fail("gives barrier " + std::to_string(id) + " " + std::to_string(threads) + " threads; whole warps are needed (" +
         text(site) + ")");
  }
  NamedBarrier& barrier = blocks_[block()].named[id];
  if (!barrier.arrived.empty() && barrier.threads != threads) {
    fail("gives barrier " + std::to_string(id) + " " + std::to_string(threads) + " threads where others gave " +
         std::to_string(barrier.threads) + " (" + text(site) + ")");
  }
  if (std::find(barrier.arrived.begin(), barrier.arrived.end(), current_->number) != barrier.arrived.end()) {
    fail("comes to barrier " + std::to_string(id) + " again while others are yet to come for its last time (" +
         text(site) + ")");
  }
  barrier.threads = threads;
  barrier.arrived.push_back(current_->number);
  if (wait_here) {
    barrier.waiting.push_back(current_->number);
    wait(Meeting::named, "named barrier", site);
  }
  if (static_cast<int>(barrier.arrived.size()) == threads) {
    memory.clocks.meet(barrier.arrived, barrier.waiting);
    for (int t : barrier.waiting) make_ready(threads_[t]);
    barrier = {};
  }
  if (wait_here) yield();
}

Gathered Machine::meet_warp(const char* operation, uint32_t mask, uint64_t value, bool orders, Site site) {
  Thread& self = *current_;
  if (!(mask >> lane() & 1)) {
    std::ostringstream hex;
    hex << std::hex << mask;
    fail(std::string("calls ") + operation + " with mask 0x" + hex.str() + ", which leaves out its own lane (" +
         text(site) + ")");
  }
  for (int l : lanes_of(self.number / 32, mask & exited_[self.number / 32])) {
    fail(std::string("calls ") + operation + " (" + text(site) + ") with a mask that names " + position(l) +
         ", which has exited");
  }
  wait(Meeting::warp, operation, site);
  meet(mask, value, orders, nullptr);
  return self.gathered;
}

void Machine::whole_warp(const char* operation, void* brought, CarryOut carry_out, Site site) {
  const int warp = current_->number / 32, lanes = std::min(total_ - warp * 32, 32);
  const auto complain = [&](const std::string& problem) {
    fail(std::string("calls ") + operation + " (" + text(site) + "), which takes a whole warp, " + problem);
  };
  if (lanes < 32) complain("in a warp of " + std::to_string(lanes) + (lanes == 1 ? " thread" : " threads"));
  if (exited_[warp]) complain("but " + position(warp * 32 + std::countr_zero(exited_[warp])) + " has exited");
  wait(Meeting::warp, operation, site);
  meet(~0u, reinterpret_cast<uint64_t>(brought), false, carry_out);
}

// The running thread, which has begun to wait, brings what it has to a collective.
void Machine::meet(uint32_t mask, uint64_t value, bool orders, CarryOut carry_out) {
  Thread& self = *current_;
  self.mask = mask;
  self.value = value;
  self.orders = orders;
  self.carry_out = carry_out;
  in_collective_[self.number / 32] |= 1u << lane();
  try_collective(self);
  yield();
}

std::vector<int> Machine::lanes_of(int warp, uint32_t mask) const {
  std::vector<int> numbers;
  for (int t = warp * 32; t < std::min(total_, warp * 32 + 32); ++t) {
    if (mask >> (t % 32) & 1) numbers.push_back(t);
  }
  return numbers;
}

// Completes the collective that `last` has come to, if it is the last one.
void Machine::try_collective(const Thread& last) {
  const int warp = last.number / 32;
  const uint32_t present = ~0u >> (31 - (std::min(total_, warp * 32 + 32) - 1) % 32), mask = last.mask & present;
  if (mask & ~in_collective_[warp]) return;
  Gathered gathered{};
  gathered.lanes = mask;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    const int l = std::countr_zero(rest);
    const Thread& other = threads_[warp * 32 + l];
    if (other.mask != last.mask || !same_line(other.site, last.site)) return;
    if (!same_text(other.operation, last.operation)) return;
    gathered.value[l] = other.value;
  }
  if (last.orders) memory.clocks.meet(lanes_of(warp, mask), lanes_of(warp, mask));
  if (last.carry_out) last.carry_out(gathered.value);
  in_collective_[warp] &= ~mask;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    Thread& other = threads_[warp * 32 + std::countr_zero(rest)];
    if (!last.carry_out) other.gathered = gathered;
    make_ready(other);
  }
}

// Whether the running thread is the last one of its warpgroup; the others have stopped until it was.
bool Machine::meet_warpgroup(const char* operation, uint64_t value, Site site) {
  Thread& self = *current_;
  const int first = memory.first_of_warpgroup(self.number);
  const auto complain = [&](const std::string& problem) {
    fail(std::string("calls ") + operation + " (" + text(site) + "), which takes a whole warpgroup, " + problem);
  };
  if (first % count_ + 128 > count_) {
    complain("in a block of " + std::to_string(count_) + " threads");
  }
  for (int t = first; t < first + 128; ++t) {
    if (threads_[t].state == State::exited) complain("but " + position(t) + " has exited");
  }
  wait(Meeting::warpgroup, operation, site);
  self.value = value;
  std::vector<int>& come = at_warpgroup_[static_cast<size_t>(first / 32)];
  come.push_back(self.number);
  const Thread& other = threads_[come.front()];
  if (!same_line(other.site, site) || !same_text(other.operation, operation)) {
    fail(std::string("calls ") + operation + " (" + text(site) + ") where " + position(other.number) +
         " of its warpgroup calls " + other.operation + " (" + text(other.site) + ")");
  }
  if (come.size() < 128) {
    yield();
    return false;
  }
  for (const int t : come) make_ready(threads_[t]);
  come.clear();
  return true;
}

// ---- memory ---------------------------------------------------------------------------------------------------------

void Machine::touch(const Access& access) {
  if (fibres_[current_->number].holds(access.address)) {
    if (current_->registers) touch_local(access);
    return;
  }
  if (preempts()) yield();
  check_own(access, current_->number);
}

void Machine::touch_for_warp(const Access& access, int lane) { check_own(access, current_->number / 32 * 32 + lane); }

// Of an address as the thread's code has it.
void Machine::check_own(Access access, int thread) {
  access.address = memory.blocks.own(access.address, thread / count_);
  check(access, thread);
}

void Machine::check(const Access& access, int thread) {
  std::optional<Conflict> conflict;
  const auto problem = memory.check(access, thread, conflict);
  if (!problem) return;
  const std::string here = " (" + source_line(access.site) + ")";
  if (!conflict) fail(thread, *problem + here);
  fail(thread,
       *problem + here + " what " + other_side(*conflict) + ": " + memory.name_of(access.address + conflict->offset));
}

// Whose deed an access conflicts with, and what lacks between them.
std::string Machine::other_side(const Conflict& conflict) const {
  const std::string did = std::string(" ") + verb(conflict.kind) + " (" + source_line(conflict.site) + ")";
  if (conflict.agent < 0) {
    return std::string("a thread of another ") + (block_count_ == 1 ? "block" : "cluster") + did +
           " without an order between " + (block_count_ == 1 ? "blocks" : "clusters");
  }
  const Clocks& clocks = memory.clocks;
  const Deeds deeds = clocks.deeds_of(conflict.agent);
  const int owner = clocks.thread_of(conflict.agent);
  const std::string its = owner < 0 ? "" : position(owner);
  if (conflict.unfenced) {
    return (deeds == Deeds::copies ? "a copy of " : "") + its + did + " with no fence_async between";
  }
  const auto unless_waited = [&](const char* wait) {
    return clocks.has_waited(owner, deeds, conflict.stamp) ? " with no barrier between"
                                                           : std::string(" with no ") + wait + " between";
  };
  switch (deeds) {
    case Deeds::copies: return "a copy of " + its + did + unless_waited("wait_copies");
    case Deeds::transfers: return "a bulk copy" + did + " with no mbarrier_wait between";
    case Deeds::store_reads: return "a store of " + its + did + unless_waited("wait_store_reads");
    case Deeds::store_writes: return "a store of " + its + did + unless_waited("wait_stores");
    case Deeds::products: return "a product of " + its + "'s warpgroup" + did + unless_waited("wgmma_wait");
    default: return its + did + " with no barrier between";
  }
}

// Checks and remembers both sides; addresses must be multiples of `alignment`.
void Machine::check_copy(const Transfer& copy, uint32_t alignment, By by, int agent, uintptr_t site) {
  const int self = current_->number;
  const auto shared = number(copy.to), global = number(copy.from);
  const auto complain = [&](const std::string& problem) { fail(problem + " (" + source_line(site) + ")"); };
  const auto misaligned = [&](const char* way) {
    complain("copies " + std::to_string(copy.size) + " bytes " + way + " an address that is not a multiple of " +
             std::to_string(alignment));
  };
  if (copy.bytes > 0) {
    if (global % alignment != 0) misaligned("from");
    check({global, copy.bytes, Kind::read, site, by, agent}, self);
    if (!memory.is_global(global)) complain("copies from memory that is not global");
  }
  if (shared % alignment != 0) misaligned("to");
  check({shared, copy.size, Kind::write, site, by, agent}, self);
  if (!memory.is_shared(shared)) complain("copies to memory that is not shared");
}

void Machine::copy_async(Copy copy, uintptr_t site) {
  if (preempts()) yield();
  if (copy.bytes > copy.size) {
    fail("copies " + std::to_string(static_cast<int32_t>(copy.bytes)) + " bytes where 0 to " +
         std::to_string(copy.size) + " fit (" + source_line(site) + ")");
  }
  const int self = current_->number, agent = memory.clocks.agent(self, Deeds::copies);
  check_copy(copy, copy.size, By::copy, agent, site);
  copy.group = memory.clocks.now(agent);
  copies_.issue(self, copy, schedule.order, random_);
}

void Machine::commit_copies() {
  const int agent = memory.clocks.agent(current_->number, Deeds::copies);
  current_->copy_groups.push_back(memory.clocks.now(agent));
  memory.clocks.step(agent);
}

void Machine::wait_copies(int pending) {
  const auto& groups = current_->copy_groups;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  const uint32_t until = groups[groups.size() - 1 - static_cast<size_t>(pending)];
  copies_.wait(current_->number, until);
  memory.clocks.waits(current_->number, Deeds::copies, until);
}

// ---- reports --------------------------------------------------------------------------------------------------------

Index3 Machine::index_of(int number) const {
  const Index3 shape = launch_->block;
  const auto n = static_cast<unsigned>(number % count_);
  return {n % shape.x, n / shape.x % shape.y, n / shape.x / shape.y};
}

Index3 Machine::block_index(int block) const {
  const Index3 shape = launch_->cluster;
  const auto b = static_cast<unsigned>(block);
  return {first_block_.x + b % shape.x, first_block_.y + b / shape.x % shape.y, first_block_.z + b / shape.x / shape.y};
}

std::string Machine::position(int number) const {
  return "thread " + text(index_of(number)) + " of " + block_name(number / count_);
}

// In a cluster of several blocks each one's threads are told behind its name.
std::string Machine::position_of_all() const {
  std::string result;
  for (int b = 0; b < block_count_; ++b) {
    std::vector<std::pair<std::string, std::vector<int>>> groups;
    for (int i = 0; i < count_; ++i) {
      const Thread& t = threads_[b * count_ + i];
      const std::string where = t.state == State::exited ? "exited"
                                : t.state == State::ready
                                    ? "running"
                                    : std::string("at ") + t.operation + " (" + text(t.site) + ")";
      auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == where; });
      if (group == groups.end()) group = groups.insert(groups.end(), {where, {}});
      group->second.push_back(i);
    }
    const std::string name = block_count_ == 1 ? "" : block_name(b) + ", ";
    for (const auto& [where, numbers] : groups) {
      result += (result.empty() ? "" : "; ") + name + "threads " + ranges(numbers) + " " + where;
    }
  }
  return result;
}

std::string Machine::source_line(uintptr_t site) const { return Image::own().source_line(site); }

// ---- what kernels and hosts call ------------------------------------------------------------------------------------

Index3 thread_index() { return Machine::the().thread_index(); }
Index3 block_index() { return Machine::the().block_index(); }
Index3 block_shape() { return Machine::the().launch().block; }
Index3 grid_shape() { return Machine::the().launch().grid; }
int lane() { return Machine::the().lane(); }
void* dynamic_shared() { return Machine::the().memory.blocks.dynamic(Machine::the().block()); }

void block_barrier(Site site) {
  const Unwatched simulator;
  Machine::the().block_barrier(site);
}

void named_barrier(int id, int threads, bool wait, Site site) {
  const Unwatched simulator;
  Machine::the().whole_warp(wait ? "barrier_sync" : "barrier_arrive", nullptr, [](const auto&) {}, site);
  Machine::the().named_barrier(id, threads, wait, site);
}

Gathered meet_warp(const char* operation, uint32_t mask, uint64_t value, bool orders, Site site) {
  const Unwatched simulator;
  return Machine::the().meet_warp(operation, mask, value, orders, site);
}

void whole_warp(const char* operation, void* brought, Machine::CarryOut carry_out, Site site) {
  const Unwatched simulator;
  Machine::the().whole_warp(operation, brought, carry_out, site);
}

uint64_t value_of_lane(const char* operation, const Gathered& gathered, int source, Site site) {
  if (gathered.lanes >> source & 1) return gathered.value[static_cast<size_t>(source)];
  const Unwatched simulator;
  Machine::the().fail(std::string(operation) + " reads lane " + std::to_string(source) + ", which takes no part (" +
                      text(site) + ")");
}

void touch(const void* address, size_t size, Touch kind, const void* return_address) {
  if (!watching) return;
  const Unwatched simulator;
  const Kind as = kind == Touch::read ? Kind::read : kind == Touch::write ? Kind::write : Kind::atomic;
  Machine::the().touch({reinterpret_cast<uintptr_t>(address), size, as, reinterpret_cast<uintptr_t>(return_address)});
}

void copy_async(void* shared, const void* global, int size, int bytes, const void* return_address) {
  const Unwatched simulator;
  char* const to = reinterpret_cast<char*>(Machine::the().own(shared));
  const Transfer transfer{to, static_cast<const char*>(global), static_cast<uint32_t>(size),
                          static_cast<uint32_t>(bytes)};
  Machine::the().copy_async({transfer}, reinterpret_cast<uintptr_t>(return_address));
}

void commit_copies() { Machine::the().commit_copies(); }

void wait_copies(int pending) {
  const Unwatched simulator;
  Machine::the().wait_copies(pending);
}

const std::vector<Moved>& moved() { return Machine::the().memory.moved(); }

std::string name_of(const void* kernel) { return Image::own().function_name(number(kernel)); }

size_t static_shared_bytes(const void* kernel) { return Image::own().static_shared_bytes(number(kernel)); }

void run(const Launch& launch) {
  last_stream = launch.stream;
  Machine::the().run(launch);
}

namespace {
std::mutex& lock() {
  static std::mutex mutex;
  return mutex;
}
}  // namespace

Tensors::Tensors(const std::vector<NamedView>& tensors) {
  lock().lock();
  Machine::the().memory.set_tensors(tensors);
}

Tensors::~Tensors() {
  Machine::the().memory.set_tensors({});
  lock().unlock();
}

}  // namespace llmengine::sim
