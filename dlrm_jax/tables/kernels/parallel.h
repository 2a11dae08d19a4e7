// Work dealt out to threads as they come: tables.cc does it on XLA's threads, score.cc on its own.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

// Calls work(0) to work(n - 1), on this thread and at most threads - 1 of the pool's, which has Schedule(task); returns
// when all are done. This thread takes whatever no other has begun, so it never waits for a task that has yet to get a
// thread.
template <typename Pool, typename Work>
void InParallel(Pool& pool, int64_t threads, int64_t n, const Work& work) {
  constexpr int kYields = 300;
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto progress = std::make_shared<Progress>();
  auto run = [progress, n, &work] {  // A task that starts after the end finds nothing left, and touches no work.
    for (int64_t i; (i = progress->next++) < n;) {
      work(i);
      std::lock_guard<std::mutex> lock(progress->mutex);
      if (++progress->done == n) progress->finished.notify_all();
    }
  };
  try {
    for (int64_t i = 1; i < std::min(n, threads); ++i) pool.Schedule(decltype(run)(run));
  } catch (const std::exception&) {  // No memory for a task: those that are scheduled must still find `work`.
  }
  run();
  // The rest is a part's time away at most, which is often less than sleeping and waking would take.
  for (int i = 0; i < kYields && progress->done < n; ++i) std::this_thread::yield();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->finished.wait(lock, [&] { return progress->done == n; });
}
