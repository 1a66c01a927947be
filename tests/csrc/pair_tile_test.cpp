// Products of pairs of bf16 (csrc/cpu/pair_tile.h) against double precision: every packing, every way into C, ragged
// sizes, and values that are not finite. Compiled once per instruction set by tests/test_products.py, and once for AMX
// with emulated tiles. Prints what failed; the exit code counts it.
#include "cpu/pair_tile.h"

#include <cstdio>
#include <random>
#include <vector>

using namespace llmengine::cpu::LLMENGINE_ISA;
using llmengine::bf16;

namespace {

int failures = 0, checks = 0;
std::mt19937 chance(1);

template <class T>
T draw() {
  T value;
  narrow(std::normal_distribution<float>()(chance), &value);
  return value;
}
float rounded(float x) {
  bf16 y;
  narrow(x, &y);
  return widen(y);
}
bool same(float y, double exact, double tolerance) {
  if (std::isnan(exact)) return std::isnan(y);
  if (std::isinf(exact)) return y == exact;
  return std::fabs(y - exact) <= tolerance;
}

// Operands as they come: T, `stride` apart, transposed or not.
template <class T>
struct Operand {
  int64_t rows, columns, stride;
  bool transposed;
  std::vector<T> values;

  Operand(int64_t r, int64_t c, bool flipped)
      : rows(r), columns(c), stride((flipped ? r : c) + 5), transposed(flipped), values((flipped ? c : r) * stride) {
    for (T& value : values) value = draw<T>();
  }
  T& at(int64_t r, int64_t c) { return values[transposed ? c * stride + r : r * stride + c]; }
};

struct Case {
  int64_t rows, columns, depth;
  bool a_transposed, b_transposed, special;
};

// Bf16 buffers whose padding is NaN until a packer says otherwise.
std::vector<bf16> poisoned(int64_t n) { return std::vector<bf16>(n, bf16{0x7fc0}); }

template <class T>
std::vector<bf16> packed_a(Operand<T>& a, int64_t stride) {
  auto to = poisoned(round_up(a.rows, kPairRows) * stride);
  if (a.transposed) {
    pack_lines_transposed(a.values.data(), a.stride, a.rows, a.columns, to.data(), stride);
  } else {
    for (int64_t r = 0; r < a.rows; ++r) pack_line(&a.at(r, 0), a.columns, to.data() + r * stride);
  }
  return to;
}

template <class T>
std::vector<bf16> packed_b(Operand<T>& b) {
  auto to = poisoned(round_up(b.columns, kPairPanel) / kPairPanel * pair_panel_size(b.rows));
  if (b.transposed) {
    pack_pairs_transposed(b.values.data(), b.stride, b.columns, b.rows, to.data());
  } else {
    pack_pairs(b.values.data(), b.stride, b.rows, b.columns, to.data());
  }
  return to;
}

template <Into into>
double expected(double product, double before, double beta) {
  if (into == Into::place) return product;
  if (into == Into::times) return product * beta;
  if (into == Into::add) return before + product;
  if (into == Into::add_times) return beta * (before + product);
  return before * beta + product;
}

template <Into into, class T>
void check(const char* what, const Case& is) {
  Operand<T> a(is.rows, is.depth, is.a_transposed), b(is.depth, is.columns, is.b_transposed);
  if (is.special) {
    narrow(INFINITY, &a.at(is.rows - 1, is.depth - 1));
    narrow(NAN, &b.at(0, is.columns / 2));
    narrow(-INFINITY, &b.at(is.depth - 1, is.columns - 1));
  }
  const int64_t a_stride = round_up(is.depth, 2 * kLanes) + 8, c_stride = round_up(is.columns, kLanes) + 3;
  const auto left = packed_a(a, a_stride);
  const auto right = packed_b(b);
  std::vector<float> c(is.rows * c_stride), beta(is.rows);
  for (float& value : c) value = draw<float>();
  for (float& value : beta) value = draw<float>();
  const auto before = c;
  {
    const PairSession session;
    multiply_pairs<into>(is.rows, (is.columns + kLanes - 1) / kLanes, pair_depth(is.depth), left.data(), a_stride,
                         right.data(), pair_panel_size(is.depth), c.data(), c_stride, beta.data());
  }
  for (int64_t r = 0; r < is.rows; ++r) {
    for (int64_t column = 0; column < c_stride; ++column) {
      const int64_t i = r * c_stride + column;
      ++checks;
      if (column >= is.columns) {  // beyond whole vectors nothing is written
        if (column < round_up(is.columns, kLanes) || c[i] == before[i]) continue;
        std::printf("FAILED %s: written beyond column %ld\n", what, static_cast<long>(is.columns));
        ++failures;
        return;
      }
      double product = 0.0, magnitude = 1.0;
      for (int64_t k = 0; k < is.depth; ++k) {
        const double term = static_cast<double>(rounded(widen(a.at(r, k)))) * rounded(widen(b.at(k, column)));
        product += term;
        magnitude += std::isfinite(term) ? std::fabs(term) : 0.0;
      }
      const double factor = beta[into == Into::scaled ? r : 0];
      const double exact = expected<into>(product, before[i], factor);
      const double tolerance = 4e-7 * (magnitude + std::fabs(before[i])) * (1.0 + std::fabs(factor));
      if (same(c[i], exact, tolerance)) continue;
      std::printf("FAILED %s %ld x %ld x %ld%s%s at (%ld, %ld): %.9g, expected %.9g\n", what,
                  static_cast<long>(is.rows), static_cast<long>(is.columns), static_cast<long>(is.depth),
                  is.a_transposed ? " A^T" : "", is.b_transposed ? " B^T" : "", static_cast<long>(r),
                  static_cast<long>(column), c[i], exact);
      ++failures;
      return;
    }
  }
}

template <class T>
void check_all(const Case& is) {
  check<Into::place, T>("place", is);
  check<Into::times, T>("times", is);
  check<Into::add, T>("add", is);
  check<Into::add_times, T>("add_times", is);
  check<Into::scaled, T>("scaled", is);
}

// Denormals count as themselves or as nothing, never as anything else; the mode of rounding does not matter.
void check_denormals() {
  std::vector<bf16> a(kPairRows * kPairDepth), b(pair_panel_size(kPairDepth));
  for (bf16& x : a) narrow(1e-39f, &x);
  for (bf16& x : b) narrow(2.0f, &x);
  std::vector<float> c(kPairPanel, 7.0f);
  const PairSession session;
  multiply_pairs<Into::place>(1, 1, kPairDepth, a.data(), kPairDepth, b.data(), 0, c.data(), kPairPanel);
  for (int i = 0; i < kLanes; ++i) {
    ++checks;
    if (c[i] >= 0.0f && c[i] <= 2.0f * kPairDepth * 1.1e-39f) continue;
    std::printf("FAILED denormals: %g\n", c[i]);
    ++failures;
    return;
  }
}

}  // namespace

int main() {
  if (!llmengine::cpu::supported(llmengine::cpu::Isa::LLMENGINE_ISA)) return 2;  // asks for AMX's tiles, too
  for (int64_t rows : {1, 5, 6, 16, 17, 32, 39}) {
    for (int64_t columns : {1, 16, 47, 64, 77, 160}) {
      for (int64_t depth : {1, 2, 31, 32, 64, 101}) {
        for (int flips = 0; flips < 4; ++flips) {
          const Case is{rows, columns, depth, flips % 2 == 1, flips / 2 == 1, (rows + depth) % 3 == 0};
          check_all<bf16>(is);
          check_all<float>(is);
        }
      }
    }
  }
  check_denormals();
  if (!failures) std::printf("passed %d checks\n", checks);
  return failures != 0;
}
