// The gradient of a pointwise matrix: G[o, i] += sum over tokens of gradient[o, t] * input[i, t].
//
// Both operands are in the blocked layout already: a step of the sum over tokens broadcasts 8 of a line's 16 output
// channels (neighbours in one cache line) and multiplies them with 3 lines of input channels: 24 sums in registers, 11
// loads for 24 multiply-adds, nothing packed. With vdpbf16ps a step takes two tokens, whose vectors were rounded and
// interleaved (pack). One call computes a vector of output channels for all input channels and at most some hundred
// tokens; the input's part (48 KB at 256 tokens) is used by both tiles of rows in turn, for the most part from L1.
// Cost: tokens * channels * vectors multiply-adds. Numerics: float32 sums in order of the tokens, call by call.
#pragma once
#include "kernels.h"

namespace spin {

template <class V>
struct WeightGradient {
  using F = typename V::F;
  static constexpr int64_t kLanes = V::kLanes;
  static constexpr int64_t kTokens = V::kLineVectors;  // in a unit
  static constexpr int64_t kStepBytes = kLanes * kUnitBytes;
  static constexpr int64_t kAhead = 16 * kStepBytes;  // three streams from L2: a step of 768/32 takes 2 to 3 % less

  static void pack(const PackGradientArgs& a) {
    char* to = a.to;
    for (int64_t t = 0; t < a.tokens; t += kTokens, to += kStepBytes) {
      F tokens[kTokens];
      for (int64_t i = 0; i < kTokens; ++i) {
        tokens[i] = t + i < a.tokens ? V::load(a.input + (t + i) * kLanes) : V::zero();
      }
      V::store(to, V::interleave(tokens));
    }
  }

  template <int kRows, int kVectors>
  static void tile(const WeightGradientArgs& a, int64_t row, int64_t vector) {
    const int64_t stride = a.out_stride;
    float* out = a.out + row * stride + vector * kLanes;
    F sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V::load(out + r * stride + v * kLanes);
    }
    const char *gradient = a.gradient + row * kUnitBytes, *input = a.input + vector * a.vector_stride;
    for (int64_t t = 0; t < a.tokens; t += kTokens, gradient += kStepBytes, input += kStepBytes) {
      F x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        x[v] = V::load(input + v * a.vector_stride);
        __builtin_prefetch(input + v * a.vector_stride + kAhead);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const F g = V::broadcast(gradient + r * kUnitBytes);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = V::mac(sum[r][v], x[v], g);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(out + r * stride + v * kLanes, sum[r][v]);
    }
  }

  // All rows of a few vectors of inputs: they come from L1 after the first tile.
  template <int kVectors>
  static void columns(const WeightGradientArgs& a, int64_t vector) {
    constexpr int kRows = V::kTileRows < V::kLanes ? V::kTileRows : V::kLanes, kRest = V::kLanes % kRows;
    int64_t row = 0;
    for (; row + kRows <= kLanes; row += kRows) tile<kRows, kVectors>(a, row, vector);
    if constexpr (kRest > 0) tile<kRest, kVectors>(a, row, vector);
  }

  static void run(const WeightGradientArgs& a) {
    int64_t vector = 0;
    for (; vector + V::kPanelVectors <= a.vectors; vector += V::kPanelVectors) columns<V::kPanelVectors>(a, vector);
    if constexpr (V::kPanelVectors > 2) {
      if (a.vectors - vector == 2) return columns<2>(a, vector);
    }
    if (vector < a.vectors) columns<1>(a, vector);
  }

  static void transpose(const TransposeArgs& a) {
    constexpr int64_t kBytes = size_of(V::kChain), kUnitValues = kUnitBytes / kBytes;
    const int64_t columns = a.inputs - a.first_input < kLanes ? a.inputs - a.first_input : kLanes;
    for (int64_t o = 0; o < a.outputs; o += kLanes) {
      const int64_t rows = a.outputs - o < kLanes ? a.outputs - o : kLanes;
      const char* from = a.rows + o * a.row_stride + a.first_input * kBytes;
      char* to = a.to + o * kBytes;
      if (rows == kLanes && columns == kLanes) {
        F block[V::kLanes];
#pragma GCC unroll 16
        for (int r = 0; r < V::kLanes; ++r) block[r] = V::load_chain(from + r * a.row_stride);
        V::transpose(block);
#pragma GCC unroll 16
        for (int r = 0; r < V::kLanes; ++r) V::store_chain(to + r * a.to_stride, block[r]);
        continue;
      }
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = 0; r < round_up(rows, kUnitValues); ++r) {
          const float value = r < rows ? load_scalar(from + r * a.row_stride, V::kChain, c) : 0.f;
          store_scalar(to + c * a.to_stride, V::kChain, r, value);
        }
      }
    }
  }
};

}  // namespace spin
