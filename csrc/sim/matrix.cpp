#include "sim/matrix.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/ptx/convert.cuh"
#include "sim/machine.h"

namespace llmengine::sim {

namespace {

using Brought = std::array<uint64_t, 32>;

template <class Lane>
Lane& lane_of(const Brought& brought, int lane) {
  return *reinterpret_cast<Lane*>(brought[static_cast<size_t>(lane)]);
}

// ---- rows -----------------------------------------------------------------------------------------------------------

void touch_rows(const Brought& brought, int count, Kind kind) {
  for (int l = 0; l < 8 * count; ++l) {
    const auto& lane = lane_of<MatrixLane>(brought, l);
    Machine::the().touch_for_warp(
        {reinterpret_cast<uintptr_t>(lane.row), 16, kind, reinterpret_cast<uintptr_t>(lane.return_address), By::warp},
        l);
  }
}

// Calls move(register, shift, element) for the two elements of every register of every lane.
template <class Move>
void for_each_element(const Brought& brought, int count, bool transposed, const Move& move) {
  for (int m = 0; m < count; ++m) {
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int half = 0; half < 2; ++half) {
        const int row = transposed ? 2 * t + half : g, column = transposed ? g : 2 * t + half;
        auto* elements = static_cast<uint16_t*>(lane_of<MatrixLane>(brought, 8 * m + row).row);
        move(lane_of<MatrixLane>(brought, l).r[m], 16 * half, elements + column);
      }
    }
  }
}

template <int count, bool transposed>
void load(const Brought& brought) {
  touch_rows(brought, count, Kind::read);
  for_each_element(brought, count, transposed, [](uint32_t& word, int shift, const uint16_t* element) {
    word = (shift ? word : 0) | uint32_t{*element} << shift;
  });
}

template <int count, bool transposed>
void store(const Brought& brought) {
  touch_rows(brought, count, Kind::write);
  for_each_element(brought, count, transposed, [](uint32_t word, int shift, uint16_t* element) {
    *element = static_cast<uint16_t>(word >> shift);
  });
}

// ---- products -------------------------------------------------------------------------------------------------------

constexpr int kRows = 16, kColumns = 8;

template <Element element>
double number(uint32_t word, int half) {
  if constexpr (element == Element::tf32) return std::bit_cast<float>(word & 0xffffe000);
  if constexpr (element == Element::bf16) return std::bit_cast<float>(half ? word & 0xffff0000 : word << 16);
  if constexpr (element == Element::f16) return ptx::float_of_f16(static_cast<uint16_t>(half ? word >> 16 : word));
}

// Toward zero; infinity beyond the largest float.
float cut_to_float(double x) {
  return static_cast<float>(std::bit_cast<double>(std::bit_cast<uint64_t>(x) >> 29 << 29));
}

// d += the products of `step` values of k, for one row.
template <int step>
void add_products(float (&d)[kColumns], const double* a, const double (*b)[kColumns]) {
  double terms[step + 1][kColumns], plain[kColumns], most[kColumns];
  for (int n = 0; n < kColumns; ++n) terms[step][n] = plain[n] = d[n], most[n] = std::fabs(plain[n]);
  for (int k = 0; k < step; ++k) {
    for (int n = 0; n < kColumns; ++n) {
      const double term = a[k] * b[k][n], magnitude = std::fabs(term);
      terms[k][n] = term;
      plain[n] += term;
      most[n] = magnitude > most[n] ? magnitude : most[n];
    }
  }
  for (int n = 0; n < kColumns; ++n) {
    if (std::isfinite(plain[n])) continue;  // the sum is `plain`; what follows is for finite terms
    for (int k = 0; k <= step; ++k) terms[k][n] = 0.0;
  }
  // The unit is 2^-25 of the power of two in the largest: in units, terms are integers of 26 bits.
  double scale[kColumns], unit[kColumns];
  for (int n = 0; n < kColumns; ++n) {
    const uint64_t exponent = std::max<uint64_t>(std::bit_cast<uint64_t>(most[n]) >> 52, 512);
    scale[n] = std::bit_cast<double>((2 * 1023 + 25 - exponent) << 52);
    unit[n] = std::bit_cast<double>((exponent - 25) << 52);
  }
  int32_t sum[kColumns] = {};
  for (int k = 0; k <= step; ++k) {
    for (int n = 0; n < kColumns; ++n) sum[n] += static_cast<int32_t>(terms[k][n] * scale[n]);
  }
  for (int n = 0; n < kColumns; ++n) {
    d[n] = std::isfinite(plain[n]) ? cut_to_float(sum[n] * unit[n]) : static_cast<float>(plain[n]);
  }
}

// The fragments as mma.cuh draws them.
template <Element element, int k>
void multiply(const Brought& brought) {
  constexpr bool packed = element != Element::tf32;
  constexpr int per_register = packed ? 2 : 1, step = packed ? 8 : 4;
  constexpr int pitch = 4 * per_register;  // of k, from one register of a row to the next
  double a[kRows][k], b[k][kColumns];
  float d[kRows][kColumns];
  for (int l = 0; l < 32; ++l) {
    const auto& lane = lane_of<MmaLane>(brought, l);
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < k / pitch; ++r) {
      for (int half = 0; half < per_register; ++half) {
        const int place = pitch * r + per_register * t + half;
        a[g][place] = number<element>(lane.a[2 * r], half);
        a[g + 8][place] = number<element>(lane.a[2 * r + 1], half);
        b[place][g] = number<element>(lane.b[r], half);
      }
    }
    d[g][2 * t] = lane.d[0], d[g][2 * t + 1] = lane.d[1];
    d[g + 8][2 * t] = lane.d[2], d[g + 8][2 * t + 1] = lane.d[3];
  }
  for (int first = 0; first < k; first += step) {
    for (int m = 0; m < kRows; ++m) add_products<step>(d[m], a[m] + first, b + first);
  }
  for (int l = 0; l < 32; ++l) {
    auto& lane = lane_of<MmaLane>(brought, l);
    const int g = l / 4, t = l % 4;
    lane.d[0] = d[g][2 * t], lane.d[1] = d[g][2 * t + 1];
    lane.d[2] = d[g + 8][2 * t], lane.d[3] = d[g + 8][2 * t + 1];
  }
}

}  // namespace

double number_of(Element element, uint32_t bits) {
  switch (element) {
    case Element::bf16: return number<Element::bf16>(bits, 0);
    case Element::f16: return number<Element::f16>(bits, 0);
    case Element::tf32: return number<Element::tf32>(bits, 0);
    case Element::e4m3: return ptx::twin::from_e4m3(bits);
    case Element::e5m2: return ptx::twin::from_e5m2(bits);
  }
  return 0.0;
}

void add_product(Element element, int rows, int n, int k, const double* a, const double* b, float* d) {
  const int step = element == Element::tf32 ? 4 : 8;
  std::vector<double> columns(static_cast<size_t>(k * kColumns));
  for (int left = 0; left < n; left += kColumns) {
    for (int i = 0; i < k * kColumns; ++i) columns[i] = b[i / kColumns * n + left + i % kColumns];
    const auto* part = reinterpret_cast<const double (*)[kColumns]>(columns.data());
    for (int m = 0; m < rows; ++m) {
      auto& sums = *reinterpret_cast<float (*)[kColumns]>(d + m * n + left);
      for (int first = 0; first < k; first += step) {
        if (step == 8) add_products<8>(sums, a + m * k + first, part + first);
        if (step == 4) add_products<4>(sums, a + m * k + first, part + first);
      }
    }
  }
}

void load_matrices(const char* operation, int count, bool transposed, MatrixLane& lane, Site site) {
  const auto apply = count == 1   ? (transposed ? load<1, true> : load<1, false>)
                     : count == 2 ? (transposed ? load<2, true> : load<2, false>)
                                  : (transposed ? load<4, true> : load<4, false>);
  whole_warp(operation, &lane, apply, site);
}

void store_matrices(const char* operation, int count, bool transposed, MatrixLane& lane, Site site) {
  const auto apply =
      count == 2 ? (transposed ? store<2, true> : store<2, false>) : (transposed ? store<4, true> : store<4, false>);
  whole_warp(operation, &lane, apply, site);
}

void multiply_matrices(const char* operation, Element element, int k, MmaLane& lane, Site site) {
  const auto apply = element == Element::tf32   ? multiply<Element::tf32, 8>
                     : element == Element::bf16 ? (k == 16 ? multiply<Element::bf16, 16> : multiply<Element::bf16, 8>)
                                                : (k == 16 ? multiply<Element::f16, 16> : multiply<Element::f16, 8>);
  whole_warp(operation, &lane, apply, site);
}

}  // namespace llmengine::sim
