// One tile of a composition: rows of a window of the bank, all its templates, all its users (see compose.h).
//
// Forward holds 4 vectors of the result in registers and walks the templates, which L1 holds; results of a large call
// are streamed past the caches, where a plain store would first read the line that it replaces. Backward reads a user's
// gradient from memory for the products with the templates (8 sums in registers), then all users' again, from L2, for
// the bank: 8 templates x 2 vectors in registers, users innermost. 2 * templates multiply-adds per vector; numerics:
// float32 sums inside a tile, in double across tiles.
#pragma once
#include "kernels.h"

namespace spin {

template <class V, DType kType>
struct Compose {
  using F = typename V::F;
  static constexpr int64_t kLanes = V::kLanes, kBytes = size_of(kType);
  static constexpr int kVectors = 4;
  static constexpr int kTemplates = V::kLanes == 16 ? 8 : 4;  // by registers
  static constexpr int64_t kAhead = 8;                        // lines of the next user that are asked for in advance

  static SPIN_INLINE F load(const char* from) { return V::load_as(from, kType); }
  // The first `count` values, zeros after them.
  template <DType kOf = kType>
  static SPIN_INLINE F load_part(const char* from, int64_t count) {
    if (count >= kLanes) return V::load_as(from, kOf);
    alignas(64) char values[kLanes * 4] = {};
    __builtin_memcpy(values, from, count * size_of(kOf));
    return V::load_as(values, kOf);
  }
  template <DType kOf = kType>
  static SPIN_INLINE void store_part(char* to, F x, int64_t count) {
    if (count >= kLanes) return V::store_as(to, kOf, x);
    alignas(64) char values[kLanes * 4];
    V::store_as(values, kOf, x);
    __builtin_memcpy(to, values, count * size_of(kOf));
  }

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
      const int64_t ahead = -reinterpret_cast<intptr_t>(to) / kBytes & (kLanes - 1);
      j = ahead < t.columns ? ahead : t.columns;
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

  static SPIN_INLINE double total(F x) {
    alignas(64) float lane[kLanes];
    V::store(lane, x);
    double sum = 0;
    for (int64_t i = 0; i < kLanes; ++i) sum += lane[i];
    return sum;
  }

  // The products of one user's gradient with kCount templates from number k.
  template <int kCount>
  static void dots(const ComposeTile& t, const ComposeUser& user, int64_t k) {
    const int64_t stride = t.stride * kBytes;
    F sum[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) sum[i] = V::zero();
    for (int64_t r = 0; r < t.rows; ++r) {
      const char *gradient = user.data + r * user.pitch * kBytes, *bank = t.bank + k * stride + r * t.pitch * kBytes;
      int64_t j = 0;
      for (; j + kLanes <= t.columns; j += kLanes) {
        const F g = load(gradient + j * kBytes);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) sum[i] = V::fma(g, load(bank + i * stride + j * kBytes), sum[i]);
      }
      if (j < t.columns) {
        const F g = load_part(gradient + j * kBytes, t.columns - j);
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i) {
          sum[i] = V::fma(g, load_part(bank + i * stride + j * kBytes, t.columns - j), sum[i]);
        }
      }
    }
    for (int i = 0; i < kCount; ++i) user.dots[k + i] = total(sum[i]);
  }

  // kCount templates' gradients from number k, for kWide vectors (or a part of one) from column j of row r.
  template <int kCount, int kWide>
  static SPIN_INLINE void spread(const ComposeTile& t, int64_t r, int64_t j, int64_t k, int64_t part) {
    F sum[kCount][kWide];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) sum[i][v] = V::zero();
    }
    for (int64_t u = 0; u < t.users_count; ++u) {
      const ComposeUser& user = t.users[u];
      const char* gradient = user.data + (r * user.pitch + j) * kBytes;
      F g[kWide];
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) {
        g[v] = kWide == 1 ? load_part(gradient, part) : load(gradient + v * kLanes * kBytes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const F weight = V::set(user.coefficients[k + i]);
#pragma GCC unroll 2
        for (int v = 0; v < kWide; ++v) sum[i][v] = V::fma(weight, g[v], sum[i][v]);
      }
    }
    for (int i = 0; i < kCount; ++i) {  // one template after the other: windows may overlap
      char* to = reinterpret_cast<char*>(t.bank_gradient + (k + i) * t.stride + r * t.pitch + j);
      for (int v = 0; v < kWide; ++v, to += kLanes * 4) {
        F x = sum[i][v];
        const int64_t count = kWide == 1 ? part : kLanes;
        if (!t.first) x = V::add(x, load_part<DType::kFloat32>(to, count));
        store_part<DType::kFloat32>(to, x, count);
      }
    }
  }

  template <int kCount>
  static void templates(const ComposeTile& t, int64_t k) {
    for (int64_t u = 0; u < t.users_count; ++u) {
      if (k == 0 && u + 1 < t.users_count) {
        for (int64_t line = 0; line < kAhead; ++line) __builtin_prefetch(t.users[u + 1].data + line * 64);
      }
      dots<kCount>(t, t.users[u], k);
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      int64_t j = 0;
      for (; j + 2 * kLanes <= t.columns; j += 2 * kLanes) spread<kCount, 2>(t, r, j, k, kLanes);
      for (; j < t.columns; j += kLanes) {
        spread<kCount, 1>(t, r, j, k, t.columns - j < kLanes ? t.columns - j : kLanes);
      }
    }
  }

  static void backward(const ComposeTile& t) {
    int64_t k = 0;
    for (; k + kTemplates <= t.templates; k += kTemplates) templates<kTemplates>(t, k);
    for (; k + 2 <= t.templates; k += 2) templates<2>(t, k);
    if (k < t.templates) templates<1>(t, k);
  }
};

template <class V>
void compose(const ComposeTile& t) {
  if (t.type == DType::kFloat32) return Compose<V, DType::kFloat32>::forward(t);
  if (t.type == DType::kBFloat16) return Compose<V, DType::kBFloat16>::forward(t);
  Compose<V, DType::kFloat16>::forward(t);
}

template <class V>
void compose_gradient(const ComposeTile& t) {
  if (t.type == DType::kFloat32) return Compose<V, DType::kFloat32>::backward(t);
  if (t.type == DType::kBFloat16) return Compose<V, DType::kBFloat16>::backward(t);
  Compose<V, DType::kFloat16>::backward(t);
}

}  // namespace spin
