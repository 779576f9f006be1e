// The Hopper mixer: one launch computes the pointwise half of block d and the depthwise half of block d + 1.
//
//     x  = pw_scale * act(gain * (W y) + pw_bias) + pw_shift (+ y)      of block d
//     y' = x + dw_scale * act(conv(x, taps) + dw_bias) + dw_shift       of block d + 1
//
// Tiling. A thread block computes 128 channels of x for all tokens of one image (or of several small ones): whole
// planes, so the convolution needs nothing from another tile: no halo, no exchange. Tokens are the product's columns:
// wgmma's accumulator is then channels x tokens, 128 registers per thread of two warpgroups. The tile goes to shared
// memory as [token][channel], where lanes are pairs of channels: borders of the image are the same for all lanes, and
// every read of a plane is a line of 128 bytes. Activations are tokens x channels in memory (channels_last), of which
// the copy engine makes tiles whose rows are padded with zeros to whole groups of 8 columns: any height and width will
// do whose padded plane has at most 256 places. Two thread blocks of a cluster multiply the same tokens by different
// rows of W: each fetches half of the tokens and sends them to both.
//
// Who does what, all at once, on different tiles: two warpgroups multiply three stages of 64 input channels, which
// their first thread has copied, and leave gain * sum + bias in the planes; two warpgroups apply the rest and convolve.
// The products' registers (168 of each thread) come from the convolution's (88).
//
// Shared memory: three stages of W (16 KB) and y (32 KB), the planes (64 KB), barriers: 208 KB of 227.
//
// Cost of a tile in clocks of a multiprocessor, at 2,048 multiply-adds of the tensor cores a clock, of which large
// products reach some 80 %, and four instructions a clock; a row is 16 values of 2 channels:
//     product    128 * 256 * C / 2048 / 0.8                               C = 768: 15,400    C = 1024: 20,500
//     hand-over  64 KB through stmatrix, the products wait                       700                700
//     depthwise  8 * (336 + 64 act (+ 112) + rows of taps in the image * row of taps)
//                act: 1 of ReLU, 17 of GELU; row of taps: 171, 233, 209, 235 at k = 3, 5, 7, 9, as compiled
//                                                                  k = 3, ReLU, residual: 8,100
//                                                                           GELU: 15,300    k = 9, GELU: 26,000
//     copies     48 KB per 1,024 clocks of products, of which 32 KB come from L2 thanks to the multicast
// The longer of product and depthwise counts: 0.42 us per image and block at 768 channels k = 3, and at 1024 channels
// k = 9 the convolution still binds, 0.90 us. bench/predict.py has the model, no GPU has confirmed it.
//
// From k = 7 on a row of taps is summed in pairs of bfloat16 and rows in float32: 235 instructions for 345, and errors
// stay below plain PyTorch's (its convolution, activation and affine round, too). Tensor cores instead (a banded 16 x
// 16 matrix per row of taps) would add 18 products of 16 x 8 x 16 per plane, 4,600 clocks at the rate of mma.sync, to
// the unit that binds elsewhere.
//
// Alternatives that were weighed: two warpgroups in turns, each with 64 channels and its own convolution ("ping-pong"):
// simpler hand-over, but 80 bytes a clock of copies into a multiprocessor, more than L2 was seen to deliver (NVIDIA's
// developer forum, topic 355253: 38, some 70 with multicast); the image resident and W streamed: no gain where a
// product has 384 flops per byte (768 channels). wgmma's widest form, 256 columns, reads 80 bytes of shared memory a
// clock where 128 columns read 96, but the compiler wants 154 registers a thread for it at the launch, and that leaves
// 12 warps.
#pragma once
#include <cstdint>

#include "../core/types.h"

#ifdef __CUDACC__
#define SPIN_DEVICE __host__ __device__ __forceinline__
#else
#define SPIN_DEVICE inline
#endif

namespace spin::hopper {

// ---- sizes ----

constexpr int kRows = 128;    // channels of x in a tile
constexpr int kPlaces = 256;  // for tokens in a tile
constexpr int kStep = 64;     // input channels of a stage: 128 bytes, the copy engine's swizzle
constexpr int kStages = 3;
constexpr int kCluster = 2;      // thread blocks that share tokens
constexpr int kLineBytes = 128;  // of a token or a row of W in a stage, of a token in half a plane tile
constexpr int kItemBytes = 2;    // bfloat16 and float16

constexpr int kMostChannels = 2048;

// ---- warps and their registers ----

// A copying warp of its own would cost a warpgroup's registers (they are dealt out to whole ones), and a launch of 640
// threads holds the compiler to 96: so the first product warp copies, too, whenever it has released a stage.
constexpr int kProductWarps = 8, kDepthwiseWarps = 8;
constexpr int kThreads = 32 * (kProductWarps + kDepthwiseWarps);
constexpr int kLaunchRegisters = 65536 / kThreads;
constexpr int kProductRegisters = 168;   // 128 sums and 40 others; at 160 a few are spilled
constexpr int kDepthwiseRegisters = 88;  // 32 sums, 18 taps, addresses
static_assert(32 * (kProductWarps * kProductRegisters + kDepthwiseWarps * kDepthwiseRegisters) <= 65536);

// ---- shared memory ----

constexpr int kMatrixBytes = kRows * kLineBytes;    // a stage of W
constexpr int kTokensBytes = kPlaces * kLineBytes;  // a stage of y
constexpr int kStageBytes = kMatrixBytes + kTokensBytes;
constexpr int kPanelBytes = kPlaces * kLineBytes;  // 64 channels of the planes
constexpr int kPanels = kRows * kItemBytes / kLineBytes;
constexpr int kPlanesAt = kStages * kStageBytes;
constexpr int kBarriersAt = kPlanesAt + kPanels * kPanelBytes;

SPIN_DEVICE constexpr int matrix_at(int stage) { return stage * kStageBytes; }
SPIN_DEVICE constexpr int tokens_at(int stage) { return stage * kStageBytes + kMatrixBytes; }

// Barriers (8 bytes each) and how many arrivals complete a phase of theirs.
constexpr int kPlanesFull = 2 * kStages, kPlanesEmpty = kPlanesFull + 1, kBarriers = kPlanesEmpty + 1;
SPIN_DEVICE constexpr int full(int stage) { return stage; }             // its bytes have come
SPIN_DEVICE constexpr int empty(int stage) { return kStages + stage; }  // products with it are done, in both blocks
SPIN_DEVICE constexpr int arrivals(int barrier, bool product) {
  if (barrier < kStages) return 1;  // who starts the copies, with their bytes
  if (barrier < 2 * kStages) return kCluster * kProductWarps;
  if (barrier == kPlanesFull) return product ? kProductWarps : 1;
  return kDepthwiseWarps;
}

constexpr int kAlignment = 1024;  // of a pattern of the swizzle; the launch asks for so much more
constexpr int kSharedBytes = kBarriersAt + 8 * kBarriers;
static_assert(kSharedBytes + kAlignment <= 232448, "a block's most on sm_90");
static_assert(kStageBytes % kAlignment == 0 && kPlanesAt % kAlignment == 0);

// ---- tiles ----

SPIN_DEVICE constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// How images lie in the places of a tile: place = (image * rows + row) * columns + column. A tile comes in two boxes,
// one per block of the cluster: the upper and the lower rows of one image, or half of several.
struct Geometry {
  int height, width;
  int images, rows, columns;  // in a tile, with padding; 0 images: the plane is too large
  int box_images, box_rows;

  SPIN_DEVICE constexpr int places() const { return images * rows * columns; }
  SPIN_DEVICE constexpr int box_bytes() const { return places() / 2 * kLineBytes; }
  SPIN_DEVICE constexpr int box_row(int box) const { return images == 1 ? box * box_rows : 0; }
  SPIN_DEVICE constexpr int box_image(int box) const { return images == 1 ? 0 : box * box_images; }
};

SPIN_DEVICE constexpr Geometry geometry_of(int height, int width) {
  const int columns = ceil_div(width, 8) * 8;
  if (height < 1 || width < 1 || height > kPlaces || width > kPlaces) return {height, width, 0, 0, 0, 0, 0};
  if (const int pairs = kPlaces / (2 * height * columns)) {
    return {height, width, 2 * pairs, height, columns, pairs, height};
  }
  const int half = ceil_div(height, 2);
  if (2 * half * columns > kPlaces) return {height, width, 0, 0, 0, 0, 0};
  return {height, width, 1, 2 * half, columns, 1, half};
}

// A launch: which halves it computes, of what.
struct Shape {
  Geometry geometry;
  int batch, channels;
  int matrix;  // which of the stacked matrices
  bool product, depthwise, residual;
  Activation activation;

  SPIN_DEVICE constexpr int steps() const { return ceil_div(channels, kStep); }
  SPIN_DEVICE constexpr int row_tiles() const { return ceil_div(channels, kCluster * kRows); }  // a cluster's
  SPIN_DEVICE constexpr int tiles() const { return ceil_div(batch, geometry.images) * row_tiles(); }
};

// Of a cluster's tile: a block's first channel and the first image. Tiles of the same tokens follow one another, so
// that y comes from memory once; all of W stays in L2.
struct Tile {
  int row, image;
};
SPIN_DEVICE constexpr Tile tile_of(const Shape& shape, int tile, int rank) {
  const int rows = shape.row_tiles();
  return {(tile % rows * kCluster + rank) * kRows, tile / rows * shape.geometry.images};
}

// Stage and phase of the next step, as every role counts them.
struct Ring {
  int stage = 0, phase = 0;

  SPIN_DEVICE constexpr void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

// ---- where values lie ----

// A 16-byte chunk of a line, as the copy engine's 128-byte swizzle and the tensor cores have it.
SPIN_DEVICE constexpr int swizzled(int line, int chunk) { return line * kLineBytes + ((chunk ^ (line & 7)) << 4); }

// Of the sums of a warpgroup (64 rows x 256 columns, wgmma's accumulators side by side): row and column of register i.
SPIN_DEVICE constexpr int sum_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
SPIN_DEVICE constexpr int sum_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// The descriptor of a swizzled operand whose rows are lines, groups of 8 lines 1024 bytes apart; `address` in bytes.
SPIN_DEVICE constexpr uint64_t descriptor(uint32_t address) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// A stage is multiplied 16 input channels at a time, 128 places at a time: wgmma's 256 would want more registers than a
// launch of 512 threads has to begin with, whatever setmaxnreg says later.
constexpr int kPartBytes = 16 * kItemBytes, kParts = kLineBytes / kPartBytes;
constexpr int kColumns = 128, kHalves = kPlaces / kColumns;

}  // namespace spin::hopper
