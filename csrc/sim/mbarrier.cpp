// Machine's part for mbarriers.
#include "sim/mbarrier.h"

#include <algorithm>
#include <utility>

#include "sim/machine.h"

namespace llmengine::sim {

void Machine::mbarrier_init(uintptr_t address, int arrivals, uintptr_t site) {
  const auto complain = [&](const std::string& problem) {
    fail("initialises an mbarrier " + problem + " (" + source_line(site) + ")");
  };
  if (arrivals <= 0 || arrivals > kMostCounted) complain("for " + std::to_string(arrivals) + " arrivals");
  if (preempts()) yield();
  check({address, sizeof(uint64_t), Kind::write, site}, current_->number);
  if (!memory.is_shared(address)) complain("that is not in shared memory");
  const int self = current_->number;
  Clocks& clocks = memory.clocks;
  Mbarrier* place = find_mbarrier(address);
  if (!place && mbarriers_.size() == mbarriers_.capacity()) complain("where the simulator has no room for more");
  if (place && place->under_way > 0) complain("anew while a bulk copy reports to it");
  if (!place) place = &mbarriers_.emplace_back();
  *place = Mbarrier{};
  place->address = address;
  place->carrier = clocks.new_carrier();
  place->thread = self, place->stamp = clocks.now(self), place->site = site;
  place->arrivals = place->missing = arrivals;
}

void Machine::mbarrier_init_fence() {
  for (Mbarrier& b : mbarriers_) b.fenced = b.fenced || b.thread == current_->number;
}

Mbarrier* Machine::find_mbarrier(uintptr_t address) {
  const auto place = std::find_if(mbarriers_.begin(), mbarriers_.end(), [&](auto& b) { return b.address == address; });
  return place == mbarriers_.end() ? nullptr : &*place;
}

// The mbarrier that the running thread, or a copy that it issues, uses, perhaps another block's: it must be one, and
// known to be.
Mbarrier& Machine::mbarrier_at(uintptr_t address, const char* operation, uintptr_t site, By by) {
  if (preempts()) yield();
  const auto call = [&] { return std::string("calls ") + operation + " (" + source_line(site) + ") on "; };
  Mbarrier* place = find_mbarrier(address);
  check_remote(address, place && by == By::bulk ? place->carrier : current_->number, "uses", site);
  if (!place) fail(call() + "what no thread has initialised as an mbarrier");
  if (!memory.clocks.before(place->thread, place->stamp, current_->number)) {
    fail(call() + "an mbarrier that " + position(place->thread) + " initialises (" + source_line(place->site) +
         ") with no barrier between: " + memory.name_of(address));
  }
  Access access{address, sizeof(uint64_t), Kind::atomic, site};
  access.remote = true;
  check(access, current_->number);
  return *place;
}

// Whether it arrives or not, the phase expects so many bytes more. Another block learns what the thread knew or did
// where that is published to the cluster, and always what it knows to have ended.
void Machine::mbarrier_arrive(const char* operation, uintptr_t address, bool arrives, int bytes, bool publishes,
                              uintptr_t site) {
  Mbarrier& b = mbarrier_at(address, operation, site);
  b.bytes += bytes;
  if (bytes < 0 || b.bytes > kMostCounted) {
    fail("expects " + std::to_string(b.bytes) + " bytes of an mbarrier (" + source_line(site) + "), which counts to " +
         std::to_string(kMostCounted));
  }
  if (!arrives) return;
  if (b.missing == 0) {
    fail("arrives (" + source_line(site) +
         ") where its mbarrier's phase waits for bytes only: " + memory.name_of(address));
  }
  if (block_of(b) == block()) {
    memory.clocks.release(current_->number, {&b.gathered.all, &b.gathered.own});
  } else if (publishes) {
    memory.clocks.release(current_->number, {&b.gathered.all});
  } else {
    memory.clocks.tell_ended(current_->number, b.gathered.all);
  }
  --b.missing;
  try_end_phase(b);
  if (!fault_.empty()) yield();
}

// Arrives when all copies that the thread has begun are there, which is all that it tells. `counted`: as one of those
// that the phase waits for; otherwise as one more.
void Machine::mbarrier_arrive_for_copies(uintptr_t address, bool counted, uintptr_t site) {
  Mbarrier& b = mbarrier_at(address, "mbarrier_arrive_for_copies", site);
  Clocks& clocks = memory.clocks;
  const int agent = clocks.agent(current_->number, Deeds::copies);
  if (!counted) ++b.missing;
  arrivals_of_copies_.push_back({current_->number, clocks.now(agent), address});
  clocks.step(agent);
}

void Machine::copies_have_come() {
  for (size_t i = 0; i < arrivals_of_copies_.size();) {
    const Arrival arrival = arrivals_of_copies_[i];
    if (copies_.has_any(arrival.thread, arrival.group)) {
      ++i;
      continue;
    }
    arrivals_of_copies_.erase(arrivals_of_copies_.begin() + static_cast<std::ptrdiff_t>(i));
    Mbarrier& b = *find_mbarrier(arrival.mbarrier);
    if (b.missing == 0) {
      fault_ = "copies of " + position(arrival.thread) +
               " arrive where their mbarrier's phase waits for bytes only: " + memory.name_of(b.address);
      return;
    }
    for (Clocks::Knowledge* told : {&b.gathered.all, &b.gathered.own}) {
      memory.clocks.tell(*told, memory.clocks.agent(arrival.thread, Deeds::copies), arrival.group);
    }
    --b.missing;
    try_end_phase(b);
  }
}

// A first look at a phase that has not ended says so, which a kernel must stand; a second one waits. Only a wait of the
// cluster's scope orders what threads of other blocks did before they arrived.
bool Machine::mbarrier_try_wait(uintptr_t address, int parity, bool cluster, uintptr_t return_address, Site site) {
  if (block_count_ > 1 && memory.blocks.holds(address) && memory.blocks.block_of(address) != block()) {
    fail("waits for another block's mbarrier (" + source_line(return_address) + ")");
  }
  Mbarrier& b = mbarrier_at(address, "mbarrier_try_wait", return_address);
  const auto ended = [&] { return (b.phase & 1) != static_cast<uint32_t>(parity); };
  if (parity != 0 && parity != 1) fail("waits for parity " + std::to_string(parity) + " of an mbarrier");
  Thread& self = *current_;
  if (!ended()) {
    const bool first = !std::exchange(self.looked, true);
    if (!first) {
      wait(Meeting::mbarrier, "mbarrier_wait", site);
      b.waiting.push_back(self.number);
    }
    yield();
    if (first && !ended()) return false;
  }
  self.looked = false;
  memory.clocks.acquire(self.number, cluster ? b.released.all : b.released.own);
  return true;
}

void Machine::try_end_phase(Mbarrier& b) {
  if (b.missing > 0 || b.bytes != 0) return;
  if (b.under_way > 0) {
    fault_ = "in " + block_name(block_of(b)) +
             " a phase ends while a bulk copy is under way that reports to its mbarrier, " + memory.name_of(b.address) +
             ": it expects fewer bytes than come";
    return;
  }
  const uint32_t transfers = memory.clocks.now(b.carrier);
  memory.clocks.step(b.carrier);
  for (Clocks::Knowledge* told : {&b.gathered.all, &b.gathered.own}) memory.clocks.tell(*told, b.carrier, transfers);
  b.released = std::exchange(b.gathered, {});
  b.missing = b.arrivals;
  ++b.phase;
  for (const int t : std::exchange(b.waiting, {})) make_ready(threads_[t]);
}

// What mbarriers that are waited for lack, for a report.
std::string Machine::missing_of_mbarriers() const {
  std::string result;
  for (const Mbarrier& b : mbarriers_) {
    if (b.waiting.empty()) continue;
    result += "; the mbarrier at " + memory.name_of(b.address) + " lacks " + std::to_string(b.missing) +
              (b.missing == 1 ? " arrival and " : " arrivals and ") + std::to_string(b.bytes) + " bytes";
  }
  return result;
}

// ---- what kernels call ----------------------------------------------------------------------------------------------

void mbarrier_init(void* mbarrier, int arrivals, const void* return_address) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  machine.mbarrier_init(machine.own(mbarrier), arrivals, number(return_address));
}

void mbarrier_init_fence() { Machine::the().mbarrier_init_fence(); }

void mbarrier_arrive(const char* operation, uintptr_t mbarrier, bool arrives, int bytes, const void* return_address) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  machine.mbarrier_arrive(operation, machine.own(mbarrier), arrives, bytes, false, number(return_address));
}

void mbarrier_arrive_cluster(const char* operation, uintptr_t mbarrier, bool publishes, const void* return_address) {
  const Unwatched simulator;
  Machine::the().mbarrier_arrive(operation, mbarrier, true, 0, publishes, number(return_address));
}

void mbarrier_arrive_for_copies(void* mbarrier, bool counted, const void* return_address) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  machine.mbarrier_arrive_for_copies(machine.own(mbarrier), counted, number(return_address));
}

bool mbarrier_try_wait(void* mbarrier, int parity, bool cluster, const void* return_address, Site site) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  return machine.mbarrier_try_wait(machine.own(mbarrier), parity, cluster, number(return_address), site);
}

}  // namespace llmengine::sim
