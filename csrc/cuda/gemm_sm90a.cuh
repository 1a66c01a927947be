// The product that kernels with matrices share on Hopper: c = a b over a depth k, in float32 sums of bf16 or fp16
// operands, and an epilogue of the kernel's own (gemm_sm90a.cu, ffn_sm90a.cu, linear_cross_entropy_sm90a.cu).
//
//     block 0 of a cluster         block 1        Two blocks run together, one below the other: their columns of b are
//   +---------------------+                       the same, so each fetches half of them and sends it to both. A block
//   |  64 x n   warpgroup 1|   the same, of        owns 128 x n of c (n 256 or 128) in registers, a warpgroup 64 x n of
//   +---------------------+   the 128 rows         them (n / 2 a thread). Warpgroup 0 has one thread at work, which
//   |  64 x n   warpgroup 2|   below               keeps a ring of stages full, 64 of k each; what it needs not of
//   +---------------------+                       registers the others take.
//
//   full[s]    a stage's bytes have come: wait for it, multiply (four products of 16 of k), keep one group in flight
//   empty[s]   both warpgroups of both blocks have multiplied what was in the stage: it is fetched into again
//
//   Blocks are persistent: each takes tile after tile, and the ring goes on through them, so that a tile's first stages
//   come while the last one's sums go through the epilogue. It has them as they lie (StoreBoxes: rounded to 16 bits, by
//   panels of 64 columns through shared memory, stored by the asynchronous unit), or as vectors of eight columns of a
//   row (each_vector). What lies past an edge comes as zeros; boxes leave it out.
//
//   Of a gate, half of b's lines are those of one weight and half of the other (`pair`): each block fetches one half,
//   and a thread has both sums of a unit. A second product, a2 b2, goes on where k of the first ends. A cluster may go
//   along a span of columns at the same rows, and k may be cut into parts (gemm.h).
//
//   An operand lies `along` k (its lines are rows of k) or `across` it (a row for each k): a stage holds lines of 64 k,
//   or panels of 64 lines with a row for each k; both are 128 bytes a row, swizzled, and wgmma reads either.
//
//   flops   2 m n k
//   bytes   a stage of 128 x n: (128 + n / 2) 64 2 from the second-level cache, for 2 128 n 64 flops: 128 flops a byte
//           at n = 256. Shared memory is read by wgmma: 64 x 16 and 16 x n for 64 x n x 16.
//   limit   the tensor cores: 4096 dense flops of bf16 a clock and multiprocessor
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/convert.cuh"
#include "cuda/ptx/matrix.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tensor_copy.cuh"
#include "cuda/ptx/warp.cuh"
#include "cuda/reduce.cuh"
#include "cuda/row.cuh"
#include "cuda/wgmma_tile.cuh"

namespace llmengine::cuda::gemm_sm90a {

inline constexpr int kCluster = 2, kWarpgroups = 2;  // blocks of a cluster; warpgroups of a block that multiply
inline constexpr int kThreads = 128 * (1 + kWarpgroups);
inline constexpr int kRows = 64 * kWarpgroups;       // of a block's tile
inline constexpr int kDepth = 64, kPerProduct = 16;  // of k, in a stage and in a product
inline constexpr int kStages = 4;
inline constexpr int kGroup = 8;  // rows of clusters' tiles that run side by side

// A warpgroup's, for its epilogue: two panels of 64 x 64 in 16 bits, or for each warp one of 16 x 64 floats.
union Room {
  uint16_t boxes[2][64 * kPanel];
  float floats[4][16 * kPanel];
};

template <int columns>
struct Shared {
  uint16_t a[kStages][kRows * kDepth];
  uint16_t b[kStages][columns * kDepth];
  Room rooms[kWarpgroups];
  ptx::Mbarrier full[kStages], empty[kStages];

  __device__ __forceinline__ Room& room(int group) { return rooms[group]; }
  static constexpr int kStageBytes = (kRows + columns) * kDepth * 2;
};

struct Operands {
  ptx::TensorMap a[2], b[2];  // of one product and another, or a and the two sides of a pair
};

// What a cluster does between two looks at its number: rows of a tile, columns [column, end), steps [from, to) of k.
struct Item {
  int row, column, end, from, to, part, span;
};

// Which items there are: clusters' rows of 2 x 128; columns of n, so many of them one after the other; parts of k.
struct Tiles {
  int rows, columns, steps;  // of tiles; of k, in all products
  int steps_of_product;      // k of the first product ends there
  int span = 1, parts = 1;

  __device__ __forceinline__ int spans() const { return (columns + span - 1) / span; }
  __device__ __forceinline__ int count() const { return rows * spans() * parts; }
  // They run down kGroup rows, then to the next column: clusters that run at once share operands in the cache.
  __device__ __forceinline__ Item item(int number) const {
    const int across = spans(), part = number / (rows * across), tile = number - part * rows * across;
    const int group = tile / (kGroup * across), first = group * kGroup;
    const int height = rows - first < kGroup ? rows - first : kGroup, within = tile - group * kGroup * across;
    const int column = within / height * span, each = (steps + parts - 1) / parts;
    const auto at_most = [](int x, int most) { return x < most ? x : most; };
    return {first + within % height,
            column,
            at_most(column + span, columns),
            part * each,
            at_most((part + 1) * each, steps),
            part,
            within / height};
  }
};

// Where a thread is in the ring of stages.
struct Turn {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ int cluster_of_block() { return static_cast<int>(blockIdx.x) / kCluster; }
__device__ __forceinline__ int clusters() { return static_cast<int>(gridDim.x) / kCluster; }

// ---- the thread that fetches ----------------------------------------------------------------------------------------

// Lines [first, first + lines) at `k` of depth, into a stage that begins with line 0; `blocks` 0: for this block.
template <bool across>
__device__ __forceinline__ void fetch(uint16_t* to, const ptx::TensorMap& map, ptx::Mbarrier* full, int first, int k,
                                      int lines, uint16_t blocks) {
  const auto copy = [&](uint16_t* place, int x, int y) {
    if (blocks == 0) {
      ptx::copy_tensor(place, &map, full, x, y);
    } else {
      ptx::copy_tensor_multicast(place, &map, full, blocks, x, y);
    }
  };
  if constexpr (across) {
    for (int l = 0; l < lines; l += kPanel) copy(to + l * kDepth, first + l, k);
  } else {
    copy(to, k, first);
  }
}

// `depth`: of k, in the 128 bytes of a stage's lines.
template <int columns, bool a_across, bool b_across, bool pair, int depth = kDepth>
__device__ __forceinline__ void fetch_all(Shared<columns>& shared, const Operands& operands, const Tiles& tiles) {
  constexpr int kShare = columns / kCluster;  // of b's lines, that this block fetches for all
  constexpr uint16_t kAll = (1 << kCluster) - 1;
  const int block = ptx::block_in_cluster();
  for (const auto* map : {&operands.a[0], &operands.b[0], &operands.b[1]}) ptx::prefetch_tensor_map(map);
  Turn turn;
  for (int number = cluster_of_block(); number < tiles.count(); number += clusters()) {
    const Item item = tiles.item(number);
    for (int column = item.column; column < item.end; ++column)
      for (int step = item.from; step < item.to; ++step, turn.next()) {
        const int product = step >= tiles.steps_of_product, s = turn.stage;
        const int k = (step - product * tiles.steps_of_product) * depth;
        const int line = pair ? column * kShare : column * columns + block * kShare;
        ptx::mbarrier_wait_cluster(&shared.empty[s], turn.parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(&shared.full[s], Shared<columns>::kStageBytes);
        fetch<a_across>(shared.a[s], operands.a[product], &shared.full[s], (item.row * kCluster + block) * kRows, k,
                        kRows, 0);
        fetch<b_across>(shared.b[s] + block * kShare * kDepth, operands.b[pair ? block : product], &shared.full[s],
                        line, k, kShare, kAll);
      }
  }
}

// ---- the warpgroups that multiply -----------------------------------------------------------------------------------

template <bool across>
inline constexpr auto kMajor = across ? ptx::Major::mn : ptx::Major::k;

// From panel to panel of lines that lie across k.
inline constexpr int kPanelBytes = kDepth * 128;
// From one product's part of k to the next one's.
template <bool across>
inline constexpr int kAdvance = across ? kPerProduct * 128 : kPerProduct * 2;

template <class T, bool a_across, bool b_across, int count>
__device__ __forceinline__ void multiply_stage(float (&d)[count], const uint16_t* a, const uint16_t* b, bool add) {
  const auto left = ptx::matrix_descriptor(a, kPanelBytes, kEightRows, Swizzle::bytes_128);
  const auto right = ptx::matrix_descriptor(b, kPanelBytes, kEightRows, Swizzle::bytes_128);
#pragma unroll
  for (int part = 0; part < kDepth / kPerProduct; ++part) {
    ptx::wgmma<kMultiplicand<T>, kMajor<a_across>, kMajor<b_across>>(
        d, left.advanced(part * kAdvance<a_across>), right.advanced(part * kAdvance<b_across>), add || part > 0);
  }
}

// One thread a warpgroup, to the fetching threads of all blocks.
__device__ __forceinline__ void give_back(ptx::Mbarrier* empty) {
  if (threadIdx.x % 128 != 0) return;
  for (int block = 0; block < kCluster; ++block) ptx::mbarrier_arrive_cluster(ptx::map_to_block(empty, block));
}

// Where a warpgroup's 64 rows of a tile lie in c, and what part of k it has of them.
struct Place {
  int row, column, part, span;
};

// An epilogue has these; `finish` is called for each tile of an item, between the other two.
struct NoBeginNorEnd {
  __device__ __forceinline__ void begin(const Place&) {}
  __device__ __forceinline__ void end(const Place&) {}
};

template <class T, int columns, bool a_across, bool b_across, class Epilogue>
__device__ __forceinline__ void multiply_all(Shared<columns>& shared, const Tiles& tiles, Epilogue epilogue) {
  const int group = static_cast<int>(threadIdx.x) / 128 - 1, block = ptx::block_in_cluster();
  Turn turn;
  for (int number = cluster_of_block(); number < tiles.count(); number += clusters()) {
    const Item item = tiles.item(number);
    Place place{(item.row * kCluster + block) * kRows + group * 64, 0, item.part, item.span};
    epilogue.begin(place);
    for (int column = item.column; column < item.end; ++column) {
      float d[columns / 2];
      int before = 0;  // the stage whose products may be under way
      for (int step = item.from; step < item.to; ++step, turn.next()) {
        const int s = turn.stage;
        ptx::mbarrier_wait(&shared.full[s], turn.parity);
        ptx::wgmma_fence();
        multiply_stage<T, a_across, b_across>(d, shared.a[s] + group * 64 * kDepth, shared.b[s], step > item.from);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (step > item.from) give_back(&shared.empty[before]);
        before = s;
      }
      ptx::wgmma_wait<0>(d);
      give_back(&shared.empty[before]);
      place.column = column * columns;
      epilogue.finish(d, shared.room(group), place);
    }
    epilogue.end(place);
  }
  if (threadIdx.x % 128 == 0) ptx::wait_store_reads<0>();
}

// The whole of a kernel: one thread does what `fetching` is, the warpgroups that multiply what `multiplying` is.
template <int columns, class Fetching, class Multiplying>
__device__ __forceinline__ void share_work(Shared<columns>& shared, const Fetching& fetching,
                                           const Multiplying& multiplying) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::mbarrier_init(&shared.full[s], 1);
      ptx::mbarrier_init(&shared.empty[s], kWarpgroups * kCluster);
    }
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_sync();
  if (warp < 4) {
    ptx::decrease_registers<kFewRegisters>();
    if (warp == 0 && ptx::elect_one()) fetching();
  } else {
    ptx::increase_registers<kManyRegisters>();
    multiplying();
  }
  ptx::cluster_sync();  // no block ends while the other arrives at its mbarriers
}

template <class T, int columns, bool a_across, bool b_across, bool pair, class Epilogue>
__device__ __forceinline__ void multiply(Shared<columns>& shared, const Operands& operands, const Tiles& tiles,
                                         const Epilogue& epilogue) {
  share_work(
      shared, [&] { fetch_all<columns, a_across, b_across, pair>(shared, operands, tiles); },
      [&] { multiply_all<T, columns, a_across, b_across>(shared, tiles, epilogue); });
}

// ---- epilogues ------------------------------------------------------------------------------------------------------

// A warpgroup's sums as boxes of a 16-bit matrix, panel by panel, with a bias.
template <class T>
struct StoreBoxes : NoBeginNorEnd {
  const ptx::TensorMap& out;
  const Line& bias;
  int columns;

  template <int count>
  __device__ __forceinline__ void finish(float (&d)[count], Room& room, const Place& place) {
    const int t = static_cast<int>(threadIdx.x) % 128, lane = t % 32, group = static_cast<int>(threadIdx.x) / 128;
    const int line = t / 32 * 16 + lane % 16;  // that this lane names to stmatrix
    if (bias.data) add_bias(d, place.column + lane % 4 * 2);
#pragma unroll
    for (int p = 0; p < count * 2 / kPanel; ++p) {
      if (t == 0) ptx::wait_store_reads<1>();
      ptx::barrier_sync(group, 128);
      uint16_t* panel = room.boxes[p % 2];
#pragma unroll
      for (int c = 0; c < kPanel / 8; c += 2) {
        const float* sums = d + p * (kPanel / 2) + 4 * c;
        const uint32_t r[4] = {pair_of<T>(sums[0], sums[1]), pair_of<T>(sums[2], sums[3]), pair_of<T>(sums[4], sums[5]),
                               pair_of<T>(sums[6], sums[7])};
        ptx::store_matrix_x4(panel + line * kPanel + ((c + lane / 16) ^ line % 8) * 8, r);
      }
      ptx::fence_async_shared();
      ptx::barrier_sync(group, 128);
      if (t == 0) {
        ptx::store_tensor(&out, panel, place.column + p * kPanel, place.row);
        ptx::commit_stores();
      }
    }
  }

  template <int count>
  __device__ __forceinline__ void add_bias(float (&d)[count], int first) const {
#pragma unroll
    for (int j = 0; j < count / 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first + 8 * j + i;
        if (column >= columns) continue;
        const float b = bias.is_float ? static_cast<const float*>(bias.data)[column]
                                      : to_float(static_cast<const T*>(bias.data)[column]);
        d[4 * j + i] += b, d[4 * j + 2 + i] += b;
      }
  }
};

// A warp's part of the room: 16 rows of 64 columns, as floats. Of a row's chunks of four the even ones come first;
// chunks change places by row and by evenness, so that neither the pairs that a thread writes nor the chunks that it
// reads meet in a bank.
struct FloatPanel {
  float* data;

  __device__ explicit FloatPanel(Room& room) : data(room.floats[threadIdx.x / 32 % 4]) {}

  __device__ __forceinline__ float* chunk(int row, int c) const {
    return data + row * kPanel + c % 2 * (kPanel / 2) + (c / 2 ^ c % 2 ^ row % 4 * 2) * 4;
  }
  // 64 / sides columns of each side, from the accumulators' element `first` of a side on.
  template <int sides, int count>
  __device__ __forceinline__ void store(const float (&d)[count], int first) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int j = 0; j < kPanel / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int side = j / (kPanel / 8 / sides), of_side = j % (kPanel / 8 / sides);
        const float* sums = d + side * (count / sides) + first + 4 * of_side + 2 * half;
        *reinterpret_cast<uint2*>(chunk(8 * half + lane / 4, 2 * j + lane % 4 / 2) + lane % 2 * 2) =
            make_uint2(__float_as_uint(sums[0]), __float_as_uint(sums[1]));
      }
  }
  __device__ __forceinline__ void load(int row, int vector, float (&x)[8]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = *reinterpret_cast<const float4*>(chunk(row, 2 * vector + half));
      x[4 * half] = four.x, x[4 * half + 1] = four.y, x[4 * half + 2] = four.z, x[4 * half + 3] = four.w;
    }
  }
};

// body(row, column, x, loaded) for each vector, as each_vector of gemm_sm80.cuh: row is counted in the warpgroup's 64,
// column in the tile. A thread's vectors of a panel have one column; after(column) ends the panel.
template <int sides, int batch, int count, class Load, class Body, class After>
__device__ __forceinline__ void each_vector(float (&d)[count], Room& room, const Load& load, const Body& body,
                                            const After& after) {
  constexpr int kColumns = kPanel / sides, kVectors = kColumns / 8, kAtOnce = 32 / kVectors;
  constexpr int kSide = count / sides, kPart = kColumns / 2;  // registers of a side, and of its part of a panel
  static_assert(16 % (batch * kAtOnce) == 0);
  const FloatPanel panel(room);
  const int lane = static_cast<int>(threadIdx.x) % 32, vector = lane % kVectors;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
#pragma unroll 1
  for (int p = 0; p < kSide / kPart; ++p) {
    const int column = p * kColumns + vector * 8;
    __syncwarp();  // what lay there has been read
#pragma unroll
    for (int q = 0; q < kSide / kPart; ++q) {  // registers have no number at run time
      if (p == q) panel.template store<sides>(d, q * kPart);
    }
    __syncwarp();
#pragma unroll 1
    for (int row = lane / kVectors; row < 16; row += batch * kAtOnce) {
      decltype(load(0, 0)) loaded[batch];
#pragma unroll
      for (int i = 0; i < batch; ++i) loaded[i] = load(warp_row + row + i * kAtOnce, column);
#pragma unroll
      for (int i = 0; i < batch; ++i) {
        float x[sides][8];
#pragma unroll
        for (int side = 0; side < sides; ++side) panel.load(row + i * kAtOnce, vector + side * kVectors, x[side]);
        body(warp_row + row + i * kAtOnce, column, x, loaded[i]);
      }
    }
    after(column);
  }
}

template <int sides, int count, class Body>
__device__ __forceinline__ void each_vector(float (&d)[count], Room& room, const Body& body) {
  struct Nothing {};
  each_vector<sides, 1>(
      d, room, [](int, int) { return Nothing{}; },
      [&](int row, int column, float (&x)[sides][8], Nothing) { body(row, column, x); }, [](int) {});
}

// The sums over a warpgroup's rows of a panel, of which each thread has those that it saw of its vector, into `line` at
// `column`; then zeros. By the whole warpgroup, in each_vector's `after`.
__device__ __forceinline__ void store_column_sums(float (&sums)[8], Room& room, float* line, int column, int columns,
                                                  bool aligned) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const int group = static_cast<int>(threadIdx.x) / 128;
#pragma unroll
  for (int lanes = 8; lanes < 32; lanes *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += __shfl_xor_sync(kWholeWarp, sums[i], lanes);
  }
  __syncwarp();  // the warp's panel has been read
  if (lane < 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) room.floats[warp][i * 8 + lane] = sums[i];
  }
  ptx::barrier_sync(group, 128);
  if (warp == 0 && lane < 8) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int w = 1; w < 4; ++w) sums[i] += room.floats[w][i * 8 + lane];
    }
    store_floats(line, column, columns, aligned, sums);
  }
  ptx::barrier_sync(group, 128);  // the panels may be written again
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[i] = 0.0f;
}

}  // namespace llmengine::cuda::gemm_sm90a
