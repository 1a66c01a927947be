// Attention, backward, in one pass over the scores, on Hopper: attention_keys_sm90a (attention_sm90a_keys.cu), which
// adds its part of dQ to a grid of integers in global memory (attention_grid.h) while it has the scores. Five products
// where the two kernels of the two passes have seven.
//
//     S^T = K Q^T, dP^T = V dO^T;  P^T;  dV += P^T dO;  G^T = P^T (dP^T - delta), which goes to shared memory, too;
//     dK += G^T Q;  when both warpgroups' G^T are there: a half of dQ^T = K^T G^T each, over all 128 keys
//
//     tensor cores   S_n | dP_n | dV      | dK, dQ_n      | S_n+1     | dP_n+1
//     a warpgroup        | P_n  | G_n     |               | dQ_n to the grid | P_n+1
//
//   Of dQ^T a warpgroup makes 64 columns of the head dim and all rows, or of head dims up to 64 half of the rows; of 96
//   the second one's last 32 columns are zeros that nobody adds. It
//   multiplies by the rows' steps, rounds to integers, and puts them into shared memory as its threads have them: the
//   asynchronous unit adds them to the grid, where they lie the same way. Sums of integers are the same in any order:
//   equal bits in every run. A part that is no number raises its tile's flag: 0 part is then no 0.
//   Blocks that share rows begin with those near their keys and go round, so that they meet at few of them.
//
//   registers       dK and dV, head_dim; S^T and dP^T, `passing`, of which dQ takes the place; P^T in 16 bits: 208
//   shared memory   head dim 128: K, V 64 kB; Q, dO of two stages 64 kB; G^T twice 32 kB; dQ 32 kB
//   barriers        1 + group: of a warpgroup; from 3 on: what it needs of G^T is there (grads_barrier); 7: all have
//                   read the keys
//   flops           10 rows keys head_dim; integers: 4 rows head_dim bytes a tile of 128 keys, 320 flops a byte
//   limit           shared memory and the tensor cores alike: at head dim 128, 64 rows, all products read for 2048
//                   clocks and multiply for 2560; boxes, G and dQ on their ways through it take 896 more
#include <cstdint>

#include "cuda/attention_sm90a_grid.cuh"
#include "cuda/attention_sm90a_keys.cuh"
#include "cuda/ptx/matrix.cuh"

namespace llmengine::cuda::attention {
namespace {

inline constexpr int kSpan = 32;  // rows of G^T that lie together: 64 bytes, and a swizzle over them

template <int D, bool simple>
struct Shape : Walk<Owner::keys, D, kGridPassing<D, simple>, D, simple> {
  static constexpr int passing = kGridPassing<D, simple>, owned = D <= 64 ? 2 : 1;
  using Part = attention::Part<D, passing>;  // of dQ
  static constexpr int few_registers = 24, many_registers = 240;
};

// What the warp that fetches tells of a tile of rows.
struct Tidings {
  int head, row;  // where it begins
  int on_grid;    // row of the grid
  int flag;       // its place among those of tiles to be made anew
};

template <class S>
struct Room : Shared<S> {
  alignas(1024) uint16_t grads[2][S::own * S::passing];  // G^T, in spans of rows
  int32_t parts[S::groups][S::Part::numbers(0)];
  static constexpr int kept = 2 * S::stages;  // until a tile's dQ is on the grid, which is longer than its stage
  float steps[kept][S::passing];
  Tidings tidings[kept];
  Work work[S::owned];  // read where it is wanted: registers are few
};

template <class T>
struct OnePass {
  Walked<T> walked;
  Grid grid;
  MaskGradient mask;
};

// ---- the rows that pass ---------------------------------------------------------------------------------------------

// A block's way through them, for each head of its keys.
template <class S>
struct Way {
  int head, row;

  __device__ __forceinline__ explicit Way(const Work& w) : head(w.from), row(start(w)) {}
  __device__ __forceinline__ static int start(const Work& w) {
    const int near = w.first < w.end ? (w.first - w.begin) / S::passing * S::passing : 0;
    return w.begin + largest(near, 0);
  }
  __device__ __forceinline__ void advance(const Work& w) {
    row += S::passing;
    if (row >= w.end) row = w.begin;
    if (row == start(w)) ++head;
  }
};

// ---- the warp that fetches ------------------------------------------------------------------------------------------

// What lies behind the last of a packed sequence's `left` lines is a neighbour's: it becomes zeros before it is told.
template <class S>
__device__ __forceinline__ void clear_neighbours(Shared<S>& shared, ptx::Mbarrier* full, bool elected, int& landed,
                                                 const auto& clear) {
  __syncwarp();
  ptx::mbarrier_wait(&shared.landed, landed);
  landed ^= 1;
  clear();
  ptx::fence_async_shared();
  __syncwarp();
  if (elected) ptx::mbarrier_arrive(full);
}

template <class S>
__device__ __forceinline__ void fetch_own(Room<S>& room, const Maps& maps, const Work& w, int place, bool packed,
                                          bool elected, int& landed) {
  const int left = w.s.keys - w.first;
  const bool neighbours = packed && left < S::own;
  ptx::Mbarrier *full = &room.own_full[place], *told = neighbours ? &room.landed : full;
  if (elected) {
    ptx::mbarrier_arrive_expect_tx(told, 2 * S::own_bytes);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll 1
      for (int g = 0; g < S::groups; ++g)
        fetch<S::panels>(room.lines(place, tile, g), kGroupRows * 128, maps.own[tile], told,
                         w.s.key0 + w.first + g * kGroupRows, w.head, w.s.batch);
  }
  if (!neighbours) return;
  clear_neighbours(room, full, elected, landed, [&] {
#pragma unroll 1
    for (int lines = 0; lines < 2 * S::groups; ++lines) {
      const int g = lines % S::groups, from = largest(left - g * kGroupRows, 0);
      if (from < kGroupRows) clear_rows<S::panels, kGroupRows>(room.lines(place, lines / S::groups, g), from);
    }
  });
}

// Q and dO of `left` rows or more, and what is known of them.
template <class S, class T>
__device__ __forceinline__ void fetch_passing(Room<S>& room, const Maps& maps, const OnePass<T>& p, const Work& w,
                                              const Way<S>& way, const Turn<S::stages>& turn, bool packed, bool elected,
                                              int& landed) {
  const int stage = turn.stage(), left = w.s.rows - way.row;
  const bool neighbours = packed && left < S::passing;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    ptx::Mbarrier *full = &room.full[stage][tile], *told = neighbours ? &room.landed : full;
    ptx::mbarrier_wait(&room.free[stage][tile], turn.parity() ^ 1);
    if (elected) {
      if (tile == 0) {
        constexpr int kBytes = S::passing * 4;
        const Sizes& sizes = p.walked.backward.sizes;
        const int on_grid = Grid::row_of(sizes, w.s, way.head, way.row);
        room.tidings[turn.number % room.kept] = {way.head, way.row, on_grid,
                                                 remade_place(sizes, w.s, way.head, way.row / kRemadeRows)};
        const float* rows = p.grid.rows + int64_t{kOfRow} * on_grid;
        ptx::mbarrier_expect_tx(full, (S::simple ? 3 : 4) * kBytes);
        ptx::copy_bulk(room.base[stage], rows, kBytes, full);
        ptx::copy_bulk(room.delta[stage], rows + S::passing, kBytes, full);
        ptx::copy_bulk(room.steps[turn.number % room.kept], rows + 2 * S::passing, kBytes, full);
        if (!S::simple) ptx::copy_bulk(room.shift[stage], rows + 3 * S::passing, kBytes, full);
      }
      ptx::mbarrier_arrive_expect_tx(told, S::stage_bytes);
      fetch<S::panels>(room.passing[stage][tile], S::passing * 128, maps.passing[tile], told, w.s.row0 + way.row,
                       way.head, w.s.batch);
    }
    if (neighbours) {
      clear_neighbours(room, full, elected, landed,
                       [&] { clear_rows<S::panels, S::passing>(room.passing[stage][tile], left); });
    }
  }
}

template <class S, class T>
__device__ __forceinline__ void fetch_all(Room<S>& room, const Maps& maps, const OnePass<T>& p) {
  const bool elected = ptx::elect_one(), packed = p.walked.backward.sizes.cu_seqlens_k != nullptr;
  Turn<S::stages> turn;
  Turn<S::owned> pair;
  int landed = 0, number = static_cast<int>(blockIdx.x);
#pragma unroll 1
  for (;; ++pair.number) {
    const int place = pair.stage();
    ptx::mbarrier_wait(&room.own_free[place], pair.parity() ^ 1);
    __syncwarp();  // all lanes have read the last
    if (elected) {
      const Place taken = p.walked.turns.at(number);
      room.taken[place] = taken;
      if (taken.tile >= 0) room.work[place] = work_of<S>(p.walked, taken);
    }
    __syncwarp();
    if (room.taken[place].tile < 0) break;
    const Work& w = room.work[place];
    if (w.some()) {
      fetch_own(room, maps, w, place, packed, elected, landed);
#pragma unroll 1
      for (Way<S> way(w); way.head < w.to; way.advance(w), ++turn.number)
        fetch_passing(room, maps, p, w, way, turn, packed, elected, landed);
    } else if (elected) {
      ptx::mbarrier_arrive(&room.own_full[place]);
    }
    number = p.walked.turns.draw(elected);
  }
  if (elected) ptx::mbarrier_arrive(&room.own_full[pair.stage()]);
}

// ---- the warpgroups that multiply -----------------------------------------------------------------------------------

// G^T of a warp's 16 keys, from `key` of the block's, beside those of the others.
template <class S>
__device__ __forceinline__ void store_grads(uint16_t* grads, const uint32_t (&rounded)[1][S::passing / 16][4],
                                            int key) {
  const int line = key + lane_of() % 16, turn = line / 2 % 4, odd = lane_of() / 16;
#pragma unroll
  for (int k = 0; k < S::passing / 16; ++k) {
    const int chunk = 2 * k % (kSpan / 8) + odd;
    uint16_t* span = grads + k * 16 / kSpan * (S::own * kSpan);
    ptx::store_matrix_x4(span + line * kSpan + (chunk ^ turn) * 8, rounded[0][k]);
  }
}

// Of a warp's 16 keys and the rows that pass: P (dP - delta), to the gradient of the mask that was added to their
// logits.
template <int n>
__device__ __forceinline__ void add_to_mask(const MaskGradient& m, const float (&grad)[1][n][4],
                                            const float (&p)[1][n][4], const Sequence& s, int head, int key, int row) {
  const int first = key + lane_of() / 4;
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = row + 8 * j + lane_of() % 4 * 2 + i;
      if (own >= s.rows) continue;
      const int64_t line = m.line_of(s, head, own), at = line * m.keys + first;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = grad[0][j][2 * half + i] * p[0][j][2 * half + i];
        if (first + 8 * half >= s.keys) continue;
        if (m.each) {
          m.each[at + 8 * half] = x;
        } else if (!(x * 0.0f == 0.0f)) {
          atomicExch(m.bounds + m.lines, 1);
        } else if (x != 0.0f) {
          const auto steps = static_cast<unsigned long long>(llrintf(x * m.steps(line)));
          atomicAdd(reinterpret_cast<unsigned long long*>(m.sums + at + 8 * half), steps);
        }
      }
    }
}

// Where a warpgroup waits for the other's G^T. One of two in turn: the other may be done with the next tile's before
// all of this one's warps have left the barrier.
__device__ __forceinline__ int grads_barrier(unsigned turn, int group) {
  return 3 + static_cast<int>(turn % 2) * 2 + group;
}

// A warpgroup's half of dQ^T = K^T G^T, begun.
template <class S, class T, int D>
__device__ __forceinline__ void begin_grad_query(Sums<1, S::Part::rows>& part, const uint16_t* keys,
                                                 const uint16_t* grads, int group) {
  constexpr int kSpanBytes = S::own * kSpan * 2, kPanelBytes = kGroupRows * 128;
  const auto a = ptx::matrix_descriptor(keys, 0, kEightRows, Swizzle::bytes_128);
  const auto b = ptx::matrix_descriptor(grads, kSpanBytes, 8 * kSpan * 2, Swizzle::bytes_64);
  const ptx::MatrixDescriptor columns{ptx::made_here(a.advanced(D <= 64 ? 0 : group * kPanelBytes).bits)};
  const ptx::MatrixDescriptor rows{ptx::made_here(b.advanced(S::Part::first_row(group) / kSpan * kSpanBytes).bits)};
#pragma unroll
  for (int k = 0; k < S::own / 16; ++k) {
    const int box = k * 16 / kGroupRows, within = k * 16 % kGroupRows;
    ptx::wgmma<kMultiplicand<T>, ptx::Major::mn, ptx::Major::mn>(
        flat(part), columns.advanced(box * S::panels * kPanelBytes + within * 128), rows.advanced(k * 16 * kSpan * 2),
        k > 0);
  }
  ptx::wgmma_commit();
}

// Of the tile that passed at turn `number`.
template <class S, class T, int D>
__device__ __forceinline__ void add_to_grid(Room<S>& room, const OnePass<T>& p, unsigned number,
                                            Sums<1, S::Part::rows>& part, int group) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
  int32_t* numbers = room.parts[group];
  if (thread == 0) ptx::wait_store_reads<0>();
  ptx::barrier_sync(1 + group, 128);  // the part before it has been read
  const float* steps = room.steps[number % room.kept] + S::Part::first_row(group);
  float strange = 0.0f;
#pragma unroll
  for (int j = 0; j < S::Part::rows / 8; ++j) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = part[0][j][i] * steps[8 * j + lane_of() % 4 * 2 + i % 2];
      strange = fmaf(x, 0.0f, strange);
      words[i] = static_cast<uint32_t>(ptx::nearest_integer(x));
    }
    const int threads = S::Part::threads(group);
    if (threads == 128 || thread < threads)
      reinterpret_cast<uint4*>(numbers)[j * threads + thread] = make_uint4(words[0], words[1], words[2], words[3]);
  }
  const Tidings& tidings = room.tidings[number % room.kept];
  if (!(strange == 0.0f)) atomicExch(p.grid.remade + tidings.flag, 1);
  ptx::fence_async_shared();
  ptx::barrier_sync(1 + group, 128);  // the whole part is there
  if (thread == 0) {
    int32_t* to = p.grid.numbers + int64_t{D} * tidings.on_grid + group * S::Part::numbers(0);
    ptx::add_bulk(to, numbers, S::Part::numbers(group) * 4);
    ptx::commit_stores();
  }
}

// dK, but for scale, and dV, but for what is kept, of a warpgroup's keys, each a sum over the group's heads; and what
// they give to dQ. Products of scores are begun before dQ of the tile before is looked at.
template <class S, class T, int D, bool simple>
__device__ __forceinline__ void add_up(Room<S>& room, const OnePass<T>& p, const Work& w, int place, int group, int own,
                                       Turn<S::stages>& turn, Sums<1, D>& grad_key, Sums<1, D>& grad_value) {
  const int key = w.first + group * kGroupRows + own;
  const Span reach = rows_of_keys(w.s.band(p.walked.backward.options), key, 16);
  int left = (w.to - w.from) * ((w.end - w.begin + S::passing - 1) / S::passing);  // tiles
  Sums<1, S::passing> x;
  Sums<1, S::Part::rows> part;
  const auto begin_scores = [&] {
    ptx::mbarrier_wait(&room.full[turn.stage()][0], turn.parity());
    ptx::wgmma_fence(flat(x));
    begin_product_of_rows<T, D>(x, room.lines(ptx::made_here(place), 0, group), room.passing[turn.stage()][0]);
  };

  begin_scores();
#pragma unroll 1
  for (;;) {
    const int stage = turn.stage();
    Sums<1, S::passing> grad;
    uint32_t rounded[1][S::passing / 16][4], rounded_grad[1][S::passing / 16][4];
    ptx::mbarrier_wait(&room.full[stage][1], turn.parity());
    ptx::wgmma_fence(flat(grad));
    begin_product_of_rows<T, D>(grad, room.lines(ptx::made_here(place), 1, group), room.passing[stage][1]);
    const Tidings& tidings = room.tidings[turn.number % room.kept];
    const int head = simple ? 0 : tidings.head, row = tidings.row;
    to_gradients<T, D, simple, S>(
        x, grad, rounded, rounded_grad, grad_value, p.walked, w, reach,
        {head, key, row, room.shift[stage], room.base[stage], room.delta[stage], room.passing[stage][1]},
        [&] {  // what lies behind the last key, or is hidden, may overflow, and dQ is for all 128
          const int keys = w.s.keys - key;
          if (keys < 16) each(x, [&](float& u, int line, int) { u = line < keys ? u : 0.0f; });
          if (p.walked.seen.keys) clear_hidden(x, p.walked.seen, w.s, key);
        },
        [&] {
          if (!simple && (p.mask.each || p.mask.sums)) add_to_mask(p.mask, grad, x, w.s, head, key, row);
        });
    uint16_t* grads = room.grads[turn.number % 2];
    store_grads<S>(grads, rounded_grad, group * kGroupRows + own);
    ptx::fence_async_shared();
    ptx::barrier_arrive(grads_barrier(turn.number, group ^ 1), 256);
    ptx::wgmma_fence(flat(grad_key));
    begin_adding_product<T, D>(grad_key, rounded_grad, room.passing[stage][0]);
    ptx::barrier_sync(grads_barrier(turn.number, group), 256);  // G^T of all keys
    ptx::wgmma_fence(flat(part));
    begin_grad_query<S, T, D>(part, room.lines(ptx::made_here(place), 0, 0), grads, group);
    ptx::wgmma_wait<1>(flat(grad_value));
    ptx::settle_registers(flat(grad_key));
    give_back_by_warps(&room.free[stage][0]);
    give_back_by_warps(&room.free[stage][1]);
    ++turn.number;
    ptx::wgmma_wait<0>(flat(part));
    if (--left == 0) break;
    begin_scores();
    add_to_grid<S, T, D>(room, p, turn.number - 1, part, group);
    if constexpr (!simple) ptx::wgmma_wait<0>(flat(x));  // else the compiler finds no order of these products
  }
  add_to_grid<S, T, D>(room, p, turn.number - 1, part, group);
}

template <class S, class T, int D, bool simple>
__device__ __forceinline__ void multiply(Room<S>& room, const OnePass<T>& p, int place, int group, int own,
                                         Turn<S::stages>& turn) {
  const Work& w = room.work[place];
  Sums<1, D> grad_key, grad_value;
  clear(grad_key);
  clear(grad_value);
  if (w.some()) add_up<S, T, D, simple>(room, p, w, place, group, own, turn, grad_key, grad_value);
  ptx::barrier_sync(7, 256);  // all are done with the keys and values
  const int key = w.first + group * kGroupRows + own, count = least(16, w.s.keys - key);
  if (count <= 0) return;
  const Backward<T>& b = p.walked.backward;
  const auto store = [&](const Sums<1, D>& sums, float by, int tile, const Operand<T>& to) {
    store_rows(
        sums, [&](int, int) { return by; }, Tile<T, kGroupRows, D>::at(room.lines(place, tile, group), 0), own,
        to.lines(w.s.batch, w.head, w.s.key0 + key), count);
  };
  store(grad_key, b.options.scale, 0, b.grad_key);
  store(grad_value, b.options.dropout.keep_scale, 1, b.grad_value);
}

template <class T, int D, bool simple>
__global__ void __launch_bounds__(Shape<D, simple>::threads, 1)
    attention_one_pass_sm90a(const __grid_constant__ ptx::TensorMap key, const __grid_constant__ ptx::TensorMap value,
                             const __grid_constant__ ptx::TensorMap query,
                             const __grid_constant__ ptx::TensorMap grad_output, const __grid_constant__ OnePass<T> p) {
  using S = Shape<D, simple>;
  auto& room = *static_cast<Room<S>*>(ptx::dynamic_shared_1024());
  clear_rest_of_keys<S>(p.walked);
  begin_barriers(room, 1);
  if (warp_of() >= 4) {
    ptx::increase_registers<S::many_registers>();
    multiply_all<S>(room, p.walked, [&](const Work&, int place, int group, int own, Turn<S::stages>& turn) {
      multiply<S, T, D, simple>(room, p, place, group, own, turn);
    });
    if (threadIdx.x % 128 == 0) ptx::wait_stores<0>();
    return;
  }
  ptx::decrease_registers<S::few_registers>();
  if (warp_of() == 0) fetch_all<S>(room, {{&key, &value}, {&query, &grad_output}}, p);
}

}  // namespace

void run_one_pass(const AttentionBackwardOnePass& p, Stream stream) {
  visit_hopper<64, 96, 128>(
      p, [&]<class T, int D, bool simple>(T, std::integral_constant<int, D>, auto, std::bool_constant<simple>) {
        using S = Shape<D, simple>;
        const OnePass<T> given{walked_of<S, T>(p, stream, 4 * D), grid_of_call(p), mask_gradient_of(p)};
        launch_walk<S, Room<S>>("attention_one_pass_sm90a", attention_one_pass_sm90a<T, D, simple>, p, stream, given);
      });
}

}  // namespace llmengine::cuda::attention
