#include "sim/block_memory.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace llmengine::sim {

namespace {

constexpr size_t kPage = 4096;

size_t size_of(const SharedVariable& v) { return v.end - v.begin; }
char* in_image(const SharedVariable& v) { return reinterpret_cast<char*>(v.begin); }

}  // namespace

BlockMemory::BlockMemory()
    : variables_(Image::own().shared_variables()), stride_(kDynamic + variables_.size() * kSharedRoom) {}

bool BlockMemory::reserve(int blocks) {
  if (blocks <= blocks_) return false;
  region_.reset(static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>(blocks) * stride_)));
  if (!region_) throw std::bad_alloc();
  blocks_ = blocks;
  return true;
}

void BlockMemory::begin_launch(uint64_t dynamic_bytes) {
  dynamic_bytes_ = dynamic_bytes;
  touched_.clear();
}

void BlockMemory::begin_cluster(int blocks) {
  clustered_ = blocks, running_ = 0;
  for (int b = 0; b < blocks; ++b) {
    std::memset(dynamic(b), 0xff, dynamic_bytes_);
    for (const SharedVariable* v : touched_) std::memset(of_block(*v, b), 0xff, size_of(*v));
  }
  for (const SharedVariable& v : variables_) std::memset(in_image(v), 0xff, size_of(v));
}

void BlockMemory::enter(int block) {
  if (block == running_) return;
  for (const SharedVariable* v : touched_) {
    std::memcpy(of_block(*v, running_), in_image(*v), size_of(*v));
    std::memcpy(in_image(*v), of_block(*v, block), size_of(*v));
  }
  running_ = block;
}

char* BlockMemory::of_block(const SharedVariable& variable, int block) const {
  return dynamic(block) + kDynamic + static_cast<size_t>(&variable - variables_.data()) * kSharedRoom;
}

void BlockMemory::touched(const SharedVariable& variable) {
  if (std::find(touched_.begin(), touched_.end(), &variable) != touched_.end()) return;
  touched_.push_back(&variable);
  for (int b = 0; b < clustered_; ++b) std::memset(of_block(variable, b), 0xff, size_of(variable));
}

uintptr_t BlockMemory::own(uintptr_t address, int block) {
  if (clustered_ == 1 || holds(address)) return address;
  const SharedVariable* variable = Image::own().shared_variable_at(address);
  if (!variable) return address;
  touched(*variable);
  return (reinterpret_cast<uintptr_t>(of_block(*variable, block)) + (address - variable->begin)) | kMark;
}

uintptr_t BlockMemory::real(uintptr_t address) const {
  if (!is_marked(address)) return address;
  if (block_of(address) != running_) return address & ~kMark;
  const InVariable at = variable_at(address);
  return at.variable->begin + at.offset;
}

BlockMemory::InVariable BlockMemory::variable_at(uintptr_t address) const {
  if (!is_marked(address)) {
    const SharedVariable* v = Image::own().shared_variable_at(address);
    return {v, v ? address - v->begin : 0};
  }
  const size_t offset = in_stride(address) - kDynamic;
  return {&variables_[offset / kSharedRoom], offset % kSharedRoom};
}

bool BlockMemory::contains(uintptr_t address, uint64_t size) const {
  if (holds_dynamic(address)) return in_stride(address) + size <= dynamic_bytes_;
  const InVariable at = variable_at(address);
  return at.variable && at.offset + size <= size_of(*at.variable);
}

bool BlockMemory::covers(uintptr_t address) const {
  if (holds_dynamic(address)) return true;
  const InVariable at = variable_at(address);
  return at.variable && at.offset < size_of(*at.variable);
}

std::optional<SharedPlace> BlockMemory::place(uintptr_t address) const {
  const InVariable at = variable_at(address);
  const bool in_dynamic = !is_marked(address) && in_region(address) < static_cast<size_t>(blocks_) * stride_;
  if (!in_dynamic && !at.variable) return {};
  // What no block has that runs lies past the end of the last one's.
  const int block = std::min(block_of(address), clustered_ - 1);
  const bool names_block = clustered_ > 1 && (in_dynamic || is_marked(address));
  const std::string whose = names_block ? " of the cluster's block " + std::to_string(block) : "";
  if (at.variable) return SharedPlace{"shared " + at.variable->name + whose, at.offset, size_of(*at.variable)};
  return SharedPlace{"dynamic shared memory" + whose, in_region(address) - static_cast<size_t>(block) * stride_,
                     dynamic_bytes_};
}

}  // namespace llmengine::sim
