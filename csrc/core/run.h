// Runs a network on a batch: the schedule.
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

// When a call sums compositions and where they live (for tests): the blocks in segments. Before
// a segment its new matrices are made; inside it images proceed independently. A slot is used again once
// no later block needs its matrix.
struct Segment {
  struct Packing {
    int64_t matrix, slot;
  };
  int64_t first_block, last_block;
  std::vector<Packing> packings;
};
struct PackingPlan {
  std::vector<Segment> segments;
  std::vector<int64_t> slot_of_block;
  int64_t slots = 0;
};
PackingPlan plan_packing(const std::vector<int64_t>& pw_index, int64_t slot_budget);

}  // namespace spin
