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

// out = or += the sum over rows. Rows are added in blocks of 64 and these in order, whatever the threads: a sum of
// sums, whose error grows slower than that of one long sum.
template <class T>
void column_sums(const T* x, int64_t stride, int64_t rows, int64_t columns, bool add, float* out) {
  constexpr int64_t kColumns = 256, kRows = 64;
  parallel_each((columns + kColumns - 1) / kColumns, [&](int64_t task) {
    const int64_t first = task * kColumns, n = std::min(kColumns, columns - first);
    float* total = out + first;
    if (!add) std::fill_n(total, n, 0.0f);
    for (int64_t block = 0; block < rows; block += kRows) {
      float line[kColumns] = {};
      for (int64_t row = block; row < std::min(rows, block + kRows); ++row) {
        const T* values = x + row * stride + first;
        for_lanes(n, [&](int64_t c, auto count) {
          store_n(line + c, load_n(line + c, count) + load_n(values + c, count), count);
        });
      }
      for_lanes(n, [&](int64_t c, auto count) {
        store_n(total + c, load_n(total + c, count) + load_n(line + c, count), count);
      });
    }
  });
}

}  // namespace llmengine::cpu::LLMENGINE_ISA
