// Runs small kernels that are right or have one known mistake, as `PROGRAM NAME broken|fixed`: under every order and
// several seeds, with a line for each, "ok" or what the simulator found.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "sim/simulator.h"

namespace llmengine {

// They begin a room, as __shared__ variables do, and must not be taken for such, which are filled with NaN: one is the
// simulator's own, the other has a guard.
namespace sim {
[[gnu::noinline]] inline volatile int& simulators_own() {
  alignas(kSharedRoom) static volatile int zero;
  return zero;
}
}  // namespace sim

namespace {

[[gnu::noinline]] const std::string& guarded() {
  alignas(sim::kSharedRoom) static const auto ok = std::make_unique<std::string>("ok");
  return *ok;
}

constexpr int kElements = 512;

TensorView view(float* data, int64_t rows, int64_t columns, int64_t stride) {
  TensorView t;
  t.data = data, t.ndim = 2;
  t.sizes[0] = rows, t.sizes[1] = columns, t.strides[0] = stride, t.strides[1] = 1;
  return t;
}

// One run on fresh buffers; returns the sum of the results.
double run_once(const std::function<void(const float*, float*)>& body, const TensorView& shape) {
  const std::unique_ptr<float4[]> inputs(new float4[kElements / 4]), outputs(new float4[kElements / 4]);
  float *in = &inputs[0].x, *out = &outputs[0].x;
  for (int i = 0; i < kElements; ++i) in[i] = static_cast<float>(i % 7), out[i] = 0.0f;
  TensorView input = shape, output = shape;
  input.data = in, output.data = out;
  const sim::Tensors touchable({{"in", input}, {"out", output}});
  body(in, out);
  double total = 0.0;
  for (int i = 0; i < kElements; ++i) total += out[i] * (i + 1);
  return total;
}

struct Case {
  std::function<void(const float*, float*)> body;
  TensorView shape = view(nullptr, 1, kElements, kElements);
};

template <class Kernel, class... Given>
void launch(Kernel kernel, unsigned blocks, unsigned threads, size_t shared, Given... given) {
  const TensorView operand = view(nullptr, 1, kElements, kElements);
  cuda::launch({"case", dim3(blocks), dim3(threads), nullptr, operand, shared}, kernel, given...);
}
template <class... Parameters, class... Given>
void launch_cluster(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, unsigned cluster, size_t shared,
                    Given... given) {
  const TensorView operand = view(nullptr, 1, kElements, kElements);
  cuda::launch({"case", dim3(blocks), dim3(threads), nullptr, operand, shared, dim3(cluster)}, kernel, given...);
}

using Cases = std::map<std::string, Case>;

int run_cases(int count, char** arguments, const Cases& broken, const Cases& fixed) {
  if (count != 3) return 2;
  const Case& chosen = (std::string(arguments[2]) == "broken" ? broken : fixed).at(arguments[1]);
  uint64_t seed = 0;
  for (const char* order : {"forward", "reversed", "round_robin", "random", "random", "random", "random", "starved"}) {
    sim::set_schedule(order, ++seed);
    try {
      const double sum = run_once(chosen.body, chosen.shape);
      const char* found = sim::simulators_own() == 0 ? guarded().c_str() : "the simulator's own variable was filled";
      std::printf("%s %d: %s %.9g\n", order, static_cast<int>(seed), found, sum);
    } catch (const std::exception& error) {
      std::printf("%s %d: %s\n", order, static_cast<int>(seed), error.what());
    }
  }
  return 0;
}

}  // namespace
}  // namespace llmengine
