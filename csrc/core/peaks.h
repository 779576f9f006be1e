// What this machine can do at best: the denominators of every "fraction of the floor"; and what it does now.
#pragma once
#include "cpu.h"
#include "team.h"

namespace spin {

// Multiply-add rate of `kernels` in registers, all threads of `parallel` together, in GFLOP/s: the best of
// `rounds` within `seconds`; with a single round the mean, whatever else the machine does meanwhile.
constexpr int kRounds = 8;
double measure_gflops(const Kernels& kernels, const Parallel& parallel, double seconds, int rounds = kRounds);

// Bytes read plus bytes written per second, in GB/s, copying blocks larger than the last-level cache share
// of a core.
double measure_copy_gbps(const Parallel& parallel, double seconds);

}  // namespace spin
