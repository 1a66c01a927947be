// Layer norm and RMS norm of rows, forward and backward (formulas: ops/norm.h).
//
//   A thread owns a run of rows. Input and residual are read from memory once; the later passes find the row of h in
//   the first-level cache (3 KiB at 768 columns), where it stands as it came or, if that is not float, in a scratch
//   line:
//     pass 1  h = residual + dropout(input), sum       read 2 x e bytes, write e      (e: bytes an element)
//     pass 2  sum (h - mean)^2                         from cache
//     pass 3  y = (h - mean) rstd w + b                write e
//   The variance is centred: E[h^2] - E[h]^2 loses every digit when |mean| is far above the deviation. Sums run in four
//   accumulators: one alone would wait four cycles for each of its own additions.
//
//   Backward: kBlock rows go through together, so that w, grad_w and grad_b are loaded and stored once for all of them:
//     pass 1  sum(g), sum(g x); grad_w, grad_b         read 2 x e bytes
//     pass 2  grad_h                                   from cache, write e
//   grad_w and grad_b gather in per-thread lines that are added in thread order, so that equal inputs and thread counts
//   give equal bits. Limit: memory. Forward 2e (4e with a residual), backward 3e bytes an element; about 10 flops an
//   element.
#include "ops/norm.h"

#include <type_traits>
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

  // h of one row as floats, in place or in `line`; also stores new_residual
  const float* gather(int64_t row, float* line, float* keep, float& total) const {
    const T* input = row_of<T>(p.input, row);
    const T* residual = row_of<T>(p.residual, row);
    T* stored = const_cast<T*>(row_of<T>(p.new_residual, row));
    F sums[4] = {};
    if constexpr (std::is_same_v<T, float>) {
      if (!residual && !dropout.active) {
        for_lanes_by_4(columns, [&](int64_t c, auto n, auto k) { sums[k] = sums[k] + load_n(input + c, n); });
        total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
        return input;
      }
    }
    if (dropout.active) dropout.multipliers(0, row, 0, columns, keep);
    for_lanes_by_4(columns, [&](int64_t c, auto n, auto k) {
      F h = load_n(input + c, n);
      if (dropout.active) h = h * load_n(keep + c, n);
      if (residual) h = h + load_n(residual + c, n);
      if (stored) {
        store_n(stored + c, h, n);
        h = load_n(stored + c, n);  // what the next layer sees is the rounded sum: normalise that one
      }
      store_n(line + c, h, n);
      sums[k] = sums[k] + h;
    });
    total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return line;
  }

  // `next`: the row after it, of which the first half is fetched meanwhile.
  float mean_square(const float* h, float mean, const T* next) const {
    F squares[4] = {};
    for_lanes_by_4(columns, [&](int64_t c, auto n, auto k) {
      __builtin_prefetch(next + c / 2);
      const F d = load_n(h + c, n, mean) - mean;
      squares[k] = squares[k] + d * d;
    });
    return sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(columns);
  }

  void operator()(int64_t begin, int64_t end) const {
    std::vector<float> line(columns), keep(dropout.active ? columns : 0);
    for (int64_t row = begin; row < end; ++row) {
      float total;
      const float* h = gather(row, line.data(), keep.data(), total);
      const float mean = p.subtract_mean ? total / static_cast<float>(columns) : 0.0f;
      const T* next = row_of<T>(p.input, row + 1 < end ? row + 1 : row);
      const float rstd = 1.0f / std::sqrt(mean_square(h, mean, next) + static_cast<float>(p.eps));
      T* out = p.output.as<T>() + row * p.output.stride(0);
      for_lanes(columns, [&](int64_t c, auto n) {
        __builtin_prefetch(next + (columns + c) / 2);
        const F x = (load_n(h + c, n) - mean) * rstd;
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
  static constexpr int kBlock = 4;  // rows: their eight sums and the line's two fit in sixteen registers

  // grad_w and grad_b of rows [begin, end) are added to the lines gw and gb.
  void operator()(int64_t begin, int64_t end, float* gw, float* gb) const {
    std::vector<float> lines(kBlock * columns), keep(dropout.active ? columns : 0);
    int64_t row = begin;
    for (; row + kBlock <= end; row += kBlock) block<kBlock>(row, lines.data(), keep.data(), gw, gb);
    for (; row < end; ++row) block<1>(row, lines.data(), keep.data(), gw, gb);
  }

  template <int rows>
  void block(int64_t first, float* lines, float* keep, float* gw, float* gb) const {
    const T *h[rows], *dy[rows];
    float mean[rows], rstd[rows];
    for (int r = 0; r < rows; ++r) {
      h[r] = row_of<T>(p.h, first + r);
      dy[r] = row_of<T>(p.grad_output, first + r);
      mean[r] = p.subtract_mean ? p.mean.as<float>()[first + r] : 0.0f;
      rstd[r] = p.rstd.as<float>()[first + r];
    }
    F sum_g[rows] = {}, sum_gx[rows] = {};
    for_lanes(columns, [&](int64_t c, auto n) {
      const F w = load_n(weight.data() + c, n);
      F sum_dx = load_n(gw + c, n), sum_d = load_n(gb + c, n);
#pragma GCC unroll 4  // so that sums stay in registers
      for (int r = 0; r < rows; ++r) {
        const F x = (load_n(h[r] + c, n, mean[r]) - mean[r]) * rstd[r], d = load_n(dy[r] + c, n), g = d * w;
        // g waits here as rounded: contracted into an FMA it would not cancel against its own mean (one column)
        store_n(lines + r * columns + c, g, n);
        sum_g[r] = sum_g[r] + g;
        sum_gx[r] = sum_gx[r] + g * x;
        sum_dx = sum_dx + d * x;
        sum_d = sum_d + d;
      }
      store_n(gw + c, sum_dx, n);
      store_n(gb + c, sum_d, n);
    });
    const float inverse = 1.0f / static_cast<float>(columns);
    for (int r = 0; r < rows; ++r) {
      const float mean_g = p.subtract_mean ? sum(sum_g[r]) * inverse : 0.0f;
      write(first + r, h[r], lines + r * columns, keep, mean[r], rstd[r], mean_g, sum(sum_gx[r]) * inverse);
    }
  }

  // grad_h of one row from its g
  void write(int64_t row, const T* h, const float* line, float* keep, float mean, float rstd, float mean_g,
             float mean_gx) const {
    const T* carried = row_of<T>(p.grad_new_residual, row);
    T* grad_input = p.grad_input.as<T>() + row * p.grad_input.stride(0);
    T* grad_residual = const_cast<T*>(row_of<T>(p.grad_residual, row));
    if (dropout.active) dropout.multipliers(0, row, 0, columns, keep);
    for_lanes(columns, [&](int64_t c, auto n) {
      const F x = (load_n(h + c, n) - mean) * rstd, g = load_n(line + c, n);
      F grad = (g - mean_g - x * mean_gx) * rstd;
      if (carried) grad = grad + load_n(carried + c, n);
      if (grad_residual) store_n(grad_residual + c, grad, n);
      if (dropout.active) grad = grad * load_n(keep + c, n);
      store_n(grad_input + c, grad, n);
    });
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
