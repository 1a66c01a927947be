// Attention, forward, on every GPU from sm_80 on: an online softmax over tiles of keys (ops/attention.h; Dao 2023).
//
//                      keys ->                    A block of four warps owns `rows` query rows of one head, a warp
//              +-------+-------+-------+---       blocks x 16 of them. The query tile stays in shared memory; output
//     rows     |       |       |       |          sums, the running maximum and sum of each row stay in registers, in
//      |  Q    |   S   |   S   |   S   |          float32. Keys and values stream through shared memory by cp.async,
//      v       +-------+-------+-------+---       one buffer for each: values are on their way while S is made, the
//              K_0 V_0 K_1 V_1 K_2 V_2            next keys while O is, and there is room for a second block.
//
//     S = Q K^T;  m' = max(m, rowmax S);  P = exp2(S - m');  O = exp2(m - m') O + P V
//
//   P goes from accumulators to the next product in registers. Tiles that none of a warp's rows sees are skipped; those
//   that all of them see whole are not compared.
//
//   flops   4 rows keys head_dim a tile, by mma.sync m16n8k16
//   bytes   query and output once; keys and values once a block, from the second-level cache. From shared memory a warp
//           reads (2 keys + 16 blocks) 2 head_dim bytes for 64 blocks keys head_dim flops: 1/23 to 1/26 byte a flop
//           with two blocks of rows, 1/14 with one (head dims above 128)
//   limit   the tensor cores; those of an A100 do 2048 flops a clock and its shared memory gives 128 bytes: with one
//           block of rows that feeds 1820 flops
#include <cmath>
#include <cstdint>

#include "cuda/attention_forward.cuh"
#ifndef __CUDACC_RTC__
#include "cuda/compiled.cuh"
#include "cuda/launch.cuh"
#endif

namespace llmengine::cuda {
namespace attention {
namespace {

// Of a head dim up to D. Tiles fit into 99 KiB of shared memory, which every GPU from sm_80 on gives a block.
template <int D, bool plain>
struct Shape {
  static constexpr int blocks = D <= 128 ? 2 : 1, rows = 16 * blocks * kWarps;
  static constexpr int most_keys = (D > 64 && D <= 128) || D == 240 ? 48 : 64;  // that registers leave room for
  static constexpr int keys = plain || D <= 64 ? most_keys : 32;
  // Blocks of a multiprocessor that have registers: for more the assembler would spill. 0: as it thinks best.
  static constexpr int at_once = D > 128 && D < 256 ? 2 : 0;
};

template <class T>
struct Forward {
  Operand<const T> query, key, value;
  Results<T> results;
  Options options;
  Sizes sizes;
  Schedule schedule;
};

template <class T, int D, bool plain>
struct Tiles {
  using S = Shape<D, plain>;
  Tile<T, S::rows, D> query;
  Tile<T, S::keys, D> key, value;

  static constexpr int bytes = (S::rows + 2 * S::keys) * D * 2;

  __device__ explicit Tiles(void* shared)
      : query(query.at(shared, 0)),
        key(key.at(shared, query.bytes)),
        value(value.at(shared, query.bytes + key.bytes)) {}
};

template <class T, int D, bool plain>
__global__ void __launch_bounds__(kThreads, Shape<D, plain>::at_once) attention_forward_sm80(const Forward<T> p) {
  using S = Shape<D, plain>;
  const Place place = place_of(p.schedule, p.sizes, false, p.sizes.heads, S::rows);
  const Sequence s = sequence_of(p.sizes, place.sequence);
  const int first = place.tile * S::rows;
  if (first < 0 || first >= s.rows) return;  // an empty place
  if (place.sequence == p.sizes.sequences) {
    return leave_empty<kThreads>(p.results, p.sizes, s, place.head, S::rows, place.tile, p.schedule.tiles);
  }

  const Tiles<T, D, plain> tiles(ptx::dynamic_shared());
  const int key_head = place.head / p.sizes.group;
  const auto begin_keys = [&](int key) {
    copy_rows<kThreads>(tiles.key, p.key.lines(s.batch, key_head, s.key0 + key), s.keys - key);
    ptx::commit_copies();
  };
  const auto begin_values = [&](int key) {
    copy_rows<kThreads>(tiles.value, p.value.lines(s.batch, key_head, s.key0 + key), s.keys - key);
    ptx::commit_copies();
  };
  const int own = warp_of() * 16 * S::blocks, row = first + own;  // this warp's first row, in the tile and at all
  const Span block = keys_of_rows(s.band(p.options), first, S::rows);
  const Span reach = keys_of_rows(s.band(p.options), row, 16 * S::blocks);
  const int begin = begin_of_walk(block, S::keys);

  Softmax<S::blocks> softmax;
  Sums<S::blocks, D> output;
  clear(output);
  if (begin < block.end) {
    copy_rows<kThreads>(tiles.query, p.query.lines(s.batch, place.head, s.row0 + first), s.rows - first);
    begin_keys(begin);
  }
#pragma unroll 1
  for (int key = begin; key < block.end; key += S::keys) {
    const bool sees = reach.some(key, key + S::keys);
    uint32_t probabilities[S::blocks][S::keys / 16][4];
    ptx::wait_copies<0>();
    __syncthreads();  // the keys are there, and every warp is done with the values before these
    begin_values(key);
    if (sees) {
      Sums<S::blocks, S::keys> x;
      product_of_rows<S::blocks>(x, tiles.query, own, tiles.key);
      if constexpr (!plain) make_logits<T, false>(x, p.options, s, place.head, row, key);
      if (!reach.all(key, key + S::keys)) hide_unseen<false>(x, s.band(p.options), row, key);
      float rescaling[S::blocks][2];
      softmax.add(x, p.options.factor, rescaling, plain);
      rescale(output, rescaling);
      if (p.options.dropout.seed) {
        const auto stream = static_cast<uint32_t>(s.index * p.sizes.heads + place.head);
        drop(x, draw<false, S::blocks, S::keys / 8>(p.options.dropout, stream, row, key), 1.0f);
      }
      round_to_operands<T>(x, probabilities);
    }
    ptx::wait_copies<0>();
    __syncthreads();  // the values are there, and every warp is done with the keys
    if (key + S::keys < block.end) begin_keys(key + S::keys);
    if (sees) add_product(output, probabilities, tiles.value);
  }

  const int count = least(16 * S::blocks, s.rows - row);
  if (count <= 0) return;
  store_results(p.results, p.sizes, s, place.head, row, count, softmax, sink_of(p.options, place.head),
                p.options.dropout.keep_scale, output, tiles.query, own, plain);
}

}  // namespace
}  // namespace attention
#ifndef __CUDACC_RTC__

void validate(const AttentionForward& p) { ops::validate(p, attention::kTypes); }

void run(const AttentionForward& p, Stream stream) {
  using namespace attention;
  constexpr const char* kSource = "cuda/attention_sm80_forward.cu";
  visit(p, [&]<class T, int D, bool plain>(T, std::integral_constant<int, D>, std::bool_constant<plain>) {
    constexpr int kRows = Shape<D, plain>::rows;
    const Forward<T> given{operand_of<const T>(p.query),
                           operand_of<const T>(p.key),
                           operand_of<const T>(p.value),
                           results_of<T>(p),
                           options_of(p),
                           sizes_of_rows(p, kRows),
                           order_of_rows(p, kRows)};
    const LaunchSite at{"attention_forward_sm80", grid_of(given.schedule), kThreads, cuda_stream(stream), p.query,
                        Tiles<T, D, plain>::bytes};
    if constexpr (kBuiltAhead<D>) {
      launch(at, attention_forward_sm80<T, D, plain>, given);
      return true;
    } else {
      return launch_compiled(at, {kSource, instance("attention::attention_forward_sm80", T{}, D, plain)}, given);
    }
  });
}

#endif
}  // namespace llmengine::cuda
