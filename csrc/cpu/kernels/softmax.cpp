// Softmax of rows, forward and backward (formulas: ops/softmax.h).
//
//   A thread owns a run of rows. Forward: the maximum; the exponentials into one scratch line and their sum; the scaled
//   line out. A row is read from memory once while it fits the second-level cache (300 thousand float columns), the
//   line costs none. Limit: 2e bytes an element (e: bytes an element) or, in bf16 from cache, the exponential's 15
//   instructions a vector. Backward: sum(g y), then y (g - sum): 3e bytes an element.
#include "ops/softmax.h"

#include <vector>

#include "cpu/log_sum_exp.h"
#include "cpu/parallel.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // rows worth waking a thread for

template <class In, class Out>
void forward_rows(const ops::SoftmaxForward& p, int64_t begin, int64_t end) {
  const int64_t columns = p.input.size(1);
  std::vector<float> line(columns);
  for (int64_t row = begin; row < end; ++row) {
    const In* x = p.input.as<In>() + row * p.input.stride(0);
    Out* y = p.output.as<Out>() + row * p.output.stride(0);
    const float shift = shift_for(largest_of(x, columns));
    const In* next = row + 1 < end ? x + p.input.stride(0) : x;
    F sums[4] = {};
    for_lanes_by_4(columns, [&](int64_t c, auto n, auto k) {
      __builtin_prefetch(next + c);  // memory would rest while this row is computed
      const F e = exp_of_nonpositive(load_n(x + c, n, -INFINITY) - shift);
      sums[k] = sums[k] + e;
      store_n(line.data() + c, e, n);
    });
    const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
    for_lanes(columns, [&](int64_t c, auto n) { store_n(y + c, load_n(line.data() + c, n) * scale, n); });
  }
}

template <class In, class Out>
void backward_rows(const ops::SoftmaxBackward& p, int64_t begin, int64_t end) {
  const int64_t columns = p.output.size(1);
  for (int64_t row = begin; row < end; ++row) {
    const Out* g = p.grad_output.as<Out>() + row * p.grad_output.stride(0);
    const Out* y = p.output.as<Out>() + row * p.output.stride(0);
    In* grad = p.grad_input.as<In>() + row * p.grad_input.stride(0);
    F sums[4] = {};
    for_lanes_by_4(columns,
                   [&](int64_t c, auto n, auto k) { sums[k] = sums[k] + load_n(g + c, n) * load_n(y + c, n); });
    const float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for_lanes(columns, [&](int64_t c, auto n) { store_n(grad + c, (load_n(g + c, n) - total) * load_n(y + c, n), n); });
  }
}

void softmax_forward(const ops::SoftmaxForward& p) {
  visit_float(p.input.dtype, [&]<class In>(In) {
    visit_float(p.output.dtype, [&]<class Out>(Out) {
      parallel_rows(p.input.size(0), p.input.size(1), kGrainElements,
                    [&](int64_t begin, int64_t end, int) { forward_rows<In, Out>(p, begin, end); });
    });
  });
}

void softmax_backward(const ops::SoftmaxBackward& p) {
  visit_float(p.grad_input.dtype, [&]<class In>(In) {
    visit_float(p.output.dtype, [&]<class Out>(Out) {
      parallel_rows(p.output.size(0), p.output.size(1), kGrainElements,
                    [&](int64_t begin, int64_t end, int) { backward_rows<In, Out>(p, begin, end); });
    });
  });
}

const Registrar<ops::SoftmaxForward> forward{softmax_forward};
const Registrar<ops::SoftmaxBackward> backward{softmax_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
