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

struct Extent {
  uintptr_t begin, end;
};

// Of the tensors' memory, in order; what overlaps is one.
std::vector<Extent> merged_extents(const std::vector<TensorView*>& tensors) {
  std::vector<Extent> extents;
  for (const TensorView* t : tensors) {
    const auto [begin, end] = extent(*t);
    if (begin != end) extents.push_back({begin, end});
  }
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  std::vector<Extent> merged;
  for (const Extent& e : extents) {
    if (merged.empty() || e.begin >= merged.back().end) {
      merged.push_back(e);
    } else {
      merged.back().end = std::max(merged.back().end, e.end);
    }
  }
  return merged;
}

}  // namespace

Apart::Apart(const std::vector<TensorView*>& tensors) {
  const std::vector<Extent> extents = merged_extents(tensors);
  if (extents.empty()) return;
  size_t largest = 0, total = 0;
  for (const Extent& e : extents) largest = std::max(largest, e.end - e.begin), total += e.end - e.begin;
  const size_t gap = (largest + (64 << 10) + kPage - 1) / kPage * kPage;
  map_bytes_ = total + (extents.size() + 1) * (gap + 2 * kPage);
  map_ = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map_ == MAP_FAILED) throw std::bad_alloc();
  auto at = reinterpret_cast<uintptr_t>(map_);
  for (const Extent& e : extents) {
    at = (at + gap + kPage - 1) / kPage * kPage + e.begin % kPage;
    pieces_.push_back({reinterpret_cast<char*>(e.begin), reinterpret_cast<char*>(at), e.end - e.begin});
    std::memcpy(pieces_.back().copy, pieces_.back().original, pieces_.back().bytes);
    at += pieces_.back().bytes;
  }
  for (TensorView* t : tensors) {
    auto* data = static_cast<char*>(t->data);
    const auto holds = [&](const Piece& p) { return data >= p.original && data < p.original + p.bytes; };
    const auto piece = std::find_if(pieces_.begin(), pieces_.end(), holds);
    if (piece != pieces_.end() && t->numel() > 0) t->data = piece->copy + (data - piece->original);
  }
}

Apart::~Apart() {
  if (map_) munmap(map_, map_bytes_);
}

void Apart::give_back() const {
  constexpr size_t kChunk = 64;
  for (const Piece& p : pieces_) {
    for (size_t i = 0; i < p.bytes; i += kChunk) {
      const size_t n = std::min(kChunk, p.bytes - i);
      if (std::memcmp(p.original + i, p.copy + i, n) == 0) continue;
      for (size_t j = i; j < i + n; ++j) {
        if (p.original[j] != p.copy[j]) p.original[j] = p.copy[j];
      }
    }
  }
}

}  // namespace llmengine::sim
