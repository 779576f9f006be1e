// The Hopper mixer's launches, for callers that know no CUDA.
#pragma once
#include <string>

#include "../core/network.h"

namespace spin::hopper {

// Of a call: the tensors of a mixer (csrc/core) on the current device, contiguous and aligned to 16 bytes, x and y as
// (B, H, W, C), and memory to work in.
struct Call {
  const NetworkShape& shape;
  const MixerWeights& weights;
  int64_t batch, height, width;
  const void* x;
  void* out;
  void* y[2];      // (B, H, W, C) each
  void* taps;      // (F, taps_of(C, k))
  void* composed;  // (S, C, C) where there are coefficients
  void* stream;
};

// Values of a filter as the kernel reads it, padded.
int64_t taps_of(int64_t channels, int64_t kernel_size);

// Enqueues all launches. Returns what went wrong, empty if nothing did.
std::string run(const Call& call);

}  // namespace spin::hopper
