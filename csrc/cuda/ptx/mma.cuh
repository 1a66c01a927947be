// Products of small matrices on tensor cores: a whole warp computes d += a b, with the sums in float32 (PTX ISA,
// "mma.sync.aligned.m16n8k8" and "m16n8k16"; sm_80). The hardware's order and rounding of a sum are not specified.
//
//   a is 16 x k (rows m), b is k x 8 (columns n), d is 16 x 8. With g = lane / 4 and t = lane % 4, lane 4g + t holds:
//
//             b   n = g                       A register of 16-bit elements has two of them, the first in its
//            k = 2t, 2t+1    b[0]             lower half; k = 2t, 2t+1 is written 2t..
//            k = 2t+8, +9    b[1]
//                                             16x8x16:  a[0] (g, 2t..)    a[1] (g + 8, 2t..)
//      a   k = 2t..  2t+8..   d   n = 2t..              a[2] (g, 2t+8..)  a[3] (g + 8, 2t+8..)
//    m = g     a[0]   a[2]      d[0] d[1]               b[0] (2t.., g)    b[1] (2t+8.., g)
//    m = g + 8 a[1]   a[3]      d[2] d[3]     16x8x8:   a[0] (g, 2t..)    a[1] (g + 8, 2t..)    b[0] (2t.., g)
//
//   tf32 has one element a register, k = t and t + 4:
//
//     16x8x8:  a[0] (g, t)  a[1] (g + 8, t)  a[2] (g, t + 4)  a[3] (g + 8, t + 4)     b[0] (t, g)  b[1] (t + 4, g)
//
//   and always  d[0] (g, 2t)  d[1] (g, 2t + 1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t + 1).
//
//   So d, rounded to 16 bits in pairs, is half of the next product's a: a[0], a[1] from the d of columns 0..7, a[2],
//   a[3] from that of columns 8..15. load_matrix_x4 of the four 8 x 8 quarters of a (upper left, lower left, upper
//   right, lower right) gives a; load_matrix_x2 of the two quarters of b, where b lies with n as rows, gives b, and
//   load_matrix_x2_transposed, where it lies with k as rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace llmengine::ptx {

__device__ __forceinline__ void mma_16x8x16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16x8x8_bf16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

__device__ __forceinline__ void mma_16x8x8_f16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

// Elements are tf32_of(float); of other floats the hardware drops the lower 13 bits.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The float of 11 significant bits that lies nearest, of two the one farther from zero. What its lower 13 bits hold is
// not specified.
__device__ __forceinline__ uint32_t tf32_of(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return word;
}

}  // namespace llmengine::ptx
