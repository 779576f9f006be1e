// The pointwise product with its epilogue: out[o, t] = epilogue(sum_i W[o, i] in[i, t]).
//
// One operand lies in panels and is multiplied vector by vector, entries of the other are broadcast. A tile of 8 rows x
// 3 vectors keeps 24 sums in registers; each step multiplies 3 vectors of a panel with 8 broadcast units: 11 loads for
// 24 multiply-adds. The 8 rows (24 KB at 768 channels) stay in L1, the panel (147 KB) streams from L2 once per tile,
// in order. (AVX2: 4 rows x 3 vectors of 8, 7 loads for 12 multiply-adds.) Which operand is which:
//
//  - A call that gets plain weights reads them as they are, row by row (run), and packs the tokens (pack_panels),
//    because a band has fewer tokens than a matrix has rows, and they are in cache anyway. Packing the matrices instead
//    cost 8 to 24 % of a call at batch 1. Tokens cost 0.1 ns each per channel: 1 to 3 % of a block. One call computes a
//    vector of output channels for all tokens; the finished sums of 16 channels are transposed, so that the epilogue
//    has channels in its lanes, as the blocked layout has.
//  - A frozen network has its matrices in panels, and tokens are read where the depthwise left them (run_panel). A call
//    computes a panel's channels for all tokens. Channels are in the lanes from the start: no transposition, and sums
//    of whole tiles are finished in registers. Alone on an AMD EPYC (Zen 5), part of the multiply-add peak, bf16 then
//    float32, with ReLU: 768 channels 95, 95 % instead of 93, 94 %; 256 channels 95, 96 % instead of 88, 92 %. (The
//    tile's loop reaches 99.5 %. Hiding the rows' transposition beside the next tile's steps gained 0 to 2 %: its
//    shuffles take places of multiply-adds.) Whole frozen networks in turns, medians of several launches, float32 and
//    bf16: 768/32 0.95 and 0.96 of the time, 1024/20 0.96 and 0.98, 256/8 0.98 and 0.96. On an Emerald Rapids an
//    earlier form of this, with sums through a buffer and lines a power of two apart (which share a few sets of L1),
//    took 1.05 to 1.2 times as long as rows do in float32 at batch 8; this one (with Strassen's product) 0.88 to 0.93.
//
// Cost: tokens * channels * vectors multiply-adds of one vector each; floor = that / FMA rate. Bytes from
// L2 per multiply-add vector: 8 (panel). What comes after these rows or this panel is prefetched, a few lines per step:
// without, 768 channels in bf16 reach 90 % where matrices come from L3.
//
// V has the operands, Out the chain: the same in inference; training's chain is float32 whatever it multiplies.
//
// Numerics: float32 sums in order of the input channel, of float32 operands 256 at a time (of quarters 64) and those
// added up, the same for every tile shape and thread count. A sum's rounding grows with its length: in ConvMixer
// 1024/20 the error of the logits is 0.65 of what single sums of 1024 leave, that of eager PyTorch. Time on an AMD EPYC
// (AVX2), float32, batch 1, medians of ten launches of both: 768/32 0.97, 1024/20 1.01, 256/8 1.03 (blocks of
// 128: 1.11, 1.03, 1.08; the tiles of a vector of rows within a block before the next block: 1.13, 1.01, 1.08, of four
// to six). Pairs of bf16 were rounded a thousand times as much: one sum (768 and 1024 channels on a Zen 4: 0.99).
#pragma once
#include "epilogue.h"
#include "kernels.h"

// Tells the compiler that a vector register is used and changed here.
#if defined(__x86_64__)
#define SPIN_KEEP(x) asm volatile("" : "+v"(x))
#else
#define SPIN_KEEP(x) asm volatile("" : "+w"(x))
#endif

namespace spin {

template <class V, class Out>
struct Product {
  using F = typename V::F;
  static constexpr int64_t kUnits = V::kLanes;  // units in a line: a line is one register wide, of either
  static constexpr int64_t kLineBytes = kUnits * kUnitBytes;
  static constexpr int64_t kVectorBytes = kLineBytes / Out::kLineVectors;  // a vector of channels in a line

  static constexpr int64_t kLineChannels = V::kLanes * V::kLineVectors;
  static constexpr bool kPairs = V::kLineVectors == 2;  // a unit holds two channels
  static constexpr int64_t kSumLines = kPairs ? INT64_MAX : 256 / kLineChannels, kFineSumLines = 64 / kLineChannels;

  static void pack_panels(const PackPanelsArgs& a) {
    // A line of panels of bf16 takes two lines of a float32 chain; half a transposition is then for nothing.
    constexpr int64_t kLines = V::kLineVectors / Out::kLineVectors, kLineUnits = kUnits / kLines;
    const int64_t lines = ceil_div(a.lines, kLines), unit = a.line * kLineUnits;
    const Panels panels(a.tokens, V::kLanes, V::kPanelVectors);
    for (int64_t p = 0; p < panels.count; ++p) {
      const int64_t first = panels.begin(p), vectors = panels.begin(p + 1) - first;
      char* to = a.panels + (first * lines * kUnits + unit * vectors) * kLineBytes;
      for (int64_t v = 0; v < vectors; ++v, to += kLineBytes) {
        F block[V::kLanes];
        const int64_t token = (first + v) * V::kLanes, left = a.tokens - token;
        auto load = [&](int64_t t) __attribute__((always_inline)) {
          const F line = V::load(a.input + (token + t) * a.stride);
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

  // Of vector v and some tokens, the first of them `output` bytes into a line of the output; the sums of a token are
  // `stride` floats after those of the one before.
  static SPIN_INLINE EpilogueArgs epilogue_args(const ProductTarget& to, int64_t v, int64_t token, int64_t output,
                                                int64_t tokens, const float* sums, int64_t stride) {
    const int64_t vector = to.first_vector + v, line = vector / Out::kLineVectors, channel = v * V::kLanes;
    const int64_t place = vector % Out::kLineVectors * kVectorBytes;
    return {sums,
            stride,
            tokens,
            to.gain + channel,
            to.bias + channel,
            to.scale + channel,
            to.shift + channel,
            to.residual ? to.residual + line * to.residual_stride + token * kLineBytes + place : nullptr,
            to.output + line * to.output_stride + output + place,
            kLineBytes};
  }

  // The operand whose entries are broadcast: rows of units, a line of them after the other.
  struct Rows {
    const char* first;
    int64_t row_stride, line_stride;  // bytes
    int64_t sum_lines = kSumLines;    // in a sum before it is added up with others
  };

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // parts: what is loaded was stored by the block before
  // finish(sums[row][vector]) of kRows rows and a panel of kVectors vectors.
  template <int kRows, int kVectors, class Finish>
  static SPIN_INLINE void tile(const Rows& rows, int64_t channels, const char* panel, Prefetch& prefetch,
                               const Finish& finish) {
    F sum[kRows][kVectors];
    alignas(64) float parts[kRows * kVectors * V::kLanes];
    auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) body(sum[r][v], parts + (r * kVectors + v) * V::kLanes);
      }
    };
    each([](F& s, float*) __attribute__((always_inline)) { s = V::zero(); });
    const char* row = rows.first;
    auto step = [&](const char* unit, bool half) __attribute__((always_inline)) {
      F x[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        x[v] = V::load(panel + v * kLineBytes);
        if constexpr (kPairs) {
          if (half) x[v] = V::first_of_pair(x[v]);
        }
      }
      panel += kVectors * kLineBytes;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        F w = V::broadcast(unit + r * rows.row_stride);
        if constexpr (kPairs) {
          if (half) w = V::first_of_pair(w);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = V::mac(sum[r][v], x[v], w);
      }
    };
    const int64_t lines = channels / kLineChannels, rest = channels % kLineChannels;
    for (int64_t first = 0; first < lines; first += rows.sum_lines) {
      if (first) {
        each([first, &rows](F& s, float* part) __attribute__((always_inline)) {
          V::store(part, first > rows.sum_lines ? V::add(V::load(part), s) : s);
          s = V::zero();
        });
      }
      const int64_t last = lines < first + rows.sum_lines ? lines : first + rows.sum_lines;
      for (int64_t line = first; line < last; ++line, row += rows.line_stride) {
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
    if (lines > rows.sum_lines)
      each([](F& s, float* part) __attribute__((always_inline)) { s = V::add(V::load(part), s); });
    finish(sum);
  }

#pragma GCC diagnostic pop

  // sums[row][vector][lane]
  template <int kRows, int kVectors>
  static void store_tile(const Rows& rows, int64_t channels, const char* panel, float* sums, Prefetch& prefetch) {
    tile<kRows, kVectors>(rows, channels, panel, prefetch, [sums](const auto& sum) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) V::store(sums + (r * kVectors + v) * V::kLanes, sum[r][v]);
      }
    });
  }

  template <int kVectors, int kRows = V::kTileRows>
  static SPIN_INLINE void store_tile_of(int64_t count, const Rows& rows, int64_t channels, const char* panel,
                                        float* sums, Prefetch& prefetch) {
    if constexpr (kRows > 1) {
      if (count < kRows) return store_tile_of<kVectors, kRows - 1>(count, rows, channels, panel, sums, prefetch);
    }
    store_tile<kRows, kVectors>(rows, channels, panel, sums, prefetch);
  }

  // ---- rows of a matrix, panels of tokens ----

  // sums[token][channel] of a panel of tokens.
  template <int kVectors>
  static SPIN_INLINE void panel_of(const ProductArgs& a, const char* panel, float* sums, Prefetch& prefetch) {
    alignas(64) float by_row[V::kLanes * kVectors * V::kLanes];
    const int64_t tiles = ceil_div(a.output_channels, V::kTileRows);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t row = i * a.output_channels / tiles, rows = (i + 1) * a.output_channels / tiles - row;
      store_tile_of<kVectors>(rows, {a.weights + row * a.row_stride, a.row_stride, kLineBytes}, a.input_channels, panel,
                              by_row + row * kVectors * V::kLanes, prefetch);
    }
    by_token<kVectors>(by_row, a.output_channels, sums);
  }

  // sums[token][channel] from sums[channel][vector of tokens][lane].
  template <int kVectors>
  static SPIN_INLINE void by_token(const float* by_row, int64_t output_channels, float* sums) {
    for (int v = 0; v < kVectors; ++v) {
      F block[V::kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < V::kLanes; ++r) {
        block[r] = r < output_channels ? V::load(by_row + (r * kVectors + v) * V::kLanes) : V::zero();
      }
      V::transpose(block);
#pragma GCC unroll 16
      for (int t = 0; t < V::kLanes; ++t) V::store(sums + (v * V::kLanes + t) * V::kLanes, block[t]);
    }
  }

  static void run(const ProductArgs& a) { run_as<Product>(a); }

  // With the panel_of of `Self`.
  template <class Self>
  static SPIN_INLINE void run_as(const ProductArgs& a) {
    alignas(64) float sums[V::kPanelVectors * V::kLanes * V::kLanes];
    const Panels panels(a.tokens, V::kLanes, V::kPanelVectors);
    const int64_t lines = ceil_div(a.input_channels, kLineChannels);
    Prefetch prefetch(a.to.ahead, panels.count * ceil_div(a.output_channels, V::kTileRows) * lines);
    with_activation(a.to.activation, [&](auto activation) {
      for (int64_t p = 0; p < panels.count; ++p) {
        const int64_t first = panels.begin(p), vectors = panels.begin(p + 1) - first;
        const char* panel = a.panels + first * lines * kUnits * kLineBytes;
        if (vectors == 1) {
          Self::template panel_of<1>(a, panel, sums, prefetch);
        } else if (vectors == 2) {
          Self::template panel_of<2>(a, panel, sums, prefetch);
        } else if constexpr (V::kPanelVectors > 2) {
          Self::template panel_of<3>(a, panel, sums, prefetch);
        }
        const int64_t token = first * V::kLanes, left = a.tokens - token, full = vectors * V::kLanes;
        epilogue<Out, decltype(activation)::value, false, V>(
            epilogue_args(a.to, 0, token, token * kLineBytes, left < full ? left : full, sums, V::kLanes));
      }
    });
  }

  // ---- a panel of a matrix, tokens as they lie ----

  // Of several products that are added up: the sums of a tile, the first of them `place` floats into what is kept. Each
  // question is asked once: for every sum, as gcc leaves it (what is stored could change the arguments), they take 2 to
  // 4 % of a tile of 128 channels.
  template <int kRows, int kVectors>
  static SPIN_INLINE void sum_up(const PanelProductArgs& a, int64_t place, F (&sums)[kRows][kVectors]) {
    auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) body(sums[r][v], place + (r * kVectors + v) * V::kLanes);
      }
    };
    if (a.keep) {
      float* const keep = a.keep;
      if (const float* const from = a.from) {
        each([=](F& s, int64_t at)
                 __attribute__((always_inline)) { V::store(keep + at, V::add(V::load(from + at), s)); });
      } else {
        each([=](F& s, int64_t at) __attribute__((always_inline)) { V::store(keep + at, s); });
      }
    }
    if (const float* const base = a.base) {
      each([=](F& s, int64_t at) __attribute__((always_inline)) { s = V::add(V::load(base + at), s); });
    }
  }

  // Not inlined: gcc gives a function of its own better registers (0.3 to 0.9 %).
  template <int kVectors, Activation kActivation>
  static __attribute__((noinline)) void panel_tokens(const PanelProductArgs& a, int64_t token, int64_t output,
                                                     int64_t tokens, Prefetch& prefetch) {
    const Rows rows{a.input + token * kLineBytes, kLineBytes, a.input_stride,
                    a.keep || a.base ? kFineSumLines : kSumLines};
    const int64_t place = token * kVectors * V::kLanes;
    if (tokens == V::kTileRows) {
      return tile<V::kTileRows, kVectors>(
          rows, a.input_channels, a.panel, prefetch, [&](auto& sum) __attribute__((always_inline)) {
            sum_up(a, place, sum);
            if (!a.finished()) return;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
              // As epilogue_rows, but its four vectors are loaded once: per row, 256 channels in bf16 reach 90, not 95
              // %.
              const EpilogueArgs e = epilogue_args(a.to, v, token, output, tokens, nullptr, 0);
              const F gain = V::load(e.gain), bias = V::load(e.bias), scale = V::load(e.scale),
                      shift = V::load(e.shift);
#pragma GCC unroll 8
              for (int r = 0; r < V::kTileRows; ++r) {
                F y = V::fma(activate<Out, kActivation>(V::fma(sum[r][v], gain, bias)), scale, shift);
                if (e.residual) y = V::add(y, Out::load_chain(e.residual + r * kLineBytes));
                Out::store_chain(e.output + r * kLineBytes, y);
              }
            }
          });
    }
    alignas(64) float sums[V::kTileRows * kVectors * V::kLanes];
    store_tile_of<kVectors>(tokens, rows, a.input_channels, a.panel, sums, prefetch);
    for (int64_t at = 0; at < tokens * kVectors * V::kLanes; at += V::kLanes) {
      F sum[1][1] = {{V::load(sums + at)}};
      sum_up(a, place + at, sum);
      V::store(sums + at, sum[0][0]);
    }
    if (!a.finished()) return;
    for (int v = 0; v < kVectors; ++v) {
      epilogue<Out, kActivation, false, V>(
          epilogue_args(a.to, v, token, output, tokens, sums + v * V::kLanes, kVectors * V::kLanes));
    }
  }

  static void run_panel(const PanelProductArgs& a) {
    int64_t all_tiles = 0;
    for (int64_t s = 0; s < a.spans_count; ++s) all_tiles += ceil_div(a.spans[s].tokens, V::kTileRows);
    Prefetch prefetch(a.to.ahead, all_tiles * ceil_div(a.input_channels, kLineChannels));
    with_activation(a.to.activation, [&](auto activation) {
      for (int64_t s = 0; s < a.spans_count; ++s) {
        const TokenSpan& span = a.spans[s];
        const int64_t tiles = ceil_div(span.tokens, V::kTileRows);
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t first = i * span.tokens / tiles, tokens = (i + 1) * span.tokens / tiles - first;
          const int64_t token = span.token + first, output = span.output + first * kLineBytes;
          if (a.vectors == 1) {
            panel_tokens<1, decltype(activation)::value>(a, token, output, tokens, prefetch);
          } else if (a.vectors == 2) {
            panel_tokens<2, decltype(activation)::value>(a, token, output, tokens, prefetch);
          } else if constexpr (V::kPanelVectors > 2) {
            panel_tokens<3, decltype(activation)::value>(a, token, output, tokens, prefetch);
          }
        }
      }
    });
  }

  // ---- the rate ----

  static double multiply_add_loop(int64_t iterations) {
    // More than latency x issue rate: with twelve, Zen 5 shows 92 % of the rate of its vdpbf16ps.
    constexpr int kSums = V::kTileRows * V::kPanelVectors > 12 ? V::kTileRows * V::kPanelVectors : 12;
    typename V::F sum[kSums], weight = V::set(1e-20f), unit = V::set(0.5f);
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) sum[i] = V::set(1e-8f);
    for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 24
      for (int i = 0; i < kSums; ++i) {
        SPIN_KEEP(weight);  // or the compiler would see the same sum many times
        sum[i] = V::mac(sum[i], weight, unit);
      }
    }
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) SPIN_KEEP(sum[i]);
    return 2.0 * kSums * V::kLanes * V::kLineVectors * iterations;
  }
};

}  // namespace spin
