// The norm of a list of tensors (formula: ops/gradient_norm.h).
//
//   The elements of all tensors are cut into blocks, the blocks dealt out in tasks. A block's squares are added up in
//   32 doubles side by side, and the blocks' sums in order: no bit depends on how many threads there are.
//   Limit: memory bandwidth, e bytes an element (e: bytes of an element).
#include "ops/gradient_norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kBlock = 1 << 16;  // elements, worth a thread's while
constexpr int kSums = 32;

template <class T>
double sum_of_squares(const T* x, int64_t n) {
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    for (int k = 0; k < kSums; ++k) {
      const double value = widen(x[i + k]);
      sums[k] += value * value;
    }
  }
  for (; i < n; ++i) {
    const double value = widen(x[i]);
    sums[i % kSums] += value * value;
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

struct Block {
  size_t tensor;
  int64_t first;
};

void gradient_norm(const ops::GradientNorm& p) {
  std::vector<Block> blocks;
  for (size_t i = 0; i < p.gradients.size(); ++i) {
    for (int64_t first = 0; first < p.gradients[i].numel(); first += kBlock) blocks.push_back({i, first});
  }
  std::vector<double> sums(blocks.size());
  parallel_each(static_cast<int64_t>(blocks.size()), [&](int64_t b) {
    const auto [tensor, first] = blocks[b];
    const TensorView& t = p.gradients[tensor];
    visit_float(t.dtype,
                [&]<class T>(T) { sums[b] = sum_of_squares(t.as<T>() + first, std::min(kBlock, t.numel() - first)); });
  });
  double total = 0;
  for (double sum : sums) total += sum;
  *p.norm.as<float>() = static_cast<float>(std::sqrt(total));
}

const Registrar<ops::GradientNorm> registered{gradient_norm};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
