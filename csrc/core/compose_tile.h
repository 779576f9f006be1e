// One tile of a composition: rows of a window of the bank, all its templates, all its users (see compose.h).
//
// Forward holds 4 vectors of the result in registers and walks the templates, which L1 holds; results of a large call
// are streamed past the caches, where a plain store would first read the line that it replaces. Backward holds 2
// vectors of the bank's gradient for 8 templates and walks the users, each a stream from memory that is read once: a
// vector of their gradients goes into the bank's, and times the templates into 8 sums in L1 (products in a pass of
// their own, with the bank's gradient from L2 after it, took 1.3 to 2 times as long: memory waits meanwhile). Forward
// one multiply-add per template and vector, backward two. Numerics: float32 sums inside a tile, in double across tiles.
#pragma once
#include "weight_tile.h"

namespace spin {

template <class V, DType kType>
struct Compose : WeightTile<V, kType> {
  using Base = WeightTile<V, kType>;
  using Floats = WeightTile<V, DType::kFloat32>;
  using Base::kLanes, Base::kBytes, Base::kStreams, Base::load, Base::load_part, Base::store_part;
  using typename Base::F, typename Base::Span;
  static constexpr int kVectors = 4;
  static constexpr int kTemplates = kLanes == 16 ? 8 : 4;  // by registers

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

  // The lines 1 KB ahead: the hardware keeps up with fewer streams than there are (0.75 to 0.9 of the time).
  static SPIN_INLINE void prefetch(const char* from) {
    __builtin_prefetch(from + 1024), __builtin_prefetch(from + 1024 + 64);
  }

  // kCount templates from number k, kWide vectors (or a part of one) from column j of row r, `users` from number u:
  // adds the products of gradient and template to the users' sums, and makes the bank's gradient.
  template <int kCount, int kWide>
  static SPIN_INLINE void gradients(const ComposeTile& t, Span users, int64_t r, int64_t j, int64_t k, int64_t part) {
    const int64_t stride = t.stride * kBytes, step = kLanes * kBytes;
    const char* bank = t.bank + k * stride + (r * t.pitch + j) * kBytes;
    if (kWide > 1 && users.first == 0) {
      for (int i = 0; i < kCount; ++i) prefetch(bank + i * stride);
    }
    F sum[kCount][kWide];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) sum[i][v] = V::zero();
    }
    for (int64_t u = users.first; u < users.last; ++u) {
      const ComposeUser& user = t.users[u];
      const char* gradient = user.data + (r * user.pitch + j) * kBytes;
      if (kWide > 1 && k == 0) prefetch(gradient);
      float* products = t.sums + (u * t.templates + k) * kLanes;
      F g[kWide];
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v) g[v] = kWide == 1 ? load_part(gradient, part) : load(gradient + v * step);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const F weight = V::set(user.coefficients[k + i]);
        F product = V::load(products + i * kLanes);
#pragma GCC unroll 4
        for (int v = 0; v < kWide; ++v) {
          const char* x = bank + i * stride + v * step;
          sum[i][v] = V::fma(weight, g[v], sum[i][v]);
          product = V::fma(g[v], kWide == 1 ? load_part(x, part) : load(x), product);
        }
        V::store(products + i * kLanes, product);
      }
    }
    for (int i = 0; i < kCount; ++i) {  // one template after the other: windows may overlap
      char* to = reinterpret_cast<char*>(t.bank_gradient + (k + i) * t.stride + r * t.pitch + j);
      const bool first = t.first && users.first == 0, stream = t.stream && reinterpret_cast<intptr_t>(to) % 64 == 0;
#pragma GCC unroll 4
      for (int v = 0; v < kWide; ++v, to += kLanes * 4) {
        const int64_t count = kWide == 1 ? part : kLanes;
        if (!first) {
          store_part(to, V::add(sum[i][v], load_part(to, count, DType::kFloat32)), count, DType::kFloat32);
        } else if (kWide > 1 && stream) {
          V::stream(to, sum[i][v]);
        } else {
          store_part(to, sum[i][v], count, DType::kFloat32);
        }
      }
    }
  }

  // kCount templates or more, as many as registers hold.
  template <int kCount>
  static SPIN_INLINE void some(const ComposeTile& t, Span users, int64_t r, int64_t j, int64_t k) {
    if constexpr (kCount < kTemplates) {
      if (t.templates - k > kCount) return some<kCount + 1>(t, users, r, j, k);
    }
    gradients<kCount, 2>(t, users, r, j, k, kLanes);
  }

  static void backward(const ComposeTile& t) {
    const int64_t count = t.users_count * t.templates;
    Base::clear(t.sums, count);
    for (int64_t u = 0; u < t.users_count; u += kStreams) {
      const Span users = Base::span(u, t.users_count);
      for (int64_t r = 0; r < t.rows; ++r) {
        auto part = [&](int64_t j, int64_t count) {
          for (int64_t k = 0; k < t.templates; ++k) gradients<1, 1>(t, users, r, j, k, count);
        };
        int64_t j = 0;
        if (t.stream) {  // the first template's gradient past the caches, and, with strides of whole lines, the others'
          j = Floats::before_stream(reinterpret_cast<const char*>(t.bank_gradient + r * t.pitch), t.columns);
          if (j > 0) part(0, j);
        }
        for (; j + 2 * kLanes <= t.columns; j += 2 * kLanes) {
          for (int64_t k = 0; k < t.templates; k += kTemplates) some<1>(t, users, r, j, k);
        }
        for (; j < t.columns; j += kLanes) part(j, Base::smaller(kLanes, t.columns - j));
      }
    }
    if (t.stream) V::fence();
    Base::reduce(t.sums, count, t.products);
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
