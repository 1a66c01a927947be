// Threads of the CPU kernels: PyTorch's own OpenMP pool (its wheel and this module share libgomp by soname), as many as
// torch.get_num_threads() says at the call. After a fork the pool's threads are gone and libgomp would wait for them
// for ever: a forked child (a DataLoader worker) runs serially.
#pragma once

#include <cstdint>

namespace llmengine::cpu {

int num_threads();            // for the kernel being run by this thread
void set_num_threads(int n);  // called by the bindings before each kernel

// Calls body(context, begin, end, thread) on disjoint ranges that cover [0, n), each at least `grain` long but the
// last; range t of T is always the same for the same n and T, so reductions per thread are reproducible.
using RangeBody = void (*)(void* context, int64_t begin, int64_t end, int thread);
int planned_threads(int64_t n, int64_t grain);
void parallel_ranges(int64_t n, int64_t grain, RangeBody body, void* context);

// parallel_ranges over rows, body(begin, end, thread): a thread is woken for no less than `grain` elements.
template <class Body>
void parallel_rows(int64_t rows, int64_t columns, int64_t grain, const Body& body) {
  const auto call = [](void* b, int64_t begin, int64_t end, int thread) {
    (*static_cast<const Body*>(b))(begin, end, thread);
  };
  parallel_ranges(rows, grain / (columns + 1) + 1, call, const_cast<Body*>(&body));
}

// Like parallel_ranges, but hands out single indices as threads come free: for tasks of unequal cost.
using TaskBody = void (*)(void* context, int64_t index, int thread);
void parallel_tasks(int64_t n, TaskBody body, void* context);

// parallel_tasks with body(index).
template <class Body>
void parallel_each(int64_t n, const Body& body) {
  const auto call = [](void* b, int64_t index, int) { (*static_cast<const Body*>(b))(index); };
  parallel_tasks(n, call, const_cast<Body*>(&body));
}

}  // namespace llmengine::cpu
