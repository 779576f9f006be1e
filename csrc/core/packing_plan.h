// When a call sums compositions and where they live.
#pragma once
#include <cstdint>
#include <vector>

namespace spin {

// The blocks in segments. Before a segment its new matrices are made; inside it images proceed independently. A slot is
// used again once no later block needs its matrix.
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
