// Layer norm and RMS norm of rows, forward and backward (formulas: ops/norm.h).
//
//   A thread owns a run of rows. A row of h is held as float in one scratch line (3 KiB at 768 columns: first-level
//   cache), so input and residual are read from memory once:
//     pass 1  h = residual + dropout(input), sum       read 2 x e bytes, write e      (e: bytes an element)
//     pass 2  sum (h - mean)^2                         from the scratch line
//     pass 3  y = (h - mean) rstd w + b                write e
//   The variance is centred: E[h^2] - E[h]^2 loses every digit when |mean| is far above the deviation.
//
//   Backward: one pass forms sum(g) and sum(g x), the second writes grad_h; grad_w and grad_b gather in per-thread
//   lines that are added in thread order, so that equal inputs and thread counts give equal bits. Limit: memory.
//   Forward 2e (4e with a residual), backward 3e bytes an element; about 10 flops an element.
#include "ops/norm.h"

#include <vector>

#include "cpu/dropout.h"
#include "cpu/lines.h"
#include "cpu/parallel.h"
#include "cpu/vec_math.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // rows worth waking a thread for

int64_t row_grain(int64_t columns) { return kGrainElements / (columns + 1) + 1; }

template <class T>
const T* row_of(const TensorView& t, int64_t row) {
  return t.defined() ? t.as<T>() + row * t.stride(0) : nullptr;
}

template <class T>
struct Forward {
  const ops::NormForward& p;
  const Dropout dropout{p.dropout_p, p.seed};
  const int64_t columns = p.input.size(1);
  const std::vector<float> weight = as_floats(p.weight, columns, 1.0f), bias = as_floats(p.bias, columns, 0.0f);

  // h of one row into `line`, and into new_residual; the sum of its elements
  float gather(int64_t row, float* line, float* keep) const {
    const T* input = row_of<T>(p.input, row);
    const T* residual = row_of<T>(p.residual, row);
    T* stored = const_cast<T*>(row_of<T>(p.new_residual, row));
    if (dropout.active) dropout.multipliers(0, row, 0, columns, keep);
    F total{};
    for_lanes(columns, [&](int64_t c, auto n) {
      F h = load_n(input + c, n);
      if (dropout.active) h = h * load_n(keep + c, n);
      if (residual) h = h + load_n(residual + c, n);
      if (stored) {
        store_n(stored + c, h, n);
        h = load_n(stored + c, n);  // what the next layer sees is the rounded sum: normalise that one
      }
      store_n(line + c, h, n);
      total = total + h;
    });
    return sum(total);
  }

  void operator()(int64_t begin, int64_t end) const {
    std::vector<float> line(columns), keep(dropout.active ? columns : 0);
    for (int64_t row = begin; row < end; ++row) {
      const float total = gather(row, line.data(), keep.data());
      const float mean = p.subtract_mean ? total / static_cast<float>(columns) : 0.0f;
      F squares{};
      for_lanes(columns, [&](int64_t c, auto n) {
        const F d = load_n(line.data() + c, n, mean) - mean;
        squares = squares + d * d;
      });
      const float rstd = 1.0f / std::sqrt(sum(squares) / static_cast<float>(columns) + static_cast<float>(p.eps));
      T* out = p.output.as<T>() + row * p.output.stride(0);
      for_lanes(columns, [&](int64_t c, auto n) {
        const F x = (load_n(line.data() + c, n) - mean) * rstd;
        store_n(out + c, x * load_n(weight.data() + c, n) + load_n(bias.data() + c, n), n);
      });
      if (p.mean.defined()) p.mean.as<float>()[row] = mean;
      p.rstd.as<float>()[row] = rstd;
    }
  }
};

template <class T>
struct Backward {
  const ops::NormBackward& p;
  const Dropout dropout{p.dropout_p, p.seed};
  const int64_t columns = p.h.size(1);
  const std::vector<float> weight = as_floats(p.weight, columns, 1.0f);

  // grad_w and grad_b of rows [begin, end) are added to the lines gw and gb.
  void operator()(int64_t begin, int64_t end, float* gw, float* gb) const {
    // g waits here as rounded: contracted into an FMA it would not cancel against its own mean (one column)
    std::vector<float> line(columns), keep(dropout.active ? columns : 0);
    for (int64_t row = begin; row < end; ++row) {
      const T* h = row_of<T>(p.h, row);
      const T* dy = row_of<T>(p.grad_output, row);
      const T* carried = row_of<T>(p.grad_new_residual, row);
      const float mean = p.subtract_mean ? p.mean.as<float>()[row] : 0.0f, rstd = p.rstd.as<float>()[row];
      F sum_g{}, sum_gx{};
      for_lanes(columns, [&](int64_t c, auto n) {
        const F x = (load_n(h + c, n, mean) - mean) * rstd, d = load_n(dy + c, n), g = d * load_n(weight.data() + c, n);
        store_n(line.data() + c, g, n);
        sum_g = sum_g + g;
        sum_gx = sum_gx + g * x;
        store_n(gw + c, load_n(gw + c, n) + d * x, n);
        store_n(gb + c, load_n(gb + c, n) + d, n);
      });
      const float inverse = 1.0f / static_cast<float>(columns);
      const float mean_g = p.subtract_mean ? sum(sum_g) * inverse : 0.0f, mean_gx = sum(sum_gx) * inverse;
      T* grad_input = p.grad_input.as<T>() + row * p.grad_input.stride(0);
      T* grad_residual = const_cast<T*>(row_of<T>(p.grad_residual, row));
      if (dropout.active) dropout.multipliers(0, row, 0, columns, keep.data());
      for_lanes(columns, [&](int64_t c, auto n) {
        const F x = (load_n(h + c, n) - mean) * rstd, g = load_n(line.data() + c, n);
        F grad = (g - mean_g - x * mean_gx) * rstd;
        if (carried) grad = grad + load_n(carried + c, n);
        if (grad_residual) store_n(grad_residual + c, grad, n);
        if (dropout.active) grad = grad * load_n(keep.data() + c, n);
        store_n(grad_input + c, grad, n);
      });
    }
  }
};

void norm_forward(const ops::NormForward& p) {
  visit_float(p.input.dtype, [&]<class T>(T) {
    Forward<T> kernel{p};
    parallel_ranges(
        p.input.size(0), row_grain(kernel.columns),
        [](void* k, int64_t begin, int64_t end, int) { (*static_cast<Forward<T>*>(k))(begin, end); }, &kernel);
  });
}

void norm_backward(const ops::NormBackward& p) {
  visit_float(p.h.dtype, [&]<class T>(T) {
    const int64_t rows = p.h.size(0), columns = p.h.size(1), grain = row_grain(columns);
    const int threads = planned_threads(rows, grain);
    struct Context {
      Backward<T> kernel;
      std::vector<float> lines;  // (threads, 2, columns)
    } context{{p}, std::vector<float>(static_cast<size_t>(threads) * 2 * columns, 0.0f)};
    parallel_ranges(
        rows, grain,
        [](void* c, int64_t begin, int64_t end, int thread) {
          auto& [kernel, lines] = *static_cast<Context*>(c);
          float* gw = lines.data() + static_cast<int64_t>(thread) * 2 * kernel.columns;
          kernel(begin, end, gw, gw + kernel.columns);
        },
        &context);
    const auto reduce = [&](const TensorView& out, int64_t offset) {
      if (!out.defined()) return;
      for (int64_t c = 0; c < columns; ++c) {
        float total = 0.0f;
        for (int t = 0; t < threads; ++t) total += context.lines[static_cast<size_t>(t) * 2 * columns + offset + c];
        out.as<float>()[c] = total;
      }
    };
    reduce(p.grad_weight, 0);
    reduce(p.grad_bias, columns);
  });
}

const Registrar<ops::NormForward> forward{norm_forward};
const Registrar<ops::NormBackward> backward{norm_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
