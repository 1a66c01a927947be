// 8 x 8 matrices of 16-bit elements between shared memory and a warp's registers (PTX ISA, "ldmatrix", "stmatrix").
//
//   A row of a matrix is 16 contiguous bytes of shared memory, at an address that is a multiple of 16. The lanes name
//   the rows: lane 8m + i gives the address of row i of matrix m, for m < N of xN; addresses of lanes from 8N on are
//   not looked at. Register m of lane 4g + t (g = lane / 4, t = lane % 4) then holds two elements of matrix m, the
//   first in the lower half:
//
//                  column 0  1   2  3   4  5   6  7
//     row 0        [ lane 0 ][   1  ][   2  ][   3  ]      plain:       (g, 2t)   and (g, 2t + 1)
//     row 1        [      4 ][   5  ][   6  ][   7  ]      transposed:  (2t, g)   and (2t + 1, g)
//     ...                                                  of the matrix as it lies in shared memory
//     row 7        [     28 ][  29  ][  30  ][  31  ]
//
//   This is what the fragments of mma.cuh are made of. The whole warp takes part, at one place of the code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/memory.cuh"

namespace llmengine::ptx {

__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(detail::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x2_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(detail::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(detail::shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x1_transposed(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(detail::shared_address(row))
               : "memory");
}

// The way back, which sm_90 has: on a processor below it these stop the kernel, so that a file for all still compiles.

__device__ __forceinline__ void store_matrix_x4(void* row, const uint32_t (&r)[4]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(detail::shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void store_matrix_x4_transposed(void* row, const uint32_t (&r)[4]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(detail::shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void store_matrix_x2(void* row, const uint32_t (&r)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(detail::shared_address(row)), "r"(r[0]),
               "r"(r[1])
               : "memory");
#else
  __trap();
#endif
}

__device__ __forceinline__ void store_matrix_x2_transposed(void* row, const uint32_t (&r)[2]) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(detail::shared_address(row)),
               "r"(r[0]), "r"(r[1])
               : "memory");
#else
  __trap();
#endif
}

}  // namespace llmengine::ptx
