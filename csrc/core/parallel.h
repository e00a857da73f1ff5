// The only place where threads start: fixed tasks, the first exception caught and rethrown.
//
// parallel_for(tasks, f) calls f(0) .. f(tasks - 1), each once, on up to `threads()` threads. Which
// thread runs a task is open, what a task computes is not: results never depend on the thread
// count. Two backends: OpenMP (one pool for the process, as the platform's libraries expect) and
// std::thread
// (-DBITWRIGHT_STD_THREADS), for ThreadSanitizer, which does not see OpenMP's locks, and for
// platforms without OpenMP. The thread count is the only state; Python sets it from affinity and
// cgroup quota.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#ifdef BITWRIGHT_STD_THREADS
#include <thread>
#include <vector>
#endif

namespace bitwright {

inline std::atomic<int>& thread_count() {
  static std::atomic<int> count{1};
  return count;
}

namespace detail {

class FirstException {
 public:
  void capture() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!first_) first_ = std::current_exception();
    failed_.store(true, std::memory_order_relaxed);
  }
  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  void rethrow() const {
    if (first_) std::rethrow_exception(first_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr first_;
  std::atomic<bool> failed_{false};
};

}  // namespace detail

template <class F>
void parallel_for(std::int64_t tasks, const F& f) {
  const int threads = static_cast<int>(
      std::min<std::int64_t>(thread_count().load(), std::max<std::int64_t>(tasks, 1)));
  if (threads <= 1) {
    for (std::int64_t i = 0; i < tasks; ++i) f(i);
    return;
  }
  detail::FirstException error;
  std::atomic<std::int64_t> next{0};
  const auto work = [&] {
    for (std::int64_t i = next.fetch_add(1); i < tasks && !error.failed(); i = next.fetch_add(1)) {
      try {
        f(i);
      } catch (...) {
        error.capture();
      }
    }
  };
#ifdef BITWRIGHT_STD_THREADS
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) pool.emplace_back(work);
  work();
  for (auto& thread : pool) thread.join();
#else
#pragma omp parallel num_threads(threads)
  work();
#endif
  error.rethrow();
}

}  // namespace bitwright
