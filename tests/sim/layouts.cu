// Kernels of one warp, each around one instruction of csrc/cuda/ptx/: what goes in and what comes out are words, which
// test_layouts.py lays out and expects by itself. A library for the simulator's compiler and for nvcc alike: the same
// test runs on a GPU.
#include <cuda_runtime.h>

#include <cstdint>
#include <exception>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/mma.cuh"
#ifndef __CUDACC__
#include "sim/simulator.h"
#endif

namespace llmengine {
namespace {

// A block gets and gives so many words, and takes its own from the arrays of all.
constexpr int kPlaces = 32, kRowWords = 4, kRows = 32 * kRowWords;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x); }
template <class Word>
__device__ __forceinline__ Word* of_block(Word* words, int each) {
  return words + static_cast<int64_t>(blockIdx.x) * each;
}

// ---- matrices -------------------------------------------------------------------------------------------------------

// In: for each lane the place of its row among 32; the rows. Out: for each lane its registers.
template <int count, bool transposed>
__global__ void load(const uint32_t* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  const uint32_t* my = of_block(in, kPlaces + kRows);
  const uint32_t* row = my + kPlaces + lane() * kRowWords;
  rows[lane()] = make_uint4(row[0], row[1], row[2], row[3]);
  __syncwarp();
  const uint4* address = rows + my[lane()];
  uint32_t r[count];
  if constexpr (count == 1 && !transposed) ptx::load_matrix_x1(r, address);
  if constexpr (count == 1 && transposed) ptx::load_matrix_x1_transposed(r, address);
  if constexpr (count == 2 && !transposed) ptx::load_matrix_x2(r, address);
  if constexpr (count == 2 && transposed) ptx::load_matrix_x2_transposed(r, address);
  if constexpr (count == 4 && !transposed) ptx::load_matrix_x4(r, address);
  if constexpr (count == 4 && transposed) ptx::load_matrix_x4_transposed(r, address);
  for (int m = 0; m < count; ++m) of_block(out, 32 * count)[lane() * count + m] = r[m];
}

// In: the places, and for each lane its registers. Out: the rows; zeros where none was stored.
template <int count, bool transposed>
__global__ void store(const uint32_t* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  const uint32_t* my = of_block(in, kPlaces + 32 * count);
  rows[lane()] = make_uint4(0, 0, 0, 0);
  __syncwarp();
  uint4* address = rows + my[lane()];
  uint32_t r[count];
  for (int m = 0; m < count; ++m) r[m] = my[kPlaces + lane() * count + m];
  if constexpr (count == 2 && !transposed) ptx::store_matrix_x2(address, r);
  if constexpr (count == 2 && transposed) ptx::store_matrix_x2_transposed(address, r);
  if constexpr (count == 4 && !transposed) ptx::store_matrix_x4(address, r);
  if constexpr (count == 4 && transposed) ptx::store_matrix_x4_transposed(address, r);
  __syncwarp();
  const uint4 row = rows[lane()];
  uint32_t* to = of_block(out, kRows) + lane() * kRowWords;
  to[0] = row.x, to[1] = row.y, to[2] = row.z, to[3] = row.w;
}

// ---- products -------------------------------------------------------------------------------------------------------

enum class Product : uint8_t { bf16_16, f16_16, bf16_8, f16_8, tf32_8 };

// In: for each lane four words of a, two of b, four of d. Out: for each lane its d after `times` products.
template <Product product>
__global__ void multiply(const uint32_t* in, uint32_t* out, int times) {
  constexpr bool half = product == Product::bf16_8 || product == Product::f16_8;
  const uint32_t* words = of_block(in, 32 * 10) + lane() * 10;
  uint32_t a[half ? 2 : 4], b[half ? 1 : 2];
  float d[4];
  for (int i = 0; i < (half ? 2 : 4); ++i) a[i] = words[i];
  for (int i = 0; i < (half ? 1 : 2); ++i) b[i] = words[4 + i];
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(words[6 + i]);
  for (int i = 0; i < times; ++i) {
    if constexpr (product == Product::bf16_16) ptx::mma_16x8x16_bf16(d, a, b);
    if constexpr (product == Product::f16_16) ptx::mma_16x8x16_f16(d, a, b);
    if constexpr (product == Product::bf16_8) ptx::mma_16x8x8_bf16(d, a, b);
    if constexpr (product == Product::f16_8) ptx::mma_16x8x8_f16(d, a, b);
    if constexpr (product == Product::tf32_8) ptx::mma_16x8x8_tf32(d, a, b);
  }
  for (int i = 0; i < 4; ++i) of_block(out, 32 * 4)[lane() * 4 + i] = __float_as_uint(d[i]);
}

__global__ void tf32(const uint32_t* in, uint32_t* out) {
  of_block(out, 32)[lane()] = ptx::tf32_of(__uint_as_float(of_block(in, 32)[lane()]));
}

// ---- copies ---------------------------------------------------------------------------------------------------------

// In: for each lane a number of bytes; the rows. Out: the rows of shared memory that copies of so many bytes leave.
template <int size>
__global__ void copy(const uint32_t* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  const uint32_t* my = of_block(in, 32 + kRows);
  rows[lane()] = make_uint4(1, 2, 3, 4);
  const int bytes = static_cast<int>(my[lane()]);
  const uint32_t* source = my + 32 + lane() * kRowWords;
  if constexpr (size == 16) ptx::copy_async_16(rows + lane(), source, bytes);
  if constexpr (size == 8) ptx::copy_async_8(rows + lane(), source, bytes);
  if constexpr (size == 4) ptx::copy_async_4(rows + lane(), source, bytes);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  const uint4 row = rows[lane()];
  uint32_t* to = of_block(out, kRows) + lane() * kRowWords;
  to[0] = row.x, to[1] = row.y, to[2] = row.z, to[3] = row.w;
}

// In and out: the rows, by a bulk copy of all.
__global__ void bulk_copy(const uint32_t* in, uint32_t* out) {
  __shared__ uint4 rows[32];
  __shared__ ptx::Mbarrier full;
  if (lane() == 0) {
    ptx::mbarrier_init(&full, 2);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect_tx(&full, sizeof(rows));
    ptx::copy_bulk(rows, of_block(in, kRows), sizeof(rows), &full);
    ptx::mbarrier_arrive(&full);
  }
  __syncwarp();
  ptx::mbarrier_wait(&full, 0);
  const uint4 row = rows[lane()];
  uint32_t* to = of_block(out, kRows) + lane() * kRowWords;
  to[0] = row.x, to[1] = row.y, to[2] = row.z, to[3] = row.w;
}

// In: a, 16 x 16 bf16; b as 8 rows of n; b as 16 rows of k. Out: a b, 16 x 8 floats, from either. As a kernel goes:
// copies fetch, ldmatrix lays out, mma multiplies.
__global__ void whole_product(const uint32_t* in, uint32_t* out) {
  __shared__ uint4 a_rows[16 * 2], b_by_n[8 * 2], b_by_k[16];
  const uint32_t* my = of_block(in, 256);
  ptx::copy_async_16(a_rows + lane(), my + lane() * 4);
  ptx::copy_async_16((lane() < 16 ? b_by_n : b_by_k) + lane() % 16, my + 128 + lane() * 4);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncwarp();
  uint32_t a[4], b[2][2];
  ptx::load_matrix_x4(a, a_rows + lane() % 16 * 2 + lane() / 16);
  ptx::load_matrix_x2(b[0], b_by_n + lane() % 8 * 2 + lane() / 8 % 2);
  ptx::load_matrix_x2_transposed(b[1], b_by_k + lane() % 16);
  for (int way = 0; way < 2; ++way) {
    float d[4] = {};
    ptx::mma_16x8x16_bf16(d, a, b[way]);
    uint32_t* to = of_block(out, 256) + way * 128 + lane() / 4 * 8 + lane() % 4 * 2;
    to[0] = __float_as_uint(d[0]), to[1] = __float_as_uint(d[1]);
    to[64] = __float_as_uint(d[2]), to[65] = __float_as_uint(d[3]);
  }
}

// For timing. In: the rows. Out: for each lane a sum of what it loaded.
__global__ void many_loads(const uint32_t* in, uint32_t* out, int times) {
  __shared__ uint4 rows[32];
  ptx::copy_async_16(rows + lane(), of_block(in, kRows) + lane() * 4);
  ptx::commit_copies();
  ptx::wait_copies<0>();
  __syncwarp();
  uint32_t sum = 0;
  for (int i = 0; i < times; ++i) {
    uint32_t r[4];
    ptx::load_matrix_x4(r, rows + lane());
    sum += r[0] ^ r[1] ^ r[2] ^ r[3];
  }
  of_block(out, 32)[lane()] = sum;
}

// ---- the library ----------------------------------------------------------------------------------------------------

// ---- warps and atomics ----------------------------------------------------------------------------------------------

constexpr unsigned kAll = 0xffffffffu;

// In: a word of each lane, and a number. Out: for each lane what it has from others, in segments of 32 and of 8 lanes.
__global__ void shuffles(const uint32_t* in, uint32_t* out) {
  const uint32_t* my = of_block(in, 33);
  const uint32_t word = my[lane()], n = my[32];
  const int number = static_cast<int>(n);
  const uint32_t found[8] = {__shfl_sync(kAll, word, number),     __shfl_sync(kAll, word, number, 8),
                             __shfl_xor_sync(kAll, word, number), __shfl_xor_sync(kAll, word, number, 8),
                             __shfl_up_sync(kAll, word, n),       __shfl_up_sync(kAll, word, n, 8),
                             __shfl_down_sync(kAll, word, n),     __shfl_down_sync(kAll, word, n, 8)};
  for (int i = 0; i < 8; ++i) of_block(out, 256)[8 * lane() + i] = found[i];
}

// In: a word of each lane. Out: for each lane the votes of all, and of its half of the warp.
__global__ void votes(const uint32_t* in, uint32_t* out) {
  const int yes = static_cast<int>(of_block(in, 32)[lane()]);
  uint32_t* mine = of_block(out, 192) + 6 * lane();
  mine[0] = __any_sync(kAll, yes) != 0, mine[1] = __all_sync(kAll, yes) != 0, mine[2] = __ballot_sync(kAll, yes);
  if (lane() < 16) {
    mine[3] = __any_sync(0xffffu, yes) != 0, mine[4] = __all_sync(0xffffu, yes) != 0;
    mine[5] = __ballot_sync(0xffffu, yes);
  } else {
    mine[3] = __any_sync(0xffff0000u, yes) != 0, mine[4] = __all_sync(0xffff0000u, yes) != 0;
    mine[5] = __ballot_sync(0xffff0000u, yes);
  }
}

// `words`: of add, max, min, exchange and compare-and-swap; `taken`: what each lane has from the last two.
__device__ void change(uint32_t* words, uint32_t word, uint32_t* taken) {
  atomicAdd(words, word);
  atomicMax(words + 1, word);
  atomicMin(words + 2, word);
  taken[0] = atomicExch(words + 3, word);
  uint32_t expected = 0, seen;
  while ((seen = atomicCAS(words + 4, expected, expected + 1)) != expected) expected = seen;
  taken[1] = expected;
}

// In: a word of each lane. Out: the five words of global memory, those of shared memory, what lanes have taken of both.
__global__ void atomics(const uint32_t* in, uint32_t* out) {
  __shared__ uint32_t words[5];
  uint32_t* global = of_block(out, 138);
  if (lane() < 5) words[lane()] = global[lane()] = lane() == 2 ? kAll : 0;
  __syncwarp();
  const uint32_t word = of_block(in, 32)[lane()];
  change(global, word, global + 10 + 2 * lane());
  change(words, word, global + 74 + 2 * lane());
  __syncwarp();
  if (lane() < 5) global[5 + lane()] = words[lane()];
}

using Kernel = void (*)(const uint32_t*, uint32_t*);
const std::map<std::string, Kernel> kKernels = {
    {"load_x1", load<1, false>},
    {"load_x2", load<2, false>},
    {"load_x4", load<4, false>},
    {"load_x1_transposed", load<1, true>},
    {"load_x2_transposed", load<2, true>},
    {"load_x4_transposed", load<4, true>},
    {"store_x2", store<2, false>},
    {"store_x4", store<4, false>},
    {"store_x2_transposed", store<2, true>},
    {"store_x4_transposed", store<4, true>},
    {"tf32_of", tf32},
    {"copy_4", copy<4>},
    {"copy_8", copy<8>},
    {"copy_16", copy<16>},
    {"bulk_copy", bulk_copy},
    {"whole_product", whole_product},
    {"shuffles", shuffles},
    {"votes", votes},
    {"atomics", atomics},
};

using Repeated = void (*)(const uint32_t*, uint32_t*, int);
const std::map<std::string, Repeated> kRepeated = {
    {"16x8x16_bf16", multiply<Product::bf16_16>}, {"16x8x16_f16", multiply<Product::f16_16>},
    {"16x8x8_bf16", multiply<Product::bf16_8>},   {"16x8x8_f16", multiply<Product::f16_8>},
    {"16x8x8_tf32", multiply<Product::tf32_8>},   {"many_loads", many_loads},
};

TensorView words(const void* data, int64_t count) {
  TensorView t;
  t.data = const_cast<void*>(data), t.dtype = DType::i32, t.ndim = 1;
  t.sizes[0] = count, t.strides[0] = 1;
  return t;
}

}  // namespace
}  // namespace llmengine

// Runs `name` with `blocks` blocks on arrays of words that the device can reach; what went wrong, or null. `times`
// is how often those instructions run that can be repeated.
extern "C" __attribute__((visibility("default"))) const char* run_layout(const char* name, const uint32_t* in,
                                                                         int64_t in_words, uint32_t* out,
                                                                         int64_t out_words, int blocks, int times) {
  using namespace llmengine;
  static std::string problem;
  const TensorView given = words(in, in_words);
  const cuda::LaunchSite site{name, dim3(static_cast<unsigned>(blocks)), dim3(32), nullptr, given};
  try {
#ifndef __CUDACC__
    const sim::Tensors touchable({{"in", given}, {"out", words(out, out_words)}});
#endif
    if (const auto found = kKernels.find(name); found != kKernels.end()) {
      cuda::launch(site, found->second, in, out);
    } else {
      cuda::launch(site, kRepeated.at(name), in, out, times);
    }
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}

#ifndef __CUDACC__
extern "C" __attribute__((visibility("default"))) void set_schedule(const char* order, uint64_t seed) {
  llmengine::sim::set_schedule(order, seed);
}
#endif
