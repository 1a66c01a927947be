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

BlockMemory::BlockMemory() : variables_(Image::own().shared_variables()) {
  size_t at = 0;
  for (const SharedVariable& v : variables_) {
    offsets_.push_back(at);
    at += v.pages_end() - v.begin;
  }
  offsets_.push_back(at);
  stride_ = kDynamic + at;
}

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
  return dynamic(block) + kDynamic + offsets_[static_cast<size_t>(&variable - variables_.data())];
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
  return reinterpret_cast<uintptr_t>(of_block(*variable, block)) + (address - variable->begin);
}

uintptr_t BlockMemory::real(uintptr_t address) const {
  if (!holds(address) || block_of(address) != running_) return address;
  const InVariable at = variable_at(address);
  return at.variable ? at.variable->begin + at.offset : address;
}

BlockMemory::InVariable BlockMemory::variable_at(uintptr_t address) const {
  if (!holds(address)) {
    const SharedVariable* v = Image::own().shared_variable_at(address);
    return {v, v ? address - v->begin : 0};
  }
  const size_t offset = (address - begin()) % stride_;
  if (offset < kDynamic) return {};
  const auto after = std::upper_bound(offsets_.begin(), offsets_.end(), offset - kDynamic);
  const auto i = static_cast<size_t>(after - offsets_.begin()) - 1;
  return {&variables_[i], offset - kDynamic - offsets_[i]};
}

bool BlockMemory::covers(uintptr_t address) const {
  if (holds_dynamic(address)) return true;
  const InVariable at = variable_at(address);
  return at.variable && at.offset < size_of(*at.variable);
}

std::optional<SharedPlace> BlockMemory::place(uintptr_t address) const {
  const InVariable at = variable_at(address);
  const bool dynamic = holds_dynamic(address);
  if (!dynamic && !at.variable) return {};
  const bool names_block = holds(address) && clustered_ > 1;
  const std::string whose = names_block ? " of the cluster's block " + std::to_string(block_of(address)) : "";
  if (dynamic) return SharedPlace{"dynamic shared memory" + whose, (address - begin()) % stride_, dynamic_bytes_};
  return SharedPlace{"shared " + at.variable->name + whose, at.offset, size_of(*at.variable)};
}

}  // namespace llmengine::sim
