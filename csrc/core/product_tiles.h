// The pointwise product with its epilogue (product.h, with the same operands) where a processor has tiles (AMX). A tile
// of A is 16 rows of one line of channels, a tile of B 16 units of a panel, as both lie in memory:
//
//                  A                           B                                C
//   frozen         16 tokens of a line of y    a vector of output channels      [token][channel]
//   plain rows     16 rows of the matrix       a vector of a panel of tokens    [channel][token], to be transposed
//
// A step multiplies up to two of A with two of B: four loads and four products, 32 and 64 clocks.
//
// Cost: tokens * channels * channels / (16 * 16 * 32) products of tiles, 16 clocks each. Both operands come from L2,
// 4 KB a step. Two cores of an Emerald Rapids, 4.5 TFLOP/s in registers: steps alone reach 3.5, the product with gelu
// 2.4 at 768 and 1024 channels and 2.05 at 256 (float32 kernels 0.33). Of no help there: finishing sums between the
// steps of the next tile (0.99 and 0.92 of these rates), asking for the tokens of the next step (0.96) or of the one
// after it (0.9). Where one computes on tiles alone for longer, the processor slows them down to two or one third for
// 10 ms to seconds. So float32 in three pieces of bf16, six products of tiles in the place of one and sums more exact
// than float32's own, took 0.84 to 1.15 of the time of Strassen's product in whole networks, for all that alone it
// reached 0.7 TFLOP/s before it was slowed down.
//
// Tokens in excess of whole tiles are taken again with the last ones before them: other shapes of tiles take 100 ns to
// set. Channels in excess of whole lines are copied, zeros behind them: what lies there may be NaN.
//
// Numerics: float32 sums in order of the input channel, pairs first. Numbers below 2^-126 are zero.
#pragma once
#include "product.h"

namespace spin {

template <class V, class Out>
struct TileProduct : Product<V, Out> {
  using Base = Product<V, Out>;
  using Base::kLineBytes, Base::kLineChannels, Base::kUnits;
  static constexpr int64_t kRows = V::kTileRows;  // of a tile

  // Rows of A, a line of channels after the other.
  struct Rows {
    const char* first;
    int64_t count, row_stride, line_stride;  // bytes
  };

  template <int kRowTiles, int kVectors>
  static SPIN_INLINE void step(const char* a, int64_t row_stride, const char* b) {
    constexpr int64_t kStride = kVectors * kLineBytes;
    V::template load_tile<6>(b, kStride);
    V::template load_tile<4>(a, row_stride);
    V::template multiply_add<0, 4, 6>();
    if constexpr (kRowTiles == 2) {
      V::template load_tile<5>(a + kRows * row_stride, row_stride);
      V::template multiply_add<2, 5, 6>();
    }
    if constexpr (kVectors == 2) {
      V::template load_tile<7>(b + kLineBytes, kStride);
      V::template multiply_add<1, 4, 7>();
      if constexpr (kRowTiles == 2) V::template multiply_add<3, 5, 7>();
    }
  }

  // sums[row][vector][lane] of some rows and a panel.
  template <int kRowTiles, int kVectors>
  static SPIN_INLINE void tile(const Rows& rows, int64_t channels, const char* panel, float* sums, Prefetch& prefetch) {
    V::template clear<0>(), V::template clear<1>(), V::template clear<2>(), V::template clear<3>();
    const int64_t lines = channels / kLineChannels, rest = channels % kLineChannels;
    const char* row = rows.first;
    for (int64_t line = 0; line < lines; ++line, row += rows.line_stride, panel += kUnits * kVectors * kLineBytes) {
      step<kRowTiles, kVectors>(row, rows.row_stride, panel);
      prefetch.step<2>();  // L1 has no place for a panel beside what a step reads
    }
    if (rest) {
      alignas(64) char a[kRowTiles * kRows * kLineBytes], b[kUnits * kVectors * kLineBytes] = {};
      for (int64_t r = 0; r < rows.count; ++r) {
        V::store(a + r * kLineBytes, V::load_channels(row + r * rows.row_stride, rest));
      }
      for (int64_t i = 0; i < rest / 2 * kVectors; ++i) V::store(b + i * kLineBytes, V::load(panel + i * kLineBytes));
      if (rest % 2) {
        for (int64_t i = rest / 2 * kVectors; i < (rest / 2 + 1) * kVectors; ++i) {
          V::store(b + i * kLineBytes, V::first_of_pair(V::load(panel + i * kLineBytes)));
        }
      }
      step<kRowTiles, kVectors>(a, kLineBytes, b);
    }
    constexpr int64_t kStride = kVectors * V::kLanes * sizeof(float);
    V::template store_tile<0>(sums, kStride);
    if constexpr (kVectors == 2) V::template store_tile<1>(sums + V::kLanes, kStride);
    if constexpr (kRowTiles == 2) {
      V::template store_tile<2>(sums + kRows * kVectors * V::kLanes, kStride);
      if constexpr (kVectors == 2) V::template store_tile<3>(sums + (kRows * kVectors + 1) * V::kLanes, kStride);
    }
  }

  // ---- rows of a matrix, panels of tokens ----

  // sums[token][channel] of a panel of tokens.
  template <int kVectors>
  static SPIN_INLINE void panel_of(const ProductArgs& a, const char* panel, float* sums, Prefetch& prefetch) {
    alignas(64) float by_row[kRows * kVectors * V::kLanes];
    tile<1, kVectors>({a.weights, a.output_channels, a.row_stride, kLineBytes}, a.input_channels, panel, by_row,
                      prefetch);
    Base::template by_token<kVectors>(by_row, a.output_channels, sums);
  }

  static void run(const ProductArgs& a) {
    if (a.output_channels < kRows) V::set_rows(a.output_channels);
    Base::template run_as<TileProduct>(a);
    if (a.output_channels < kRows) V::set_rows(kRows);
  }

  // ---- a panel of a matrix, tokens as they lie ----

  template <int kVectors, Activation kActivation>
  static __attribute__((noinline)) void panel_tokens(const PanelProductArgs& a) {
    int64_t all_tiles = 0;
    for (int64_t s = 0; s < a.spans_count; ++s) all_tiles += ceil_div(a.spans[s].tokens, 2 * kRows);
    Prefetch prefetch(a.to.ahead, all_tiles * ceil_div(a.input_channels, kLineChannels));
    alignas(64) float sums[2 * kRows * kVectors * V::kLanes];
    auto tokens = [&]<int kRowTiles>(const TokenSpan& span, int64_t first, int64_t count) {
      const int64_t token = span.token + first;
      tile<kRowTiles, kVectors>({a.input + token * kLineBytes, count, kLineBytes, a.input_stride}, a.input_channels,
                                a.panel, sums, prefetch);
      for (int v = 0; v < kVectors; ++v) {
        epilogue<Out, kActivation, false, V>(Base::epilogue_args(a.to, v, token, span.output + first * kLineBytes,
                                                                 count, sums + v * V::kLanes, kVectors * V::kLanes));
      }
    };
    for (int64_t s = 0; s < a.spans_count; ++s) {
      const TokenSpan& span = a.spans[s];
      if (span.tokens < kRows) {
        V::set_rows(span.tokens);
        tokens.template operator()<1>(span, 0, span.tokens);
        V::set_rows(kRows);
        continue;
      }
      for (int64_t first = 0; first < span.tokens;) {
        const int64_t left = span.tokens - first, count = left > kRows && span.tokens >= 2 * kRows ? 2 * kRows : kRows;
        const int64_t from = first + count <= span.tokens ? first : span.tokens - count;
        if (count == 2 * kRows) {
          tokens.template operator()<2>(span, from, count);
        } else {
          tokens.template operator()<1>(span, from, count);
        }
        first = from + count;
      }
    }
  }

  static void run_panel(const PanelProductArgs& a) {
    with_activation(a.to.activation, [&](auto activation) {
      if (a.vectors == 1) {
        panel_tokens<1, decltype(activation)::value>(a);
      } else {
        panel_tokens<2, decltype(activation)::value>(a);
      }
    });
  }

  // ---- the rate ----

  static double multiply_add_loop(int64_t iterations) {
    alignas(64) uint16_t units[kRows * kLineBytes / 2];
    for (int64_t i = 0; i < kRows * kLineBytes / 2; ++i) units[i] = uint16_t(0x3c00 + i * 37 % 512);  // 0.008 to 0.12
    V::enter();
    V::template clear<0>(), V::template clear<1>(), V::template clear<2>(), V::template clear<3>();
    V::template load_tile<4>(units, kLineBytes), V::template load_tile<5>(units, kLineBytes);
    V::template load_tile<6>(units, kLineBytes), V::template load_tile<7>(units, kLineBytes);
    for (int64_t n = 0; n < iterations; ++n) {
      V::template multiply_add<0, 4, 6>(), V::template multiply_add<1, 4, 7>();
      V::template multiply_add<2, 5, 6>(), V::template multiply_add<3, 5, 7>();
    }
    V::leave();
    return 2.0 * 4 * kRows * V::kLanes * kLineChannels * double(iterations);
  }
};

}  // namespace spin
