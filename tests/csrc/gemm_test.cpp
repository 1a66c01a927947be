// gemm() (csrc/cpu/gemm.h) on small whole numbers, whose products and sums are exact in float, so that every path must
// give the same bits: dtypes and mixtures of them, transpositions, gathered rows, several terms, two accumulators,
// sizes beyond every block. Compiled by tests/test_products.py with the kernel's source, once per instruction set.
#include "cpu/gemm.h"

#include <cstdio>
#include <random>
#include <vector>

using namespace llmengine;
using namespace llmengine::cpu::LLMENGINE_ISA;

namespace {

int failures = 0;
std::mt19937 chance(1);
int64_t below(int64_t n) { return static_cast<int64_t>(chance() % n); }

struct Operand {
  Operand(Operand&&) = default;

  int64_t rows, columns;
  DType dtype;
  Matrix matrix;
  std::vector<int64_t> index;
  std::vector<float> floats;
  std::vector<bf16> halves;

  Operand(int64_t r, int64_t c, DType type, bool transposed, bool gathered) : rows(r), columns(c), dtype(type) {
    const int64_t lines = transposed ? c : r, stride = (transposed ? r : c) + 3;
    floats.resize(lines * stride);
    halves.resize(lines * stride);
    for (size_t i = 0; i < floats.size(); ++i) {
      floats[i] = static_cast<float>(below(9) - 4);
      narrow(floats[i], &halves[i]);
    }
    matrix = Matrix(floats.data(), stride);
    if (dtype == DType::bf16) matrix.data = halves.data(), matrix.dtype = dtype;
    matrix.transposed = transposed;
    if (gathered) {
      for (int64_t i = 0; i < r; ++i) index.push_back(below(r));
      matrix = matrix.gathered(index.data());
    }
  }
  float at(int64_t r, int64_t c) const {
    if (matrix.transposed) return floats[c * matrix.stride + r];
    return floats[(matrix.index ? index[r] : r) * matrix.stride + c];
  }
};

struct Factors {
  Operand a, b;
  int64_t depth;
  int into;
};

Factors factors(int64_t rows, int64_t columns, int64_t depth, int into) {
  const auto type = [] { return below(3) ? DType::bf16 : DType::f32; };
  const bool a_transposed = below(2), b_transposed = below(2);
  return {Operand(rows, depth, type(), a_transposed, !a_transposed && below(2)),
          Operand(depth, columns, type(), b_transposed, !b_transposed && below(2)), depth, into};
}

void check(int64_t rows, int64_t columns, const std::vector<Factors>& terms) {
  std::vector<float> c[kAccumulators];
  std::vector<int> visits(rows * columns);
  for (auto& sums : c) sums.assign(rows * columns, NAN);
  const auto epilogue = [&](const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      for (int64_t i = 0; i < tile.columns; ++i) {
        const int64_t at = (tile.row + r) * columns + tile.column + i;
        ++visits[at];
        for (int k = 0; k < kAccumulators; ++k) {
          if (tile.c[k]) c[k][at] = tile.c[k][r * tile.stride + i];
        }
      }
    }
  };
  const auto term = [&](size_t i) { return Term{terms[i].a.matrix, terms[i].b.matrix, terms[i].depth, terms[i].into}; };
  if (terms.size() == 1) gemm(rows, columns, {term(0)}, epilogue);
  if (terms.size() == 2) gemm(rows, columns, {term(0), term(1)}, epilogue);
  if (terms.size() == 3) gemm(rows, columns, {term(0), term(1), term(2)}, epilogue);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> exact[kAccumulators];
    for (auto& line : exact) line.assign(columns, 0.0f);
    bool used[kAccumulators] = {true};
    for (const Factors& t : terms) {
      used[t.into] = true;
      for (int64_t k = 0; k < t.depth; ++k) {
        const float x = t.a.at(r, k);
        for (int64_t i = 0; i < columns; ++i) exact[t.into][i] += x * t.b.at(k, i);
      }
    }
    for (int64_t i = 0; i < columns; ++i) {
      bool right = visits[r * columns + i] == 1;
      for (int k = 0; k < kAccumulators; ++k) right &= !used[k] || c[k][r * columns + i] == exact[k][i];
      if (right) continue;
      std::printf("FAILED %ld x %ld, %zu terms, first depth %ld, at (%ld, %ld): %g and %g, expected %g and %g\n",
                  static_cast<long>(rows), static_cast<long>(columns), terms.size(), static_cast<long>(terms[0].depth),
                  static_cast<long>(r), static_cast<long>(i), c[0][r * columns + i], c[1][r * columns + i], exact[0][i],
                  exact[1][i]);
      ++failures;
      return;
    }
  }
}

}  // namespace

int main() {
  if (!llmengine::cpu::supported(llmengine::cpu::Isa::LLMENGINE_ISA)) return 2;  // asks for AMX's tiles, too
  int cases = 0;
  for (int64_t rows : {1, 7, 96, 131}) {
    for (int64_t columns : {1, 65, 400}) {
      for (int64_t depth : {1, 33, 300, 1100}) {
        for (int repeat = 0; repeat < 4; ++repeat, ++cases) {
          std::vector<Factors> terms;  // moved, never copied: operands point into themselves
          terms.push_back(factors(rows, columns, depth, 0));
          if (repeat > 1) terms.push_back(factors(rows, columns, depth / 2 + 1, repeat - 2));
          if (repeat > 2) terms.push_back(factors(rows, columns, 40, 0));
          check(rows, columns, terms);
        }
      }
    }
  }
  std::vector<Factors> deep;  // beyond what is packed once for a layer of rows
  deep.push_back(factors(97, 400, 11000, 0));
  check(97, 400, deep);
  ++cases;
  if (!failures) std::printf("passed %d cases\n", cases);
  return failures != 0;
}
