// Machine's part for the schedule: which thread goes on, and when what goes on asynchronously takes effect.
#include <algorithm>
#include <bit>
#include <stdexcept>

#include "sim/machine.h"

namespace llmengine::sim {

int Machine::pick() {
  switch (schedule.order) {
    case Order::forward: return pick_warp_by_warp(false);
    case Order::reversed: return pick_warp_by_warp(true);
    case Order::round_robin: return pick_next();
    case Order::random: return pick_random();
    case Order::starved: return pick_warp_by_warp(false, starved_);
  }
  return -1;
}

// Stays in the warp of the thread that ran last while one of its lanes is ready. `last_of_all` comes where no other
// can.
int Machine::pick_warp_by_warp(bool reversed, int last_of_all) {
  const int warps = static_cast<int>(ready_.size());
  const int start = std::clamp(last_, 0, total_ - 1) / 32;
  const auto first_ready = [&](int warp) {
    const uint32_t lanes = ready_[warp];
    return warp * 32 + (reversed ? 31 - std::countl_zero(lanes) : std::countr_zero(lanes));
  };
  for (int i = 0; i < warps; ++i) {
    const int warp = reversed ? (start - i + warps) % warps : (start + i) % warps;
    if (warp != last_of_all && ready_[warp]) return first_ready(warp);
  }
  return last_of_all >= 0 && ready_[last_of_all] ? first_ready(last_of_all) : -1;
}

bool Machine::others_are_ready(int warp) const {
  for (int w = 0; w < static_cast<int>(ready_.size()); ++w) {
    if (w != warp && ready_[w]) return true;
  }
  return false;
}

int Machine::pick_next() {
  for (int i = 1; i <= total_; ++i) {
    const int t = (last_ + i) % total_;
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
    case Order::starved: return current_->number / 32 == starved_ && others_are_ready(starved_);
    default: return false;
  }
}

Machine::Moment Machine::choose_moment() {
  const auto choice = schedule.order == Order::random ? random_() % 4 : 0;
  return {schedule.order == Order::reversed || choice == 1, schedule.order == Order::forward || choice == 2};
}

// Lane that elect_one chooses: always the same one in a launch, but which is the schedule's affair.
int Machine::elected() const {
  if (schedule.order == Order::reversed) return 31;
  return schedule.order == Order::random ? static_cast<int>(schedule.seed % 32) : 0;
}

void set_schedule(const std::string& order, uint64_t seed) {
  const std::vector<std::string> names = {"forward", "reversed", "round_robin", "random", "starved"};
  const auto found = std::find(names.begin(), names.end(), order);
  if (found == names.end()) {
    throw std::invalid_argument("schedule: '" + order +
                                "' is not one of forward, reversed, round_robin, random, starved");
  }
  Machine::the().schedule = {static_cast<Order>(found - names.begin()), seed};
}

}  // namespace llmengine::sim
