// Relative attention, backward (formulas: ops/relative_attention.h, tiles: cpu/relative_tile.h).
//
//   A task owns a share of the row tiles of one head of one sequence, and accumulates the gradients of key, value and
//   position_key in floats. It makes attention's tiles again (attention_backward.cpp, cpu/attention_rows.h); three
//   products join its five: the position scores, and the gradients of position_query and of the position keys. The
//   gradients of query, position_query and the segment scores of its rows are its own.
//
//   Then the accumulators are added in a fixed order: of key and value those of a sequence's shares, of position_key
//   those of all sequences, each of which reaches its own distances alone. How many shares there are is a matter of
//   the shapes, never of the number of threads: this changes no bit. Accumulators: 4 (keys (head_dim + value_dim) +
//   (rows + keys) head_dim) bytes a head, sequence and share. Limit: the multiply-add ports.
#include "cpu/relative_tile.h"

namespace llmengine::cpu::LLMENGINE_ISA {
namespace {

constexpr int64_t kTasks = 16;  // at least so many of about equal work, where there is so much

class Backward {
 public:
  explicit Backward(const ops::RelativeAttentionBackward& p)
      : p_(p),
        depth_(padded(p.query.size(3))),
        width_(padded(p.value.size(3))),
        sequences_(ops::sequences_of(p)),
        position_keys_(p, sequences_) {
    double work = 0;
    for (const ops::Sequence& s : sequences_) work += static_cast<double>(s.rows) * s.keys * p.heads();
    int64_t total = 0;
    for (const ops::Sequence& s : sequences_) {
      Accumulators a{};
      a.offset = total;
      const auto wanted = work > 0 ? static_cast<int64_t>(kTasks * (s.rows / work) * s.keys) + 1 : 1;
      a.shares = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, count_of(s.rows, kRows)));
      if (s.rows && s.keys) {
        const ops::Distances d = ops::distances_of(p, s, 0, s.rows);
        a.first = d.first - kLanes, a.distances = d.last - a.first + 1;
      }
      a.floats = s.keys * (depth_ + width_) + a.distances * depth_;
      total += a.floats * a.shares * p.heads();
      accumulators_.push_back(a);
    }
    floats_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(total));
  }

  template <class T>
  void run() {
    position_keys_.pack<T>();
    const SequenceTasks tasks(sequences_, [&](size_t s) { return p_.heads() * accumulators_[s].shares; });
    parallel_each(tasks.size(), [&](int64_t index) { share<T>(tasks[index]); });
    const SequenceTasks keys(sequences_, [&](size_t s) { return p_.heads() * count_of(sequences_[s].keys, kKeys); });
    parallel_each(keys.size(), [&](int64_t index) { add_keys<T>(keys[index]); });
    const int64_t chunks = count_of(p_.distances(), kKeys);
    parallel_each(p_.heads() * chunks, [&](int64_t i) { add_distances<T>(i / chunks, i % chunks * kKeys); });
  }

 private:
  // Of each share of a head: grad_key (keys, depth_), grad_value (keys, width_), grad_distances (distances, depth_),
  // which begins at distance `first`.
  struct Accumulators {
    int64_t offset, shares, first, distances, floats;
  };
  float* floats(size_t sequence, int64_t head, int64_t share) const {
    const Accumulators& a = accumulators_[sequence];
    return floats_.get() + a.offset + (head * a.shares + share) * a.floats;
  }

  template <class T>
  void share(const SequenceTasks::Task& task) const {
    const ops::Sequence& s = task.sequence;
    const Accumulators& a = accumulators_[task.which];
    const int64_t head = task.number / a.shares, share = task.number % a.shares;
    float* grad_key = floats(task.which, head, share);
    std::fill_n(grad_key, a.floats, 0.0f);
    for (int64_t row = share * kRows; row < s.rows; row += a.shares * kRows) rows<T>(s, a, head, row, grad_key);
  }

  template <class T>
  void rows(const ops::Sequence& s, const Accumulators& a, int64_t head, int64_t row, float* grad_key) const {
    using RowTile = BackwardRows<T, ops::RelativeAttentionBackward, RelativeScores>;
    float *grad_value = grad_key + s.keys * depth_, *grad_distances = grad_value + s.keys * width_;
    thread_local Scratch scratch, more;
    using Keys = KeyTiles<T, ops::RelativeAttentionBackward>;
    const auto [keys, memory, buffers, grad_query] =
        scratch.take(Keys::floats(p_), RowTile::floats(p_), TileBuffers<T>::kFloats, kRows * depth_);
    const Keys key_tiles(p_, s, head, keys);
    const TileBuffers<T> tiles(buffers);
    [[maybe_unused]] const typename Products<T>::Session session;
    std::vector<RowTile> one;
    one.emplace_back(p_, s, head, row, RelativeScores(p_, s, head, row, position_keys_, more, T{}), memory);
    SegmentSums segments;
    std::fill_n(grad_query, kRows * depth_, 0.0f);
    const auto make = [&](int64_t first) { return key_tiles.backward(first); };
    for_key_tiles(s.keys, one, make, [&](RowTile& tile, const KeyTile<T>& of) {
      const TilePlace at = tile.make_tiles(of, tiles);
      tile.accumulate(at, of, tiles, {grad_key, grad_value});
      tile.scores().accumulate_positions(at, tiles.g, grad_query, grad_distances, a.first);
      if (p_.segment_scores.defined()) tile.scores().accumulate_segments(at, tiles.p, tiles.g, segments);
    });
    one[0].write();
    store_rows(grad_query, depth_, std::min(kRows, s.rows - row), static_cast<float>(p_.scale),
               Rows<T>(p_.grad_position_query, 0, head, s.row0 + row));
    if (p_.segment_scores.defined()) one[0].scores().store_segments(segments, p_.grad_lse, p_.grad_segment_scores);
  }

  template <class T>
  void add_keys(const SequenceTasks::Task& task) const {
    const ops::Sequence& s = task.sequence;
    const int64_t tiles = count_of(s.keys, kKeys), head = task.number / tiles;
    const int64_t first = task.number % tiles * kKeys, count = std::min(kKeys, s.keys - first);
    const auto add = [&](int64_t offset, int64_t floats_each) {
      float* into = floats(task.which, head, 0) + offset;
      for (int64_t share = 1; share < accumulators_[task.which].shares; ++share) {
        const float* from = floats(task.which, head, share) + offset;
        for (int64_t i = 0; i < floats_each; ++i) into[i] += from[i];
      }
      return into;
    };
    const float scale = static_cast<float>(p_.scale);
    store_rows(add(first * depth_, count * depth_), depth_, count, scale,
               Rows<T>(p_.grad_key, 0, head, s.key0 + first));
    store_rows(add(s.keys * depth_ + first * width_, count * width_), width_, count, 1.0f,
               Rows<T>(p_.grad_value, 0, head, s.key0 + first));
  }

  // Rows [first, first + kKeys) of grad_position_key.
  template <class T>
  void add_distances(int64_t head, int64_t first) const {
    const int64_t count = std::min(kKeys, p_.distances() - first);
    thread_local Scratch scratch;
    float* sum = scratch.take(kKeys * depth_)[0];
    std::fill_n(sum, kKeys * depth_, 0.0f);
    for (size_t n = 0; n < sequences_.size(); ++n) {
      const Accumulators& a = accumulators_[n];
      const int64_t shift = first - p_.zero_distance - a.first;  // of a row's place in the accumulators
      const int64_t begin = std::clamp<int64_t>(-shift, 0, count);
      const int64_t end = std::clamp<int64_t>(a.distances - shift, begin, count);
      for (int64_t share = 0; share < a.shares && begin < end; ++share) {
        const float* from = floats(n, head, share) + sequences_[n].keys * (depth_ + width_) + (begin + shift) * depth_;
        for (int64_t i = 0; i < (end - begin) * depth_; ++i) sum[begin * depth_ + i] += from[i];
      }
    }
    store_rows(sum, depth_, count, static_cast<float>(p_.scale), Rows<T>(p_.grad_position_key, 0, head, first));
  }

  const ops::RelativeAttentionBackward& p_;
  int64_t depth_, width_;
  std::vector<ops::Sequence> sequences_;
  PositionKeys position_keys_;
  std::vector<Accumulators> accumulators_;
  std::unique_ptr<float[]> floats_;
};

void relative_attention_backward(const ops::RelativeAttentionBackward& p) {
  Backward backward(p);
  visit_float(p.query.dtype, [&]<class T>(T) { backward.run<T>(); });
  if (!p.segment_scores.defined()) return;
  // rows after the last boundary belong to no sequence
  const int64_t end = p.cu_seqlens_q.as<int32_t>()[p.sequences()], line = p.heads() * 2;
  std::fill(p.grad_segment_scores.as<float>() + end * line, p.grad_segment_scores.as<float>() + p.query.size(2) * line,
            0.0f);
}

const Registrar<ops::RelativeAttentionBackward> backward{relative_attention_backward};

}  // namespace
}  // namespace llmengine::cpu::LLMENGINE_ISA
