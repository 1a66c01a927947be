#include "sim/copies.h"

#include <algorithm>
#include <cstring>

#include "sim/machine.h"

namespace llmengine::sim {

namespace {
char* real(const char* address) {
  return reinterpret_cast<char*>(Machine::the().memory.blocks.real(reinterpret_cast<uintptr_t>(address)));
}
}  // namespace

void Transfer::take_effect() const {
  char* const there = real(to);
  if (bytes > 0) std::memcpy(there, real(from), bytes);
  std::memset(there + bytes, 0, size - bytes);
}

template <class Number>
void Transfer::add() const {
  const char* const summands = real(from);
  for (uint32_t at = 0; at < bytes; at += sizeof(Number)) {
    Number sum, more;
    std::memcpy(&sum, to + at, sizeof(Number));
    std::memcpy(&more, summands + at, sizeof(Number));
    sum += more;
    std::memcpy(to + at, &sum, sizeof(Number));
  }
}
template void Transfer::add<float>() const;
template void Transfer::add<uint32_t>() const;

void Copies::issue(int thread, Copy copy, Order order, std::mt19937_64& random) {
  const auto choice = order == Order::random ? random() % 4 : 0;
  if (order == Order::reversed || choice == 1) return copy.take_effect();
  copy.late = order == Order::forward || choice == 2;
  under_way_[static_cast<size_t>(thread)].push_back(copy);
  ++count_;
}

void Copies::stopped(int thread, Order order, std::mt19937_64& random) {
  if (count_ == 0 || order == Order::forward) return;
  if (order == Order::random) thread = static_cast<int>(random() % under_way_.size());
  auto& copies = under_way_[static_cast<size_t>(thread)];
  if (copies.empty()) return;
  Copy& chosen = order == Order::random ? copies[random() % copies.size()] : copies.back();
  if (chosen.late) return;
  chosen.take_effect();
  chosen = copies.back();
  copies.pop_back();
  --count_;
}

void Copies::wait(int thread, uint32_t group) {
  count_ -= std::erase_if(under_way_[static_cast<size_t>(thread)], [=](const Copy& copy) {
    if (copy.group > group) return false;
    copy.take_effect();
    return true;
  });
}

bool Copies::has_any(int thread, uint32_t group) const {
  const auto& copies = under_way_[static_cast<size_t>(thread)];
  return std::any_of(copies.begin(), copies.end(), [=](const Copy& copy) { return copy.group <= group; });
}

void Copies::end_cluster() {
  for (const auto& copies : under_way_) {
    for (const Copy& copy : copies) copy.take_effect();
  }
}

}  // namespace llmengine::sim
