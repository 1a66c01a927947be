// Lines: one float for each column of a matrix, such as a bias or its gradient.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace llmengine::cpu::LLMENGINE_ISA {

// A weight or bias as float, or a line of `otherwise` where none was given.
inline std::vector<float> as_floats(const TensorView& t, int64_t columns, float otherwise) {
  std::vector<float> line(columns, otherwise);
  if (t.defined()) {
    visit_float(t.dtype, [&]<class T>(T) {
      for (int64_t c = 0; c < columns; ++c) line[c] = widen(t.as<T>()[c]);
    });
  }
  return line;
}

// out = or += the sum over rows, each addition's rounding error gathered beside it (Knuth's two-sum): right to the last
// bit but one, whatever the number of rows, and the same for every number of threads.
template <class T>
void column_sums(const T* x, int64_t stride, int64_t rows, int64_t columns, bool add, float* out) {
  constexpr int64_t kColumns = 256;
  parallel_each((columns + kColumns - 1) / kColumns, [&](int64_t task) {
    const int64_t first = task * kColumns, n = std::min(kColumns, columns - first);
    float totals[kColumns] = {}, errors[kColumns] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const T* values = x + row * stride + first;
      for_lanes(n, [&](int64_t c, auto count) {
        const F before = load_n(totals + c, count), value = load_n(values + c, count);
        const F total = before + value, rest = total - before;
        const F error = (before - (total - rest)) + (value - rest);
        store_n(totals + c, total, count);
        store_n(errors + c, load_n(errors + c, count) + error, count);
      });
    }
    for_lanes(n, [&](int64_t c, auto count) {
      const F total = load_n(totals + c, count);
      const I finite = total - total == F{};  // the error of an infinite sum is NaN
      const F exact = select(finite, total + load_n(errors + c, count), total);
      store_n(out + first + c, add ? load_n(out + first + c, count) + exact : exact, count);
    });
  });
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
