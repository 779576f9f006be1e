#include "peaks.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

namespace spin {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Each thread repeats `work` (which returns units done) for its share of the time, round by round; the
// result is the best round's sum of rates.
template <class Work>
double best_rate(const Parallel& parallel, double seconds, int rounds, const Work& work) {
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    std::vector<double> rates(parallel.threads);
    parallel.run(parallel.threads, [&](int thread) {
      work(thread);  // warm up
      const auto start = std::chrono::steady_clock::now();
      double units = 0, elapsed = 0;
      do {
        units += work(thread);
        elapsed = seconds_since(start);
      } while (elapsed < seconds / rounds);
      rates[thread] = units / elapsed;
    });
    double sum = 0;
    for (double rate : rates) sum += rate;
    best = std::max(best, sum);
  }
  return best;
}

}  // namespace

double measure_gflops(const Kernels& kernels, const Parallel& parallel, double seconds, int rounds) {
  return best_rate(parallel, seconds, rounds, [&](int) { return kernels.multiply_add_loop(20000); }) * 1e-9;
}

double measure_copy_gbps(const Parallel& parallel, double seconds) {
  constexpr int64_t kBytes = 64 << 20;
  std::vector<std::vector<char>> from(parallel.threads), to(parallel.threads);
  parallel.run(parallel.threads, [&](int thread) {
    from[thread].assign(kBytes, 1);
    to[thread].assign(kBytes, 2);
  });
  return best_rate(parallel, seconds, kRounds,
                   [&](int thread) {
                     std::memcpy(to[thread].data(), from[thread].data(), kBytes);
                     return 2.0 * kBytes;
                   }) *
         1e-9;
}

}  // namespace spin
