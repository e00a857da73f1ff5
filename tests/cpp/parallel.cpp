// parallel_for: each task once, the first exception after the join, nested calls from threads.
#include <thread>
#include <vector>

#include "check.h"

namespace bitwright_tests {

namespace {

void each_task_once(int threads, std::int64_t tasks) {
  thread_count().store(threads);
  std::vector<int> runs(static_cast<std::size_t>(tasks), 0);
  parallel_for(tasks, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
  bool once = true;
  for (const int count : runs) once = once && count == 1;
  CHECK(once);
}

void exceptions_arrive(int threads) {
  thread_count().store(threads);
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> started{0};
    const std::string text = refusal([&] {
      parallel_for(200, [&](std::int64_t i) {
        started.fetch_add(1);
        if (i % 3 == 1) throw std::invalid_argument("task refused");
      });
    });
    CHECK(text == "task refused");
    CHECK(started.load() >= 1 && started.load() <= 200);
  }
  bool other = false;
  try {
    parallel_for(8, [](std::int64_t i) {
      if (i == 7) throw 7;
    });
  } catch (int value) {
    other = value == 7;
  }
  CHECK(other);
  each_task_once(threads, 64);  // the pool is whole after a failure
}

void callers_at_once() {
  thread_count().store(2);
  std::vector<std::int64_t> totals(4, 0);
  std::vector<std::thread> callers;
  for (auto& total : totals)
    callers.emplace_back([&total] {
      std::atomic<std::int64_t> sum{0};
      for (int round = 0; round < 10; ++round)
        parallel_for(100, [&](std::int64_t i) { sum.fetch_add(i); });
      total = sum.load();
    });
  for (auto& caller : callers) caller.join();
  for (const auto total : totals) CHECK(total == 10 * 4950);
}

}  // namespace

void parallel() {
  for (int threads = 1; threads <= 4; ++threads) {
    for (const std::int64_t tasks : {0, 1, 2, 3, 5, 64, 1000}) each_task_once(threads, tasks);
    exceptions_arrive(threads);
  }
  callers_at_once();
}

}  // namespace bitwright_tests
