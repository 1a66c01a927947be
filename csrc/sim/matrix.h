// Warp matrix instructions: what one lane brings to them and takes from them. The twins of cuda/ptx/matrix.cuh and
// mma.cuh call these; the lane that comes last carries the instruction out for all 32.
//
//   Reads and writes of shared memory are those of the lane that names the row, as far as bounds, alignment and what
//   comes after are concerned; but what came before must be ordered before every lane of the warp, since the row's
//   elements go to other lanes than the one that names it.
//
//   Products. The hardware's order of a sum and its rounding are not specified. The twin does what has been observed of
//   sm_80 (Fasi, Higham, Mikaitis, Pranesh 2021): exact products; k in steps of 8 (tf32: 4); in a step, products and
//   accumulator are cut, toward zero, to 26 bits below the largest's, added exactly, and the sum is cut to a float. So
//   it errs to one side, as tensor cores do, and small terms beside large ones are lost, as there. Of 8-bit elements
//   Hopper is said to keep about 14 bits of each term of 32 products (DeepSeek-V3's report, 2024); the twin keeps 26 of
//   them too, so that what a kernel loses where it sums a deep k in the tensor cores alone does not show here.
#pragma once

#include <cstdint>

#include "sim/device.h"

namespace llmengine::sim {

struct MatrixLane {
  void* row;
  const void* return_address;  // of the instruction, for reports
  uint32_t r[4];
};

void load_matrices(const char* operation, int count, bool transposed, MatrixLane& lane, Site site);
void store_matrices(const char* operation, int count, bool transposed, MatrixLane& lane, Site site);

struct MmaLane {
  float d[4];
  uint32_t a[4], b[2];  // of 16x8x8 with 16-bit elements a[0], a[1] and b[0]
};

enum class Element : uint8_t { bf16, f16, tf32, e4m3, e5m2 };
double number_of(Element element, uint32_t bits);

// d (rows x n) += a (rows x k) b (k x n), row by row, as tensor cores add; n a multiple of 8.
void add_product(Element element, int rows, int n, int k, const double* a, const double* b, float* d);

void multiply_matrices(const char* operation, Element element, int k, MmaLane& lane, Site site);

}  // namespace llmengine::sim
