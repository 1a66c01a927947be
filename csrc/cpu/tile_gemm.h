// Products of small float tiles that lie in a core's own caches, and the packing that brings tensors there.
//
//   C(row, column) = sum_k A(row, k) B(k, column), scaled by or added to what C holds
//
//   The micro-kernel holds some rows and vectors of C in registers and adds an outer product for every k: it loads
//   vectors of B and broadcasts elements of A, so A may lie either way round (Across: element (row, k) at a[k stride +
//   row]) and B's columns are contiguous. 16 lanes: kTileRows x kTileVectors = 6 x 4 accumulators, 10 loads for 24
//   multiply-adds, where products are cut to fit a caller's tile (attention); kTallRows x kPanelVectors = 8 x 3, 11
//   loads, where B is in panels of three vectors (gemm.h). Either keeps both multiply-add ports of an AVX-512 core
//   busy.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#include "cpu/vec.h"

namespace llmengine::cpu::LLMENGINE_ISA {

inline constexpr int kTileRows = 6;
inline constexpr int kTileVectors = kLanes == 16 ? 4 : 2;  // 16 registers elsewhere: 6 x 2 accumulators
// Columns of a packed panel: three vectors where four would leave 96-column tiles with a remainder.
inline constexpr int kPanelVectors = kLanes == 16 ? 3 : 2;
inline constexpr int kPanel = kPanelVectors * kLanes;
inline constexpr int kTallRows = kLanes == 16 ? 8 : kTileRows;  // of a tile kPanelVectors wide

enum class Lies { along, across };  // A(row, k): a[row stride + k] or a[k stride + row]
// C = AB, beta[0] AB, C + AB, beta[0] (C + AB), beta[row] C + AB
enum class Into { place, times, add, add_times, scaled };

// Sums as they go into C's row r, which lies at c.
template <Into into>
inline F brought_into(const float* c, F sum, int r, const float* beta) {
  if constexpr (into == Into::times) return sum * beta[0];
  if constexpr (into == Into::add) return load(c) + sum;
  if constexpr (into == Into::add_times) return beta[0] * (load(c) + sum);
  if constexpr (into == Into::scaled) return load(c) * beta[r] + sum;
  return sum;
}

// The first `rows` rows of a tile in registers.
template <Into into, int kRows, int kVectors>
inline void store_tile(const F (&sum)[kRows][kVectors], int rows, float* c, int64_t c_stride, const float* beta) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) return;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + r * c_stride + v * kLanes;
      store(out, brought_into<into>(out, sum[r][v], r, beta));
    }
  }
}

// kAsks: asks for a line of memory from `ahead` on with every fourth step of k, for the second-level cache. All at once
// they would keep the loads of C and B waiting.
template <int kRows, int kVectors, Lies lies, Into into, bool kAsks = false>
inline void multiply_tile(int rows, int64_t depth, const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                          float* c, int64_t c_stride, const float* beta, const float* ahead = nullptr) {
  F sum[kRows][kVectors] = {};
  const auto add = [&](int64_t k) {
    F line[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) line[v] = load(b + k * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const F x = broadcast(lies == Lies::along ? a[r * a_stride + k] : a[k * a_stride + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += x * line[v];
    }
  };
  int64_t k = 0;
  if constexpr (kAsks) {
    for (; k + 4 <= depth; k += 4) {
      __builtin_prefetch(ahead + 4 * k, 0, 2);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) add(k + i);
    }
  }
  for (; k < depth; ++k) add(k);
  store_tile<into>(sum, rows, c, c_stride, beta);
}

// The same for 1 <= vectors <= kTileVectors (kPanelVectors, where rows are more). Rows beyond `rows` are read from A,
// whatever they hold, and not stored.
template <Lies lies, Into into, int kRows = kTileRows, bool kAsks = false>
inline void multiply_tile(int vectors, int rows, int64_t depth, const float* a, int64_t a_stride, const float* b,
                          int64_t b_stride, float* c, int64_t c_stride, const float* beta = nullptr,
                          const float* ahead = nullptr) {
  const auto multiply = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
    multiply_tile<kRows, kVectors, lies, into, kAsks>(rows, depth, a, a_stride, b, b_stride, c, c_stride, beta, ahead);
  };
  switch (vectors) {
    case 1: return multiply(std::integral_constant<int, 1>{});
    case 2: return multiply(std::integral_constant<int, 2>{});
#if LLMENGINE_LANES == 16
    case 3: return multiply(std::integral_constant<int, 3>{});
    case 4:
      if constexpr (kRows == kTileRows) return multiply(std::integral_constant<int, 4>{});
#endif
  }
}

// Into::times, a run of the depth after another: the error of a sum grows with the number of additions in one chain,
// and PyTorch's products of few rows, being dot products, have short ones. Runs of 32 cost a fused multiply-add nothing
// that shows; without one every product is rounded too, and runs are shorter.
#if defined(__FMA__)
inline constexpr int64_t kRun = 32;
#else
inline constexpr int64_t kRun = 16;
#endif

template <Lies lies>
inline void multiply_tile_in_runs(int vectors, int rows, int64_t depth, const float* a, int64_t a_stride,
                                  const float* b, int64_t b_stride, float* c, int64_t c_stride, const float* beta) {
  if (depth <= kRun) {
    return multiply_tile<lies, Into::times>(vectors, rows, depth, a, a_stride, b, b_stride, c, c_stride, beta);
  }
  const int64_t a_step = lies == Lies::along ? 1 : a_stride;
  multiply_tile<lies, Into::place>(vectors, rows, kRun, a, a_stride, b, b_stride, c, c_stride, beta);
  int64_t k = kRun;
  for (; depth - k > kRun; k += kRun) {
    multiply_tile<lies, Into::add>(vectors, rows, kRun, a + k * a_step, a_stride, b + k * b_stride, b_stride, c,
                                   c_stride, beta);
  }
  multiply_tile<lies, Into::add_times>(vectors, rows, depth - k, a + k * a_step, a_stride, b + k * b_stride, b_stride,
                                       c, c_stride, beta);
}

// Neighbours [begin, end).
struct Span {
  int64_t begin, end;
  constexpr int64_t count() const { return end - begin; }
};
constexpr Span common(Span a, Span b) { return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end}; }

// Calls body(stripe, rows of it) for the stripes of so many rows, all of `height` but the last.
template <class Body>
inline void for_stripes(int64_t rows, int64_t height, const Body& body) {
  for (int64_t r = 0; r < rows; r += height) body(r, static_cast<int>(rows - r < height ? rows - r : height));
}

// A stripe of C, in the vectors of columns of a span. B(k, column) of panel i: b[i panel_stride + k b_stride + column -
// i columns of a panel], a panel being kPanelVectors or kTileVectors wide.
template <Lies lies, Into into>
inline void multiply_stripe(int panel_vectors, int rows, Span vectors, int64_t depth, const float* a, int64_t a_stride,
                            const float* b, int64_t b_stride, int64_t panel_stride, float* c, int64_t c_stride,
                            const float* beta = nullptr) {
  for (int64_t v = vectors.begin; v < vectors.end;) {
    const int64_t panel = v / panel_vectors, next = (panel + 1) * panel_vectors;
    const int width = static_cast<int>((next < vectors.end ? next : vectors.end) - v);
    const float* columns = b + panel * panel_stride + (v - panel * panel_vectors) * kLanes;
    float* tile = c + v * kLanes;
    if constexpr (into == Into::times) {
      multiply_tile_in_runs<lies>(width, rows, depth, a, a_stride, columns, b_stride, tile, c_stride, beta);
    } else {
      multiply_tile<lies, into>(width, rows, depth, a, a_stride, columns, b_stride, tile, c_stride, beta);
    }
    v += width;
  }
}

// C of any size, stripe by stripe.
template <Lies lies, Into into>
inline void multiply(int panel_vectors, int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t a_stride,
                     const float* b, int64_t b_stride, int64_t panel_stride, float* c, int64_t c_stride,
                     const float* beta = nullptr) {
  for_stripes(rows, kTileRows, [&](int64_t r, int count) {
    multiply_stripe<lies, into>(panel_vectors, count, {0, vectors}, depth,
                                lies == Lies::along ? a + r * a_stride : a + r, a_stride, b, b_stride, panel_stride,
                                c + r * c_stride, c_stride, into == Into::scaled ? beta + r : beta);
  });
}

// ---- packing --------------------------------------------------------------------------------------------------------

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Exchanges the off-diagonal quarters of all 2 step x 2 step blocks.
template <int step, int... lane>
inline void transpose_blocks(F (&x)[kLanes], std::integer_sequence<int, lane...>) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const F a = x[i], b = x[i + step];
    x[i] = shuffle<(lane & step ? kLanes + (lane ^ step) : lane)...>(a, b);
    x[i + step] = shuffle<(lane & step ? kLanes + lane : lane ^ step)...>(a, b);
  }
}

// x[i] lane j <-> x[j] lane i
template <int step = kLanes / 2>
inline void transpose(F (&x)[kLanes]) {
  transpose_blocks<step>(x, Lanes());
  if constexpr (step > 1) transpose<step / 2>(x);
}

// Rows of a tensor, widened, to_stride floats apart; columns up to `width` become zero.
template <class T>
inline void pack_rows(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t width,
                      int64_t to_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* x = from + r * from_stride;
    float* line = to + r * to_stride;
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) store(line + c, load(x + c));
    if (c < width) store(line + c, load_part(x + c, columns - c));
  }
}

template <class T>
inline void pack_rows(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t width) {
  pack_rows(from, from_stride, rows, columns, to, width, width);
}

// kLanes x kLanes elements transposed, the rows of the result `step` apart.
template <class T>
inline void transpose_block(const T* from, int64_t from_stride, float* to, int64_t step) {
  F block[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) block[i] = load(from + i * from_stride);
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store(to + i * step, block[i]);
}

// The transpose in panels of kPanel columns: element (row, column) at to[(row / kPanel) columns kPanel + column kPanel
// + row % kPanel]. Rows up to a multiple of kLanes become zero.
template <class T>
inline void pack_transposed(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    float* panel = to + r / kPanel * columns * kPanel + r % kPanel;
    const int64_t count = rows - r < kLanes ? rows - r : kLanes;
    int64_t c = 0;
    if (count == kLanes) {
      for (; c + kLanes <= columns; c += kLanes) {
        transpose_block(from + r * from_stride + c, from_stride, panel + c * kPanel, kPanel);
      }
    }
    for (; c < columns; ++c) {
      float* line = panel + c * kPanel;
      for (int64_t i = 0; i < kLanes; ++i) line[i] = i < count ? widen(from[(r + i) * from_stride + c]) : 0.0f;
    }
  }
}

// ---- scratch --------------------------------------------------------------------------------------------------------

// Aligned floats of one thread, kept between calls: fresh pages would cost more than small attentions take.
class Scratch {
 public:
  // Gives back what is so large that its pages are little beside the work done in them.
  void release_large() {
    if (size_ <= kKept) return;
    size_ = 0;
    memory_.reset();
  }

  // Buffers of so many floats each; what was taken before dies.
  template <class... Count>
  std::array<float*, sizeof...(Count)> take(Count... counts) {
    const int64_t sizes[] = {round_up(counts, 64 / 4)...};
    int64_t total = 0;
    for (int64_t size : sizes) total += size;
    reserve(total);
    std::array<float*, sizeof...(Count)> buffers;
    float* next = memory_.get();
    for (size_t i = 0; i < sizeof...(Count); ++i) {
      buffers[i] = next;
      next += sizes[i];
    }
    return buffers;
  }

 private:
  static constexpr int64_t kKept = int64_t{1} << 24;  // 64 MiB

  void reserve(int64_t floats) {
    if (floats <= size_) return;
    size_ = 0;
    memory_.reset();  // before its successor comes: both together may be more than there is
    const size_t bytes = static_cast<size_t>(round_up(floats * 4, 4096));
    memory_.reset(static_cast<float*>(std::aligned_alloc(4096, bytes)));
    if (!memory_) throw std::bad_alloc();
    size_ = floats;
  }

  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
