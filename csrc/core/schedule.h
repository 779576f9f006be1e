// Who does what: images in groups, bands of their rows, and the steps of each.
//
// Images are taken in groups, as many as it takes to fill the vectors of tokens and to read a matrix for 256 of them
// (four images of 7 x 7, one of 16 x 16); their planes lie side by side in a line, so that a product sees one long row
// of tokens.
//
//  - A batch: every thread takes a group at a time through all blocks; nothing waits for anything.
//  - Groups left over (fewer than threads): the threads share one group, a line each, a phase per block: the pointwise
//    of block d for a line, then the depthwise of block d + 1 for the same line, which needs no other. The two
//    kinds of panels alternate, so that one barrier per block is enough. (Frozen: the channels of a panel are no whole
//    lines, so both have a phase of their own. Strassen's product: items of the first cut come first.)
//  - Images too large for their y to stay in L2: bands of rows, one after the other or shared. x alternates between two
//    buffers then, because the neighbours still read the old one. A shared image whose matrices or filters are small
//    is cut into bands too, if that costs no vectors of tokens; and one of Strassen's product, if threads get the same.
//
// Two alternatives for sharing one image:
//  - A band of rows each, whatever the size: no core reads what another one has computed but halo rows, yet every core
//    streams the whole matrix and the vectors of tokens are cut once more (14 x 14: 2 x 7 instead of 13). Two cores of
//    an Emerald Rapids, batch 1, in turns, time by bands / by lines: 1024 k9 1.07, 768 k3 1.00, 512 k5 0.97, 256 k5
//    0.94, 128 k5 0.83; at 14 x 14 tokens 1024 1.17 to 1.29, 768 1.18 to 1.26, 256 1.03 to 1.07. Zen 5, on two core
//    complexes and on one: 768 k3 bf16 0.92 and 1.00, not frozen 0.94 and 0.98, float32 not frozen 0.93 and 0.98; 1024
//    k9 bf16 1.00 and 1.01. Zen 4, likewise: Strassen's product by bands instead of by panels of half the tokens: 768
//    k3 0.73 and 0.97, 1024 k9 0.83 and 1.00; 1024 k9 bf16 0.95 and 0.99.
//  - One kernel over the whole batch before the next: activations then leave the caches between kernels.
// Fusing the pointwise with the next depthwise of an image that is not shared gains nothing: both passes hit the
// caches.
#pragma once
#include <vector>

#include "network.h"
#include "packing_plan.h"
#include "plane.h"
#include "run.h"

namespace spin {

// What happens to a group, one step after the other. Items of a step are independent of each other.
struct Step {
  enum Kind {
    kLoad,       // items: lines
    kPatches,    // bands of every image, into y
    kStem,       // panels
    kEmbed,      // bands: both
    kDepthwise,  // lines; of Strassen's product: pairs of them, of one cut after the other
    kPointwise,  // lines; frozen: panels (Strassen's, shared: of one cut after the other)
    kFused,      // lines: kPointwise, then the next block's kDepthwise
    kBand,       // bands: a block whole
    kStore,      // lines
    kPoolBand,   // bands
    kPool,       // lines
  } kind;
  int64_t block;
};

struct Schedule {
  Schedule(const Network& network, const Batch& batch, bool frozen, const Parallel& parallel);
  std::vector<Step> steps(const NetworkShape& shape, const Segment& segment, bool frozen, bool shared) const;

  bool strassen = false;  // products are Strassen's
  Plane plane;
  int threads;
  int64_t group, groups, alone;  // images in a group; groups; those that a thread takes alone
  int64_t bands;
};

}  // namespace spin
