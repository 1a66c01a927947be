// Machine's part for mbarriers and bulk copies.
#include "sim/mbarrier.h"

#include <algorithm>
#include <utility>

#include "sim/machine.h"

namespace llmengine::sim {

void Machine::mbarrier_init(uintptr_t address, int arrivals, uintptr_t site) {
  const auto complain = [&](const std::string& problem) {
    fail("initialises an mbarrier " + problem + " (" + source_line(site) + ")");
  };
  if (arrivals <= 0) complain("for " + std::to_string(arrivals) + " arrivals");
  if (preempts()) yield();
  check({address, sizeof(uint64_t), Kind::write, site}, current_->number);
  if (!memory.is_shared(address)) complain("that is not in shared memory");
  const int self = current_->number;
  auto place = std::find_if(mbarriers_.begin(), mbarriers_.end(), [&](auto& b) { return b.address == address; });
  const auto number = static_cast<int>(place - mbarriers_.begin());
  if (number == Clocks::kMbarriers) complain("where the simulator has no room for more");
  if (place != mbarriers_.end() && place->under_way > 0) complain("anew while a bulk copy reports to it");
  if (place == mbarriers_.end()) place = mbarriers_.insert(place, Mbarrier{});
  Clocks& clocks = memory.clocks;
  *place = Mbarrier{address, number, self, clocks.now(self), site, false, arrivals, arrivals, 0, 0, 0, {}, {}, {}};
  place->gathered = place->released = clocks.nothing();
}

void Machine::mbarrier_init_fence() {
  for (Mbarrier& b : mbarriers_) b.fenced = b.fenced || b.thread == current_->number;
}

// The mbarrier that the running thread uses: it must be one, and known to be.
Mbarrier& Machine::mbarrier_at(uintptr_t address, const char* operation, uintptr_t site) {
  if (preempts()) yield();
  const auto call = [&] { return std::string("calls ") + operation + " (" + source_line(site) + ") on "; };
  const auto place = std::find_if(mbarriers_.begin(), mbarriers_.end(), [&](auto& b) { return b.address == address; });
  if (place == mbarriers_.end()) fail(call() + "what no thread has initialised as an mbarrier");
  if (!memory.clocks.before(place->thread, place->stamp, current_->number)) {
    fail(call() + "an mbarrier that " + position(place->thread) + " initialises (" + source_line(place->site) +
         ") with no barrier between: " + memory.name_of(address));
  }
  check({address, sizeof(uint64_t), Kind::atomic, site}, current_->number);
  return *place;
}

void Machine::mbarrier_arrive(uintptr_t address, int bytes, uintptr_t site) {
  Mbarrier& b = mbarrier_at(address, bytes == 0 ? "mbarrier_arrive" : "mbarrier_arrive_expect_tx", site);
  if (b.missing == 0) {
    fail("arrives (" + source_line(site) +
         ") where its mbarrier's phase waits for bytes only: " + memory.name_of(address));
  }
  memory.clocks.release(current_->number, b.gathered);
  b.bytes += bytes;
  --b.missing;
  try_end_phase(b);
  if (!fault_.empty()) yield();
}

// A first look at a phase that has not ended says so, which a kernel must stand; a second one waits.
bool Machine::mbarrier_try_wait(uintptr_t address, int parity, uintptr_t return_address, Site site) {
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
  memory.clocks.acquire(self.number, b.released);
  return true;
}

void Machine::try_end_phase(Mbarrier& b) {
  if (b.missing > 0 || b.bytes != 0) return;
  if (b.under_way > 0) {
    fault_ = "in block " + text(block_) +
             " a phase ends while a bulk copy is under way that reports to its mbarrier, " + memory.name_of(b.address) +
             ": it expects fewer bytes than come";
    return;
  }
  memory.clocks.end_phase(b.number, b.gathered);
  b.released = std::exchange(b.gathered, memory.clocks.nothing());
  b.missing = b.arrivals;
  ++b.phase;
  for (const int t : std::exchange(b.waiting, {})) make_ready(threads_[t]);
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

void Machine::copy_bulk(Transfer transfer, uintptr_t mbarrier, uintptr_t site) {
  Mbarrier& b = mbarrier_at(mbarrier, "copy_bulk", site);
  if (!b.fenced) {
    fail("calls copy_bulk (" + source_line(site) + ") on an mbarrier that " + position(b.thread) + " initialises (" +
         source_line(b.site) + ") with no mbarrier_init_fence between");
  }
  if (transfer.size == 0 || transfer.size % 16 != 0) {
    fail("copies " + std::to_string(static_cast<int32_t>(transfer.size)) + " bytes in bulk (" + source_line(site) +
         "); multiples of 16 are needed");
  }
  check_copy(transfer, 16, memory.clocks.carrier(b.number), site);
  ++b.under_way;
  const auto choice = schedule.order == Order::random ? random_() % 4 : 0;
  bulk_copies_.push_back({transfer, b.number, schedule.order == Order::forward || choice == 2});
  if (schedule.order == Order::reversed || choice == 1) finish_bulk_copy(bulk_copies_.size() - 1);
  if (!fault_.empty()) yield();
}

// A moment at which bulk copies may take effect; the last one for those that are late, where no thread can go on.
// Whether one did.
bool Machine::bulk_copies_may_finish(bool last_moment) {
  if (bulk_copies_.empty() || (schedule.order == Order::random && !last_moment && random_() % 4 != 0)) return false;
  const size_t chosen = (schedule.order == Order::random ? random_() : bulk_copies_.size() - 1) % bulk_copies_.size();
  if (bulk_copies_[chosen].late && !last_moment) return false;
  finish_bulk_copy(chosen);
  return true;
}

void Machine::finish_bulk_copy(size_t i) {
  const BulkCopy copy = bulk_copies_[i];
  bulk_copies_.erase(bulk_copies_.begin() + static_cast<std::ptrdiff_t>(i));
  copy.take_effect();
  Mbarrier& b = mbarriers_[copy.mbarrier];
  --b.under_way;
  b.bytes -= copy.size;
  try_end_phase(b);
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

namespace {
uintptr_t number(const void* p) { return reinterpret_cast<uintptr_t>(p); }
}  // namespace

void mbarrier_init(void* mbarrier, int arrivals, const void* return_address) {
  const Unwatched simulator;
  Machine::the().mbarrier_init(number(mbarrier), arrivals, number(return_address));
}

void mbarrier_init_fence() { Machine::the().mbarrier_init_fence(); }

void mbarrier_arrive(void* mbarrier, int bytes, const void* return_address) {
  const Unwatched simulator;
  Machine::the().mbarrier_arrive(number(mbarrier), bytes, number(return_address));
}

bool mbarrier_try_wait(void* mbarrier, int parity, const void* return_address, Site site) {
  const Unwatched simulator;
  return Machine::the().mbarrier_try_wait(number(mbarrier), parity, number(return_address), site);
}

void copy_bulk(void* shared, const void* global, int bytes, void* mbarrier, const void* return_address) {
  const Unwatched simulator;
  const auto size = static_cast<uint32_t>(bytes);
  Machine::the().copy_bulk({static_cast<char*>(shared), static_cast<const char*>(global), size, size}, number(mbarrier),
                           number(return_address));
}

}  // namespace llmengine::sim
