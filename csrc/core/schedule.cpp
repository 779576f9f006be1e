#include "schedule.h"

#include <algorithm>

namespace spin {
namespace {

constexpr int64_t kGroupTokens = 256;  // of small images together: weights are read once for all of them

int64_t grid(const NetworkShape& shape, int64_t pixels) {
  return shape.whole() ? (pixels + 2 * shape.patch_padding - shape.patch) / shape.patch_stride + 1 : pixels;
}

// Whether a band for each thread takes no more vectors of tokens than the image, and either matrices stay in every L2
// or cores read much less of what others have written: a few rows of x instead of their lines of y.
bool bands_are_free(const Network& network, const Plane& plane, bool frozen, int64_t threads) {
  const NetworkShape& shape = network.shape();
  const int64_t lanes = network.kernels().lanes;
  const int64_t vectors = ceil_div(ceil_div(plane.height, threads) * plane.width, lanes);
  if (threads * vectors > ceil_div(plane.tokens(), lanes)) return false;
  const int64_t others_rows = 2 * (shape.kernel_size / 2) * threads;
  return others_rows <= (frozen ? plane.height : plane.height / 2) ||
         network.matrix_bytes(shape.channels, shape.channels) <= kSmallMatrix;
}

}  // namespace

Schedule::Schedule(const Network& network, const Batch& batch, bool frozen, const Parallel& parallel) {
  const NetworkShape& shape = network.shape();
  const int64_t height = grid(shape, batch.input.height), width = grid(shape, batch.input.width);
  const int64_t cuts = network.quartered() ? strassen_cuts(height, width) : 0;
  strassen = cuts > 0;
  plane = {height, width, network.kernels().line_bytes, strassen ? cuts : height};
  threads = useful_threads(2.0 * batch.size * shape.depth * plane.tokens() * shape.channels * shape.channels, parallel);

  const int64_t image_bytes = network.lines(shape.channels) * plane.bytes();
  const int64_t fitting = std::min(band_bytes() / image_bytes, kGroupTokens / plane.tokens());
  const int64_t fair = batch.size < threads ? batch.size : ceil_div(batch.size, int64_t(threads));
  group = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(fair, 1));
  groups = ceil_div(batch.size, group);
  alone = groups / threads * threads;

  const int64_t sharers = alone < groups ? threads : 1;
  const bool free = strassen ? plane.cuts % threads == 0 : bands_are_free(network, plane, frozen, threads);
  bands = ceil_div(image_bytes, band_bytes());
  if (bands > 1 || (alone == 0 && group == 1 && free)) bands = std::min(round_up(bands, sharers), plane.cuts);
}

std::vector<Step> Schedule::steps(const NetworkShape& shape, const Segment& segment, bool frozen, bool shared) const {
  std::vector<Step> steps;
  const bool fused = shared && !frozen;
  if (segment.first_block == 0) {
    if (shape.whole() && bands == 1) steps.push_back({Step::kPatches, 0});
    steps.push_back({!shape.whole() ? Step::kLoad : bands > 1 ? Step::kEmbed : Step::kStem, 0});
  }
  for (int64_t block = segment.first_block; block < segment.last_block; ++block) {
    if (bands > 1) {
      steps.push_back({Step::kBand, block});
      continue;
    }
    if (!fused || block == segment.first_block) steps.push_back({Step::kDepthwise, block});
    steps.push_back({fused && block + 1 < segment.last_block ? Step::kFused : Step::kPointwise, block});
  }
  if (segment.last_block == shape.depth) {
    if (shape.whole() && bands > 1) steps.push_back({Step::kPoolBand, shape.depth});
    steps.push_back({shape.whole() ? Step::kPool : Step::kStore, shape.depth});
  }
  return steps;
}

}  // namespace spin
