// Attention, forward, on Hopper with products of 8-bit floats: blocks, rings and turns of attention_sm90a_forward.cu,
// over tiles of bytes (attention_fp8.h).
//
//   A warpgroup has 64 query rows; of every 128 keys
//
//     S = Q K^T                        8 bits, the sums of 32 to 256 products as they come
//     P = 2^8 exp(scale q k S - max)   in float32, q and k the scales of both tiles; rounded to e4m3 in registers
//     O = O rescaling + v (P V)        in float32, v the scale of V's tile
//     sum = sum rescaling + P 1        by the product, too: eight rows of ones lie behind V's columns
//
//   The tensor cores add 8-bit products with about 14 bits (ptx/wgmma.cuh): so O is added up by the warpgroup itself,
//   and no sum of theirs is of more than 128 products of P V, or a head dim's of Q K^T. P is at most 256, so that it is
//   exact to e4m3's 2^-4 down to 2^-14 of the largest and vanishes below 2^-17. O is divided by the sum of what V was
//   weighed with: weights sum to 1, and what values have in common is not lost to P's rounding. lse is that sum's.
//
//   Sums lie in registers by columns 2t, 2t + 1 of 8, an 8-bit operand by 4t .. 4t + 3 of 16 (t a lane of four): V's
//   tiles have their keys in that order, so that nothing is exchanged between lanes.
//
//   O, the part that is added to it and the scores want all registers: so products of a warpgroup follow one another,
//   and lie under the other one's exponentials. Warpgroups take turns at those.
//
//   query_full[q], key_full[s], value_full[s]   bytes have come
//   query_free[q]                               every warp has stored what it made of the queries, by way of their
//   place, of which they take half
//   key_free[s], value_free[s]                  every warpgroup has multiplied them
//
//   flops   4 rows keys D a tile, at 8192 a clock and multiprocessor
//   bytes   2 D a key and block, from the second-level cache: 128 rows do 256 flops a byte
//   limit   exponentials, 16 a clock: as long as the products at head dim 128, twice as long at 64, half at 256.
//           Beside them a score wants half an instruction to become a byte, and a number of O a multiply-add a step
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda/attention_forward.cuh"
#include "cuda/attention_fp8.h"
#include "cuda/attention_sm90a_forward.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/warp.cuh"

namespace llmengine::cuda {
namespace attention {
namespace {

constexpr int kLift = 8;  // P is at most 2^8
constexpr int kOnes = 8;  // rows of ones: the least columns of a product

template <int D>
struct Shape {
  static constexpr int groups = 2, rows = kByteRows, threads = 128 * (1 + groups);
  static constexpr int columns = D, keys = keys_of_step(D);
  static constexpr int stages = 4, queries = D <= 128 ? 2 : 1;
  static constexpr bool by_turns = true;
  static constexpr int query_bytes = kGroupRows * D, step_bytes = keys * D;  // of a warpgroup; of keys, or of values
  static constexpr int panel = D < 128 ? D : 128;  // columns, bytes, of a row of queries and of keys
  static constexpr int part = D < 128 ? D : 128;   // columns of O that are added to at once: all, or half
};

template <class S>
struct Shared {
  uint8_t query[S::queries][S::groups][2 * S::query_bytes];  // queries, then outputs of 16 bits
  uint8_t key[S::stages][S::step_bytes];
  struct {
    uint8_t numbers[S::step_bytes], ones[kOnes * S::keys];
  } value[S::stages];
  ptx::Mbarrier query_full[S::queries], query_free[S::queries];
  ptx::Mbarrier key_full[S::stages], key_free[S::stages];
  ptx::Mbarrier value_full[S::stages], value_free[S::stages];
  Place taken[S::queries];  // whose queries these are, to be read between query_full and query_free
};

// Tiles of a tensor.
struct Bytes {
  const uint8_t* numbers;
  const float* scales;
  int heads, tokens;

  __device__ __forceinline__ int64_t number(const Sizes& sizes, const Sequence& s, int token0, int token,
                                            int head) const {
    const int first = first_place(s.index, token0, tokens, kByteRows, sizes.cu_seqlens_q != nullptr);
    return static_cast<int64_t>(first + token / kByteRows) * heads + head;
  }
};

template <class T>
struct Forward {
  Results<T> results;
  Options options;
  Seen seen;  // all
  Sizes sizes;
  Turns turns;
  Bytes query, key, value;
  float factor;  // of products of queries and keys, but for their scales

  __device__ __forceinline__ int64_t tile_of_queries(const RowsWork& w) const {
    return query.number(sizes, w.s, w.s.row0, w.first, w.head);
  }
  __device__ __forceinline__ int64_t tile_of_keys(const RowsWork& w, int from) const {
    return key.number(sizes, w.s, w.s.key0, from, w.head / sizes.group);
  }
};

// ---- the warp that fetches ------------------------------------------------------------------------------------------

template <class S, class T>
__device__ __forceinline__ void fetch_all(Shared<S>& shared, const Forward<T>& p) {
  const bool elected = ptx::elect_one();
  Turn<S::stages> turn;
  Turn<S::queries> query;
  int number = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (;; ++query.number) {
    const int stage = query.stage();
    const Place place = p.turns.at(number);
    if (elected) {
      ptx::mbarrier_wait(&shared.query_free[stage], query.parity() ^ 1);
      shared.taken[stage] = place;
    }
    if (place.tile < 0) break;
    const RowsWork w = work_of<S>(p, place);
    if (elected) {
      ptx::Mbarrier* full = &shared.query_full[stage];
      if (w.some()) {
        const uint8_t* from = p.query.numbers + p.tile_of_queries(w) * S::groups * S::query_bytes;
        ptx::mbarrier_arrive_expect_tx(full, S::groups * S::query_bytes);
#pragma unroll
        for (int g = 0; g < S::groups; ++g)
          ptx::copy_bulk(shared.query[stage][g], from + g * S::query_bytes, S::query_bytes, full);
      } else {
        ptx::mbarrier_arrive(full);
      }
#pragma unroll 1
      for (int key = w.begin; key < w.end; key += S::keys, ++turn.number) {
        const int s = turn.stage();
        const int64_t from = (p.tile_of_keys(w, key) * kByteRows + key % kByteRows) * S::columns;
        ptx::mbarrier_wait(&shared.key_free[s], turn.parity() ^ 1);
        ptx::mbarrier_arrive_expect_tx(&shared.key_full[s], S::step_bytes);
        ptx::copy_bulk(shared.key[s], p.key.numbers + from, S::step_bytes, &shared.key_full[s]);
        ptx::mbarrier_wait(&shared.value_free[s], turn.parity() ^ 1);
        ptx::mbarrier_arrive_expect_tx(&shared.value_full[s], S::step_bytes);
        ptx::copy_bulk(shared.value[s].numbers, p.value.numbers + from, S::step_bytes, &shared.value_full[s]);
      }
    }
    __syncwarp();
    number = p.turns.draw(elected);
  }
  if (elected) ptx::mbarrier_arrive(&shared.query_full[query.stage()]);
}

// ---- the warpgroups that multiply -----------------------------------------------------------------------------------

// Rows of 64 or 128 bytes.
constexpr Swizzle swizzle_of(int row) { return row == 128 ? Swizzle::bytes_128 : Swizzle::bytes_64; }

// x = queries keys^T, begun.
template <class S, int D>
__device__ __forceinline__ void begin_scores(Sums<1, S::keys>& x, const uint8_t* queries, const uint8_t* keys) {
  const auto a = ptx::matrix_descriptor(queries, 0, 8 * S::panel, swizzle_of(S::panel));
  const ptx::MatrixDescriptor here{ptx::made_here(a.bits)};
  const auto b = ptx::matrix_descriptor(keys, 0, 8 * S::panel, swizzle_of(S::panel));
#pragma unroll
  for (int k = 0; k < D; k += 32) {
    const int panel = k / S::panel, within = k % S::panel;
    ptx::wgmma<ptx::Multiplicand::e4m3>(flat(x), here.advanced(panel * kGroupRows * S::panel + within),
                                        b.advanced(panel * S::keys * S::panel + within), k > 0);
  }
  ptx::wgmma_commit();
}

// Rounded to bytes, as first operands of products over keys in V's order.
template <int keys>
__device__ __forceinline__ void round_to_bytes(const Sums<1, keys>& x, uint32_t (&a)[keys / 32][4]) {
#pragma unroll
  for (int step = 0; step < keys / 32; ++step)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float (&left)[4] = x[0][4 * step + r / 2 * 2], (&right)[4] = x[0][4 * step + r / 2 * 2 + 1];
      const int half = 2 * (r % 2);
      a[step][r] = ptx::e4m3x2_of(left[half], left[half + 1]) |
                   static_cast<uint32_t>(ptx::e4m3x2_of(right[half], right[half + 1])) << 16;
    }
}

// output = output rescaling + scale probabilities values, part after part; softmax.sum += probabilities, which each
// lane of a row has, and one counts.
template <class S, int D>
__device__ __forceinline__ void add_values(Sums<1, D>& output, Softmax<1, kLift>& softmax,
                                           const float (&rescaling)[1][2],
                                           const uint32_t (&probabilities)[S::keys / 32][4], const uint8_t* values,
                                           float scale) {
  const auto b = ptx::matrix_descriptor(values, 0, 8 * S::keys, swizzle_of(S::keys));
  const auto add = [&]<int first, int columns>() {
    Sums<1, columns> sums;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < S::keys / 32; ++k)
      ptx::wgmma<ptx::Multiplicand::e4m3>(flat(sums), probabilities[k], b.advanced(first * S::keys + 32 * k), k > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(flat(sums));
#pragma unroll
    for (int j = 0; j < S::part / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& o = output[0][first / 8 + j][i];
        o = fmaf(sums[0][j][i], scale, o);
      }
    if (columns > S::part && lane_of() % 4 == 0) {
      softmax.sum[0][0] += sums[0][columns / 8 - 1][0];
      softmax.sum[0][1] += sums[0][columns / 8 - 1][2];
    }
  };
  if (__any_sync(kWholeWarp, rescaling[0][0] != 1.0f || rescaling[0][1] != 1.0f)) rescale(output, rescaling);
  if constexpr (D > S::part) add.template operator()<0, S::part>();
  add.template operator()<D - S::part, S::part + kOnes>();
}

template <class S, class T, int D>
__device__ __forceinline__ void attend(Shared<S>& shared, const Forward<T>& p, const RowsWork& w, const uint8_t* query,
                                       int row, const Order<S>& order, Turn<S::stages>& turn,
                                       Softmax<1, kLift>& softmax, Sums<1, D>& output) {
  const Span reach = keys_of_rows(w.s.band(p.options), row, 16);
  const float factor = p.factor * p.query.scales[p.tile_of_queries(w)];
  const int64_t tiles = p.tile_of_keys(w, 0);
#pragma unroll 1
  for (int key = w.begin; key < w.end; key += S::keys, ++turn.number) {
    const int stage = turn.stage();
    const int64_t tile = tiles + key / kByteRows * p.key.heads;
    const float key_scale = p.key.scales[tile];
    Sums<1, S::keys> x;
    uint32_t probabilities[S::keys / 32][4];
    float rescaling[1][2];

    ptx::mbarrier_wait(&shared.key_full[stage], turn.parity());
    ptx::wgmma_fence(flat(x));
    begin_scores<S, D>(x, query, shared.key[stage]);
    ptx::wgmma_wait<0>(flat(x));
    give_back(&shared.key_free[stage]);

    order.take();
    if (!reach.all(key, key + S::keys)) hide_unseen<false>(x, w.s.band(p.options), row, key);
    // Not 0, as it is for tiles of zeros: a hidden key's logit is -inf.
    softmax.template add<false>(x, fmaxf(factor * key_scale, FLT_MIN), rescaling);
    order.pass();
    round_to_bytes<S::keys>(x, probabilities);

    const float value_scale = p.value.scales[tile];
    ptx::mbarrier_wait(&shared.value_full[stage], turn.parity());
    add_values<S, D>(output, softmax, rescaling, probabilities, shared.value[stage].numbers, value_scale);
    give_back(&shared.value_free[stage]);
  }
}

template <class S, class T, int D>
__device__ __forceinline__ void multiply_all(Shared<S>& shared, const Forward<T>& p) {
  const int group = warp_of() / 4 - 1;
  const Order<S> order{group};
  Turn<S::stages> turn;
  Turn<S::queries> query;
  order.begin();
#pragma unroll 1
  for (;; ++query.number) {
    const int stage = query.stage();
    ptx::mbarrier_wait(&shared.query_full[stage], query.parity());
    if (shared.taken[stage].tile < 0) break;
    const RowsWork w = work_of<S>(p, shared.taken[stage]);
    Softmax<1, kLift> softmax;
    Sums<1, D> output;
    clear(output);
    if (w.some()) {
      const int row = w.first + group * kGroupRows + ptx::made_here(warp_of() % 4 * 16);  // this warp's first one
      attend<S, T, D>(shared, p, w, shared.query[stage][group], row, order, turn, softmax, output);
    }
    const int warp = ptx::made_here(warp_of()), of = warp / 4 - 1, own = warp % 4 * 16;
    // at its last turn all warps of the warpgroup were done with the queries
    const RowsWork again = work_of<S>(p, shared.taken[stage]);  // sooner than in registers all the while
    const int row = again.first + of * kGroupRows + own, count = least(16, again.s.rows - row);
    if (count > 0) {
      store_results(p.results, p.sizes, again.s, again.head, row, count, softmax, sink_of(p.options, again.head), 1.0f,
                    output, Tile<T, kGroupRows, D>::at(shared.query[stage][of], 0), own);
    }
    ptx::fence_async_shared();
    give_back_by_warps(&shared.query_free[stage]);
  }
  order.end();
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <class T, int D>
__global__ void __launch_bounds__(Shape<D>::threads, 1) attention_fp8_forward(const __grid_constant__ Forward<T> p) {
  using S = Shape<D>;
  auto& shared = *static_cast<Shared<S>*>(ptx::dynamic_shared_1024());
  if (threadIdx.x == 0) {
    for (int q = 0; q < S::queries; ++q) {
      ptx::mbarrier_init(&shared.query_full[q], 1);
      ptx::mbarrier_init(&shared.query_free[q], 4 * S::groups);
    }
    for (int s = 0; s < S::stages; ++s) {
      for (auto* full : {shared.key_full, shared.value_full}) ptx::mbarrier_init(full + s, 1);
      for (auto* free : {shared.key_free, shared.value_free}) ptx::mbarrier_init(free + s, S::groups);
    }
    ptx::mbarrier_init_fence();
  }
  for (auto& stage : shared.value) {
    for (int i = static_cast<int>(threadIdx.x); i < kOnes * S::keys / 4; i += S::threads)
      reinterpret_cast<uint32_t*>(stage.ones)[i] = 0x38383838;  // 1 in e4m3
  }
  ptx::fence_async_shared();
  if (p.sizes.cu_seqlens_q) {
    const Sequence rest = sequence_of(p.sizes, p.sizes.sequences);
    for (int head = 0; head < p.sizes.heads; ++head)
      leave_empty<S::threads>(p.results, p.sizes, rest, head, S::rows, static_cast<int>(blockIdx.x),
                              static_cast<int>(gridDim.x));
  }
  __syncthreads();
  if (warp_of() >= 4) {
    ptx::increase_registers<kManyRegisters>();
    multiply_all<S, T, D>(shared, p);
    return;
  }
  ptx::decrease_registers<kFewRegisters>();
  if (warp_of() == 0) fetch_all<S>(shared, p);
}

Bytes bytes_of(const TensorView& numbers, const TensorView& scales, const TensorView& of) {
  return {numbers.as<const uint8_t>(), scales.as<const float>(), static_cast<int>(of.size(1)),
          static_cast<int>(of.size(2))};
}

template <class T, int D>
void launch_forward(const AttentionFp8Forward& p, Stream stream) {
  using S = Shape<D>;
  static_assert(sizeof(Shared<S>) <= 227 << 10);
  const TilesOf tiles{false, S::rows, S::keys, p.key.size(3) + p.value.size(3)};
  const Forward<T> given{results_of<T>(p),
                         options_of(p),
                         {},
                         sizes_of_rows(p, S::rows),
                         turns_of(p, tiles, p.turns.as<int>(), stream),
                         bytes_of(p.query_numbers, p.query_scales, p.query),
                         bytes_of(p.key_numbers, p.key_scales, p.key),
                         bytes_of(p.value_numbers, p.value_scales, p.value),
                         static_cast<float>(p.scale * 1.4426950408889634 / D)};
  const LaunchSite at{"attention_fp8_forward", persistent_blocks(p, tiles), S::threads, cuda_stream(stream), p.query,
                      sizeof(Shared<S>)};
  launch(at, attention_fp8_forward<T, D>, given);
}

}  // namespace
}  // namespace attention

void validate(const AttentionFp8Forward& p) {
  ops::validate(p, attention::kTypes);
  const Checker at{"attention_fp8"};
  if (p.query.size(3) > 256)
    at.fail_at("query", "has head dim " + std::to_string(p.query.size(3)) + "; allowed: up to 256");
  const int columns = attention::byte_columns_of(p.query.size(3));
  if (!attention::is_plain(p) || p.dropout_p > 0) {
    at.fail_at("scale", "must be above 0 and all that makes logits of products; there is no dropout");
  }
  using Tensors = std::initializer_list<const TensorView*>;
  const TensorView* const of[] = {&p.query, &p.key, &p.value};
  const Tensors numbers = {&p.query_numbers, &p.key_numbers, &p.value_numbers};
  const Tensors scales = {&p.query_scales, &p.key_scales, &p.value_scales};
  const char* const names[] = {"query_numbers", "key_numbers", "value_numbers"};
  const char* const scales_names[] = {"query_scales", "key_scales", "value_scales"};
  for (int i = 0; i < 3; ++i)
    attention::check_tiles(at, *numbers.begin()[i], names[i], *scales.begin()[i], scales_names[i], *of[i],
                           i == 0 ? p.cu_seqlens_q : p.cu_seqlens_k, columns);
  at.defined(p.turns, "turns");
  at.dtype(p.turns, "turns", {DType::i32});
  at.shape(p.turns, "turns", {1, attention::turns_room(p)});
  at.contiguous(p.turns, "turns");
}

void run(const AttentionFp8Forward& p, Stream stream) {
  using namespace attention;
  if (p.query.numel() == 0) return;
  check_is_hopper("attention_fp8_forward");
  visit_at_least<64, 128, 256>(static_cast<int>(p.query.size(3)), [&]<int D>(std::integral_constant<int, D>) {
    p.query.dtype == DType::bf16 ? launch_forward<bf16, D>(p, stream) : launch_forward<f16, D>(p, stream);
  });
}

}  // namespace llmengine::cuda
