// Between the outside and the layouts of kernels.h: tensors of any strides, patches of images, matrices,
// filters, pooled means. One pass over memory each; 16 x 16 (8 x 8, 4 x 4) transpositions in registers where the
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

  // ---- patches ----

  // Neighbours in a row of a patch, at most a vector of them; `first`: among the channels of their line.
  struct Piece {
    int64_t channel, row, column, count, first;
  };

  // Rows of tokens one after the other: those of an image are then read from its first to its last.
  static void load_patches(const PatchArgs& a) {
    const int64_t inputs = a.image.channels * a.patch * a.patch;
    for (int64_t y = a.first_row; y < a.last_row; ++y) {
      char* row = a.output + (y - a.first_row) * a.grid_width * kLineBytes;
      for (int64_t input = 0; input < inputs; input += kLineChannels, row += a.output_stride) {
        patch_line(a, y, input, smaller(kLineChannels, inputs - input), row);
      }
    }
  }

  // Of a row of tokens, some inputs from the first on.
  static void patch_line(const PatchArgs& a, int64_t y, int64_t first, int64_t inputs, char* token) {
    const int64_t area = a.patch * a.patch;
    Piece pieces[kLineChannels];
    int64_t count = 0;
    for (int64_t i = 0; i < inputs; i += pieces[count++].count) {
      const int64_t input = first + i, column = input % a.patch;
      const int64_t neighbours = smaller(smaller(a.patch - column, inputs - i), kLanes);
      pieces[count] = {input / area, input % area / a.patch, column, neighbours, i};
    }
    for (int64_t x = 0; x < a.grid_width; ++x, token += kLineBytes) {
      float values[kLineChannels + kLanes];
      for (int64_t i = 0; i < count; ++i) load_piece(a, pieces[i], y, x, values + pieces[i].first);
      for (int64_t i = inputs; i < kLineChannels; i += kLanes) V::store(values + i, V::zero());
      for (int64_t v = 0; v < V::kLineVectors; ++v) {
        V::store_chain(token + v * kVectorBytes, V::load(values + v * kLanes));
      }
    }
  }

  // Of token (y, x); what it writes behind them, to a vector's end, has no meaning.
  static SPIN_INLINE void load_piece(const PatchArgs& a, const Piece& piece, int64_t y, int64_t x, float* values) {
    const External& image = a.image;
    const int64_t row = y * a.stride - a.padding + piece.row, column = x * a.stride - a.padding + piece.column;
    const bool row_inside = row >= 0 && row < image.height;
    const int64_t at = piece.channel * image.channel_stride + row * image.row_stride + column * image.column_stride;
    const int64_t last = (image.channels - 1) * image.channel_stride + (image.height - 1) * image.row_stride +
                         (image.width - 1) * image.column_stride;
    if (row_inside && column >= 0 && column + piece.count <= image.width && image.column_stride == 1 &&
        at + kLanes - 1 <= last) {
      return V::store(values, V::load_as(image.data + at * size_of(image.type), image.type));
    }
    for (int64_t i = 0; i < piece.count; ++i) {
      const bool inside = row_inside && column + i >= 0 && column + i < image.width;
      values[i] = inside ? load_scalar(image.data, image.type, at + i * image.column_stride) : 0.f;
    }
  }

  // ---- matrices ----

  template <DType type, bool composed>
  static void pack_rows_of(const PackRowsArgs& a) {
    constexpr int64_t kChainSize = kVectorBytes / kLanes;
    for (int64_t row = 0; row < a.rows; ++row) {
      const char* from = a.source + row * a.columns * size_of(type);
      char* to = a.to + row * a.row_stride;
      int64_t column = 0;
      for (; column + kLanes <= a.columns; column += kLanes) {
        const char* at = from + column * size_of(type);
        F sum = V::load_as(at, type);
        if constexpr (composed) {
          sum = V::mul(V::set(a.coefficients[0]), sum);
          for (int64_t t = 1; t < a.templates; ++t) {
            at += a.template_stride * size_of(type);
            sum = V::fma(V::set(a.coefficients[t]), V::load_as(at, type), sum);
          }
        }
        V::store_chain(to + column * kChainSize, sum);
      }
      for (; column < a.columns; ++column) {
        float sum = 0;
        for (int64_t t = 0; t < a.templates; ++t) {
          const float value = load_scalar(from, type, column + t * a.template_stride);
          sum = composed ? __builtin_fmaf(a.coefficients[t], value, sum) : value;
        }
        store_scalar(to, V::kChain, column, sum);
      }
      for (; column * kChainSize < a.row_stride; ++column) store_scalar(to, V::kChain, column, 0.f);
    }
  }

  static void pack_rows(const PackRowsArgs& a) {
    const bool composed = a.coefficients != nullptr;
    switch (a.type) {
      case DType::kFloat32:
        return composed ? pack_rows_of<DType::kFloat32, true>(a) : pack_rows_of<DType::kFloat32, false>(a);
      case DType::kBFloat16:
        return composed ? pack_rows_of<DType::kBFloat16, true>(a) : pack_rows_of<DType::kBFloat16, false>(a);
      case DType::kFloat16:
        return composed ? pack_rows_of<DType::kFloat16, true>(a) : pack_rows_of<DType::kFloat16, false>(a);
    }
  }

  // Filters (channels, area) as taps (DepthwiseArgs), zero for channels past the last.
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
      if constexpr (V::kTapStep == 2) {
        for (int64_t size = 3; has_row_tiles(size); size += 2) {
          if (size * size == area) pair_taps(taps, size);
        }
      }
    }
  }

  // Of a vector of filters, in place: units of two taps of a row, the last with zero.
  static void pair_taps(float* taps, int64_t size) {
    float* to = taps;
    for (int64_t row = 0; row < size; ++row, taps += size * kLanes) {
      for (int64_t j = 0; j < size; j += 2, to += kLanes) {
        const F pair[] = {V::load(taps + j * kLanes), j + 1 < size ? V::load(taps + (j + 1) * kLanes) : V::zero()};
        V::store(to, V::interleave(pair));
      }
    }
  }

  // ---- global average pool ----

  // Tokens of a line, added to what `sums` has of it.
  static void sum_tokens(const char* blocked, int64_t tokens, float* sums) {
    for (int64_t v = 0; v < V::kLineVectors; ++v, sums += kLanes) {
      F sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};  // four chains hide the latency of the addition
      auto add = [&](F& sum, int64_t token) __attribute__((always_inline)) {
        sum = V::add(sum, V::load_chain(blocked + token * kLineBytes + v * kVectorBytes));
      };
      int64_t token = 0;
      for (; token + 4 <= tokens; token += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) add(sum[i], token + i);
      }
      for (int i = 0; token < tokens; ++i, ++token) add(sum[i], token);
      V::store(sums, V::add(V::load(sums), V::add(V::add(sum[0], sum[1]), V::add(sum[2], sum[3]))));
    }
  }

  static void mean(const float* sums, int64_t parts, int64_t stride, int64_t tokens, char* pooled) {
    for (int64_t v = 0; v < V::kLineVectors; ++v, sums += kLanes) {
      F total = V::load(sums);
      for (int64_t part = 1; part < parts; ++part) total = V::add(total, V::load(sums + part * stride));
      V::store_chain(pooled + v * kVectorBytes, V::mul(total, V::set(1.f / float(tokens))));
    }
  }
};

}  // namespace spin
