// Threads working through the same phases: a phase is some items of work; the next begins when all its items are done.
// Items are claimed, several at a time where there are many, first from a thread's own range (its data are in that
// core's cache), then from the others', so a core that is slowed down from outside does not hold up the rest, and it
// does not matter how many of the threads really run at the same time: even a single one finishes everything.
// (A barrier would hang where a thread pool runs its tasks one after the other.)
//
// Which thread does what never changes a result: every item writes its own place.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>

#include "types.h"

namespace spin {

// Runs body(0), ..., body(threads - 1), at the same time if it can.
struct Parallel {
  int threads;
  std::function<void(int threads, const std::function<void(int)>& body)> run;
};

// Threads that are worth waking for so many operations: below this a second one costs more than it brings.
inline int useful_threads(double flops, const Parallel& parallel) {
  constexpr double kFlopsPerThread = 2e6;
  return int(std::clamp(flops / kFlopsPerThread, 1.0, double(parallel.threads)));
}

class Team {
 public:
  Team(int threads, int64_t phases)
      : threads_(threads),
        stride_(round_up(threads + 1, kCountersPerLine)),
        counters_(new (std::align_val_t(kCacheLine)) std::atomic<int>[phases * stride_] {}) {}

  // Called by every thread with the same phases in the same order; run(item) does one item.
  template <class Run>
  void phase(int thread, int64_t phase, int64_t items, const Run& run) {
    std::atomic<int>* counters = counters_.get() + phase * stride_;
    std::atomic<int>& done = counters[threads_];
    for (int i = 0; i < threads_; ++i) {
      const int owner = (thread + i) % threads_;
      const int64_t first = items * owner / threads_, count = items * (owner + 1) / threads_ - first;
      const int64_t some = std::max<int64_t>(1, count / kClaims);
      while (counters[owner].load(std::memory_order_relaxed) < count) {
        const int64_t claimed = counters[owner].fetch_add(int(some), std::memory_order_relaxed);
        if (claimed >= count) break;
        const int64_t end = std::min(claimed + some, count);
        for (int64_t item = claimed; item < end; ++item) run(first + item);
        fence();
        done.fetch_add(int(end - claimed), std::memory_order_release);
      }
    }
    // Items still missing are being worked on by a thread that runs: spin as long as an item may well take,
    // then let others have the core.
    for (int spins = 0; done.load(std::memory_order_acquire) < items; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kCountersPerLine = kCacheLine / sizeof(std::atomic<int>);
  // Of a thread's range, where it has more items: a claim waits until stores past the caches are through.
  static constexpr int64_t kClaims = 64;
  static constexpr int kSpins = 4096;  // 50 to 150 microseconds

  // Items may store past the caches: such stores have no order of their own.
  static void fence() {
#if defined(__x86_64__)
    __builtin_ia32_sfence();
#endif
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  struct Free {
    void operator()(std::atomic<int>* p) const { ::operator delete[](p, std::align_val_t(kCacheLine)); }
  };
  int threads_;
  int64_t stride_;
  std::unique_ptr<std::atomic<int>[], Free> counters_;
};

}  // namespace spin
