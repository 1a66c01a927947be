// Machine's part for products of warpgroups.
#include "sim/wgmma.h"

#include <algorithm>
#include <vector>

#include "sim/machine.h"

namespace llmengine::sim {

namespace {

constexpr int kRows = 64;            // of a and d
constexpr uintptr_t kWindow = 1024;  // where dynamic shared memory lies among shared addresses of 32 bits

uint32_t field(uint64_t descriptor, int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; }

// Chunks of 16 bytes in a row of the swizzle's pattern.
uintptr_t span_of(uint32_t swizzle) { return swizzle == 0 ? 1 : 16u >> swizzle; }

int size_of(Element element) { return element == Element::tf32 ? 4 : element >= Element::e4m3 ? 1 : 2; }
int depth(Element element) { return 32 / size_of(element); }

uint32_t element_at(uintptr_t address, int bytes) {
  if (bytes == 1) return *reinterpret_cast<const uint8_t*>(address);
  return bytes == 4 ? *reinterpret_cast<const uint32_t*>(address) : *reinterpret_cast<const uint16_t*>(address);
}

// Where lane l of a warpgroup has element i of d, and of a's registers.
struct Place {
  int row, column;
};
Place place_in_d(int lane, int i) {
  return {16 * (lane / 32) + lane % 32 / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (lane % 4) + i % 2};
}
Place place_in_a(int lane, int i, Element element) {
  const int row = 16 * (lane / 32) + lane % 32 / 4;
  if (element == Element::tf32) return {row + 8 * (i % 2), lane % 4 + 4 * (i / 2)};
  const int n = 4 / size_of(element);  // of a register
  return {row + 8 * (i / n % 2), n * (lane % 4) + i % n + 4 * n * (i / (2 * n))};
}

}  // namespace

uint32_t window_address(const void* shared) {
  Machine& machine = Machine::the();
  const uintptr_t begin = number(machine.memory.blocks.dynamic(machine.block()));
  if (!machine.memory.blocks.holds_dynamic(number(shared))) {
    const Unwatched simulator;
    machine.fail("describes an operand that is not in dynamic shared memory, where the simulator wants it");
  }
  return static_cast<uint32_t>(number(shared) - begin + kWindow);
}

uintptr_t MatrixView::address(int row, int column) const {
  const uintptr_t leading = field(descriptor, 16), stride = field(descriptor, 32), span = span_of(swizzle());
  const auto r = static_cast<uintptr_t>(row), byte = static_cast<uintptr_t>(column * element_bytes), chunk = byte / 16;
  uintptr_t at = window - kWindow + field(descriptor, 0) + byte % 16 + r % 8 * span * 16;
  if (swizzle() == 0) {
    at += mn_major ? r / 8 * leading + chunk * stride : r / 8 * stride + chunk * leading;
  } else {
    at += r / 8 * stride + (mn_major ? chunk % span * 16 + chunk / span * leading : chunk * 16);
  }
  return at ^ (at - base() >> 3 & ((span - 1) * 16));
}

// ---- the product ----------------------------------------------------------------------------------------------------

void Product::take_effect() const {
  const int n = shape.n, k = depth(shape.left), bytes = size_of(shape.left), per_register = 4 / bytes;
  std::vector<double> left(static_cast<size_t>(kRows * k)), right(static_cast<size_t>(k * n));
  std::vector<float> sums(static_cast<size_t>(kRows * n));
  for (int i = 0; i < kRows * k && !a_registers[0]; ++i) {
    const int row = i / k, column = i % k;
    left[i] = number_of(shape.left, element_at(a.mn_major ? a.address(column, row) : a.address(row, column), bytes));
  }
  for (int i = 0; i < k * n; ++i) {
    const int row = i / n, column = i % n;
    right[i] = number_of(shape.right, element_at(b.mn_major ? b.address(row, column) : b.address(column, row), bytes));
  }
  for (int l = 0; l < 128; ++l) {
    for (int i = 0; i < 4 * per_register && a_registers[l]; ++i) {
      const Place p = place_in_a(l, i, shape.left);
      const uint32_t word = a_registers[l][i / per_register];
      const uint32_t from = word >> 8 * bytes * (i % per_register);
      left[p.row * k + p.column] = number_of(shape.left, bytes == 4 ? from : from & ((1u << 8 * bytes) - 1));
    }
    for (int i = 0; i < n / 2; ++i) {
      const Place p = place_in_d(l, i);
      sums[p.row * n + p.column] = add ? d[l][i] : 0.0f;
    }
  }
  add_product(shape.left, kRows, n, k, left.data(), right.data(), sums.data());
  for (int l = 0; l < 128; ++l) {
    for (int i = 0; i < n / 2; ++i) {
      const Place p = place_in_d(l, i);
      d[l][i] = sums[p.row * n + p.column];
    }
  }
}

// ---- registers ------------------------------------------------------------------------------------------------------

void Machine::wgmma_fence() {
  if (!current_->registers) current_->registers = std::make_unique<Registers>();
  current_->registers->touched.reset();
}

void Machine::settle_registers(const Access& access) {
  if (!current_->registers) return;
  for (const Registers::InFlight& r : current_->registers->in_flight) {
    if (access.address >= r.end || access.address + access.size <= r.begin) continue;
    fail(std::string(verb(access.kind)) + " (" + source_line(access.site) + ") " +
         (r.accumulators ? "accumulators" : "fragments") + " of a product (" + source_line(r.site) +
         ") with no wgmma_wait between");
  }
}

void Machine::touch_local(const Access& access) {
  settle_registers(access);
  Registers& own = *current_->registers;
  const size_t first = fibres_[current_->number].offset_of(access.address) / 4;
  for (size_t word = first; word < first + (access.size + 3) / 4; ++word) own.touched.set(word);
}

// What lane `t` gives to a product: not touched since its fence, and nobody's accumulators but the same ones.
void Machine::check_registers(int t, const WgmmaLane& lane, const WgmmaShape& shape, const char* operation) {
  const auto complain = [&](const std::string& problem) {
    fail(t, std::string("calls ") + operation + " (" + source_line(number(lane.return_address)) + ") " + problem);
  };
  if (!threads_[t].registers) complain("with no wgmma_fence before");
  const Registers& own = *threads_[t].registers;
  const auto check_range = [&](const void* begin, int words, bool accumulators) {
    const uintptr_t first = number(begin), end = first + static_cast<uintptr_t>(words) * 4;
    const char* what = accumulators ? "accumulators" : "fragments";
    if (!fibres_[t].holds(first)) complain(std::string("with ") + what + " that are not local to the thread");
    for (int w = 0; w < words; ++w) {
      if (own.touched[fibres_[t].offset_of(first) / 4 + static_cast<size_t>(w)]) {
        complain(std::string("on ") + what + " that it has touched since its last wgmma_fence");
      }
    }
    for (const Registers::InFlight& r : own.in_flight) {
      const bool same = accumulators && r.accumulators && r.begin == first && r.end == end;
      const bool both_read = !accumulators && !r.accumulators;
      if (first < r.end && r.begin < end && !same && !both_read) {
        complain(std::string("on ") + what + " that another product (" + source_line(r.site) + ") has in flight");
      }
    }
  };
  check_range(lane.d, shape.n / 2, true);
  if (lane.a_registers) check_range(lane.a_registers, 4, false);
}

// ---- operands in shared memory --------------------------------------------------------------------------------------

void Machine::touch_operand(const MatrixView& view, const char* operation, int agent, uintptr_t site) {
  const auto complain = [&](const std::string& problem) {
    fail(std::string("calls ") + operation + " (" + source_line(site) + ") " + problem);
  };
  const uintptr_t span = 16 * span_of(view.swizzle()), start = (field(view.descriptor, 0) - view.base()) % (8 * span);
  if (view.swizzle() != 0 && start >= span) {
    complain("with a tile of which the swizzle's pattern begins " + std::to_string(start / span * span) +
             " bytes behind a multiple of " + std::to_string(8 * span) + " and its base offset, where it must begin");
  }
  const int in_chunk = 16 / view.element_bytes;
  for (int row = 0; row < view.rows; ++row) {
    for (int column = 0; column < view.columns; column += in_chunk) {
      const uintptr_t address = view.address(row, column);
      if (!memory.blocks.holds_dynamic(address)) complain("with a descriptor that points out of shared memory");
      check({address, 16, Kind::read, site, By::product, agent}, current_->number);
    }
  }
}

// ---- issue, commit, wait --------------------------------------------------------------------------------------------

void Machine::wgmma(const char* operation, const WgmmaShape& shape, WgmmaLane& lane, Site site) {
  if (!meet_warpgroup(operation, number(&lane), site)) return;
  const int first = memory.first_of_warpgroup(current_->number);
  const uintptr_t at = number(lane.return_address);
  Clocks& clocks = memory.clocks;
  const int agent = clocks.agent_of_all(first, 128, Deeds::products);
  Product product;
  product.shape = shape;
  product.group = clocks.now(agent);
  for (int l = 0; l < 128; ++l) {
    const auto& theirs = *reinterpret_cast<const WgmmaLane*>(threads_[first + l].value);
    check_registers(first + l, theirs, shape, operation);
    if (threads_[first + l].registers->groups != product.group - clocks.first()) {
      fail(first + l, std::string("calls ") + operation + " (" + source_line(at) +
                          ") when it has committed other groups than the rest of its warpgroup");
    }
    if (theirs.a != lane.a || theirs.b != lane.b || theirs.add != lane.add) {
      fail(first + l, std::string("calls ") + operation + " (" + source_line(at) +
                          ") with other descriptors than the rest of its warpgroup");
    }
    product.d[l] = theirs.d, product.a_registers[l] = theirs.a_registers;
  }
  const int k = depth(shape.left), bytes = size_of(shape.left);
  const auto view = [&](uint64_t descriptor, bool mn_major, int extent) {
    return MatrixView{number(memory.blocks.dynamic(block())),
                      descriptor,
                      mn_major,
                      mn_major ? k : extent,
                      mn_major ? extent : k,
                      bytes};
  };
  product.add = lane.add;
  product.b = view(lane.b, shape.b_mn_major, shape.n);
  touch_operand(product.b, operation, agent, at);
  if (!lane.a_registers) {
    product.a = view(lane.a, shape.a_mn_major, kRows);
    touch_operand(product.a, operation, agent, at);
  }
  for (int l = 0; l < 128; ++l) {
    auto& flights = threads_[first + l].registers->in_flight;
    const auto fly = [&](const void* begin, int words, bool accumulators) {
      const uintptr_t from = number(begin);
      flights.push_back({from, from + static_cast<uintptr_t>(words) * 4, product.group, at, accumulators});
    };
    fly(product.d[l], shape.n / 2, true);
    if (product.a_registers[l]) fly(product.a_registers[l], 4, false);
  }
  const Moment moment = choose_moment();
  product.late = moment.late;
  auto& queue = products_[static_cast<size_t>(first / 32)];
  queue.push_back(product);
  ++products_under_way_;
  while (moment.at_once && !queue.empty()) finish_product(static_cast<size_t>(first / 32));
}

void Machine::wgmma_commit() {
  const int first = memory.first_of_warpgroup(current_->number);
  Clocks& clocks = memory.clocks;
  const int agent = clocks.agent_of_all(first, 128, Deeds::products);
  if (!current_->registers) fail("calls wgmma_commit with no wgmma_fence before");
  const uint32_t group = clocks.first() + current_->registers->groups++;
  if (clocks.now(agent) == group) clocks.step(agent);  // the first of the warpgroup to commit it
}

void Machine::wgmma_wait(int pending) {
  if (!current_->registers) return;
  Registers& own = *current_->registers;
  if (own.groups <= static_cast<uint32_t>(pending)) return;
  Clocks& clocks = memory.clocks;
  const uint32_t until = clocks.first() + own.groups - 1 - static_cast<uint32_t>(pending);
  const auto queue = static_cast<size_t>(memory.first_of_warpgroup(current_->number) / 32);
  while (!products_[queue].empty() && products_[queue].front().group <= until) finish_product(queue);
  std::erase_if(own.in_flight, [=](const Registers::InFlight& r) { return r.group <= until; });
  clocks.waits(current_->number, Deeds::products, until);
}

// A moment at which the oldest product of a warpgroup may take effect.
void Machine::products_may_finish() {
  if (schedule.order == Order::forward) return;
  for (size_t warp = 0; warp < products_.size(); ++warp) {
    if (products_[warp].empty() || products_[warp].front().late) continue;
    if (schedule.order != Order::random || random_() % 64 == 0) finish_product(warp);
  }
}

void Machine::finish_product(size_t warp) {
  products_[warp].front().take_effect();
  products_[warp].erase(products_[warp].begin());
  --products_under_way_;
}

// ---- what kernels call ----------------------------------------------------------------------------------------------

void wgmma_fence(Site site) {
  const Unwatched simulator;
  Machine::the().whole_warp("wgmma_fence", nullptr, [](const auto&) {}, site);
  Machine::the().wgmma_fence();
}

void wgmma(const char* operation, const WgmmaShape& shape, WgmmaLane lane, Site site) {
  const Unwatched simulator;
  Machine::the().wgmma(operation, shape, lane, site);
}

void settle_registers(const float* d, int count, const void* return_address) {
  const Unwatched simulator;
  const auto bytes = static_cast<uint64_t>(count) * sizeof(float);
  Machine::the().settle_registers({number(d), bytes, Kind::read, number(return_address)});
}

void wgmma_commit(Site site) {
  const Unwatched simulator;
  Machine::the().whole_warp("wgmma_commit", nullptr, [](const auto&) {}, site);
  Machine::the().wgmma_commit();
}

void wgmma_wait(int pending, Site site) {
  const Unwatched simulator;
  Machine::the().whole_warp("wgmma_wait", nullptr, [](const auto&) {}, site);
  Machine::the().wgmma_wait(pending);
}

}  // namespace llmengine::sim
