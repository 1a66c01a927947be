// Kernels around the instructions that sm_90 brought: boxes of tensors, products of warpgroups, clusters. What goes in
// and what comes out are words, which test_hopper.py lays out and expects by itself. A library for the simulator's
// compiler and for nvcc alike: the same test runs on a GPU.
#include <cuda_runtime.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx/async_copy.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/ptx/wgmma.cuh"
#ifndef __CUDACC__
#include "sim/simulator.h"
#endif

namespace llmengine {
namespace {

using ptx::Major;
using ptx::Mbarrier;
using ptx::Multiplicand;
using ptx::TensorMap;

constexpr int kThreads = 128;

// A kernel's numbers, as the test gives them; each says which it takes.
struct Numbers {
  int at[32];
};

// Dynamic shared memory: tiles from its beginning, mbarriers in its last bytes.
struct Shared {
  uint32_t* words;
  Mbarrier* barriers;
};
__device__ __forceinline__ Shared shared_memory(int words) {
  auto* memory = static_cast<uint32_t*>(ptx::dynamic_shared_1024());
  return {memory, reinterpret_cast<Mbarrier*>(memory + words)};
}
constexpr int kBarrierBytes = 64;

__device__ __forceinline__ void begin_mbarrier(Mbarrier* barrier, int arrivals) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, arrivals);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
}

__device__ __forceinline__ void copy_words(uint32_t* to, const uint32_t* from, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) to[i] = from[i];
}

// ---- boxes ----------------------------------------------------------------------------------------------------------

// kSwapped: whether the two dimensions before the last lie in memory the other way round.
enum BoxNumber { kRank, kDtype, kSwizzle, kSizes, kBox = 8, kSteps = 13, kPlace = 18, kSwapped = 23 };

template <class Call>
__device__ __forceinline__ void with_place(const Numbers& n, const Call& call) {
  const int* p = n.at + kPlace;
  if (n.at[kRank] == 1) call(p[0]);
  if (n.at[kRank] == 2) call(p[0], p[1]);
  if (n.at[kRank] == 3) call(p[0], p[1], p[2]);
  if (n.at[kRank] == 4) call(p[0], p[1], p[2], p[3]);
  if (n.at[kRank] == 5) call(p[0], p[1], p[2], p[3], p[4]);
}

// In: a tensor. Out: the words of shared memory that a box of it fills.
__global__ void load_box(const __grid_constant__ TensorMap map, uint32_t* out, int words, Numbers n) {
  const Shared shared = shared_memory(words);
  begin_mbarrier(shared.barriers, 1);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_arrive_expect_tx(shared.barriers, words * 4);
    with_place(n, [&](auto... place) { ptx::copy_tensor(shared.words, &map, shared.barriers, place...); });
  }
  ptx::mbarrier_wait(shared.barriers, 0);
  copy_words(out, shared.words, words);
}

// In: the words of shared memory. Out: a tensor, into which a box goes, or to which it is added, twice.
template <bool adds>
__global__ void store_box(const __grid_constant__ TensorMap map, const uint32_t* in, int words, Numbers n) {
  const Shared shared = shared_memory(words);
  copy_words(shared.words, in, words);
  if (n.at[kRank] == 1) {
    ptx::fence_async();
  } else {
    ptx::fence_async_shared();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int time = 0; time < (adds ? 2 : 1); ++time) {
      with_place(n, [&](auto... place) {
        if constexpr (adds) {
          ptx::add_tensor(&map, shared.words, place...);
        } else {
          ptx::store_tensor(&map, shared.words, place...);
        }
      });
    }
    ptx::commit_stores();
    ptx::wait_store_reads<0>();
    ptx::wait_stores<0>();
  }
}

// In: floats. Out: the same, twice the same, and their bits, added to themselves as integers.
__global__ void store_in_bulk(const uint32_t* in, uint32_t* out, int words) {
  const Shared shared = shared_memory(words);
  copy_words(shared.words, in, words);
  ptx::fence_async_shared();
  __syncthreads();
  if (threadIdx.x != 0) return;
  ptx::store_bulk(out, shared.words, words * 4);
  ptx::store_bulk(out + words, shared.words, words * 4);
  ptx::store_bulk(out + 2 * words, shared.words, words * 4);
  ptx::commit_stores();
  ptx::wait_stores<0>();
  ptx::add_bulk(reinterpret_cast<float*>(out + words), reinterpret_cast<const float*>(shared.words), words * 4);
  ptx::add_bulk(reinterpret_cast<int32_t*>(out + 2 * words), reinterpret_cast<const int32_t*>(shared.words), words * 4);
  ptx::commit_stores();
  ptx::wait_store_reads<0>();
}

// ---- products -------------------------------------------------------------------------------------------------------

// kSwizzleMode for both operands; offsets in bytes; kProducts: products, from one to the next of which descriptors
// advance; kBehind: where both tiles' patterns begin, beyond where they repeat.
enum ProductNumber {
  kSwizzleMode,
  kAWords,
  kBWords,
  kALeading,
  kAStride,
  kBLeading,
  kBStride,
  kAdd,
  kProducts,
  kAAdvance,
  kBAdvance,
  kBehind
};

// In: the words of a and of b in shared memory; registers of a (4 a thread), of every product; d, n / 2 a thread.
// Out: d.
template <Multiplicand element, int n, bool registers, Major a_major, Major b_major>
__global__ void __launch_bounds__(kThreads, 1) multiply(const uint32_t* in, uint32_t* out, Numbers numbers) {
  const int* v = numbers.at;
  const int words = v[kAWords] + v[kBWords], t = static_cast<int>(threadIdx.x);
  auto* tiles = static_cast<uint32_t*>(ptx::dynamic_shared_1024());
  copy_words(tiles, in, words);
  ptx::fence_async_shared();
  __syncthreads();
  const auto swizzle = static_cast<Swizzle>(v[kSwizzleMode]);
  const int behind = v[kBehind] / 4, base = v[kBehind] / 128 % 8;
  const auto a = ptx::matrix_descriptor(tiles + behind, v[kALeading], v[kAStride], swizzle, base);
  const auto b = ptx::matrix_descriptor(tiles + v[kAWords] + behind, v[kBLeading], v[kBStride], swizzle, base);
  const uint32_t* of_a = in + words;
  const uint32_t* of_d = of_a + v[kProducts] * 4 * kThreads;
  float d[n / 2];
  for (int i = 0; i < n / 2; ++i) d[i] = __uint_as_float(of_d[t * (n / 2) + i]);
  if constexpr (!registers) ptx::wgmma_fence(d);
  for (int step = 0; step < v[kProducts]; ++step) {
    const auto b_now = b.advanced(step * v[kBAdvance]);
    const bool add = v[kAdd] != 0 || step > 0;
    if constexpr (registers) {
      uint32_t fragment[4];
      for (int i = 0; i < 4; ++i) fragment[i] = of_a[(step * kThreads + t) * 4 + i];
      ptx::wgmma_fence(d);
      ptx::wgmma<element, b_major>(d, fragment, b_now, add);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>(d);
    } else {
      ptx::wgmma<element, a_major, b_major>(d, a.advanced(step * v[kAAdvance]), b_now, add);
      ptx::wgmma_commit();
    }
  }
  ptx::wgmma_wait<0>(d);
  for (int i = 0; i < n / 2; ++i) out[t * (n / 2) + i] = __float_as_uint(d[i]);
}

// ---- clusters -------------------------------------------------------------------------------------------------------

// In: 2 x 64 words a block of two. Out: each block's shared memory, 2 x 64 words a block: every block brings its own
// rows to both.
__global__ void multicast(const __grid_constant__ TensorMap map, uint32_t* out) {
  const Shared shared = shared_memory(256);
  begin_mbarrier(shared.barriers, 1);
  const int block = ptx::block_in_cluster(), blocks = ptx::blocks_of_cluster();
  const int cluster = static_cast<int>(blockIdx.x) / blocks;
  if (threadIdx.x == 0) {
    ptx::mbarrier_expect_tx(shared.barriers, 256 * 4);
    ptx::mbarrier_arrive(shared.barriers);
  }
  ptx::cluster_sync();
  if (threadIdx.x == 0) {
    ptx::copy_tensor_multicast(shared.words + block * 128, &map, shared.barriers, 3, 0, (cluster * 2 + block) * 2);
  }
  ptx::mbarrier_wait(shared.barriers, 0);
  copy_words(out + blockIdx.x * 256, shared.words, 256);
  ptx::cluster_sync();
}

// In: 32 words a block. Out: those of the block before, in a ring, which writes them here, plus those of the block
// after, which are read there; in words of 4 or of 16 bytes.
template <bool wide>
__global__ void ring(const uint32_t* in, uint32_t* out) {
  constexpr int threads = wide ? 8 : 32, each = 32 / threads;
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  const Shared shared = shared_memory(64);
  begin_mbarrier(shared.barriers, threads);
  const int block = ptx::block_in_cluster(), blocks = ptx::blocks_of_cluster(), t = static_cast<int>(threadIdx.x);
  if (t < 32) shared.words[32 + t] = in[blockIdx.x * 32 + t];
  ptx::cluster_sync();
  const int next = (block + 1) % blocks;
  if (t < threads) {
    const uint32_t* mine = shared.words + 32 + t * each;
    const auto to = ptx::map_to_block(shared.words, next) + t * each * 4;
    const auto from = ptx::map_to_block(shared.words + 32, next) + t * each * 4;
    uint32_t theirs[each];
    if constexpr (wide) {
      ptx::store_cluster_16(to, make_uint4(mine[0], mine[1], mine[2], mine[3]));
      const uint4 word = ptx::load_cluster_16(from);
      theirs[0] = word.x, theirs[1] = word.y, theirs[2] = word.z, theirs[3] = word.w;
    } else {
      ptx::store_cluster_4(to, mine[0]);
      theirs[0] = ptx::load_cluster_4(from);
    }
    ptx::mbarrier_release_cluster(ptx::map_to_block(shared.barriers, next));
    ptx::mbarrier_wait_cluster(shared.barriers, 0);
    for (int i = 0; i < each; ++i) out[blockIdx.x * 32 + t * each + i] = shared.words[t * each + i] + theirs[i];
  }
  ptx::cluster_sync();
}

// ---- warps ----------------------------------------------------------------------------------------------------------

// Four warpgroups, of which three give registers up and one takes them. Out: one number a warp, by the lane elected.
__global__ void __launch_bounds__(512, 1) registers(uint32_t* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp / 4 == 0) {
    ptx::increase_registers<240>();
  } else {
    ptx::decrease_registers<40>();
  }
  uint32_t mine = ptx::elect_one();
  const uint32_t first = mine;
  mine += ptx::elect_one();
  for (int lanes = 16; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, lanes);
  if (first) out[warp] = mine;
}

// In: 128 words. Out: the same, copied by the first warp's lanes, whose copies arrive, and read by the others.
template <bool counted>
__global__ void arriving_copies(const uint32_t* in, uint32_t* out) {
  __shared__ uint4 tile[32];
  __shared__ Mbarrier full;
  begin_mbarrier(&full, counted ? 32 : 1);
  const int t = static_cast<int>(threadIdx.x);
  if (t < 32) {
    ptx::copy_async_16(tile + t, in + 4 * t);
    if constexpr (counted) {
      ptx::mbarrier_arrive_for_copies(&full);
    } else {
      ptx::mbarrier_arrive_also_for_copies(&full);
      __syncwarp();
      if (t == 0) ptx::mbarrier_arrive(&full);
    }
  }
  ptx::mbarrier_wait(&full, 0);
  out[t] = reinterpret_cast<const uint32_t*>(tile)[127 - t];
}

// ---- the library ----------------------------------------------------------------------------------------------------

struct Arrays {
  const uint32_t* in;
  int64_t in_words;
  uint32_t* out;
  int64_t out_words;
  Numbers numbers;
};

TensorView words(const void* data, int64_t count) {
  TensorView t;
  t.data = const_cast<void*>(data), t.dtype = DType::i32, t.ndim = 1;
  t.sizes[0] = count, t.strides[0] = 1;
  return t;
}

TensorMapFields box_map(void* data, const Numbers& n) {
  const int rank = n.at[kRank];
  TensorView tensor;
  tensor.data = data, tensor.dtype = static_cast<DType>(n.at[kDtype]), tensor.ndim = rank;
  std::vector<int> box, steps;
  int64_t stride = 1;
  for (int d = rank - 1; d >= 0; --d) {
    tensor.sizes[d] = n.at[kSizes + d], tensor.strides[d] = stride;
    stride *= tensor.sizes[d];
  }
  if (n.at[kSwapped]) {
    const int inner = rank - 2, outer = rank - 3;
    tensor.strides[outer] = tensor.strides[inner], tensor.strides[inner] *= tensor.sizes[outer];
  }
  for (int d = 0; d < rank; ++d) box.push_back(n.at[kBox + d]), steps.push_back(n.at[kSteps + d]);
  return tensor_map_fields("tensor", tensor, box, static_cast<Swizzle>(n.at[kSwizzle]), steps);
}

template <class... Parameters, class... Given>
void start(const Arrays& a, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int64_t words_of_shared,
           unsigned cluster, const Given&... given) {
  const TensorView operand = words(a.in, a.in_words);
  const cuda::LaunchSite site{"layout",     dim3(blocks), dim3(threads),
                              nullptr,      operand,      static_cast<size_t>(words_of_shared * 4 + kBarrierBytes),
                              dim3(cluster)};
  cuda::launch(site, kernel, given...);
}

template <Multiplicand element, int n, bool registers, Major a_major, Major b_major>
void start_product(const Arrays& a) {
  start(a, multiply<element, n, registers, a_major, b_major>, 1, kThreads,
        a.numbers.at[kAWords] + a.numbers.at[kBWords], 1, a.in, a.out, a.numbers);
}

using Run = std::function<void(const Arrays&)>;

template <Multiplicand element>
void add_products(std::map<std::string, Run>& runs, const std::string& type) {
  constexpr Major k = Major::k, mn = Major::mn;
  runs[type + "_64_k_k"] = start_product<element, 64, false, k, k>;
  runs[type + "_64_registers_k"] = start_product<element, 64, true, k, k>;
  if constexpr (element < Multiplicand::tf32) {
    runs[type + "_64_k_mn"] = start_product<element, 64, false, k, mn>;
    runs[type + "_64_mn_k"] = start_product<element, 64, false, mn, k>;
    runs[type + "_64_mn_mn"] = start_product<element, 64, false, mn, mn>;
    runs[type + "_64_registers_mn"] = start_product<element, 64, true, k, mn>;
  }
}

template <int n>
void add_width(std::map<std::string, Run>& runs) {
  runs["bf16_" + std::to_string(n) + "_k_k"] = start_product<Multiplicand::bf16, n, false, Major::k, Major::k>;
  runs["bf16_" + std::to_string(n) + "_registers_k"] = start_product<Multiplicand::bf16, n, true, Major::k, Major::k>;
  runs["bf16_" + std::to_string(n) + "_registers_mn"] = start_product<Multiplicand::bf16, n, true, Major::k, Major::mn>;
}

const std::map<std::string, Run>& all_runs() {
  static const auto runs = [] {
    std::map<std::string, Run> all;
    all["load_box"] = [](const Arrays& a) {
      const auto map = ptx::encode_tensor_map(box_map(const_cast<uint32_t*>(a.in), a.numbers));
      start(a, load_box, 1, kThreads, a.out_words, 1, map, a.out, static_cast<int>(a.out_words), a.numbers);
    };
    all["add_box"] = [](const Arrays& a) {
      const auto map = ptx::encode_tensor_map(box_map(a.out, a.numbers));
      start(a, store_box<true>, 1, kThreads, a.in_words, 1, map, a.in, static_cast<int>(a.in_words), a.numbers);
    };
    all["store_in_bulk"] = [](const Arrays& a) {
      start(a, store_in_bulk, 1, kThreads, a.in_words, 1, a.in, a.out, static_cast<int>(a.in_words));
    };
    all["store_box"] = [](const Arrays& a) {
      const auto map = ptx::encode_tensor_map(box_map(a.out, a.numbers));
      start(a, store_box<false>, 1, kThreads, a.in_words, 1, map, a.in, static_cast<int>(a.in_words), a.numbers);
    };
    all["multicast"] = [](const Arrays& a) {
      TensorView rows = words(a.in, a.in_words);
      rows.ndim = 2, rows.sizes[0] = a.in_words / 64, rows.sizes[1] = 64, rows.strides[0] = 64, rows.strides[1] = 1;
      const auto map = ptx::encode_tensor_map(tensor_map_fields("rows", rows, {2, 64}, Swizzle::none));
      start(a, multicast, static_cast<unsigned>(a.in_words / 128), kThreads, 256, 2, map, a.out);
    };
    all["ring"] = [](const Arrays& a) {
      start(a, ring<false>, static_cast<unsigned>(a.in_words / 32), kThreads, 64, 4, a.in, a.out);
    };
    all["wide_ring"] = [](const Arrays& a) {
      start(a, ring<true>, static_cast<unsigned>(a.in_words / 32), kThreads, 64, 4, a.in, a.out);
    };
    all["registers"] = [](const Arrays& a) { start(a, registers, 1, 512, 0, 1, a.out); };
    all["arriving_copies"] = [](const Arrays& a) { start(a, arriving_copies<true>, 1, kThreads, 0, 1, a.in, a.out); };
    all["also_arriving_copies"] = [](const Arrays& a) {
      start(a, arriving_copies<false>, 1, kThreads, 0, 1, a.in, a.out);
    };
    add_products<Multiplicand::bf16>(all, "bf16");
    add_products<Multiplicand::f16>(all, "f16");
    add_products<Multiplicand::tf32>(all, "tf32");
    add_products<Multiplicand::e4m3>(all, "e4m3");
    add_products<Multiplicand::e5m2_e4m3>(all, "e5m2_e4m3");
    add_width<8>(all);
    add_width<16>(all);
    add_width<32>(all);
    add_width<96>(all);
    add_width<128>(all);
    add_width<192>(all);
    add_width<256>(all);
    return all;
  }();
  return runs;
}

}  // namespace
}  // namespace llmengine

// Runs `name` on arrays of words that the device can reach, with 32 numbers; what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* run_layout(const char* name, const uint32_t* in,
                                                                         int64_t in_words, uint32_t* out,
                                                                         int64_t out_words, const int* numbers) {
  using namespace llmengine;
  static std::string problem;
  Arrays arrays{in, in_words, out, out_words, {}};
  std::copy(numbers, numbers + 32, arrays.numbers.at);
  try {
#ifndef __CUDACC__
    const sim::Tensors touchable({{"in", words(in, in_words)}, {"out", words(out, out_words)}});
#endif
    all_runs().at(name)(arrays);
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
