// The host's side of the attention kernels, for every GPU from sm_80 on and for Hopper: from the operator's arguments
// to those of kernels.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "cuda/attention.h"
#include "cuda/attention_logits.cuh"
#include "cuda/attention_places.h"
#include "cuda/attention_schedule.h"
#include "cuda/device.h"
#include "cuda/dispatch.h"

namespace llmengine::cuda::attention {

inline constexpr std::initializer_list<DType> kOperandTypes = {DType::bf16, DType::f16};
inline constexpr std::initializer_list<DType> kMaskTypes = {DType::boolean, DType::f32, DType::bf16, DType::f16};
inline constexpr ops::AttentionTypes kTypes = {kOperandTypes, kMaskTypes};

inline constexpr int64_t kMostTokens = int64_t{1} << 30;  // positions, and windows beside them, are 32-bit numbers

// Whether every row of 16-bit numbers begins at a multiple of 16 bytes.
inline bool rows_aligned(const TensorView& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
  for (int d = 0; d < 3; ++d) aligned = aligned && (t.size(d) == 1 || t.stride(d) % 8 == 0);
  return aligned;
}

template <class T>
Operand<T> operand_of(const TensorView& t) {
  return {t.as<T>(), t.stride(0), t.stride(1), t.stride(2), static_cast<int>(t.size(3)), rows_aligned(t)};
}

// A mask that hides keys from all rows and heads of a sequence, as padding is hidden.
inline bool is_padding(const ops::AttentionOptions& p) {
  if (!p.mask.defined() || p.mask.dtype != DType::boolean || p.mask.size(3) != p.key.size(2)) return false;
  const auto shared = [&](int d) { return p.mask.size(d) == 1 || p.mask.stride(d) == 0; };
  return shared(1) && shared(2) && (p.mask.size(3) == 1 || p.mask.stride(3) == 1);
}

inline Mask mask_of(const ops::AttentionOptions& p) {
  if (!p.mask.defined()) return {nullptr, 0, 0, 0, 0, Mask::none};
  const auto step = [&](int d) { return p.mask.size(d) == 1 ? 0 : p.mask.stride(d); };
  const DType dtype = p.mask.dtype;
  check(dtype == DType::boolean || dtype == DType::f32 || dtype == p.query.dtype,
        std::string("attention: mask has dtype ") + name(dtype) + ", which CUDA takes beside " + name(dtype) +
            " operands alone; allowed: bool, float32, " + name(p.query.dtype));
  const auto kind = dtype == DType::boolean ? Mask::boolean : dtype == DType::f32 ? Mask::floats : Mask::operands;
  return {p.mask.data, step(0), step(1), step(2), step(3), kind};
}

// Whether a mask is one of the logits', or padding is hidden by kernels that know of it (attention_sm90a.cuh).
enum class Padding : uint8_t { masks, apart };

// Logits are positive multiples of the products, also as floats, and stay those.
inline bool is_plain(const ops::AttentionOptions& p, Padding padding = Padding::masks) {
  return static_cast<float>(p.scale) > 0 && p.softcap == 0 && !p.alibi_slopes.defined() && !p.distance_bias.defined() &&
         (!p.mask.defined() || (padding == Padding::apart && is_padding(p)));
}

inline Options options_of(const ops::AttentionOptions& p, Padding padding = Padding::masks) {
  const auto window = [](int64_t side) { return static_cast<int>(std::min(side, kMostTokens)); };
  const bool slopes = p.alibi_slopes.defined(), distances = p.distance_bias.defined();
  return {padding == Padding::apart && is_padding(p) ? Mask{nullptr, 0, 0, 0, 0, Mask::none} : mask_of(p),
          slopes ? p.alibi_slopes.as<float>() : nullptr,
          slopes ? p.alibi_slopes.stride(0) : 0,
          slopes ? p.alibi_slopes.stride(1) : 0,
          distances ? p.distance_bias.as<float>() : nullptr,
          distances ? static_cast<int>(p.farthest()) : 0,
          p.sinks.defined() ? p.sinks.as<float>() : nullptr,
          window(p.window_left),
          window(p.window_right),
          p.bottom_right,
          static_cast<float>(p.scale),
          static_cast<float>((is_plain(p, padding) ? p.scale : 1.0) * 1.4426950408889634),
          static_cast<float>(p.softcap),
          dropout_of(p.dropout_p, p.seed)};
}

// For kernels whose blocks own `tile` lines of at most `longest`, in packed sequences or of `tokens`.
inline Sizes sizes_of(const ops::AttentionOptions& p, int64_t longest, int64_t tokens, int tile) {
  for (int64_t count : {p.query.size(2), p.key.size(2)}) {
    check(count <= kMostTokens, "attention: " + std::to_string(count) +
                                    " tokens are not supported on CUDA; allowed: up to " + std::to_string(kMostTokens));
  }
  const int64_t lines = p.packed() ? std::min(longest, tokens) : tokens, tiles = (lines + tile - 1) / tile;
  return {p.cu_seqlens_q.as<int32_t>(),
          p.cu_seqlens_k.as<int32_t>(),
          static_cast<int>(p.packed() ? std::max<int64_t>(tiles, 1) : tiles),
          static_cast<int>(p.heads()),
          static_cast<int>(p.group()),
          static_cast<int>(p.sequences()),
          static_cast<int>(p.query.size(2)),
          static_cast<int>(p.key.size(2))};
}
inline Sizes sizes_of_rows(const ops::AttentionOptions& p, int tile) {
  return sizes_of(p, p.max_seqlen_q, p.query.size(2), tile);
}
inline Sizes sizes_of_keys(const ops::AttentionOptions& p, int tile) {
  return sizes_of(p, p.max_seqlen_k, p.key.size(2), tile);
}

// Numbers of tiles are ints, also those `beyond` the last that blocks draw before they end.
inline dim3 grid_of_tiles(int64_t tiles, int64_t beyond = 0) {
  check(tiles <= std::numeric_limits<int>::max() - beyond, "attention: more than 2^31 tiles are not supported on CUDA");
  return dim3(static_cast<unsigned>(tiles));
}

// Tiles of `lines` of each owner, and owners: heads of sequences. Of packed sequences, whose lengths are the device's
// to know, places of tiles of each head, which tokens behind the last one have, too.
struct Tiling {
  int64_t tiles, owners;
};
inline Tiling tiling_of(const ops::AttentionOptions& p, int64_t tokens, int64_t heads, int lines) {
  if (p.packed()) return {count_places(p.sequences() + 1, tokens, lines, true), heads};
  return {(tokens + lines - 1) / lines, heads * p.sequences()};
}

// Of sm_80's kernels, of which a multiprocessor has room for two.
inline int blocks_at_once() { return 2 * multiprocessors(); }

// The order of tiles of so many rows, of which blocks_at_once() run at once; and that of tiles of keys, past which what
// is `row_bytes` of each row goes. Of packed sequences the longest may be all that goes on.
inline Schedule order_of_rows(const ops::AttentionOptions& p, int lines) {
  const auto [tiles, owners] = tiling_of(p, p.query.size(2), p.heads(), lines);
  const int64_t keys = p.packed() ? std::min(p.max_seqlen_k, p.key.size(2)) : p.key.size(2);
  const Streams streams{keys * (p.key.size(3) + p.value.size(3)) * 2, static_cast<int>(p.group())};
  grid_of_tiles(tiles * owners);
  return schedule_of_rows(static_cast<int>(tiles), static_cast<int>(owners), p.window_left >= 0, p.window_right >= 0,
                          streams, {cache_bytes(), blocks_at_once()});
}
inline Schedule order_of_keys(const ops::AttentionOptions& p, int lines, int64_t row_bytes) {
  const auto [tiles, owners] = tiling_of(p, p.key.size(2), p.key_heads(), lines);
  const int64_t rows = p.packed() ? std::min(p.max_seqlen_q, p.query.size(2)) : p.query.size(2);
  grid_of_tiles(tiles * owners);
  return schedule_of_keys(static_cast<int>(tiles), static_cast<int>(owners), p.window_right >= 0,
                          {rows * row_bytes * p.group(), 1}, {cache_bytes(), blocks_at_once()});
}
// A block for every tile.
inline dim3 grid_of(const Schedule& schedule) { return grid_of_tiles(int64_t{schedule.tiles} * schedule.owners); }

// body(T{}, the class of the head dim, of those that kernels are made for)
template <int... dims, class Body>
void visit_dims(const ops::AttentionOptions& p, const Body& body) {
  const auto of_type = [&]<class T>(T) {
    visit_at_least<dims...>(static_cast<int>(std::max(p.query.size(3), p.value.size(3))),
                            [&](auto dim) { body(T{}, dim); });
  };
  p.query.dtype == DType::bf16 ? of_type(bf16{}) : of_type(f16{});
}

// Classes of head dims whose kernels are built ahead. Those between, in steps of 16 columns, that being what mma goes
// by, are compiled when a call that asks for exact ones needs them (cuda/compiled.h).
#ifndef LLMENGINE_HEAD_DIMS  // the simulator is built with more
#define LLMENGINE_HEAD_DIMS 64, 128, 256
#endif
template <int D, int... dims>
constexpr bool is_one_of(std::integer_sequence<int, dims...>) {
  return ((D == dims) || ...);
}
template <int D>
inline constexpr bool kBuiltAhead = is_one_of<D>(std::integer_sequence<int, LLMENGINE_HEAD_DIMS>{});

// body(T{}, the class of the head dim), which tells whether its kernel can be had: 64, 128 and 256 always can.
template <class Params, class Body>
void visit_classes(const Params& p, const Body& body) {
  bool served = false;
  const auto try_class = [&](auto type, auto dim) { served = body(type, dim); };
  if (p.exact) visit_dims<32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256>(p, try_class);
  if (!served) visit_dims<64, 128, 256>(p, try_class);
}

// The same of body(T{}, the class of the head dim, whether logits are plain).
template <class Params, class Body>
void visit(const Params& p, const Body& body) {
  visit_classes(p, [&](auto type, auto dim) {
    return is_plain(p) ? body(type, dim, std::true_type{}) : body(type, dim, std::false_type{});
  });
}

}  // namespace llmengine::cuda::attention
