// The gradient of a depthwise filter: taps[i, j] += sum over outputs of gradient[y, x] * input[y + i - p, x + j - p].
//
// The mirror image of depthwise.h: there a row of outputs stays in registers while taps pass; here a row of up to 16
// output gradients does, and for each of the k rows of taps the inputs pass, each feeding up to k sums.
// Cost: rows * columns * k * k multiply-adds; per row of taps 16 + k - 1 loads and 2 k of sums for 16 k of them.
// Other kernel sizes than 3, 5, 7 and 9 take one load per multiply-add, tap by tap.
// Numerics: float32 sums, row by row and column by column in order, whatever the threads.
#pragma once
#include "kernels.h"

namespace spin {

template <class V>
struct TapsGradient {
  using F = typename V::F;
  static constexpr int64_t kLanes = V::kLanes;

  // kColumns gradients of one output row against one row of inputs, of which `left` and `right` columns exist beside
  // it.
  template <int kSize, int kColumns>
  static SPIN_INLINE void row(const F (&gradient)[kColumns], const float* input, int64_t left, int64_t right,
                              float* taps) {
    constexpr int kPad = kSize / 2;
    F sum[kSize];
#pragma GCC unroll 9
    for (int j = 0; j < kSize; ++j) sum[j] = V::load(taps + j * kLanes);
#pragma GCC unroll 24
    for (int x = -kPad; x < kColumns + kPad; ++x) {
      if (x < 0 ? -x > left : x - kColumns >= right) continue;
      const F value = V::load(input + x * kLanes);
#pragma GCC unroll 9
      for (int j = 0; j < kSize; ++j) {
        const int c = x + kPad - j;
        if (c >= 0 && c < kColumns) sum[j] = V::fma(gradient[c], value, sum[j]);
      }
    }
#pragma GCC unroll 9
    for (int j = 0; j < kSize; ++j) V::store(taps + j * kLanes, sum[j]);
  }

  template <int kSize, int kColumns>
  static void tile(const TapsGradientArgs& a, int64_t y, int64_t column) {
    constexpr int kPad = kSize / 2;
    F gradient[kColumns];
    const float* from = a.gradient + (y * a.width + column) * kLanes;
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) gradient[c] = V::load(from + c * kLanes);
    const int64_t top = y < kPad ? 0 : y - kPad, bottom = y + kPad < a.height ? y + kPad + 1 : a.height;
    for (int64_t source = top; source < bottom; ++source) {
      row<kSize>(gradient, a.input + (source * a.width + column) * kLanes, column, a.width - column - kColumns,
                 a.taps + (source - y + kPad) * kSize * kLanes);
    }
  }

  template <int kSize, int kColumns = V::kRowColumns>
  static void tile_of(int64_t columns, const TapsGradientArgs& a, int64_t y, int64_t column) {
    if constexpr (kColumns > 1) {
      if (columns < kColumns) return tile_of<kSize, kColumns / 2>(columns, a, y, column);
    }
    tile<kSize, kColumns>(a, y, column);
    if (columns > kColumns) tile_of<kSize, kColumns>(columns - kColumns, a, y, column + kColumns);
  }

  template <int kSize>
  static void sized(const TapsGradientArgs& a) {
    for (int64_t y = 0; y < a.height; ++y) tile_of<kSize>(a.width, a, y, 0);
  }

  static void any(const TapsGradientArgs& a) {
    const int64_t k = a.kernel_size, pad = k / 2;
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const int64_t dy = i - pad, dx = j - pad;
        const int64_t left = dx < 0 ? -dx : 0, right = dx > 0 ? a.width - dx : a.width;
        F sum[2] = {V::load(a.taps + (i * k + j) * kLanes), V::zero()};
        for (int64_t y = dy < 0 ? -dy : 0; y < (dy > 0 ? a.height - dy : a.height); ++y) {
          const float* gradient = a.gradient + y * a.width * kLanes;
          const float* input = a.input + ((y + dy) * a.width + dx) * kLanes;
          int64_t x = left;
          for (; x + 2 <= right; x += 2) {
            sum[0] = V::fma(V::load(gradient + x * kLanes), V::load(input + x * kLanes), sum[0]);
            sum[1] = V::fma(V::load(gradient + (x + 1) * kLanes), V::load(input + (x + 1) * kLanes), sum[1]);
          }
          if (x < right) sum[0] = V::fma(V::load(gradient + x * kLanes), V::load(input + x * kLanes), sum[0]);
        }
        V::store(a.taps + (i * k + j) * kLanes, V::add(sum[0], sum[1]));
      }
    }
  }

  static void run(const TapsGradientArgs& a) {
    switch (a.kernel_size) {
      case 3:
        return sized<3>(a);
      case 5:
        return sized<5>(a);
      case 7:
        return sized<7>(a);
      case 9:
        return sized<9>(a);
      default:
        return any(a);
    }
  }
};

}  // namespace spin
