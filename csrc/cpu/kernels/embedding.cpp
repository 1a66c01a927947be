// Rows of a table by token id, and the table's gradient (formulas: ops/embedding.h).
//
//   forward    a thread copies a run of tokens' rows. 2 e bytes an element (e: bytes of an element)
//   backward   a counting sort gives each id's tokens in their order. Then each row of the table is written once:
//              zeros, or the sum of its tokens' gradients, kept in a line of floats in the first-level cache. No row is
//              shared, so no bit depends on the threads. Reads e bytes an element of the tokens and writes e an element
//              of the table, which is the most: 50257 x 768 floats are 154 MB
//   limit      memory bandwidth; of a gradient in fresh pages, the system that maps them
#include "ops/embedding.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // rows worth waking a thread for
constexpr int64_t kRows = 64;                // of a backward's task, where there are many
constexpr int64_t kColumns = 1024;           // of a line of sums

template <class T>
void gather(const ops::EmbeddingForward& p, int64_t begin, int64_t end) {
  const int64_t columns = p.weight.size(1), stride = p.weight.stride(0);
  const auto* ids = p.input.as<int64_t>();
  const auto scale = static_cast<float>(p.scale);
  for (int64_t token = begin; token < end; ++token) {
    const T* from = p.weight.as<T>() + ids[token] * stride;
    T* to = p.output.as<T>() + token * columns;
    if (scale == 1.0f) {
      std::copy(from, from + columns, to);
    } else {
      for_lanes(columns, [&](int64_t c, auto n) { store_n(to + c, load_n(from + c, n) * scale, n); });
    }
  }
}

// The tokens of id v, in their order, are tokens[first[v]] to tokens[first[v + 1] - 1].
struct TokensById {
  std::vector<int64_t> first, tokens;

  TokensById(const TensorView& input, int64_t rows) : first(rows + 2, 0), tokens(input.size(0)) {
    const auto* ids = input.as<int64_t>();
    for (size_t t = 0; t < tokens.size(); ++t) ++first[ids[t] + 2];
    for (int64_t v = 0; v < rows; ++v) first[v + 2] += first[v + 1];
    // first[v + 1], where v's begin, moves on to where they end, which is where those of v + 1 begin
    for (size_t t = 0; t < tokens.size(); ++t) tokens[first[ids[t] + 1]++] = static_cast<int64_t>(t);
  }
};

// One row of the table's gradient, of `count` > 0 tokens: four at a time, so that the sums are seldom read and written.
template <class T>
void add_up(const ops::EmbeddingBackward& p, const int64_t* tokens, int64_t count, T* to) {
  const int64_t columns = p.grad_weight.size(1), stride = p.grad_output.stride(0);
  const auto scale = static_cast<float>(p.scale);
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t width = std::min(kColumns, columns - first);
    const auto row = [&](int64_t k) { return p.grad_output.as<T>() + tokens[k] * stride + first; };
    float sums[kColumns];
    std::fill_n(sums, width, 0.0f);
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
      const T *a = row(k), *b = row(k + 1), *c = row(k + 2), *d = row(k + 3);
      for_lanes(width, [&](int64_t i, auto n) {
        const F sum = load_n(sums + i, n) + load_n(a + i, n) + load_n(b + i, n) + load_n(c + i, n) + load_n(d + i, n);
        store_n(sums + i, sum, n);
      });
    }
    for (; k < count; ++k) {
      const T* a = row(k);
      for_lanes(width, [&](int64_t i, auto n) { store_n(sums + i, load_n(sums + i, n) + load_n(a + i, n), n); });
    }
    for_lanes(width, [&](int64_t i, auto n) { store_n(to + first + i, load_n(sums + i, n) * scale, n); });
  }
}

// Zeros, in vectors: memset's string instruction begins anew at every page that is not yet mapped.
void clear(void* to, int64_t bytes) {
  auto* place = static_cast<char*>(to);
  const F zeros{};
  int64_t i = 0;
  for (; i + static_cast<int64_t>(sizeof zeros) <= bytes; i += sizeof zeros) {
    std::memcpy(place + i, &zeros, sizeof zeros);
    asm volatile("" ::: "memory");  // or the compiler makes a memset of the loop
  }
  if (i < bytes) std::memset(place + i, 0, static_cast<size_t>(bytes - i));  // of no columns there is no place
}

template <class T>
void scatter(const ops::EmbeddingBackward& p) {
  const int64_t rows = p.grad_weight.size(0), columns = p.grad_weight.size(1);
  const TokensById by_id(p.input, rows);
  const int64_t rows_each = std::clamp<int64_t>(rows / kRows, 1, kRows);  // one of a small table's
  parallel_each((rows + rows_each - 1) / rows_each, [&](int64_t task) {
    const int64_t last = std::min(rows, (task + 1) * rows_each);
    for (int64_t v = task * rows_each; v < last; ++v) {
      T* to = p.grad_weight.as<T>() + v * columns;
      const int64_t count = v == p.padding_idx ? 0 : by_id.first[v + 1] - by_id.first[v];
      if (count == 0) {
        clear(to, columns * static_cast<int64_t>(sizeof(T)));
      } else {
        add_up(p, by_id.tokens.data() + by_id.first[v], count, to);
      }
    }
  });
}

void embedding_forward(const ops::EmbeddingForward& p) {
  ops::check_ids("embedding", p.input, p.weight.size(0));
  visit_float(p.weight.dtype, [&]<class T>(T) {
    parallel_rows(p.input.size(0), p.weight.size(1), kGrainElements,
                  [&](int64_t begin, int64_t end, int) { gather<T>(p, begin, end); });
  });
}

void embedding_backward(const ops::EmbeddingBackward& p) {
  ops::check_ids("embedding backward", p.input, p.grad_weight.size(0));
  visit_float(p.grad_weight.dtype, [&]<class T>(T) { scatter<T>(p); });
}

const Registrar<ops::EmbeddingForward> forward{embedding_forward};
const Registrar<ops::EmbeddingBackward> backward{embedding_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
