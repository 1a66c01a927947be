// The two cores that multiply matrices, and which of them does: that of gemm_sm80.cuh takes everything, that of
// gemm_sm90a.cuh what TMA can fetch, on Hopper.
#pragma once

#include <string>
#include <vector>

#include "common/check.h"
#include "cuda/gemm.h"

namespace llmengine::cuda {

// Why gemm_sm90a.cuh does not multiply these matrices, or nothing: it does. An error where it was asked for on a device
// that has not its instructions. What TMA cannot fetch though Hopper's core was asked for is remembered.
std::string hopper_refuses(const std::string& core, const NamedTensors& matrices);

// Which matrices Hopper's core left to the other since this thread last asked, and why.
std::vector<std::string> take_left();

// Of an operator that hands `core` and `room` to its products.
void check_core(const Checker& at, const std::string& core, const TensorView& room);

void multiply_sm80(const Gemm& p, Stream stream);
void multiply_sm90a(const Gemm& p, Stream stream);

// ---- parts of k -----------------------------------------------------------------------------------------------------

// Of a part: its products take about as long as its sums' way to memory and back.
inline constexpr int kLeastDepth = 512;

// Into how many parts k is cut, so that a product of few tiles has work for all of the `slots` in which tiles are made
// at once: as many as fill them, each at least `least` deep, as far as there is room for their sums; of whole steps of
// `depth`. Never where half of the slots are filled without.
int parts_of(const Gemm& p, int64_t tiles, int64_t slots, int depth, int least = kLeastDepth);

// The sums of the parts, in their order, to the product's result.
void add_parts(const Gemm& p, int parts, Stream stream);

}  // namespace llmengine::cuda
