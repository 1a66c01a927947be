// What stands between the products of attention's AMX kernels and their weights (formulas: ops/attention.h).
//
//   A piece is 32 keys and 16 rows of products, a row in each lane. Who sees whom, and what dropout keeps, are a bit a
//   score: one vector a piece, whose lanes have a bit for each key. A band and a boolean mask are such bits and nothing
//   else, so that they cost the kernels a selection a vector. Soft cap, biases of every kind and a scale that is not
//   positive make passes over the piece, which lies in the first-level cache, before its exponentials: three
//   instructions a vector each, but for tanh; dropout draws Philox's words for it, 17 cycles a vector.
#pragma once

#include "cpu/attention_rows.h"

#if defined(LLMENGINE_AMX)

namespace llmengine::cpu::LLMENGINE_ISA {

#define LLMENGINE_INLINE __attribute__((always_inline)) inline

inline constexpr int kPieceRows = kAmxRows, kPieceKeys = 32;

LLMENGINE_INLINE bool all(I condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__builtin_bit_cast(__m512i, condition), __builtin_bit_cast(__m512i, condition)) ==
         0xffff;
#else
  for (int i = 0; i < kLanes; ++i) {
    if (!condition[i]) return false;
  }
  return true;
#endif
}

// Of each lane, is its bit set?
LLMENGINE_INLINE I has_bit(U bits, int bit) { return (bits & (uint32_t{1} << bit)) != 0; }

// 32 keys and 16 rows of a head as they lie in tiles: keys 0 to 15, and keys 16 to 31 so many floats further on.
struct AmxPiece {
  int64_t row, rows, key;  // of the sequence; there may be fewer than 16 rows, and keys end with the sequence's
  float* at(float* tiles, int64_t half, int64_t k) const { return tiles + k / kAmxRows * half + k % kAmxRows * kLanes; }
};

class AmxLogits {
 public:
  // Are logits products times a positive factor, or unseen, and weights what they are?
  static bool plain(const ops::AttentionOptions& p) {
    const bool biased =
        p.alibi_slopes.defined() || p.distance_bias.defined() || (p.mask.defined() && p.mask.dtype != DType::boolean);
    const float factor = static_cast<float>(p.scale * 1.4426950408889634);
    return !biased && p.softcap == 0 && p.dropout_p == 0 && factor > 0 && factor < INFINITY;
  }

  // One head of a sequence.
  AmxLogits(const ops::AttentionOptions& p, const ops::Sequence& s, int64_t head)
      : p_(p),
        band_(p.band(s)),
        mask_(p, s, head),
        keys_(s.keys),
        head_(head),
        index_(s.index),
        stream_(static_cast<uint32_t>(s.index * p.heads() + head)),
        dropout_(p.dropout_p, p.seed) {}

  // From the first to the last key that some row may see.
  Span keys() const { return mask_.seen(keys_); }
  bool drops() const { return dropout_.active; }
  float keep_scale() const { return dropout_.keep_scale; }

  // May scores be unseen that a band shows?
  bool masked() const { return mask_.boolean(); }
  // Who sees whom. Lanes beyond the last row see what it sees in the mask, so that they are no cause for anything.
  U seen(const AmxPiece& at) const {
    const U band = in_band(at);
    return mask_.boolean() ? band & in_mask(at) : band;
  }

  // What dropout keeps.
  U kept(const AmxPiece& at) const {
    U bits = {};
    for (int k = 0; k < kPieceKeys; k += Dropout::kBlockColumns) {
      dropout_.draw_across(stream_, at.row, at.key + k,
                           [&](int j, int, I dropped) { bits |= dropped ? U{} : U{} + (uint32_t{1} << (k + j)); });
    }
    return bits;
  }

  // Products become logits, -inf where not seen. `slopes`: receives the soft cap's derivative, where there is a cap.
  void make(const AmxPiece& at, U seen, float* tiles, int64_t half, float* slopes = nullptr) const {
    const float scale = static_cast<float>(p_.scale);
    const auto each = [&](const auto& body) {
      for (int k = 0; k < kPieceKeys; ++k) {
        float* x = at.at(tiles, half, k);
        store(x, body(load(x), k));
      }
    };
    if (capped()) {
      const float cap = static_cast<float>(p_.softcap), inverse = static_cast<float>(1.0 / p_.softcap);
      each([&](F x, int k) {
        const F t = tanh(x * scale * inverse);
        if (slopes) store(slopes + k * kLanes, 1.0f - t * t);
        return t * cap;
      });
    } else {
      each([&](F x, int) { return x * scale; });
    }
    if (p_.alibi_slopes.defined()) {
      const float slope =
          p_.alibi_slopes.as<float>()[index_ * p_.alibi_slopes.stride(0) + head_ * p_.alibi_slopes.stride(1)];
      const F position = to_float(__builtin_bit_cast(I, lane_numbers()) + static_cast<int32_t>(ahead(at)));
      each([&](F x, int k) {
        const F distance = position - static_cast<float>(k);
        return x - slope * max(distance, -distance);
      });
    }
    if (p_.distance_bias.defined()) {
      float line[kDiagonals];
      read_diagonals(at, line);
      each([&](F x, int k) { return biased(x, load(line + kPieceKeys - 1 - k)); });
    }
    if (mask_.defined() && !mask_.boolean()) {
      alignas(64) float bias[kPieceKeys * kLanes];
      mask_.visit(at.row, at.key, [&]<class T>(const T* mask) {
        if constexpr (!std::is_same_v<T, uint8_t>) read_bias(at, mask, bias);
      });
      each([&](F x, int k) { return biased(x, load(bias + k * kLanes)); });
    }
    each([&](F x, int k) {  // a NaN becomes one that rounds to a NaN: see interleaved
      return select(has_bit(seen, k), select(x == x, x, broadcast(NAN)), broadcast(-INFINITY));
    });
  }
  bool capped() const { return p_.softcap > 0; }

 private:
  static constexpr int kDiagonals = kPieceKeys + kPieceRows;  // the last is of no score

  int64_t keys_of(const AmxPiece& at) const { return std::min<int64_t>(kPieceKeys, keys_ - at.key); }
  // How far the first row's position lies beyond the first key.
  int64_t ahead(const AmxPiece& at) const { return at.row + band_.shift - at.key; }

  // The lowest n bits, of n from 0 to 32
  static U lowest(I n) {
    const U some = __builtin_bit_cast(U, n);
    return n > 31 ? ~U{} : ((U{} + 1) << (some & 31)) - 1;
  }
  static I clamped(I n) {
    n = n < 0 ? I{} : n;
    return n > kPieceKeys ? I{} + kPieceKeys : n;
  }
  U in_band(const AmxPiece& at) const {
    const auto near = [](int64_t x) { return static_cast<int32_t>(ops::clamp_index(x, -64, 64)); };
    const int64_t position = ahead(at), most = band_.rows + band_.keys;
    const I lanes = __builtin_bit_cast(I, lane_numbers()), keys = I{} + near(band_.keys - at.key);
    const I first = lanes + near(position - std::min(band_.left, most));
    const I last = lanes + near(position + std::min(band_.right, most) + 1);
    const I begin = band_.left < 0 ? I{} : first, end = band_.right < 0 ? keys : (last < keys ? last : keys);
    return lowest(clamped(end)) & ~lowest(clamped(begin));
  }

  U in_mask(const AmxPiece& at) const {
    const int64_t keys = keys_of(at);
    return mask_.visit(at.row, at.key, [&]<class T>(const T* mask) {
      U bits = {};
      if constexpr (std::is_same_v<T, uint8_t>) {
        if (mask_.row_step == 0) return U{} + bits_of(mask, keys);
        for (int64_t r = 0; r < kLanes; ++r) bits[r] = bits_of(mask + std::min(r, at.rows - 1) * mask_.row_step, keys);
      }
      return bits;
    });
  }
  // A bit for each of up to 32 keys.
  uint32_t bits_of(const uint8_t* mask, int64_t keys) const {
    if (mask_.key_step == 0) return *mask ? ~uint32_t{0} : 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    const uint32_t there = keys == kPieceKeys ? ~uint32_t{0} : (uint32_t{1} << keys) - 1;
    const __m256i line = _mm256_maskz_loadu_epi8(there, mask);
    return _mm256_test_epi8_mask(line, line);
#else
    uint32_t bits = 0;
    for (int64_t k = 0; k < keys; ++k) bits |= static_cast<uint32_t>(mask[k] != 0) << k;
    return bits;
#endif
  }
  // The bias of a distance is one for a diagonal of the piece: number r - k + 31 for row r and key k.
  void read_diagonals(const AmxPiece& at, float* line) const {
    const int64_t most = p_.farthest(), first = kPieceKeys - 1 - ahead(at);
    const float* table = p_.distance_bias.as<float>() + head_ * p_.distance_bias.size(1) + most;
    for (int64_t d = 0; d < kDiagonals; ++d) line[d] = table[ops::clamp_index(first - d, -most, most)];
  }

  template <class T>
  void read_bias(const AmxPiece& at, const T* mask, float* bias) const {
    const int64_t keys = keys_of(at);
    const auto read = [&](const T* from, int64_t k) {
      const int64_t count = std::clamp<int64_t>(keys - k, 0, kLanes);
      if (mask_.key_step == 0) return broadcast(bias_of(*from));
      return count == kLanes ? load(from + k) : load_part(from + k, count);
    };
    for (int64_t k = 0; k < kPieceKeys; k += kLanes) {
      float* to = bias + k * kLanes;
      F block[kLanes];
      if (mask_.row_step == 0) {
        alignas(64) float line[kLanes];
        store(line, read(mask, k));
        for (int i = 0; i < kLanes; ++i) block[i] = broadcast(line[i]);
      } else {
        for (int64_t r = 0; r < kLanes; ++r) block[r] = read(mask + std::min(r, at.rows - 1) * mask_.row_step, k);
        transpose(block);
      }
      for (int i = 0; i < kLanes; ++i) store(to + i * kLanes, block[i]);
    }
  }

  const ops::AttentionOptions& p_;
  ops::Band band_;
  MaskOfHead mask_;
  int64_t keys_, head_, index_;
  uint32_t stream_;
  Dropout dropout_;
};

}  // namespace llmengine::cpu::LLMENGINE_ISA
#endif
