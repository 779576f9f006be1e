// Runs a network on a batch.
#pragma once
#include "network.h"
#include "team.h"

namespace spin {

struct Batch {
  int64_t size;
  External input;        // of the first image
  int64_t input_stride;  // elements from one image to the next
  External output;       // without classifier: of the first image
  int64_t output_stride;
};

// A network whose matrices are all packed (slots = matrices).
void run_packed(Network& network, const Batch& batch, const Parallel& parallel);

// Weights as the caller has them: plain matrices are read there, each composition is summed once, however many
// blocks share it.
void run_unpacked(const Kernels& kernels, NetworkShape shape, const MixerWeights& weights, const Batch& batch,
                  const Parallel& parallel);

}  // namespace spin
