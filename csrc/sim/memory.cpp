#include "sim/memory.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <tuple>
#include <utility>

#include "sim/image.h"

namespace llmengine::sim {

namespace {

constexpr uintptr_t kPage = 4096;

uintptr_t address_of(const void* p) { return reinterpret_cast<uintptr_t>(p); }

std::string bytes(uint64_t n) { return std::to_string(n) + (n == 1 ? " byte" : " bytes"); }

}  // namespace

// Strides are not negative in PyTorch.
std::pair<uintptr_t, uintptr_t> extent(const TensorView& t) {
  int64_t last = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] == 0) return {address_of(t.data), address_of(t.data)};
    last += (t.sizes[d] - 1) * t.strides[d];
  }
  return {address_of(t.data), address_of(t.data) + static_cast<uintptr_t>((last + 1) * size_of(t.dtype))};
}

const char* verb(Kind kind) {
  switch (kind) {
    case Kind::read: return "reads";
    case Kind::write: return "writes";
    case Kind::atomic: return "changes atomically";
  }
  return "";
}

static const char* agent_of(By by) {
  switch (by) {
    case By::thread: return "";
    case By::warp: return "its warp ";
    case By::copy:
    case By::bulk: return "its copy ";
    case By::product: return "its product ";
  }
  return "";
}

void Memory::begin_launch(const Launch& launch) {
  pages_.clear();
  last_ = nullptr;
  sites_.clear();
  site_numbers_.clear();
  clocks.begin_launch();
  blocks.begin_launch(launch.shared_bytes);
  parameters_ = address_of(launch.parameters);
  parameters_end_ = parameters_ + launch.parameter_bytes;
}

void Memory::end_launch(const Launch& launch) {
  for (const Region& r : regions_) {
    if (r.moved.reads == 0 && r.moved.writes == 0) continue;
    r.moved.kernel = launch.kernel, r.moved.tensor = r.name;
    moved_.push_back(std::exchange(r.moved, {}));
  }
}

// Counts an access that was found right.
void Memory::count(const Access& access, const Region& region) {
  if (access.kind != Kind::write) ++region.moved.reads, region.moved.bytes_read += access.size;
  if (access.kind != Kind::read) ++region.moved.writes, region.moved.bytes_written += access.size;
}

void Memory::begin_cluster(int threads_of_block, int block_count) {
  threads_ = threads_of_block, block_count_ = block_count;
  known_to_all_ = {};
  clocks.begin_cluster(threads_ * block_count);
  if (blocks.reserve(block_count)) {
    pages_.clear();
    last_ = nullptr;
  }
  blocks.begin_cluster(block_count);
}

std::optional<std::string> Memory::check(const Access& access, int thread, std::optional<Conflict>& conflict) {
  const bool shared = blocks.contains(access.address, access.size);
  if (block_count_ > 1) {
    if (auto problem = foreign(access, thread)) return problem;
  }
  const Region* const region = shared ? nullptr : region_at(access.address, access.size);
  if (!shared && !region) {
    if (is_constant(access)) return {};
    return outside(access);
  }
  const bool own_alignment = access.by == By::bulk || access.by == By::product;  // whoever issues them checks it
  if (!own_alignment && std::has_single_bit(access.size) && access.size <= 16 && access.address % access.size != 0) {
    return std::string(verb(access.kind)) + " " + bytes(access.size) + " at an address that is not a multiple of " +
           std::to_string(access.size);
  }
  const uint32_t site = site_number(access.site);
  Cell past, present;
  for (uint64_t i = 0; i < access.size; ++i) {
    Cell& byte = cell(access.address + i);
    if (i > 0 && byte == past) {  // neighbours mostly have the same past
      byte = present;
      continue;
    }
    past = byte;
    if (shared && !clocks.of_this_cluster(byte.write_stamp)) byte = Cell{};  // an earlier block's
    if (shared && access.kind != Kind::write && byte.write_stamp == 0) {
      return "reads shared memory that no thread of the block wrote";
    }
    conflict = conflict_at(byte, access, thread);
    if (conflict) {
      conflict->offset = i;
      return std::string(conflict->unfenced ? "needs a fence: " : "races: ") + agent_of(access.by) + verb(access.kind);
    }
    remember(byte, access, thread, site);
    present = byte;
  }
  if (region) count(access, *region);
  return {};
}

// ---- bounds ---------------------------------------------------------------------------------------------------------

bool Memory::is_constant(const Access& access) const {
  if (access.kind != Kind::read) return false;
  if (access.address >= parameters_ && access.address + access.size <= parameters_end_) return true;
  return Image::own().is_constant(access.address);
}

// What a block of a cluster may not touch.
std::optional<std::string> Memory::foreign(const Access& access, int thread) const {
  if (!blocks.holds(access.address) || access.remote || blocks.block_of(access.address) == thread / threads_) return {};
  return std::string(verb(access.kind)) + " another block's shared memory, but not by its cluster address";
}

std::string Memory::outside(const Access& access) const {
  const auto place = blocks.place(access.address);
  if (!place) return outside_tensors(access);
  return std::string(verb(access.kind)) + " " + bytes(access.size) + " at byte " + std::to_string(place->offset) +
         " of " + place->name + ", which has " + std::to_string(place->size);
}

void Memory::set_tensors(const std::vector<NamedView>& tensors) {
  regions_.clear();
  last_region_ = nullptr;
  if (!tensors.empty()) moved_.clear();  // what a call moved may be asked for when it is over
  for (const NamedView& t : tensors) {
    Region region(t);
    if (region.begin != region.end) regions_.push_back(std::move(region));
  }
}

Memory::Region::Region(const NamedView& view) : name(view.name), tensor(view.tensor) {
  std::tie(begin, end) = extent(tensor);
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.sizes[d] > 1 && tensor.strides[d] > 0) by_stride.push_back(d);
  }
  std::sort(by_stride.begin(), by_stride.end(), [&](int a, int b) { return tensor.strides[a] > tensor.strides[b]; });
  int64_t packed = 1;
  for (auto d = by_stride.rbegin(); d != by_stride.rend() && tensor.strides[*d] == packed; ++d) {
    packed *= tensor.sizes[*d];
  }
  dense = static_cast<uint64_t>(packed * size_of(tensor.dtype)) == end - begin;
}

// How many elements lie side by side from this offset (in elements) on; 0 where none lies. The largest stride goes
// first, which is exact for tensors whose rows do not interleave.
int64_t Memory::Region::run_at(int64_t offset) const {
  int64_t run = 1;
  for (const int d : by_stride) {
    const int64_t stride = tensor.strides[d], index = std::min(offset / stride, tensor.sizes[d] - 1);
    offset -= index * stride;
    if (stride == 1) run = tensor.sizes[d] - index;
  }
  return offset == 0 ? run : 0;
}

bool Memory::Region::holds(uintptr_t address, uint64_t size) const {
  if (address < begin || address + size > end) return false;
  if (dense) return true;
  const int64_t element = size_of(tensor.dtype);
  const auto last = static_cast<int64_t>(address + size - 1 - begin) / element;
  for (auto at = static_cast<int64_t>(address - begin) / element; at <= last;) {
    const int64_t run = run_at(at);
    if (run == 0) return false;
    at += run;
  }
  return true;
}

const Memory::Region* Memory::region_at(uintptr_t address, uint64_t size) const {
  if (last_region_ && last_region_->holds(address, size)) return last_region_;
  for (const Region& r : regions_) {
    if (r.holds(address, size)) return last_region_ = &r;
  }
  return nullptr;
}

// Names the tensor that lies nearest.
std::string Memory::outside_tensors(const Access& access) const {
  const Region* nearest = nullptr;
  uintptr_t least = UINTPTR_MAX;
  for (const Region& r : regions_) {
    const uintptr_t distance = access.address < r.begin ? r.begin - access.address
                               : access.address < r.end ? 0
                                                        : access.address - r.end;
    if (distance < least) least = distance, nearest = &r;
  }
  const std::string what = std::string(verb(access.kind)) + " " + bytes(access.size);
  if (!nearest || least > (1u << 20)) return what + " at an address that belongs to no tensor of the call";
  const std::string name = nearest->name + " " + nearest->tensor.shape();
  if (access.address < nearest->begin) return what + " " + bytes(nearest->begin - access.address) + " before " + name;
  if (access.address >= nearest->end)
    return what + " " + bytes(access.address - nearest->end) + " past the end of " + name;
  const bool crosses = access.address + access.size > nearest->end;
  return what + " at byte " + std::to_string(access.address - nearest->begin) + " of " + name +
         (crosses ? ", across its end" : ", between its rows");
}

std::string Memory::name_of(uintptr_t address) const {
  const auto at = [](uint64_t offset, const std::string& name) {
    return "byte " + std::to_string(offset) + " of " + name;
  };
  if (const auto place = blocks.place(address)) return at(place->offset, place->name);
  if (const Region* r = region_at(address, 1)) return at(address - r->begin, r->name);
  return "memory";
}

// ---- races ----------------------------------------------------------------------------------------------------------

Memory::Cell& Memory::cell(uintptr_t address) {
  const uintptr_t page = address & ~(kPage - 1);
  if (!last_ || page != last_page_) {
    auto& found = pages_[page];
    if (!found) found = std::make_unique<Page>();
    last_ = found.get();
    last_page_ = page;
  }
  return last_->cells[address - page];
}

bool Memory::comes_after(const Access& access, int agent, uint32_t stamp, int thread) const {
  if (access.by != By::warp && access.by != By::product) return clocks.before(agent, stamp, thread);
  const bool warp = access.by == By::warp;
  const int first = warp ? thread / 32 * 32 : first_of_warpgroup(thread), count = warp ? 32 : 128;
  // What all know they will always know, and the next row's past is mostly this one's.
  const Known asked{agent, stamp, first, count};
  if (asked == known_to_all_) return true;
  const bool known = clocks.before_all(agent, stamp, first, count);
  if (known) known_to_all_ = asked;
  return known;
}

// What a fence must reach for a write of that agent there.
Reach Memory::reach_of(int writer, uintptr_t address) const {
  if (is_global(address)) return Reach::global;
  const int thread = clocks.thread_of(writer);
  const bool own = thread < 0 || !blocks.holds(address) || blocks.block_of(address) == thread / threads_;
  return own ? Reach::block : Reach::cluster;
}

std::optional<Conflict> Memory::conflict_at(const Cell& c, const Access& access, int thread) const {
  const auto unordered = [&](uint32_t stamp, int agent) {
    if (stamp == 0) return false;
    return !clocks.of_this_cluster(stamp) || !comes_after(access, agent, stamp, thread);
  };
  const auto side = [&](Kind earlier, uint32_t stamp, int agent, uint32_t site) {
    return Conflict{earlier, clocks.of_this_cluster(stamp) ? agent : -1, stamp, sites_[site]};
  };
  const auto last_write = [&] {
    return side(c.atomic ? Kind::atomic : Kind::write, c.write_stamp, c.writer, c.write_site);
  };
  if (unordered(c.write_stamp, c.writer) && !(c.atomic && access.kind == Kind::atomic)) return last_write();
  if ((access.by == By::bulk || access.by == By::product) && c.write_stamp != 0 &&
      !clocks.fenced(c.writer, c.write_stamp, thread, reach_of(c.writer, access.address))) {
    Conflict conflict = last_write();
    conflict.unfenced = true;
    return conflict;
  }
  if (access.kind == Kind::read) return {};
  for (int r = 0; r < kReaders; ++r) {
    if (unordered(c.read_stamp[r], c.reader[r])) return side(Kind::read, c.read_stamp[r], c.reader[r], c.read_site[r]);
  }
  return {};
}

void Memory::remember(Cell& c, const Access& access, int thread, uint32_t site) {
  const int agent = access.agent >= 0 ? access.agent : thread;
  const uint32_t now = clocks.now(agent);
  if (access.kind != Kind::read) {
    c = Cell{};
    c.write_stamp = now, c.write_site = site, c.writer = static_cast<uint16_t>(agent);
    c.atomic = access.kind == Kind::atomic;
    return;
  }
  // A reader that this one comes after is no longer needed: who is ordered after this one is ordered after both.
  const bool replaces =
      c.read_stamp[0] == 0 || (clocks.of_this_cluster(c.read_stamp[0]) &&
                               (c.reader[0] == agent || clocks.before(c.reader[0], c.read_stamp[0], thread)));
  const int slot = replaces ? 0 : 1;
  c.read_stamp[slot] = now, c.read_site[slot] = site, c.reader[slot] = static_cast<uint16_t>(agent);
}

uint32_t Memory::site_number(uintptr_t site) {
  const auto [it, added] = site_numbers_.try_emplace(site, static_cast<uint32_t>(sites_.size()));
  if (added) sites_.push_back(site);
  return it->second;
}

}  // namespace llmengine::sim
