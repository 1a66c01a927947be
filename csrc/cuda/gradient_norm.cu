// The norm of a list of tensors (formula: ops/gradient_norm.h).
//
//   squares    a block owns a chunk of one tensor (tensor_list.cuh): a thread has four vectors of 16 bytes on their way
//              at a time and adds up their squares in a double; shuffles and shared memory join a block's threads.
//              Reads e bytes an element (e: bytes of an element)
//   root       one block adds the chunks' sums: 8 bytes for each of their 8192 elements
//   Every order is fixed, so the bits are the same on every run.
//   limit      memory bandwidth; one conversion to double and one double multiply-add an element
#include <cmath>
#include <cstdint>

#include "cuda/dispatch.h"
#include "cuda/gradient_norm.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/tensor_list.cuh"

namespace llmengine::cuda {
namespace {

constexpr int kThreads = 256, kSumThreads = 1024;
constexpr int kUnrolled = 4;   // vectors that a thread asks for at once
constexpr int kTensors = 192;  // of a launch

struct Squares {
  const void* tensor[kTensors];
  int64_t size[kTensors];
  BlockTable<kTensors> table;
  double* sums;  // of the launch's first block
};
static_assert(sizeof(Squares) <= kParameterBytes);

template <class T>
__global__ void __launch_bounds__(kThreads) gradient_norm_squares(const Squares p) {
  constexpr int n = kLanes<T>;
  __shared__ RowSlots<1, kThreads / 32, double> slots;
  const int which = p.table.owner(blockIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x - p.table.first[which]) * kNormChunk;
  const T* chunk = static_cast<const T*>(p.tensor[which]) + begin;
  const int64_t rest = p.size[which] - begin;
  const int count = rest < kNormChunk ? static_cast<int>(rest) : static_cast<int>(kNormChunk);
  const bool aligned = reinterpret_cast<uintptr_t>(chunk) % 16 == 0;
  double total[1] = {0.0};
  for (int first = static_cast<int>(threadIdx.x) * n; first < count; first += kUnrolled * kThreads * n) {
    uint4 vector[kUnrolled];
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) vector[k] = load_vector(chunk, first + k * kThreads * n, count, aligned);
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      float x[n];
      unpack<T>(vector[k], x);
#pragma unroll
      for (int i = 0; i < n; ++i) total[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
  }
  int turn = 0;
  row_reduce<Sum>(total, slots, turn);
  if (threadIdx.x == 0) p.sums[blockIdx.x] = total[0];
}

__global__ void __launch_bounds__(kSumThreads) gradient_norm_root(const double* sums, int64_t blocks, float* norm) {
  __shared__ RowSlots<1, kSumThreads / 32, double> slots;
  double total[1] = {0.0};
  for (int64_t block = threadIdx.x; block < blocks; block += kSumThreads) total[0] += sums[block];
  int turn = 0;
  row_reduce<Sum>(total, slots, turn);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(total[0]));
}

int64_t chunks_of(const TensorView& t) { return (t.numel() + kNormChunk - 1) / kNormChunk; }

template <class T>
void launch_squares(const GradientNorm& p, Stream stream) {
  Squares given{};
  given.sums = p.sums.as<double>();
  const auto flush = [&] {
    launch({"gradient_norm_squares", given.table.blocks, kThreads, cuda_stream(stream), p.gradients[0]},
           gradient_norm_squares<T>, given);
    given.sums += given.table.blocks;
    given.table = {};
  };
  for (const TensorView& t : p.gradients) {
    if (t.numel() == 0) continue;
    if (given.table.full()) flush();
    const int place = given.table.add(t.numel(), kNormChunk);
    given.tensor[place] = t.data;
    given.size[place] = t.numel();
  }
  flush();
}

}  // namespace

void validate(const GradientNorm& p) {
  ops::validate(p, kFloatTypes);
  const Checker at{"gradient_norm"};
  int64_t chunks = 0;
  for (const TensorView& t : p.gradients) chunks += chunks_of(t);
  at.defined(p.sums, "sums");
  at.dtype(p.sums, "sums", {DType::f64});
  at.shape(p.sums, "sums", {chunks});
  at.contiguous(p.sums, "sums");
}

void run(const GradientNorm& p, Stream stream) {
  if (!p.gradients.empty()) {
    visit_float(p.gradients[0].dtype, [&]<class T>(T) { launch_squares<T>(p, stream); });
  }
  launch({"gradient_norm_root", 1, kSumThreads, cuda_stream(stream), p.sums}, gradient_norm_root, p.sums.as<double>(),
         p.sums.size(0), p.norm.as<float>());
}

}  // namespace llmengine::cuda
