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
  explicit Team(int threads) : threads_(threads), ranges_(std::make_unique<Range[]>(threads)) {}

  // Called by every thread with the same phases in the same order; run(item) does one of `items` (fewer than 2^32).
  template <class Run>
  void phase(int thread, int64_t items, const Run& run) {
    Range& own = ranges_[thread];
    const uint64_t phase = ++own.phase;
    own.items += items;
    int64_t finished = 0;
    for (int i = 0; i < threads_; ++i) {
      const int owner = (thread + i) % threads_;
      const int64_t first = items * owner / threads_, count = items * (owner + 1) / threads_ - first;
      const int64_t some = std::max<int64_t>(1, count / kClaims);
      for (int64_t claimed; (claimed = ranges_[owner].claim(phase, some, count)) < count;) {
        const int64_t end = std::min(claimed + some, count);
        for (int64_t item = claimed; item < end; ++item) run(first + item);
        finished += end - claimed;
      }
    }
    if (finished > 0) {
      fence();
      done_.fetch_add(finished, std::memory_order_release);
    }
    // Items still missing are being worked on by a thread that runs: spin as long as an item may well take,
    // then let others have the core.
    for (int spins = 0; done_.load(std::memory_order_acquire) < own.items; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int64_t kClaims = 64;  // of a range that has more items
  static constexpr int kSpins = 4096;     // 50 to 150 microseconds

  // A thread's, on a line of its own: that stays with its core until another thread looks for work there.
  struct alignas(kCacheLine) Range {
    std::atomic<uint64_t> claims{0};  // a phase, and in the low half how many items were claimed in it
    uint64_t phase = 0;               // where the thread is,
    int64_t items = 0;                // and of all phases until its end

    // The first of `some` items; `count` if none is left.
    int64_t claim(uint64_t phase, int64_t some, int64_t count) {
      uint64_t before = claims.load(std::memory_order_relaxed);
      while (true) {
        if (before >> 32 > phase) return count;  // others are further already
        const int64_t next = before >> 32 == phase ? int64_t(before & UINT32_MAX) : 0;
        if (next >= count) return count;
        if (claims.compare_exchange_weak(before, phase << 32 | uint64_t(next + some), std::memory_order_relaxed)) {
          return next;
        }
      }
    }
  };

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

  const int threads_;
  const std::unique_ptr<Range[]> ranges_;
  alignas(kCacheLine) std::atomic<int64_t> done_{0};  // items, of all phases
};

}  // namespace spin
