// Products of warpgroups on tensor cores: four warps, the first of them a multiple of four in its block, compute
// d += a b asynchronously, with the sums in float32 (PTX ISA, "wgmma.mma_async"; sm_90a).
//
//   a is 64 x k, b is k x n, d is 64 x n; k is 32 bytes, so 16 (bf16, f16), 8 (tf32) or 32 (e4m3, e5m2), n twice the
//   accumulators of a thread. b lies in shared memory, a there or in registers. Warp w of the warpgroup has rows 16w to
//   16w + 15 of d and a, its lanes as in mma.cuh: with g = lane / 4 and t = lane % 4,
//
//     d[4j], d[4j + 1]       (16w + g, 8j + 2t), and the column after it      a[0] .. a[3]   as mma_16x8x16 (tf32:
//     d[4j + 2], d[4j + 3]   (16w + g + 8, 8j + 2t), ...                                     mma_16x8x8_tf32) has them
//
//     a of 8-bit elements, four in a register, the first in its lowest byte:
//     a[0]   (16w + g, 4t ..), a[1] 8 rows below        a[2]   (16w + g, 16 + 4t ..), a[3] 8 rows below
//
//   An operand in shared memory is made of 16-byte chunks: of k ("k-major", rows are those of m or n) or of m or n
//   ("mn-major", 16-bit elements only; rows are those of k). Eight rows of a swizzle's span are its pattern, as a box
//   of tensor_copy.cuh lies; a descriptor says where a tile starts, and how far apart patterns are:
//
//                swizzled: `leading`                    `stride`                not swizzled (rows of 16 bytes):
//     k-major    not looked at                          to the next 8 rows      chunk to chunk     8 rows to 8 rows
//     mn-major   to the next span of m or n             to the next 8 of k      8 of k to 8        chunk to chunk
//
//   Where a k-major row holds several steps of k, `advanced(32)` is the next one's descriptor. Tiles start at multiples
//   of 1024, 512 or 256 bytes (spans of 128, 64, 32), as boxes do; one whose pattern begins elsewhere has a base
//   offset: of its first address, bits 7 to 9.
//
//     wgmma_fence(d);                                  before the first product on registers that were touched
//     for (...) wgmma<Multiplicand::bf16>(d, a, b, true);
//     wgmma_commit();                                  a group
//     wgmma_wait<0>(d);                                until then, hands off d, registers of a, and tiles
//
//   The sums of products of 8-bit elements are kept in float32, but on Hopper added with about 14 bits: whoever sums a
//   deep k takes them over into sums of his own from time to time.
//
//   Threads that wrote a tile themselves have called fence_async_shared (tensor_copy.cuh) before a barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/memory.cuh"
#include "cuda/tensor_map.h"

namespace llmengine::ptx {

// Of a and of b, which differ where two are named.
enum class Multiplicand : uint8_t { bf16, f16, tf32, e4m3, e5m2_e4m3 };
enum class Major : uint8_t { k, mn };

struct MatrixDescriptor {
  uint64_t bits;

  __device__ __forceinline__ MatrixDescriptor advanced(int bytes) const {
    const uint32_t low = static_cast<uint32_t>(bits) + static_cast<uint32_t>(bytes >> 4);  // carries nothing upward
    return {(bits & ~uint64_t{0xffffffff}) | low};
  }
};

// `leading` and `stride` in bytes, multiples of 16.
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(const void* tile, int leading, int stride,
                                                              Swizzle swizzle, int base_offset = 0) {
  const uint64_t mode = swizzle == Swizzle::none ? 0 : 4 - static_cast<uint64_t>(swizzle);
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return {field(detail::shared_address(tile)) | field(leading) << 16 | field(stride) << 32 |
          static_cast<uint64_t>(base_offset & 7) << 49 | mode << 62};
}

// Tells the compiler that the registers change here: it moves no use of them across. wgmma_fence and wgmma_wait do it
// to the accumulators that they are given; further ones are given to this. Of a product in flight it is a use: the
// compiler would put a wait before it.
template <int count>
__device__ __forceinline__ void settle_registers(float (&d)[count]) {
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void wgmma_fence() {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}
template <int count>
__device__ __forceinline__ void wgmma_fence(float (&d)[count]) {
  settle_registers(d);
  wgmma_fence();
}

__device__ __forceinline__ void wgmma_commit() {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Waits until at most the `pending` latest groups are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#else
  __trap();
#endif
}
template <int pending, int count>
__device__ __forceinline__ void wgmma_wait(float (&d)[count]) {
  wgmma_wait<pending>();
  settle_registers(d);
}

namespace detail {

// What an instruction's name and its last operands are, put into the assembly by the "C" constraint.
template <Multiplicand element>
struct WgmmaTypes;
template <>
struct WgmmaTypes<Multiplicand::bf16> {
  static constexpr const char name[] = "k16.f32.bf16.bf16";
};
template <>
struct WgmmaTypes<Multiplicand::f16> {
  static constexpr const char name[] = "k16.f32.f16.f16";
};
template <>
struct WgmmaTypes<Multiplicand::tf32> {
  static constexpr const char name[] = "k8.f32.tf32.tf32";
};

template <>
struct WgmmaTypes<Multiplicand::e4m3> {
  static constexpr const char name[] = "k32.f32.e4m3.e4m3";
};
template <>
struct WgmmaTypes<Multiplicand::e5m2_e4m3> {
  static constexpr const char name[] = "k32.f32.e5m2.e4m3";
};

constexpr bool has_sixteen_bits(Multiplicand m) { return m == Multiplicand::bf16 || m == Multiplicand::f16; }

template <bool sixteen_bits, Major... majors>
struct WgmmaMajors {
  static constexpr const char text[] = "";
};
template <Major b>
struct WgmmaMajors<true, b> {
  static constexpr const char text[] = {',', ' ', static_cast<char>('0' + static_cast<int>(b)), 0};
};
template <Major a, Major b>
struct WgmmaMajors<true, a, b> {
  static constexpr const char text[] = {',', ' ', static_cast<char>('0' + static_cast<int>(a)),
                                        ',', ' ', static_cast<char>('0' + static_cast<int>(b)),
                                        0};
};

}  // namespace detail

// d = a b, or d += a b where `add`; with a in shared memory, and in registers.
template <Multiplicand element, Major a_major = Major::k, Major b_major = Major::k, int count>
__device__ __forceinline__ void wgmma(float (&d)[count], MatrixDescriptor a, MatrixDescriptor b, bool add);
template <Multiplicand element, Major b_major = Major::k, int count>
__device__ __forceinline__ void wgmma(float (&d)[count], const uint32_t (&a)[4], MatrixDescriptor b, bool add);

}  // namespace llmengine::ptx

// What an instruction of each width is made of needs all that stands above.
#include "cuda/ptx/wgmma_registers.cuh"
#include "cuda/ptx/wgmma_shared.cuh"
