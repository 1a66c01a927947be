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

std::string text(Site site) {
  const std::string path = site.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

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

Machine& Machine::the() {
  static Machine machine;
  return machine;
}

// The symbols are read when the program starts: later, a rebuilt file may have taken the place of the one that runs.
[[maybe_unused]] static const Image& kImage = Image::own();

// ---- launches and blocks --------------------------------------------------------------------------------------------

void Machine::run(const Launch& launch) {
  launch_ = &launch;
  count_ = static_cast<int>(launch.block.count());
  while (static_cast<int>(fibres_.size()) < count_) fibres_.emplace_back();
  memory.begin_launch(launch);
  random_.seed(schedule.seed);
  fault_.clear();
  std::vector<uint64_t> blocks(launch.grid.count());
  std::iota(blocks.begin(), blocks.end(), 0);
  if (schedule.order == Order::reversed) std::reverse(blocks.begin(), blocks.end());
  if (schedule.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), random_);
  for (const uint64_t b : blocks) {
    block_ = {static_cast<unsigned>(b % launch.grid.x), static_cast<unsigned>(b / launch.grid.x % launch.grid.y),
              static_cast<unsigned>(b / launch.grid.x / launch.grid.y)};
    run_block();
    current_ = nullptr;
    if (!fault_.empty())
      throw std::runtime_error(Image::own().function_name(reinterpret_cast<uintptr_t>(launch.kernel)) + ": " + fault_);
  }
}

void Machine::run_block() {
  memory.begin_block(count_);
  threads_.assign(static_cast<size_t>(count_), Thread{});
  ready_.assign(static_cast<size_t>((count_ + 31) / 32), 0);
  in_collective_.assign(ready_.size(), 0);
  exited_.assign(ready_.size(), 0);
  named_.assign(kNamedBarriers, {});
  at_barrier_ = 0;
  copies_.begin_block(count_);
  mbarriers_.clear();
  mbarriers_.reserve(Clocks::kMbarriers);  // threads hold references to them while they stop
  bulk_copies_.clear();
  last_ = schedule.order == Order::reversed ? count_ : -1;
  for (int t = 0; t < count_; ++t) {
    threads_[t].number = t;
    fibres_[t].prepare(thread_body, this);
    make_ready(threads_[t]);
  }
  while (fault_.empty()) {
    const int t = pick();
    if (t < 0 && bulk_copies_may_finish(true)) continue;
    if (t < 0) break;
    last_ = t;
    current_ = &threads_[t];
    fibres_[t].resume();
    copies_.stopped(t, schedule.order, random_);
    bulk_copies_may_finish(false);
  }
  copies_.end_block();
  for (const BulkCopy& copy : bulk_copies_) copy.take_effect();
  const bool all_exited =
      std::all_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == State::exited; });
  if (fault_.empty() && !all_exited) {
    fault_ = "deadlock in block " + text(block_) + ": " + position_of_all() + missing_of_mbarriers();
  }
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

// ---- the schedule ---------------------------------------------------------------------------------------------------

int Machine::pick() {
  switch (schedule.order) {
    case Order::forward: return pick_warp_by_warp(false);
    case Order::reversed: return pick_warp_by_warp(true);
    case Order::round_robin: return pick_next();
    case Order::random: return pick_random();
  }
  return -1;
}

// Stays in the warp of the thread that ran last while one of its lanes is ready.
int Machine::pick_warp_by_warp(bool reversed) {
  const int warps = static_cast<int>(ready_.size());
  const int start = std::clamp(last_, 0, count_ - 1) / 32;
  for (int i = 0; i < warps; ++i) {
    const int warp = reversed ? (start - i + warps) % warps : (start + i) % warps;
    if (const uint32_t lanes = ready_[warp]) {
      return warp * 32 + (reversed ? 31 - std::countl_zero(lanes) : std::countr_zero(lanes));
    }
  }
  return -1;
}

int Machine::pick_next() {
  for (int i = 1; i <= count_; ++i) {
    const int t = (last_ + i) % count_;
    if (threads_[t].state == State::ready) return t;
  }
  return -1;
}

int Machine::pick_random() {
  const auto is_ready = [](uint32_t lanes) { return lanes != 0; };
  const auto warps = static_cast<uint64_t>(std::count_if(ready_.begin(), ready_.end(), is_ready));
  if (warps == 0) return -1;
  auto warp = std::find_if(ready_.begin(), ready_.end(), is_ready);
  for (uint64_t skip = random_() % warps; skip > 0; --skip) warp = std::find_if(warp + 1, ready_.end(), is_ready);
  uint32_t lanes = *warp;
  for (uint64_t skip = random_() % std::popcount(lanes); skip > 0; --skip) lanes &= lanes - 1;
  return static_cast<int>(warp - ready_.begin()) * 32 + std::countr_zero(lanes);
}

bool Machine::preempts() {
  switch (schedule.order) {
    case Order::round_robin: return ++touches_ % 4 == 0;
    case Order::random: return random_() % 16 == 0;
    default: return false;
  }
}

// ---- meetings -------------------------------------------------------------------------------------------------------

void Machine::block_barrier(Site site) {
  wait(Meeting::block, "__syncthreads", site);
  ++at_barrier_;
  try_block_barrier();
  yield();
}

void Machine::try_block_barrier() {
  if (at_barrier_ < count_) return;
  std::vector<int> all(static_cast<size_t>(count_));
  std::iota(all.begin(), all.end(), 0);
  for (const Thread& t : threads_) {
    if (!same_line(t.site, threads_[0].site)) {
      fault_ = "divergent barrier in block " + text(block_) + ": " + position_of_all();
      return;
    }
  }
  memory.clocks.meet(all, all);
  at_barrier_ = 0;
  for (Thread& t : threads_) make_ready(t);
}

void Machine::named_barrier(int id, int threads, bool wait_here, Site site) {
  if (id < 0 || id >= kNamedBarriers)
    fail("uses barrier " + std::to_string(id) + "; there are 16 (" + text(site) + ")");
  if (threads <= 0 || threads % 32 != 0) {
    fail("gives barrier " + std::to_string(id) + " " + std::to_string(threads) + " threads; whole warps are needed (" +
         text(site) + ")");
  }
  NamedBarrier& barrier = named_[id];
  if (!barrier.arrived.empty() && barrier.threads != threads) {
    fail("gives barrier " + std::to_string(id) + " " + std::to_string(threads) + " threads where others gave " +
         std::to_string(barrier.threads) + " (" + text(site) + ")");
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
  const int warp = current_->number / 32, lanes = std::min(count_ - warp * 32, 32);
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
  for (int t = warp * 32; t < std::min(count_, warp * 32 + 32); ++t) {
    if (mask >> (t % 32) & 1) numbers.push_back(t);
  }
  return numbers;
}

// Completes the collective that `last` has come to, if it is the last one.
void Machine::try_collective(const Thread& last) {
  const int warp = last.number / 32;
  const uint32_t present = ~0u >> (31 - (std::min(count_, warp * 32 + 32) - 1) % 32), mask = last.mask & present;
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

// ---- memory ---------------------------------------------------------------------------------------------------------

void Machine::touch(const Access& access) {
  if (fibres_[current_->number].holds(access.address)) return;  // local memory
  if (preempts()) yield();
  check(access, current_->number);
}

void Machine::touch_for_warp(const Access& access, int lane) { check(access, current_->number / 32 * 32 + lane); }

void Machine::check(const Access& access, int thread) {
  std::optional<Conflict> conflict;
  const auto problem = memory.check(access, thread, conflict);
  if (!problem) return;
  const std::string here = " (" + source_line(access.site) + ")";
  if (!conflict) fail(thread, *problem + here);
  const Clocks& clocks = memory.clocks;
  const int other = conflict->agent, owner = other < 0 ? -1 : clocks.thread_of(other);
  const bool copy = other >= 0 && clocks.is_copier(other), bulk = other >= 0 && clocks.is_carrier(other);
  const std::string whose = other < 0 ? "a thread of another block" : bulk ? "a bulk copy" : position(owner);
  const std::string when = other < 0                                            ? " without an order between blocks"
                           : bulk                                               ? " with no mbarrier_wait between"
                           : copy && !clocks.has_waited(owner, conflict->stamp) ? " with no wait_copies between"
                                                                                : " with no barrier between";
  fail(thread, *problem + here + " what " + (copy ? "a copy of " : "") + whose + " " + verb(conflict->kind) + " (" +
                   source_line(conflict->site) + ")" + when + ": " + memory.name_of(access.address));
}

// Checks and remembers both sides; addresses must be multiples of `alignment`.
void Machine::check_copy(const Transfer& copy, uint32_t alignment, int agent, uintptr_t site) {
  const int self = current_->number;
  const auto shared = reinterpret_cast<uintptr_t>(copy.shared), global = reinterpret_cast<uintptr_t>(copy.global);
  const auto complain = [&](const std::string& problem) { fail(problem + " (" + source_line(site) + ")"); };
  const auto misaligned = [&](const char* way) {
    complain("copies " + std::to_string(copy.size) + " bytes " + way + " an address that is not a multiple of " +
             std::to_string(alignment));
  };
  if (copy.bytes > 0) {
    if (global % alignment != 0) misaligned("from");
    check({global, copy.bytes, Kind::read, site, By::copy, agent}, self);
    if (!memory.is_global(global)) complain("copies from memory that is not global");
  }
  if (shared % alignment != 0) misaligned("to");
  check({shared, copy.size, Kind::write, site, By::copy, agent}, self);
  if (!memory.is_shared(shared)) complain("copies to memory that is not shared");
}

void Machine::copy_async(Copy copy, uintptr_t site) {
  if (preempts()) yield();
  if (copy.bytes > copy.size) {
    fail("copies " + std::to_string(static_cast<int32_t>(copy.bytes)) + " bytes where 0 to " +
         std::to_string(copy.size) + " fit (" + source_line(site) + ")");
  }
  const int self = current_->number, agent = memory.clocks.copier(self);
  check_copy(copy, copy.size, agent, site);
  copy.group = memory.clocks.now(agent);
  copies_.issue(self, copy, schedule.order, random_);
}

void Machine::wait_copies(int pending) {
  copies_.wait(current_->number, memory.clocks.wait(current_->number, static_cast<uint32_t>(pending)));
}

// ---- reports --------------------------------------------------------------------------------------------------------

Index3 Machine::index_of(int number) const {
  const Index3 shape = launch_->block;
  const auto n = static_cast<unsigned>(number);
  return {n % shape.x, n / shape.x % shape.y, n / shape.x / shape.y};
}

Index3 Machine::thread_index() const { return index_of(current_->number); }

std::string Machine::position(int number) const {
  return "thread " + text(index_of(number)) + " of block " + text(block_);
}

std::string Machine::position_of_all() const {
  std::vector<std::pair<std::string, std::vector<int>>> groups;
  for (const Thread& t : threads_) {
    const std::string where = t.state == State::exited  ? "exited"
                              : t.state == State::ready ? "running"
                                                        : std::string("at ") + t.operation + " (" + text(t.site) + ")";
    auto group = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == where; });
    if (group == groups.end()) group = groups.insert(groups.end(), {where, {}});
    group->second.push_back(t.number);
  }
  std::string result;
  for (const auto& [where, numbers] : groups) {
    result += (result.empty() ? "threads " : "; threads ") + ranges(numbers) + " " + where;
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
void* dynamic_shared() { return Machine::the().memory.dynamic_shared(); }

void block_barrier(Site site) {
  const Unwatched simulator;
  Machine::the().block_barrier(site);
}

void named_barrier(int id, int threads, bool wait, Site site) {
  const Unwatched simulator;
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
  const Transfer transfer{static_cast<char*>(shared), static_cast<const char*>(global), static_cast<uint32_t>(size),
                          static_cast<uint32_t>(bytes)};
  Machine::the().copy_async({transfer}, reinterpret_cast<uintptr_t>(return_address));
}

void commit_copies() { Machine::the().commit_copies(); }

void wait_copies(int pending) {
  const Unwatched simulator;
  Machine::the().wait_copies(pending);
}

void run(const Launch& launch) { Machine::the().run(launch); }

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

void set_schedule(const std::string& order, uint64_t seed) {
  const std::vector<std::string> names = {"forward", "reversed", "round_robin", "random"};
  const auto found = std::find(names.begin(), names.end(), order);
  if (found == names.end()) {
    throw std::invalid_argument("schedule: '" + order + "' is not one of forward, reversed, round_robin, random");
  }
  Machine::the().schedule = {static_cast<Order>(found - names.begin()), seed};
}

}  // namespace llmengine::sim
