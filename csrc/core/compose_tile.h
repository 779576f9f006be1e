// One tile of a composition: rows of a window of the bank, all its templates, all its users (see compose.h).
//
// Forward holds 4 vectors of the result in registers and walks the templates, which L1 holds; results of a large call
// are streamed past the caches, where a plain store would first read the line that it replaces.
//
// Backward packs the tile's templates into scratch, next to sums for their gradients, and walks the users: a vector of
// a user's gradient goes into 2 sums per template in L1, times the templates into 2 of products in registers. The sums
// go to the bank's gradient at the end. So memory sees bursts, a template's or a user's part of the tile each, of which
// the next is asked for during one. Read side by side instead, a vector of every user at a time, took 1.05 times as
// long, and 1.5 with huge pages: strides of weights are often multiples of 64 KB, and lines of more than 8 streams then
// fight for one set of L1 and of L2. Without asking ahead: 1.25.
//
// Cost: one multiply-add per template and vector forward, two backward.
// Numerics: float32 sums in a tile, double across tiles.
#pragma once
#include <cstring>

#include "weight_tile.h"

namespace spin {

template <class V, DType kType>
struct Compose : WeightTile<V, kType> {
  using Base = WeightTile<V, kType>;
  using Floats = WeightTile<V, DType::kFloat32>;
  using Base::kLanes, Base::kBytes, Base::load, Base::load_part, Base::store_part;
  using typename Base::F;
  static constexpr int kVectors = 4;
  static constexpr int kTemplates = kLanes == 16 ? 8 : 4;  // backward, by registers

  template <int kCount, bool kStream>
  static SPIN_INLINE void combine(const char* from, const ComposeTile& t, const float* c, char* to, int64_t part) {
    constexpr int64_t step = kLanes * kBytes;
    auto element = [&](int v) { return kCount == 1 ? load_part(from, part) : load(from + v * step); };
    F sum[kCount], weight = V::set(c[0]);
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) sum[v] = V::mul(weight, element(v));
    for (int64_t k = 1; k < t.templates; ++k) {
      from += t.stride * kBytes, weight = V::set(c[k]);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) sum[v] = V::fma(weight, element(v), sum[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      if constexpr (kStream) {
        V::stream(to + v * step, sum[v]);
      } else if constexpr (kCount == 1) {
        store_part(to, sum[v], part);
      } else {
        V::store_as(to + v * step, kType, sum[v]);
      }
    }
  }

  template <bool kStream>
  static SPIN_INLINE void row(const char* from, const ComposeTile& t, const float* c, char* to) {
    int64_t j = 0;
    if constexpr (kStream) {  // whole lines only
      j = Base::before_stream(to, t.columns);
      if (j > 0) combine<1, false>(from, t, c, to, j);
    }
    for (; j + kVectors * kLanes <= t.columns; j += kVectors * kLanes) {
      combine<kVectors, kStream>(from + j * kBytes, t, c, to + j * kBytes, kLanes);
    }
    for (; j < t.columns; j += kLanes) combine<1, false>(from + j * kBytes, t, c, to + j * kBytes, t.columns - j);
  }

  static void forward(const ComposeTile& t) {
    for (int64_t u = 0; u < t.users_count; ++u) {
      const ComposeUser& user = t.users[u];
      for (int64_t r = 0; r < t.rows; ++r) {
        const char* from = t.bank + r * t.pitch * kBytes;
        char* to = user.data + r * user.pitch * kBytes;
        if (t.stream) {
          row<true>(from, t, user.coefficients, to);
        } else {
          row<false>(from, t, user.coefficients, to);
        }
      }
    }
    if (t.stream) V::fence();
  }

  // A part of a template or of a user's gradient, as large as the tile.
  struct Burst {
    const char* from;
    int64_t pitch;  // bytes
    SPIN_INLINE void prefetch(int64_t row, int64_t offset, int64_t bytes) const {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + row * pitch + offset + i);
    }
  };
  static SPIN_INLINE Burst template_of(const ComposeTile& t, int64_t k) {
    return {t.bank + k * t.stride * kBytes, t.pitch * kBytes};
  }
  static SPIN_INLINE Burst gradient_of(const ComposeUser& user) { return {user.data, user.pitch * kBytes}; }

  static int64_t width_of(const ComposeTile& t) { return round_up(t.columns, 2 * kLanes); }  // of a row of scratch
  static float* packed(const ComposeTile& t, int64_t k) { return t.scratch + k * t.rows * width_of(t); }
  static float* gradient_sums(const ComposeTile& t, int64_t k) { return packed(t, t.templates + k); }

  static void pack(const ComposeTile& t, int64_t k, Burst next) {
    const Burst own = template_of(t, k);
    const int64_t width = width_of(t), step = 2 * kLanes * kBytes;
    for (int64_t r = 0; r < t.rows; ++r) {
      const char* from = own.from + r * own.pitch;
      float* to = packed(t, k) + r * width;
      for (int64_t j = 0; j < width; j += 2 * kLanes, from += step) {
        next.prefetch(r, j * kBytes, step);
        const int64_t left = t.columns - j;
        V::store(to + j, load_part(from, left));
        V::store(to + j + kLanes, left > kLanes ? load_part(from + step / 2, left - kLanes) : V::zero());
      }
    }
  }

  // kCount templates from number k: their products with a user's gradient, and what it adds to their gradients.
  template <int kCount, bool kFirst>
  static SPIN_INLINE void gradients(const ComposeTile& t, const ComposeUser& user, int64_t k, Burst next,
                                    double* products) {
    const int64_t width = width_of(t), area = t.rows * width, step = 2 * kLanes * kBytes;
    const float* templates = packed(t, k);
    float* sums = gradient_sums(t, k);
    F product[kCount][2], weight[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      product[i][0] = product[i][1] = V::zero(), weight[i] = V::set(user.coefficients[k + i]);
    }
    auto two = [&](const F(&g)[2], int64_t at) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t place = i * area + at + v * kLanes;
          product[i][v] = V::fma(g[v], V::load(templates + place), product[i][v]);
          V::store(sums + place, kFirst ? V::mul(weight[i], g[v]) : V::fma(weight[i], g[v], V::load(sums + place)));
        }
      }
    };
    for (int64_t r = 0; r < t.rows; ++r) {
      const char* from = user.data + r * user.pitch * kBytes;
      int64_t j = 0;
      for (; j + 2 * kLanes <= t.columns; j += 2 * kLanes, from += step) {
        next.prefetch(r, j * kBytes, step);
        two({load(from), load(from + step / 2)}, r * width + j);
      }
      if (const int64_t left = t.columns - j; left > 0) {
        two({load_part(from, left), left > kLanes ? load_part(from + step / 2, left - kLanes) : V::zero()},
            r * width + j);
      }
    }
    for (int i = 0; i < kCount; ++i) {
      alignas(64) float total[kLanes];
      V::store(total, V::add(product[i][0], product[i][1]));
      Base::reduce(total, 1, products + k + i);
    }
  }

  // kCount templates or more, as many as registers hold.
  template <int kCount = 1>
  static SPIN_INLINE void some(const ComposeTile& t, int64_t u, int64_t k, Burst next) {
    if constexpr (kCount < kTemplates) {
      if (t.templates - k > kCount) return some<kCount + 1>(t, u, k, next);
    }
    double* products = t.products + u * t.templates;
    if (u == 0) {
      gradients<kCount, true>(t, t.users[u], k, next, products);
    } else {
      gradients<kCount, false>(t, t.users[u], k, next, products);
    }
  }

  // A row of sums into the bank's gradient.
  static SPIN_INLINE void put(const ComposeTile& t, const float* from, float* to) {
    auto bytes = [&](int64_t j) { return reinterpret_cast<char*>(to + j); };
    int64_t j = 0;
    if (t.first && t.stream) {  // whole lines only
      j = Floats::before_stream(bytes(0), t.columns);
      std::memcpy(to, from, j * sizeof(float));
      for (; j + kLanes <= t.columns; j += kLanes) V::stream(bytes(j), V::load(from + j));
    }
    if (t.first) {
      std::memcpy(to + j, from + j, (t.columns - j) * sizeof(float));
    } else {
      for (; j < t.columns; j += kLanes) {
        const int64_t left = t.columns - j;
        const F before = load_part(bytes(j), left, DType::kFloat32);
        store_part(bytes(j), V::add(before, V::load(from + j)), left, DType::kFloat32);
      }
    }
  }

  static void backward(const ComposeTile& t) {
    for (int64_t k = 0; k < t.templates; ++k) {
      pack(t, k, k + 1 < t.templates ? template_of(t, k + 1) : gradient_of(t.users[0]));
    }
    Burst beyond = template_of(t, 0);  // where the next tile begins
    beyond.from += (t.rows == 1 ? t.columns : t.rows * t.pitch) * kBytes;
    for (int64_t u = 0; u < t.users_count; ++u) {
      const Burst next = u + 1 < t.users_count ? gradient_of(t.users[u + 1]) : beyond;
      for (int64_t k = 0; k < t.templates; k += kTemplates) some(t, u, k, k ? gradient_of(t.users[u]) : next);
    }
    for (int64_t k = 0; k < t.templates; ++k) {  // one template after the other: windows may overlap
      const float* sums = gradient_sums(t, k);
      for (int64_t r = 0; r < t.rows; ++r) put(t, sums + r * width_of(t), t.bank_gradient + k * t.stride + r * t.pitch);
    }
    if (t.stream) V::fence();
  }
};

template <class V>
void compose(const ComposeTile& t) {
  with_type(t.type, [&](auto type) { Compose<V, type.value>::forward(t); });
}

template <class V>
void compose_gradient(const ComposeTile& t) {
  with_type(t.type, [&](auto type) { Compose<V, type.value>::backward(t); });
}

}  // namespace spin
