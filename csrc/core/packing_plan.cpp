#include "packing_plan.h"

#include <algorithm>
#include <utility>

namespace spin {

PackingPlan plan_packing(const std::vector<int64_t>& pw_index, int64_t slot_budget) {
  const int64_t depth = pw_index.size();
  const int64_t matrices = depth ? *std::max_element(pw_index.begin(), pw_index.end()) + 1 : 0;
  std::vector<int64_t> last_use(matrices, -1), slot_of(matrices, -1), free_slots;
  for (int64_t d = 0; d < depth; ++d) last_use[pw_index[d]] = d;

  PackingPlan plan;
  plan.segments.push_back({0, depth, {}});
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t matrix = pw_index[d];
    if (slot_of[matrix] < 0) {
      if (free_slots.empty() && plan.slots >= slot_budget) {
        // Blocks before d are done with these once the segment ends: their slots are free for the next.
        for (int64_t m = 0; m < matrices; ++m) {
          if (slot_of[m] >= 0 && last_use[m] < d) free_slots.push_back(std::exchange(slot_of[m], -2));
        }
        if (!free_slots.empty()) {
          plan.segments.back().last_block = d;
          plan.segments.push_back({d, depth, {}});
        }
      }
      if (free_slots.empty()) free_slots.push_back(plan.slots++);
      slot_of[matrix] = free_slots.back();
      free_slots.pop_back();
      plan.segments.back().packings.push_back({matrix, slot_of[matrix]});
    }
    plan.slot_of_block.push_back(slot_of[matrix]);
  }
  return plan;
}

}  // namespace spin
