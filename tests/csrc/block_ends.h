// When blocks end that take work in order, each the next when it is done with its last, and when they could at best.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <queue>
#include <vector>

inline int64_t end_of_last(const std::vector<int64_t>& work, int blocks) {
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> ends;
  for (int i = 0; i < blocks; ++i) ends.push(0);
  int64_t last = 0;
  for (int64_t w : work) {
    const int64_t end = ends.top() + w;
    ends.pop();
    ends.push(end);
    last = std::max(last, end);
  }
  return last;
}

// What no order can be better than: an even division; and, of the n blocks + 1 longest tiles, n + 1 in one block.
inline double least_end(std::vector<int64_t> work, int blocks) {
  std::sort(work.begin(), work.end(), std::greater<>());
  double least = static_cast<double>(std::accumulate(work.begin(), work.end(), int64_t{0})) / blocks;
  for (int n = 0; n * blocks < static_cast<int>(work.size()); ++n) {
    const auto end = work.begin() + n * blocks + 1;
    least = std::max(least, static_cast<double>(std::accumulate(end - n - 1, end, int64_t{0})));
  }
  return least;
}
