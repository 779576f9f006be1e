// Between the outside and the blocked layout: tensors of any strides, patches of images, packed matrices,
// pooled means. One pass over memory each; 16 x 16 (8 x 8, 4 x 4) transpositions in registers where the
// strides allow, element by element where they do not.
#pragma once
#include "kernels.h"

namespace spin {

template <class V>
struct Layout {
  using F = typename V::F;
  static constexpr int64_t kLanes = V::kLanes;
  static constexpr int64_t kVectorBytes = kLanes * (V::kChain == DType::kFloat32 ? 4 : 2);
  static constexpr int64_t kLineBytes = kVectorBytes * V::kLineVectors;
  static constexpr int64_t kLineChannels = kLanes * V::kLineVectors;

  static SPIN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  // ---- tensors ----

  static SPIN_INLINE bool is_planar(const External& t) {
    return t.column_stride == 1 && (t.row_stride == t.width || t.height == 1);
  }

  static void load(const External& from, int64_t line, char* blocked) {
    const int64_t tokens = from.height * from.width, size = size_of(from.type);
    for (int64_t v = 0; v < V::kLineVectors; ++v, blocked += kVectorBytes) {
      const int64_t channel = line * kLineChannels + v * kLanes;
      const int64_t channels = smaller(kLanes, from.channels - channel);
      const char* base = from.data + channel * from.channel_stride * size;
      int64_t token = 0;
      if (channels == kLanes && is_planar(from)) {
        for (; token + kLanes <= tokens; token += kLanes) {
          F block[kLanes];
          for (int64_t c = 0; c < kLanes; ++c) {
            block[c] = V::load_as(base + (c * from.channel_stride + token) * size, from.type);
          }
          V::transpose(block);
          for (int64_t t = 0; t < kLanes; ++t) V::store_chain(blocked + (token + t) * kLineBytes, block[t]);
        }
      }
      for (; token < tokens; ++token) {
        const char* pixel =
            base + (token / from.width * from.row_stride + token % from.width * from.column_stride) * size;
        char* to = blocked + token * kLineBytes;
        if (channels == kLanes && from.channel_stride == 1) {
          V::store_chain(to, V::load_as(pixel, from.type));
          continue;
        }
        alignas(64) float values[kLanes] = {};
        for (int64_t c = 0; c < channels; ++c) values[c] = load_scalar(pixel, from.type, c * from.channel_stride);
        V::store_chain(to, V::load(values));
      }
    }
  }

  static void store(const char* blocked, int64_t line, const External& to) {
    const int64_t tokens = to.height * to.width, size = size_of(to.type);
    for (int64_t v = 0; v < V::kLineVectors; ++v, blocked += kVectorBytes) {
      const int64_t channel = line * kLineChannels + v * kLanes;
      const int64_t channels = smaller(kLanes, to.channels - channel);
      char* base = to.data + channel * to.channel_stride * size;
      int64_t token = 0;
      if (channels == kLanes && is_planar(to)) {
        for (; token + kLanes <= tokens; token += kLanes) {
          F block[kLanes];
          for (int64_t t = 0; t < kLanes; ++t) block[t] = V::load_chain(blocked + (token + t) * kLineBytes);
          V::transpose(block);
          for (int64_t c = 0; c < kLanes; ++c) {
            V::store_as(base + (c * to.channel_stride + token) * size, to.type, block[c]);
          }
        }
      }
      for (; token < tokens; ++token) {
        char* pixel = base + (token / to.width * to.row_stride + token % to.width * to.column_stride) * size;
        const F value = V::load_chain(blocked + token * kLineBytes);
        if (channels == kLanes && to.channel_stride == 1) {
          V::store_as(pixel, to.type, value);
          continue;
        }
        alignas(64) float values[kLanes];
        V::store(values, value);
        for (int64_t c = 0; c < channels; ++c) store_scalar(pixel, to.type, c * to.channel_stride, values[c]);
      }
    }
  }

  static SPIN_INLINE void store_lane(char* token, int64_t channel, float value) {  // of the line at `token`
    store_scalar(token, V::kChain, channel, value);
  }

  // ---- patches ----

  static void load_patches(const PatchArgs& a) {
    const External& image = a.image;
    const int64_t size = size_of(image.type);
    const int64_t inputs = image.channels * a.patch * a.patch, padded = round_up(inputs, kLineChannels);
    for (int64_t y = a.first_row; y < a.last_row; ++y) {
      for (int64_t c = 0; c < image.channels; ++c) {
        for (int64_t ky = 0; ky < a.patch; ++ky) {
          const int64_t row = y * a.stride - a.padding + ky;
          const char* pixels = image.data + (c * image.channel_stride + row * image.row_stride) * size;
          const int64_t first = (c * a.patch + ky) * a.patch;
          for (int64_t x = 0; x < a.grid_width; ++x) {
            char* token = a.output + ((y - a.first_row) * a.grid_width + x) * kLineBytes;
            const int64_t column = x * a.stride - a.padding;
            for (int64_t kx = 0; kx < a.patch; ++kx) {
              const bool inside = row >= 0 && row < image.height && column + kx >= 0 && column + kx < image.width;
              const float value = inside ? load_scalar(pixels, image.type, (column + kx) * image.column_stride) : 0.f;
              const int64_t channel = first + kx;
              store_lane(token + channel / kLineChannels * a.output_stride, channel % kLineChannels, value);
            }
          }
        }
      }
      for (int64_t channel = inputs; channel < padded; ++channel) {
        for (int64_t x = 0; x < a.grid_width; ++x) {
          char* token = a.output + ((y - a.first_row) * a.grid_width + x) * kLineBytes;
          store_lane(token + channel / kLineChannels * a.output_stride, channel % kLineChannels, 0.f);
        }
      }
    }
  }

  // ---- matrices ----

  // kLanes elements of a matrix from (row, column); `composed` says whether there are coefficients.
  template <DType type, bool composed>
  static SPIN_INLINE F combine(const PackArgs& a, int64_t row, int64_t column) {
    const char* at = a.source + (row * a.columns + column) * size_of(type);
    if constexpr (!composed) return V::load_as(at, type);
    F sum = V::mul(V::set(a.coefficients[0]), V::load_as(at, type));
    for (int64_t t = 1; t < a.templates; ++t) {
      at += a.template_stride * size_of(type);
      sum = V::fma(V::set(a.coefficients[t]), V::load_as(at, type), sum);
    }
    return sum;
  }

  static F combine_tail(const PackArgs& a, int64_t row, int64_t column) {  // fewer than kLanes columns are left
    alignas(64) float values[kLanes] = {};
    for (int64_t i = 0; column + i < a.columns; ++i) {
      const int64_t at = row * a.columns + column + i;
      float sum = 0;
      for (int64_t t = 0; t < a.templates; ++t) {
        const float value = load_scalar(a.source, a.type, at + t * a.template_stride);
        sum = a.coefficients ? __builtin_fmaf(a.coefficients[t], value, sum) : value;
      }
      values[i] = sum;
    }
    return V::load(values);
  }

  // A line of units of one row; `inside` promises that all of it is there.
  template <DType type, bool composed, bool inside>
  static SPIN_INLINE F units(const PackArgs& a, int64_t row, int64_t first_column) {
    if constexpr (inside && !composed && type == V::kChain) {
      return V::load(a.source + (row * a.columns + first_column) * size_of(type));  // is in units already
    }
    F channels[V::kLineVectors];
    for (int64_t v = 0; v < V::kLineVectors; ++v) {
      const int64_t column = first_column + v * kLanes;
      if (inside || (row < a.rows && column + kLanes <= a.columns)) {
        channels[v] = combine<type, composed>(a, row, column);
      } else {
        channels[v] = row < a.rows && column < a.columns ? combine_tail(a, row, column) : V::zero();
      }
    }
    return V::to_units(channels);
  }

  template <DType type, bool composed, bool inside>
  static SPIN_INLINE void pack_block(const PackArgs& a, int64_t row, int64_t column, char* to) {
    F block[kLanes];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kLanes; ++r) {
      block[r] = units<type, composed, inside>(a, row + r, column);
    }
    V::transpose(block);
    const int64_t stride = a.vectors * kLanes * 4;
#pragma GCC unroll 16
    for (int64_t unit = 0; unit < kLanes; ++unit) V::store(to + unit * stride, block[unit]);
  }

  template <DType type, bool composed>
  static void pack_panel_of(const PackArgs& a) {
    const int64_t lines = ceil_div(a.columns, kLineChannels);
    constexpr int64_t kUnitVectorBytes = kLanes * 4;
    for (int64_t vector = 0; vector < a.vectors; ++vector) {
      const int64_t row = a.first_row + vector * kLanes;
      const int64_t inside = row + kLanes <= a.rows ? a.columns / kLineChannels : 0;
      char* to = a.panel + vector * kUnitVectorBytes;
      for (int64_t line = 0; line < lines; ++line, to += kLanes * a.vectors * kUnitVectorBytes) {
        if (line < inside) {
          pack_block<type, composed, true>(a, row, line * kLineChannels, to);
        } else {
          pack_block<type, composed, false>(a, row, line * kLineChannels, to);
        }
      }
    }
  }

  static void pack_panel(const PackArgs& a) {
    const bool composed = a.coefficients != nullptr;
    switch (a.type) {
      case DType::kFloat32:
        return composed ? pack_panel_of<DType::kFloat32, true>(a) : pack_panel_of<DType::kFloat32, false>(a);
      case DType::kBFloat16:
        return composed ? pack_panel_of<DType::kBFloat16, true>(a) : pack_panel_of<DType::kBFloat16, false>(a);
      case DType::kFloat16:
        return composed ? pack_panel_of<DType::kFloat16, true>(a) : pack_panel_of<DType::kFloat16, false>(a);
    }
  }

  // Filters (channels, area) as taps [vector][area][lane], zero for channels past the last.
  static void pack_taps(const char* source, DType type, int64_t channels, int64_t area, float* taps) {
    const int64_t size = size_of(type);
    for (int64_t channel = 0; channel < round_up(channels, kLineChannels); channel += kLanes, taps += area * kLanes) {
      for (int64_t column = 0; column < area; column += kLanes) {
        F block[kLanes];
        for (int64_t r = 0; r < kLanes; ++r) {
          const int64_t at = (channel + r) * area + column;
          if (channel + r >= channels) {
            block[r] = V::zero();
          } else if (at + kLanes <= channels * area) {
            block[r] = V::load_as(source + at * size, type);  // may run into the next row: not stored
          } else {
            alignas(64) float values[kLanes] = {};
            for (int64_t i = 0; at + i < channels * area; ++i) values[i] = load_scalar(source, type, at + i);
            block[r] = V::load(values);
          }
        }
        V::transpose(block);
        for (int64_t i = 0; i < smaller(kLanes, area - column); ++i) V::store(taps + (column + i) * kLanes, block[i]);
      }
    }
  }

  // ---- global average pool ----

  static void pool(const char* blocked, int64_t tokens, char* pooled) {
    for (int64_t v = 0; v < V::kLineVectors; ++v) {
      F sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};  // four chains hide the latency of the addition
      for (int64_t token = 0; token < tokens; ++token) {
        sum[token & 3] = V::add(sum[token & 3], V::load_chain(blocked + token * kLineBytes + v * kVectorBytes));
      }
      const F total = V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]));
      V::store_chain(pooled + v * kVectorBytes, V::mul(total, V::set(1.f / float(tokens))));
    }
  }
};

}  // namespace spin
