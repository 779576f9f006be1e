// The depthwise convolution with its epilogue and a residual, in inference the block's first:
//   y = residual + scale * act(sum over (i, j) of taps[i, j] * x[row + i - p, column + j - p] + bias) + shift.
//
// Channels lie in the lanes, so a tap is one vector and nothing is shuffled. A row of up to 16 outputs is
// held in registers while the tap rows pass: each input vector is loaded once per tap row and feeds up to
// k sums; the k taps of a row stay in registers too (16 + 9 + 1 of 32 at k = 9). Taps that fall on the
// zero padding are skipped, in both directions: which ones is known at compile time for tiles at the
// left and right edge, and is the range of tap rows at the top and bottom.
//
// Cost: rows * columns * k * k multiply-adds of one vector each, less the skipped ones (at 16 x 16, k = 9:
// 27 %), so more than the nominal peak can be seen. Loads: (columns + k - 1) / (columns * k) per
// multiply-add. Kernel sizes other than 3, 5, 7, 9 take one load per multiply-add from zero-padded rows.
//
// Chains in bf16 are copied, each row once (not once per tap row), right before the first row of outputs that needs it.
// For k in {3, 5, 7, 9} the copy has a unit for each pair of neighbours in a row and the taps are pairs too, so
// (k + 1) / 2 steps of vdpbf16ps take the place of k multiply-adds (exact: weights and activations are bf16 already);
// the last tap is a pair with zero, and multiplies a neighbour that is masked, because it may be infinite. Otherwise
// they are widened to float. On an AMD EPYC (Zen 5), in turns, 1024/20 k9 takes 0.97 of the time, 256/8 k5 0.96. Rows
// right before their use, not all at once (they do not fit L1 beside x and y), take 0.97 (k = 5, 9) and 0.92 (k = 3) of
// the depthwise's time on a Zen 4; ReLU finished in registers, not from a buffer, another 0.8 (k = 3; float32 0.85).
#pragma once
#include <limits>

#include "epilogue.h"
#include "kernels.h"

namespace spin {

template <class V>
struct Depthwise {
  using F = typename V::F;
  static constexpr int64_t kVectorBytes = V::kLanes * (V::kChain == DType::kFloat32 ? 4 : 2);
  static constexpr int64_t kLineBytes = kVectorBytes * V::kLineVectors;
  static constexpr bool kWiden = V::kChain != DType::kFloat32;
  static constexpr int kStep = V::kTapStep;            // taps that a step takes in a row tile
  static constexpr int64_t kScratchBytes = 128 << 10;  // a share of L2

  // ---- k in {3, 5, 7, 9}: kColumns outputs in registers, the padding at the edges compiled away ----

  // ReLU (what is below `least` = 0) and no activation (minus infinity) are finished in registers. Of the others
  // `finish` is null, and the sums go to a buffer: gelu in every tile would be 2.5 times the code, and no faster.
  using RowTile = void (*)(const float* input, int64_t row_stride, int64_t tap_rows, const float* taps,
                           const float* bias, float* sums, float least, const EpilogueArgs* finish);

  template <int kSize, int kColumns, bool kLeft, bool kRight>
  static void row_tile(const float* input, int64_t row_stride, int64_t tap_rows, const float* taps, const float* bias,
                       float* sums, float least, const EpilogueArgs* finish) {
    constexpr int kPad = kSize / 2, kSteps = (kSize + kStep - 1) / kStep;
    F sum[kColumns];
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) sum[c] = V::load(bias);
    for (int64_t i = 0; i < tap_rows; ++i, input += row_stride, taps += kSteps * V::kLanes) {
      F tap[kSteps];
#pragma GCC unroll 9
      for (int j = 0; j < kSteps; ++j) tap[j] = V::load(taps + j * V::kLanes);
#pragma GCC unroll 24
      for (int x = kLeft ? 1 - kStep : -kPad; x < kColumns + (kRight ? 0 : kPad); ++x) {
        const F value = V::load(input + x * V::kLanes);
#pragma GCC unroll 9
        for (int j = 0; j < kSteps; ++j) {
          const int c = x + kPad - kStep * j;
          if (c < 0 || c >= kColumns) continue;
          if constexpr (kStep == 2) {
            sum[c] = V::mac(sum[c], j + 1 == kSteps ? V::first_of_pair(value) : value, tap[j]);
          } else {
            sum[c] = V::fma(value, tap[j], sum[c]);
          }
        }
      }
    }
    if (!finish) {
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) V::store(sums + c * V::kLanes, sum[c]);
      return;
    }
    const F bound = V::set(least), scale = V::load(finish->scale), shift = V::load(finish->shift);
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      F y = V::fma(V::max(bound, sum[c]), scale, shift);
      if (finish->residual) y = V::add(y, V::load_chain(finish->residual + c * kLineBytes));
      V::store_chain(finish->output + c * kLineBytes, y);
    }
  }

  // Tiles between 1 and kRowColumns wide; those of a row that needs several are at least half that.
  template <int kSize, int kColumns = V::kRowColumns>
  static RowTile find_row_tile(int64_t columns, bool left, bool right) {
    if constexpr (kColumns > 1) {
      if (columns < kColumns) return find_row_tile<kSize, kColumns - 1>(columns, left, right);
    }
    if (left && right) return row_tile<kSize, kColumns, true, true>;
    if constexpr (2 * kColumns >= V::kRowColumns) {
      if (left) return row_tile<kSize, kColumns, true, false>;
      if (right) return row_tile<kSize, kColumns, false, true>;
      return row_tile<kSize, kColumns, false, false>;
    }
    return nullptr;
  }

  static RowTile find_row_tile(int64_t kernel_size, int64_t columns, bool left, bool right) {
    switch (kernel_size) {
      case 3:
        return find_row_tile<3>(columns, left, right);
      case 5:
        return find_row_tile<5>(columns, left, right);
      case 7:
        return find_row_tile<7>(columns, left, right);
      case 9:
        return find_row_tile<9>(columns, left, right);
      default:
        return nullptr;
    }
  }

  // ---- any k: rows padded with zeros on both sides, tap by tap ----

  template <int kColumns>
  static void padded_tile(const float* input, int64_t row_stride, int64_t kernel_size, int64_t tap_rows,
                          const float* taps, const float* bias, float* sums) {
    F sum[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[c] = V::load(bias);
    for (int64_t i = 0; i < tap_rows; ++i, input += row_stride) {
      for (int64_t j = 0; j < kernel_size; ++j, taps += V::kLanes) {
        const F tap = V::load(taps);
#pragma GCC unroll 8
        for (int c = 0; c < kColumns; ++c) sum[c] = V::fma(V::load(input + (c + j) * V::kLanes), tap, sum[c]);
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) V::store(sums + c * V::kLanes, sum[c]);
  }

  // ---- driver ----

  static SPIN_INLINE int64_t band_rows(int64_t height, int64_t width, int64_t kernel_size) {
    const int64_t row_bytes = (width + kernel_size - 1) * V::kLanes * 4;
    const int64_t rows = kScratchBytes / row_bytes - (kernel_size - 1);
    return rows < 4 ? (height < 4 ? height : 4) : rows < height ? rows : height;
  }

  static int64_t scratch(int64_t height, int64_t width, int64_t kernel_size) {
    if (!kWiden && has_row_tiles(kernel_size)) return 0;
    // Padded tiles always compute 8 columns: the last one of the last row may run past its end.
    return ((band_rows(height, width, kernel_size) + kernel_size - 1) * (width + kernel_size - 1) + 8) * V::kLanes;
  }

  // A row of one vector of channels as floats, with `pad` zero columns on either side.
  static SPIN_INLINE void widen(const char* from, int64_t width, int64_t pad, float* to) {
    for (int64_t i = 0; i < pad; ++i, to += V::kLanes) V::store(to, V::zero());
    for (int64_t i = 0; i < width; ++i, to += V::kLanes, from += kLineBytes) V::store(to, V::load_chain(from));
    for (int64_t i = 0; i < pad; ++i, to += V::kLanes) V::store(to, V::zero());
  }

  // The same as units of two neighbours; what is left and right of the row is zero.
  static SPIN_INLINE void pair(const char* from, int64_t width, float* to) {
    alignas(64) static constexpr char kZeros[64] = {};
    V::store(to, V::interleave(kZeros, from));
    for (int64_t i = 1; i < width; ++i) {
      V::store(to + i * V::kLanes, V::interleave(from + (i - 1) * kLineBytes, from + i * kLineBytes));
    }
    V::store(to + width * V::kLanes, V::interleave(from + (width - 1) * kLineBytes, kZeros));
  }

  template <Activation kActivation>
  static void rows(const DepthwiseArgs& a, int64_t vector, int64_t first, int64_t last, Prefetch (&ahead)[2]) {
    constexpr bool kInRegisters = kActivation == Activation::kRelu || kActivation == Activation::kIdentity;
    constexpr float kLeast = kActivation == Activation::kRelu ? 0.f : -std::numeric_limits<float>::infinity();
    const int64_t k = a.kernel_size, pad = k / 2;
    const bool padded = !has_row_tiles(k), copied = kWiden || padded;
    const int64_t steps = padded ? k : ceil_div(k, kStep);  // in a row of taps
    const int64_t widest = padded ? 8 : V::kRowColumns;
    const int64_t tiles = ceil_div(a.width, widest), small = a.width / tiles, larger = a.width % tiles;
    const float* taps = a.taps + vector * k * k * V::kLanes;
    const float* bias = a.bias + vector * V::kLanes;
    alignas(64) float sums[(V::kRowColumns > 8 ? V::kRowColumns : 8) * V::kLanes];
    // The plane itself, or copies of its rows from first_copied on, each made before the first tile that reads it.
    const int64_t left = padded ? pad : kStep - 1;  // columns of a copied row before column 0
    const int64_t stride = (a.width + (padded ? 2 * pad : left)) * V::kLanes;
    const int64_t first_copied = copied && first > pad ? first - pad : 0;
    const float* source = copied ? a.scratch + left * V::kLanes : reinterpret_cast<const float*>(a.input);
    int64_t column = 0, next_copied = first_copied;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t columns = small + (tile < larger);
      const RowTile function = padded ? nullptr : find_row_tile(k, columns, tile == 0, tile == tiles - 1);
      for (int64_t row = first; row < last; ++row) {
        for (Prefetch& prefetch : ahead) prefetch.step();
        const int64_t top = row < pad ? 0 : row - pad, bottom = row + pad < a.height ? row + pad + 1 : a.height;
        for (; copied && next_copied < bottom; ++next_copied) {
          const char* from = a.input + next_copied * a.width * kLineBytes + vector * kVectorBytes;
          float* to = a.scratch + (next_copied - first_copied) * stride;
          if constexpr (kStep == 2) {
            if (!padded) {
              pair(from, a.width, to);
              continue;
            }
          }
          widen(from, a.width, padded ? pad : 0, to);
        }
        const float* input = source + (top - first_copied) * stride + column * V::kLanes;
        const float* used = taps + (top + pad - row) * steps * V::kLanes;
        const int64_t token = row * a.width + column, place = token - a.first_row * a.width;
        const int64_t before_split = a.split > place && a.split < place + columns ? a.split - place : columns;
        EpilogueArgs finish{
            sums,
            V::kLanes,
            before_split,
            nullptr,
            nullptr,
            a.scale + vector * V::kLanes,
            a.shift + vector * V::kLanes,
            a.residual ? a.residual + token * kLineBytes + vector * kVectorBytes : nullptr,
            (place < a.split ? a.output + place * kLineBytes : a.second + (place - a.split) * kLineBytes) +
                vector * kVectorBytes,
            kLineBytes};
        const bool in_registers = kInRegisters && !padded && before_split == columns;
        if (padded) {
          padded_tile<8>(input - pad * V::kLanes, stride, k, bottom - top, used, bias, sums);
        } else {
          function(input, stride, bottom - top, used, bias, sums, kLeast, in_registers ? &finish : nullptr);
        }
        if (in_registers) continue;
        for (int64_t done = 0; done < columns; finish.rows = columns - done) {
          epilogue<V, kActivation, true, V>(finish);
          done += finish.rows;
          finish.sums += finish.rows * V::kLanes, finish.output = a.second + vector * kVectorBytes;
          if (finish.residual) finish.residual += finish.rows * kLineBytes;
        }
      }
      column += columns;
    }
  }

  static void run(const DepthwiseArgs& a) {
    const bool copied = kWiden || !has_row_tiles(a.kernel_size);
    const int64_t step = copied ? band_rows(a.height, a.width, a.kernel_size) : a.last_row - a.first_row;
    const int64_t calls = (a.last_row - a.first_row) * V::kLineVectors;
    Prefetch ahead[] = {{a.ahead[0], calls}, {a.ahead[1], calls}};
    with_activation(a.activation, [&](auto activation) {
      for (int64_t vector = 0; vector < V::kLineVectors; ++vector) {
        for (int64_t first = a.first_row; first < a.last_row; first += step) {
          rows<decltype(activation)::value>(a, vector, first, first + step < a.last_row ? first + step : a.last_row,
                                            ahead);
        }
      }
    });
  }
};

}  // namespace spin
