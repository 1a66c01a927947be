#include "sim/apart.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "sim/memory.h"

namespace llmengine::sim {

namespace {

constexpr size_t kPage = 4096;

// Memory of tensors that overlap, and where it goes.
struct Extent {
  uintptr_t begin, end, place;
};

// In order of address.
std::vector<Extent> merged_extents(const std::vector<TensorView*>& tensors) {
  std::vector<Extent> extents, merged;
  for (const TensorView* t : tensors) {
    const auto [begin, end] = extent(*t);
    if (begin != end) extents.push_back({begin, end, 0});
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  for (const Extent& e : extents) {
    if (merged.empty() || e.begin >= merged.back().end) {
      merged.push_back(e);
    } else {
      merged.back().end = std::max(merged.back().end, e.end);
    }
  }
  return merged;
}

// Calls visit(offset, bytes) for the runs of elements that lie side by side.
template <class Visit>
void for_each_run(const TensorView& t, const Visit& visit) {
  int64_t run = 1, runs = 1;
  std::vector<int> outer;  // dimensions, the smallest stride first
  for (int d = 0; d < t.ndim; ++d) {
    if (t.sizes[d] > 1 && t.strides[d] > 0) outer.push_back(d);
  }
  std::sort(outer.begin(), outer.end(), [&](int a, int b) { return t.strides[a] < t.strides[b]; });
  while (!outer.empty() && t.strides[outer.front()] == run) {
    run *= t.sizes[outer.front()];
    outer.erase(outer.begin());
  }
  for (const int d : outer) runs *= t.sizes[d];
  for (int64_t i = 0; i < runs; ++i) {
    int64_t offset = 0, rest = i;
    for (const int d : outer) offset += rest % t.sizes[d] * t.strides[d], rest /= t.sizes[d];
    visit(static_cast<size_t>(offset * size_of(t.dtype)), static_cast<size_t>(run * size_of(t.dtype)));
  }
}

void copy_changes(char* to, const char* from, size_t bytes) {
  constexpr size_t kChunk = 64;
  for (size_t i = 0; i < bytes; i += kChunk) {
    const size_t end = std::min(i + kChunk, bytes);
    if (std::memcmp(to + i, from + i, end - i) == 0) continue;
    for (size_t j = i; j < end; ++j) {
      if (to[j] != from[j]) to[j] = from[j];
    }
  }
}

}  // namespace

Apart::Apart(const std::vector<TensorView*>& tensors) {
  std::vector<Extent> extents = merged_extents(tensors);
  if (extents.empty()) return;
  size_t largest = 0;
  for (const Extent& e : extents) largest = std::max(largest, e.end - e.begin);
  const size_t gap = (largest + (64 << 10) + kPage - 1) / kPage * kPage;
  for (Extent& e : extents) {
    map_bytes_ = (map_bytes_ + gap + kPage - 1) / kPage * kPage + e.begin % kPage;
    e.place = map_bytes_;
    map_bytes_ += e.end - e.begin;
  }
  map_bytes_ += gap;
  map_ = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map_ == MAP_FAILED) throw std::bad_alloc();
  for (TensorView* t : tensors) {
    const auto begin = reinterpret_cast<uintptr_t>(t->data);
    const auto holds = [&](const Extent& e) { return begin >= e.begin && begin < e.end; };
    const auto e = std::find_if(extents.begin(), extents.end(), holds);
    if (t->numel() == 0 || e == extents.end()) continue;
    pairs_.push_back({*t, static_cast<char*>(map_) + e->place + (begin - e->begin)});
    t->data = pairs_.back().copy;
  }
  for (const Pair& p : pairs_) {
    for_each_run(p.original, [&](size_t offset, size_t bytes) {
      std::memcpy(p.copy + offset, p.original.as<const char>() + offset, bytes);
    });
  }
}

Apart::~Apart() {
  if (map_) munmap(map_, map_bytes_);
}

void Apart::give_back() const {
  for (const Pair& p : pairs_) {
    for_each_run(p.original, [&](size_t offset, size_t bytes) {
      copy_changes(p.original.as<char>() + offset, p.copy + offset, bytes);
    });
  }
}

}  // namespace llmengine::sim
