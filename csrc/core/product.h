// The pointwise product with its epilogue: out[o, t] = epilogue(sum_i W[o, i] in[i, t]).
//
// The weights are read as they are, row by row; it is the tokens that are packed (pack_tokens), because a
// band has fewer tokens than a matrix has rows, and they are in cache anyway. Packing the matrices instead
// cost a call with plain weights 8 to 24 % at batch 1. Tokens cost 0.1 ns each per channel: 1 to 3 % of a block.
//
// Tiling: one call computes a vector of output channels (16) for all tokens, panel by panel of 48 tokens. A
// tile of 8 rows x 3 vectors of tokens keeps 24 sums in registers; each step multiplies 3 vectors of tokens
// with 8 broadcast weights: 11 loads for 24 multiply-adds. The 8 rows (24 KB at 768 channels) stay in L1,
// the panel (147 KB) streams from L2 once per tile, in order. The finished sums of 16 channels are
// transposed, so that the epilogue has channels in its lanes, as the blocked layout has. (AVX2: 8 channels as two tiles
// of 4 rows, panels of 24 tokens, 7 loads for 12 multiply-adds.)
//
// Cost: tokens * channels * vectors multiply-adds of one vector each; floor = that / FMA rate. Bytes from
// L2 per multiply-add vector: 8 (panel). The rows after these are prefetched to L2, a few lines per step.
//
// The other way round, broadcast tokens and packed weights, has equal counts but reads 8 tokens of every
// line, a plane apart: their addresses share a few sets of L1. Measured in turns on two cores of an Emerald
// Rapids, float32, batch 8: 1024/20 k9 415 against 347 ms, 768/32 k3 314 against 293, 256/8 k5 10.3 against 9.8.
//
// V has the operands, Out the chain: the same in inference; training's chain is float32 whatever it multiplies.
//
// Numerics: float32 sums in order of the input channel, 256 at a time and those added up, the same for every tile shape
// and thread count. A sum's rounding grows with its length: in ConvMixer 1024/20 the error of the logits is 0.65 of
// what single sums of 1024 leave, that of eager PyTorch. Time on an AMD EPYC (AVX2), float32, batch 1, medians of ten
// launches of both: 768/32 0.97, 1024/20 1.01, 256/8 1.03 (blocks of 128: 1.11, 1.03, 1.08; the tiles of a vector of
// rows within a block before the next block: 1.13, 1.01, 1.08, of four to six).
#pragma once
#include "epilogue.h"
#include "kernels.h"

namespace spin {

template <class V, class Out>
struct Product {
  using F = typename V::F;
  static constexpr int64_t kUnits = V::kLanes;  // units in a line: a line is one register wide, of either
  static constexpr int64_t kLineBytes = kUnits * kUnitBytes;
  static constexpr int64_t kVectorBytes = kLineBytes / Out::kLineVectors;  // a vector of channels in a line

  static constexpr int64_t kLineChannels = V::kLanes * V::kLineVectors;
  static constexpr bool kPairs = V::kLineVectors == 2;  // a unit holds two channels
  static constexpr int64_t kSumLines = 256 / kLineChannels;

  // The panels of some tokens: vectors are dealt out evenly.
  struct Panels {
    int64_t vectors, count;
    explicit SPIN_INLINE Panels(int64_t tokens)
        : vectors(ceil_div(tokens, V::kLanes)), count(ceil_div(vectors, V::kPanelVectors)) {}
    SPIN_INLINE int64_t begin(int64_t panel) const { return panel * vectors / count; }
  };

  static void pack_tokens(const PackTokensArgs& a) {
    // A line of panels of bf16 takes two lines of a float32 chain; half a transposition is then for nothing.
    constexpr int64_t kLines = V::kLineVectors / Out::kLineVectors, kLineUnits = kUnits / kLines;
    const int64_t lines = ceil_div(a.lines, kLines), unit = a.line * kLineUnits;
    const Panels panels(a.tokens);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t first = panels.begin(p), vectors = panels.begin(p + 1) - first;
      char* to = a.panels + (first * lines * kUnits + unit * vectors) * kLineBytes;
      for (int64_t v = 0; v < vectors; ++v, to += kLineBytes) {
        F block[V::kLanes];
        const int64_t token = (first + v) * V::kLanes, left = a.tokens - token;
        auto load = [&](int64_t t) __attribute__((always_inline)) {
          const F line = V::load(a.input + (token + t) * kLineBytes);
          if constexpr (kLines == 1) return line;
          const F lines[] = {line, V::zero()};
          return V::to_units(lines);
        };
        if (left >= V::kLanes) {
#pragma GCC unroll 16
          for (int t = 0; t < V::kLanes; ++t) block[t] = load(t);
        } else {
          for (int t = 0; t < V::kLanes; ++t) block[t] = t < left ? load(t) : V::zero();
        }
        V::transpose(block);
#pragma GCC unroll 16
        for (int64_t u = 0; u < kLineUnits; ++u) V::store(to + u * vectors * kLineBytes, block[u]);
      }
    }
  }

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

  // sums[row][vector][lane] of kRows rows of weights.
  template <int kRows, int kVectors>
  static void tile(const ProductArgs& a, const char* panel, const char* row, float* sums, Prefetch& prefetch) {
    F sum[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = V::zero();
    }
    auto add_up = [&](bool more) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* to = sums + (r * kVectors + v) * V::kLanes;
          V::store(to, more ? V::add(V::load(to), sum[r][v]) : sum[r][v]);
          sum[r][v] = V::zero();
        }
      }
    };
    auto step = [&](const char* unit, bool half) __attribute__((always_inline)) {
      F x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        x[v] = V::load(panel + v * kLineBytes);
        if constexpr (kPairs) {
          if (half) x[v] = V::first_of_pair(x[v]);
        }
        V::hold(x[v]);
      }
      panel += kVectors * kLineBytes;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        F w = V::broadcast(unit + r * a.row_stride);
        V::hold(w);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = V::mac(sum[r][v], x[v], w);
      }
    };
    const int64_t lines = a.input_channels / kLineChannels, rest = a.input_channels % kLineChannels;
    for (int64_t first = 0; first < lines; first += kSumLines) {
      if (first) add_up(first > kSumLines);
      const int64_t last = lines < first + kSumLines ? lines : first + kSumLines;
      for (int64_t line = first; line < last; ++line, row += kLineBytes) {
        prefetch.step();
        if constexpr (V::kTileSteps == 8) {  // the pragma takes no constant of a template
#pragma GCC unroll 8
          for (int64_t unit = 0; unit < kUnits; ++unit) step(row + unit * kUnitBytes, false);
        } else {
#pragma GCC unroll 4
          for (int64_t unit = 0; unit < kUnits; ++unit) step(row + unit * kUnitBytes, false);
        }
      }
    }
    // Of a line that is not full, padding channels are left out: they may hold NaN.
    for (int64_t channel = 0; channel < rest; channel += V::kLineVectors, row += kUnitBytes) {
      step(row, kPairs && channel + 1 == rest);
    }
    add_up(lines > kSumLines);
  }

  template <int kVectors, int kRows = V::kTileRows>
  static SPIN_INLINE void tile_of(int64_t rows, const ProductArgs& a, const char* panel, const char* row, float* sums,
                                  Prefetch& prefetch) {
    if constexpr (kRows > 1) {
      if (rows < kRows) return tile_of<kVectors, kRows - 1>(rows, a, panel, row, sums, prefetch);
    }
    tile<kRows, kVectors>(a, panel, row, sums, prefetch);
  }

  // sums[token][channel] of a panel of tokens.
  template <int kVectors>
  static SPIN_INLINE void panel_of(const ProductArgs& a, const char* panel, float* sums, Prefetch& prefetch) {
    alignas(64) float by_row[V::kLanes * kVectors * V::kLanes];
    const int64_t tiles = ceil_div(a.output_channels, V::kTileRows);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = i * a.output_channels / tiles, rows = (i + 1) * a.output_channels / tiles - row;
      tile_of<kVectors>(rows, a, panel, a.weights + row * a.row_stride, by_row + row * kVectors * V::kLanes, prefetch);
    }
    for (int v = 0; v < kVectors; ++v) {
      F block[V::kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < V::kLanes; ++r) {
        block[r] = r < a.output_channels ? V::load(by_row + (r * kVectors + v) * V::kLanes) : V::zero();
      }
      V::transpose(block);
#pragma GCC unroll 16
      for (int t = 0; t < V::kLanes; ++t) V::store(sums + (v * V::kLanes + t) * V::kLanes, block[t]);
    }
  }

  static void run(const ProductArgs& a) {
    alignas(64) float sums[V::kPanelVectors * V::kLanes * V::kLanes];
    const Panels panels(a.tokens);
    const int64_t lines = ceil_div(a.input_channels, kLineChannels);
    const int64_t steps = panels.count * ceil_div(a.output_channels, V::kTileRows) * lines;
    Prefetch prefetch{a.prefetch, a.prefetch + a.prefetch_bytes, ceil_div(a.prefetch_bytes / kCacheLine, steps)};
    const int64_t line = a.first_vector / Out::kLineVectors;
    const int64_t lane = a.first_vector % Out::kLineVectors * kVectorBytes;
    with_activation(a.activation, [&](auto activation) {
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.begin(p), vectors = panels.begin(p + 1) - first;
        const char* panel = a.panels + first * lines * kUnits * kLineBytes;
        if (vectors == 1) {
          panel_of<1>(a, panel, sums, prefetch);
        } else if (vectors == 2) {
          panel_of<2>(a, panel, sums, prefetch);
        } else if constexpr (V::kPanelVectors > 2) {
          panel_of<3>(a, panel, sums, prefetch);
        }
        const int64_t token = first * V::kLanes, left = a.tokens - token, place = token * kLineBytes + lane;
        epilogue<Out, decltype(activation)::value, false>(
            {sums, V::kLanes, left < vectors * V::kLanes ? left : vectors * V::kLanes, a.gain, a.bias, a.scale, a.shift,
             a.residual ? a.residual + line * a.residual_stride + place : nullptr,
             a.output + line * a.output_stride + place, kLineBytes});
      }
    });
  }
};

}  // namespace spin
