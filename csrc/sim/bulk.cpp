// Machine's part for bulk copies and boxes of tensors.
#include "sim/bulk.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "cuda/tensor_map.h"
#include "sim/machine.h"

namespace llmengine::sim {

namespace {

constexpr uint32_t kChunk = 16;  // bytes that a swizzle keeps together

uintptr_t swizzled(uintptr_t address, Swizzle swizzle) { return address ^ (address >> 3 & swizzle_mask(swizzle)); }

// A box of a tensor, row by row: where its first dimension's elements lie, and which of them are the tensor's.
struct Box {
  const TensorMapFields& map;
  const BoxPlace& at;
  uint32_t element;                 // bytes
  std::array<int64_t, 5> counts{};  // elements along each dimension
  int64_t rows = 1;

  Box(const TensorMapFields& map, const BoxPlace& at)
      : map(map), at(at), element(static_cast<uint32_t>(size_of(map.dtype))) {
    for (int d = 0; d < map.rank; ++d) {
      counts[d] = (map.box[d] + map.steps[d] - 1) / map.steps[d];
      if (d > 0) rows *= counts[d];
    }
  }

  uint32_t row_bytes() const { return static_cast<uint32_t>(counts[0]) * element; }
  uint32_t bytes() const { return static_cast<uint32_t>(rows) * row_bytes(); }

  // Of row r: the address of its element 0, and its elements from `begin` to `end` lie in the tensor.
  struct Row {
    const char* address;
    int64_t begin, end;
  };
  Row row(int64_t r) const {
    Row row{static_cast<const char*>(map.data), std::max<int64_t>(0, -int64_t{at.place[0]}),
            std::min<int64_t>(counts[0], map.sizes[0] - at.place[0])};
    row.address += int64_t{at.place[0]} * element;
    for (int d = 1; d < map.rank; r /= counts[d], ++d) {
      const int64_t place = at.place[d] + r % counts[d] * map.steps[d];
      if (place < 0 || place >= map.sizes[d]) row.end = row.begin;
      row.address += place * map.strides[d];
    }
    row.end = std::max(row.begin, row.end);
    return row;
  }
};

// Calls move(shared, global, bytes) for every stretch of a box that lies together on both sides, and move(shared, null,
// bytes) for what lies outside of the tensor.
template <class Move>
void for_each_stretch(const Box& box, uintptr_t shared, const Move& move) {
  const uint32_t stretch = box.map.swizzle == Swizzle::none ? box.row_bytes() : kChunk;
  for (int64_t r = 0; r < box.rows; ++r) {
    const Box::Row row = box.row(r);
    const uintptr_t start = shared + static_cast<uintptr_t>(r) * box.row_bytes();
    const auto inside = static_cast<uint32_t>(row.begin) * box.element,
               past = static_cast<uint32_t>(row.end) * box.element;
    for (uint32_t c = 0; c < box.row_bytes(); c += stretch) {
      const uint32_t end = c + stretch;
      const uint32_t begins = std::clamp(inside, c, end), ends = std::max(begins, std::clamp(past, c, end));
      char* to = reinterpret_cast<char*>(swizzled(start + c, box.map.swizzle));
      if (begins > c) move(to, static_cast<const char*>(nullptr), begins - c);
      if (ends > begins) move(to + (begins - c), row.address + begins, ends - begins);
      if (end > ends) move(to + (ends - c), static_cast<const char*>(nullptr), end - ends);
    }
  }
}

}  // namespace

// ---- to shared memory -----------------------------------------------------------------------------------------------

void Machine::need_fenced(const Mbarrier& b, const char* operation, uintptr_t site) {
  if (b.fenced) return;
  fail(std::string("calls ") + operation + " (" + source_line(site) + ") on an mbarrier that " + position(b.thread) +
       " initialises (" + source_line(b.site) + ") with no mbarrier_init_fence between");
}

void Machine::copy_bulk(Transfer transfer, uintptr_t mbarrier, uintptr_t site) {
  Mbarrier& b = mbarrier_at(mbarrier, "copy_bulk", site);
  need_fenced(b, "copy_bulk", site);
  if (transfer.size == 0 || transfer.size % 16 != 0) {
    fail("copies " + std::to_string(static_cast<int32_t>(transfer.size)) + " bytes in bulk (" + source_line(site) +
         "); multiples of 16 are needed");
  }
  check_copy(transfer, 16, By::bulk, b.carrier, site);
  BulkCopy copy;
  copy.pieces = {transfer};
  copy.bytes = transfer.size;
  report_to(copy, b, site);
  issue(std::move(copy));
}

void Machine::report_to(BulkCopy& copy, Mbarrier& b, uintptr_t site) {
  ++b.under_way;
  b.last_copy = memory.clocks.now(b.carrier);
  b.copy_site = site;
  copy.mbarrier = static_cast<int>(&b - mbarriers_.data());
}

// `blocks`: bit b is set for block b of the cluster, at the same place of whose shared memory the box goes, and the
// report to the mbarrier.
void Machine::load_tensor(uintptr_t shared, const TensorMapFields& map, const BoxPlace& at, uintptr_t mbarrier,
                          uint32_t blocks, uintptr_t site) {
  if (preempts()) yield();
  check_box(shared, map, at.rank, site);
  const Box box(map, at);
  if (blocks == 0 || blocks >> block_count_ != 0) {
    fail("copies a box to blocks " + std::to_string(blocks) + ", of which not all are in its cluster of " +
         std::to_string(block_count_) + " (" + source_line(site) + ")");
  }
  std::vector<BulkCopy> copies;
  for (int block = 0; block < block_count_; ++block) {
    if (!(blocks >> block & 1)) continue;
    const auto place = [&](uintptr_t address) {
      return block_count_ == 1 ? address : memory.blocks.in_block(address, block);
    };
    Mbarrier& b = mbarrier_at(place(mbarrier), "copy_tensor", site, By::bulk);
    need_fenced(b, "copy_tensor", site);
    check_remote(place(shared), b.carrier, "copies to", site);
    for (int64_t r = 0; r < box.rows; ++r) {
      const Box::Row row = box.row(r);
      if (row.begin == row.end) continue;
      const uintptr_t first = number(row.address) + static_cast<uintptr_t>(row.begin) * box.element;
      check({first, static_cast<uint64_t>(row.end - row.begin) * box.element, Kind::read, site, By::bulk, b.carrier},
            current_->number);
    }
    check({place(shared), box.bytes(), Kind::write, site, By::bulk, b.carrier, true}, current_->number);
    BulkCopy& copy = copies.emplace_back();
    copy.bytes = box.bytes();
    for_each_stretch(box, place(shared), [&](char* to, const char* from, uint32_t bytes) {
      copy.pieces.push_back({to, from, bytes, from ? bytes : 0});
    });
    report_to(copy, b, site);
  }
  for (BulkCopy& copy : copies) issue(std::move(copy));
}

void Machine::check_box(uintptr_t shared, const TensorMapFields& map, int rank, uintptr_t site) {
  constexpr uintptr_t kAlignment = 128;
  const auto complain = [&](const std::string& problem) { fail(problem + " (" + source_line(site) + ")"); };
  if (map.rank != rank) {
    complain("gives " + std::to_string(rank) + " coordinates to a tensor map of " + std::to_string(map.rank) +
             " dimensions");
  }
  if (shared % kAlignment != 0) complain("copies a box to or from an address that is not a multiple of 128");
  if (!memory.is_shared(shared)) complain("copies a box to or from memory that is not shared");
}

// ---- to global memory -----------------------------------------------------------------------------------------------

// A copy of this thread's to global memory, as far as the side in shared memory goes.
BulkCopy Machine::begin_store(uintptr_t shared, uint64_t bytes, Adds adds, uintptr_t site) {
  const int self = current_->number, reads = memory.clocks.agent(self, Deeds::store_reads);
  check({shared, bytes, Kind::read, site, By::bulk, reads}, self);
  BulkCopy copy;
  copy.adds = adds;
  copy.thread = self;
  copy.group = current_->last_store = memory.clocks.now(reads);
  current_->store_site = site;
  return copy;
}

void Machine::store_piece(BulkCopy& copy, const char* shared, const char* global, uint32_t bytes, uintptr_t site) {
  const int writes = memory.clocks.agent(copy.thread, Deeds::store_writes);
  check({number(global), bytes, copy.adds == Adds::nothing ? Kind::write : Kind::atomic, site, By::bulk, writes},
        copy.thread);
  copy.pieces.push_back({const_cast<char*>(global), shared, bytes, bytes});
}

void Machine::store_tensor(const TensorMapFields& map, const BoxPlace& at, uintptr_t shared, Adds adds,
                           uintptr_t site) {
  if (preempts()) yield();
  check_box(shared, map, at.rank, site);
  if (adds != Adds::nothing && map.dtype != DType::f32) {
    fail(std::string("adds elements of ") + name(map.dtype) +
         " to a tensor, of which the simulator adds float32 alone (" + source_line(site) + ")");
  }
  const Box box(map, at);
  BulkCopy copy = begin_store(shared, box.bytes(), adds, site);
  for_each_stretch(box, shared, [&](char* in_shared, const char* in_global, uint32_t bytes) {
    if (in_global) store_piece(copy, in_shared, in_global, bytes, site);
  });
  issue(std::move(copy));
}

void Machine::store_bulk(uintptr_t global, uintptr_t shared, int bytes, Adds adds, uintptr_t site) {
  if (preempts()) yield();
  const auto complain = [&](const std::string& problem) { fail(problem + " (" + source_line(site) + ")"); };
  if (bytes <= 0 || bytes % 16 != 0)
    complain("stores " + std::to_string(bytes) + " bytes in bulk; multiples of 16 are needed");
  if (global % 16 != 0 || shared % 16 != 0) complain("stores in bulk at an address that is not a multiple of 16");
  if (!memory.is_shared(shared)) complain("stores in bulk from memory that is not shared");
  BulkCopy copy = begin_store(shared, static_cast<uint64_t>(bytes), adds, site);
  store_piece(copy, reinterpret_cast<const char*>(shared), reinterpret_cast<const char*>(global),
              static_cast<uint32_t>(bytes), site);
  issue(std::move(copy));
}

void Machine::commit_stores() {
  Clocks& clocks = memory.clocks;
  const int self = current_->number;
  const int reads = clocks.agent(self, Deeds::store_reads), writes = clocks.agent(self, Deeds::store_writes);
  current_->store_groups.push_back(clocks.now(reads));
  clocks.step(reads);
  clocks.step(writes);
}

void Machine::wait_stores(int pending, bool reads_only) {
  const auto& groups = current_->store_groups;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  const int self = current_->number;
  const uint32_t until = groups[groups.size() - 1 - static_cast<size_t>(pending)];
  for (size_t i = 0; i < bulk_copies_.size();) {
    if (bulk_copies_[i].thread == self && bulk_copies_[i].group <= until) {
      finish_bulk_copy(i);
    } else {
      ++i;
    }
  }
  memory.clocks.waits(self, Deeds::store_reads, until);
  if (!reads_only) memory.clocks.waits(self, Deeds::store_writes, until);
}

// ---- when they take effect ------------------------------------------------------------------------------------------

void Machine::issue(BulkCopy copy) {
  const Moment moment = choose_moment();
  copy.late = moment.late;
  bulk_copies_.push_back(std::move(copy));
  if (moment.at_once) finish_bulk_copy(bulk_copies_.size() - 1);
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
  const BulkCopy copy = std::move(bulk_copies_[i]);
  bulk_copies_.erase(bulk_copies_.begin() + static_cast<std::ptrdiff_t>(i));
  for (const Transfer& piece : copy.pieces) {
    switch (copy.adds) {
      case Adds::nothing: piece.take_effect(); break;
      case Adds::floats: piece.add<float>(); break;
      case Adds::integers: piece.add<uint32_t>(); break;
    }
  }
  if (copy.mbarrier < 0) return;
  Mbarrier& b = mbarriers_[static_cast<size_t>(copy.mbarrier)];
  --b.under_way;
  b.bytes -= copy.bytes;
  try_end_phase(b);
}

// ---- what kernels call ----------------------------------------------------------------------------------------------

void copy_bulk(void* shared, const void* global, int bytes, void* mbarrier, const void* return_address) {
  const Unwatched simulator;
  const auto size = static_cast<uint32_t>(bytes);
  Machine& machine = Machine::the();
  char* const to = reinterpret_cast<char*>(machine.own(shared));
  machine.copy_bulk({to, static_cast<const char*>(global), size, size}, machine.own(mbarrier), number(return_address));
}

void load_tensor(void* shared, const TensorMapFields& map, const BoxPlace& at, void* mbarrier, uint32_t blocks,
                 const void* return_address) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  if (blocks == 0) blocks = 1u << machine.block();
  machine.load_tensor(machine.own(shared), map, at, machine.own(mbarrier), blocks, number(return_address));
}

void store_tensor(const TensorMapFields& map, const BoxPlace& at, const void* shared, Adds adds,
                  const void* return_address) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  machine.store_tensor(map, at, machine.own(shared), adds, number(return_address));
}

void store_bulk(void* global, const void* shared, int bytes, Adds adds, const void* return_address) {
  const Unwatched simulator;
  Machine& machine = Machine::the();
  machine.store_bulk(number(global), machine.own(shared), bytes, adds, number(return_address));
}

void commit_stores() {
  const Unwatched simulator;
  Machine::the().commit_stores();
}

void wait_stores(int pending, bool reads_only) {
  const Unwatched simulator;
  Machine::the().wait_stores(pending, reads_only);
}

void fence_async(Reach reach) {
  const Unwatched simulator;
  Machine::the().fence_async(reach);
}

}  // namespace llmengine::sim
