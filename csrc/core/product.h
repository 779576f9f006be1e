// The pointwise product with its epilogue: out[o, t] = epilogue(sum_i W[o, i] in[i, t]).
//
// Tiling: one call computes a panel (up to 48 output channels, all tokens of a plane or band), token tile
// by token tile. A tile of 8 tokens x 3 vectors keeps 24 sums in registers; each step multiplies 3 vectors
// of weights with 8 broadcast inputs: 11 loads for 24 multiply-adds. The input tile (8 tokens, all
// channels: 24 KB at 768) stays in L1, the panel (147 KB at 768) streams from L2 once per tile.
// Tokens are dealt out evenly over the tiles (49 = 7 tiles of 7), so there is no slow remainder.
//
// Cost: tokens * channels * vectors multiply-adds of one vector each; floor = that / FMA rate. Bytes from
// L2 per multiply-add vector: 8 (panel) + 1.3 (input) at 8 x 48, well under what L2 delivers. The panel
// after this one is prefetched to L2, a few lines per input line, evenly over the tiles. Blocking the input
// channels too, so that a slice of the panel stays in L1 (64 to 256 channels), gained nothing: -4 to +4 %.
//
// Numerics: float32 sums in order of the input channel, the same for every tile shape and thread count.
#pragma once
#include "epilogue.h"
#include "kernels.h"

namespace spin {

template <class V>
struct Product {
  using F = typename V::F;
  static constexpr int64_t kUnitBytes = 4;
  static constexpr int64_t kUnits = V::kLanes;  // units in a line: a line is one register wide
  static constexpr int64_t kLineBytes = kUnits * kUnitBytes;
  static constexpr int64_t kVectorBytes = kLineBytes / V::kLineVectors;  // a vector of channels in a line

  static constexpr int64_t kLineChannels = V::kLanes * V::kLineVectors;
  static constexpr bool kPairs = V::kLineVectors == 2;  // a unit holds two channels

  struct Prefetch {
    const char* next;
    const char* end;
    int64_t lines_per_step;
    SPIN_INLINE void step() {
      for (int64_t i = 0; i < lines_per_step && next < end; ++i, next += kCacheLine) {
        __builtin_prefetch(next, 0, 2);
      }
    }
  };

  template <int kTokens, int kVectors>
  static void tile(const ProductArgs& a, const char* input, float* sums, Prefetch& prefetch) {
    F sum[kTokens][kVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[t][v] = V::zero();
    }
    const char* weights = a.panel;
    auto step = [&](const char* unit, bool half) __attribute__((always_inline)) {
      F w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = V::load(weights + v * kLineBytes);
      weights += kVectors * kLineBytes;
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        F x = V::broadcast(unit + t * kLineBytes);
        if constexpr (kPairs) {
          if (half) x = V::first_of_pair(x);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[t][v] = V::mac(sum[t][v], w[v], x);
      }
    };
    const int64_t lines = a.input_channels / kLineChannels, rest = a.input_channels % kLineChannels;
    for (int64_t line = 0; line < lines; ++line, input += a.input_stride) {
      prefetch.step();
#pragma GCC unroll 4
      for (int64_t unit = 0; unit < kUnits; ++unit) step(input + unit * kUnitBytes, false);
    }
    // Of a line that is not full, padding channels are left out: they may hold NaN.
    for (int64_t channel = 0; channel < rest; channel += V::kLineVectors, input += kUnitBytes) {
      step(input, kPairs && channel + 1 == rest);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(sums + (t * kVectors + v) * V::kLanes, sum[t][v]);
    }
  }

  template <int kVectors, int kTokens = V::kTileTokens>
  static SPIN_INLINE void tile_of(int64_t tokens, const ProductArgs& a, const char* input, float* sums,
                                  Prefetch& prefetch) {
    if constexpr (kTokens > 1) {
      if (tokens < kTokens) return tile_of<kVectors, kTokens - 1>(tokens, a, input, sums, prefetch);
    }
    tile<kTokens, kVectors>(a, input, sums, prefetch);
  }

  template <int kVectors>
  static void panel(const ProductArgs& a) {
    alignas(64) float sums[V::kTileTokens * kVectors * V::kLanes];
    const int64_t tiles = ceil_div(a.tokens, V::kTileTokens), small = a.tokens / tiles, larger = a.tokens % tiles;
    Prefetch prefetch{a.prefetch, a.prefetch + a.prefetch_bytes,
                      ceil_div(a.prefetch_bytes / kCacheLine, tiles * ceil_div(a.input_channels, kLineChannels))};
    with_activation(a.activation, [&](auto activation) {
      int64_t token = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t tokens = small + (i < larger);
        tile_of<kVectors>(tokens, a, a.input + token * kLineBytes, sums, prefetch);
        for (int v = 0; v < kVectors; ++v) {
          const int64_t vector = a.first_vector + v;
          const int64_t line = vector / V::kLineVectors;
          const int64_t place = vector % V::kLineVectors * kVectorBytes + token * kLineBytes;
          epilogue<V, decltype(activation)::value, false>(
              {sums + v * V::kLanes, kVectors * V::kLanes, tokens, a.gain + v * V::kLanes, a.bias + v * V::kLanes,
               a.scale + v * V::kLanes, a.shift + v * V::kLanes,
               a.residual ? a.residual + line * a.residual_stride + place : nullptr,
               a.output + line * a.output_stride + place, kLineBytes});
        }
        token += tokens;
      }
    });
  }

  static void run(const ProductArgs& a) {
    if constexpr (V::kPanelVectors > 2) {
      if (a.vectors == 3) return panel<3>(a);
    }
    a.vectors == 2 ? panel<2>(a) : panel<1>(a);
  }
};

}  // namespace spin
