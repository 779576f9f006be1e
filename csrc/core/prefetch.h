// What a core reads next, asked for while it computes, a few cache lines per step: all of it at once would hold every
// place that L1 has for lines on their way, and what the computation itself reads would wait behind it.
#pragma once
#include "types.h"

namespace spin {

struct Ahead {
  const char* data = nullptr;
  int64_t bytes = 0;
};

class Prefetch {
 public:
  SPIN_INLINE Prefetch(const Ahead& ahead, int64_t steps)
      : next_(ahead.data), end_(ahead.data + ahead.bytes), lines_per_step_(ceil_div(ahead.bytes / kCacheLine, steps)) {}
  template <int kLocality = 3>  // 3: into L1, 2: into L2
  SPIN_INLINE void step() {
    for (int64_t i = 0; i < lines_per_step_ && next_ < end_; ++i, next_ += kCacheLine)
      __builtin_prefetch(next_, 0, kLocality);
  }

 private:
  const char* next_;
  const char* end_;
  int64_t lines_per_step_;
};

}  // namespace spin
