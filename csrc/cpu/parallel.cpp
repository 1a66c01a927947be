#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace llmengine::cpu {
namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int atfork = pthread_atfork(nullptr, nullptr, [] { forked = true; });
thread_local int requested = 1;

bool nested() {
#ifdef _OPENMP
  return omp_in_parallel();
#else
  return false;
#endif
}

// Runs body(thread) on `threads` threads; an exception of any thread reaches the caller. The team is all of
// num_threads(), as PyTorch's are: libgomp ends the threads that a smaller team leaves over, and the next larger one,
// here or in PyTorch, would start them again.
template <class Body>
void run(int threads, const Body& body) {
  if (threads <= 1) return body(0);
#ifdef _OPENMP
  std::exception_ptr error;
#pragma omp parallel num_threads(num_threads())
  {
    try {
      // The runtime may give fewer threads than asked for: each then takes several shares.
      for (int t = omp_get_thread_num(); t < threads; t += omp_get_num_threads()) body(t);
    } catch (...) {
#pragma omp critical(llmengine_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
#else
  for (int t = 0; t < threads; ++t) body(t);
#endif
}

}  // namespace

int num_threads() { return forked || nested() ? 1 : requested; }
void set_num_threads(int n) { requested = std::max(1, n); }

int planned_threads(int64_t n, int64_t grain) {
  const int64_t useful = (n + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  return static_cast<int>(std::clamp<int64_t>(useful, 1, num_threads()));
}

void parallel_ranges(int64_t n, int64_t grain, RangeBody body, void* context) {
  if (n <= 0) return;
  const int64_t threads = planned_threads(n, grain);
  run(static_cast<int>(threads), [&](int t) {
    const int64_t begin = n * t / threads, end = n * (t + 1) / threads;
    if (begin < end) body(context, begin, end, t);
  });
}

void parallel_tasks(int64_t n, TaskBody body, void* context) {
  if (n <= 0) return;
  std::atomic<int64_t> next{0};
  run(planned_threads(n, 1), [&](int t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) body(context, i, t);
  });
}

}  // namespace llmengine::cpu
