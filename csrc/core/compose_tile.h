// One tile of a composition: rows of a window of the bank, all its templates, all its users (see compose.h).
//
// Forward walks the templates, which L1 holds, for two lines of a user's result at a time; results of a large call are
// streamed past the caches, where a plain store would first read the line that it replaces.
//
// Backward packs the tile's templates into scratch, next to sums for their gradients, and walks the users two at a
// time: vectors of both gradients go into a sum per template in L1, times the templates into products in registers. The
// sums go to the bank's gradient at the end.
//
// So memory sees bursts, a template's or a user's part of the tile each, and every burst asks for what comes after it;
// while results are written, that is the next tile's templates. Time on a Zen 5 processor of what is left out, for
// WRN-28-10 at 10 to 100 % of its parameters (this order: 1): backward, users one at a time 1.06 to 1.09, and with
// nothing asked for during writes 1.08 to 1.2; a vector of every user at a time, with lines 1 KB ahead, 1.0 to 1.12 (in
// huge pages 1.0 to 1.16: strides of weights are often multiples of 64 KB, and many streams then fight for one set of
// L1 and of L2). Forward, nothing asked for 1.02 to 1.12, lines of four vectors each 1.02 to 1.08. On a Zen 4, whose L1
// waits for few lines at a time, backward takes 1.16 to 1.3 if bursts are asked for into L1 instead of L2; users three
// or four at a time 0.95 to 1.08, up to eight 0.92 to 1.03, sums written line by line while the next tile is read 1.1
// to 1.14, by the last users' walk instead of from L1 1.0 to 1.02. With all tiles in caches it would take 0.45 (10 %)
// to 0.55 (100 %) of the time there.
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
  static constexpr int kVectors = 128 / (kLanes * sizeof(float));      // forward: two lines
  static constexpr int kUsers = 2, kTemplates = kLanes == 16 ? 4 : 2;  // backward at a time, by registers

  // A part of a template or of a user's gradient, as large as the tile.
  struct Burst {
    const char* from;
    int64_t pitch;  // bytes
    bool into_l2;
    SPIN_INLINE const char* at(int64_t row, int64_t column) const { return from + row * pitch + column * kBytes; }
    SPIN_INLINE void prefetch(int64_t row, int64_t column, int64_t columns) const {
      for (int64_t i = 0; i < columns * kBytes; i += 64) {
        if (into_l2) {
          __builtin_prefetch(at(row, column) + i, 0, 2);
        } else {
          __builtin_prefetch(at(row, column) + i, 0, 3);
        }
      }
    }
  };
  static SPIN_INLINE Burst template_of(const ComposeTile& t, int64_t k) {
    return {t.bank + k * t.stride * kBytes, t.pitch * kBytes, t.ask_into_l2};
  }
  static SPIN_INLINE Burst gradient_of(const ComposeTile& t, int64_t u) {
    return {t.users[u].data, t.users[u].pitch * kBytes, t.ask_into_l2};
  }
  // The same of the next tile.
  static SPIN_INLINE Burst beyond(const ComposeTile& t, Burst burst) {
    burst.from += t.rows == 1 ? t.columns * kBytes : t.rows * burst.pitch;
    return burst;
  }

  template <int kCount, bool kStream>
  static SPIN_INLINE void combine(const char* from, const ComposeTile& t, const float* c, char* to, int64_t part) {
    constexpr int64_t step = kLanes * kBytes;
    auto element = [&](int v) { return kCount == 1 ? load_part(from, part) : load(from + v * step); };
    F sum[kCount], weight = V::set(c[0]);
#pragma GCC unroll 8
    for (int v = 0; v < kCount; ++v) sum[v] = V::mul(weight, element(v));
    for (int64_t k = 1; k < t.templates; ++k) {
      from += t.stride * kBytes, weight = V::set(c[k]);
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) sum[v] = V::fma(weight, element(v), sum[v]);
    }
#pragma GCC unroll 8
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

  // Row r of user u. The last users ask for the next tile's templates.
  template <bool kStream>
  static SPIN_INLINE void row(const ComposeTile& t, int64_t u, int64_t r) {
    const ComposeUser& user = t.users[u];
    const char* from = t.bank + r * t.pitch * kBytes;
    char* to = user.data + r * user.pitch * kBytes;
    const float* c = user.coefficients;
    int64_t j = 0;
    if constexpr (kStream) {  // whole lines only
      j = Base::before_stream(to, t.columns);
      if (j > 0) combine<1, false>(from, t, c, to, j);
    }
    constexpr int64_t step = kVectors * kLanes;
    for (; j + step <= t.columns; j += step) {
      for (int64_t k = t.users_count - 1 - u; k < t.templates; k += t.users_count) {
        beyond(t, template_of(t, k)).prefetch(r, j, step);
      }
      combine<kVectors, kStream>(from + j * kBytes, t, c, to + j * kBytes, kLanes);
    }
    for (; j < t.columns; j += kLanes) combine<1, false>(from + j * kBytes, t, c, to + j * kBytes, t.columns - j);
  }

  static void forward(const ComposeTile& t) {
    for (int64_t u = 0; u < t.users_count; ++u) {
      for (int64_t r = 0; r < t.rows; ++r) {
        if (t.stream) {
          row<true>(t, u, r);
        } else {
          row<false>(t, u, r);
        }
      }
    }
  }

  static int64_t width_of(const ComposeTile& t) { return round_up(t.columns, 2 * kLanes); }  // of a row of scratch
  static float* packed(const ComposeTile& t, int64_t k) { return t.scratch + k * t.rows * width_of(t); }
  static float* gradient_sums(const ComposeTile& t, int64_t k) { return packed(t, t.templates + k); }

  static void pack(const ComposeTile& t, int64_t k, Burst next) {
    const Burst own = template_of(t, k);
    const int64_t width = width_of(t), step = 2 * kLanes * kBytes;
    for (int64_t r = 0; r < t.rows; ++r) {
      const char* from = own.at(r, 0);
      float* to = packed(t, k) + r * width;
      int64_t j = 0;
      for (; j + 2 * kLanes <= t.columns; j += 2 * kLanes, from += step) {
        next.prefetch(r, j, 2 * kLanes);
        V::store(to + j, load(from)), V::store(to + j + kLanes, load(from + step / 2));
      }
      for (; j < width; j += kLanes, from += step / 2) {
        V::store(to + j, j < t.columns ? load_part(from, t.columns - j) : V::zero());
      }
    }
  }

  // What burst number n asks for, where users come first, then the sums that are written: what is read kUsers later.
  static SPIN_INLINE Burst after(const ComposeTile& t, int64_t n) {
    n += Base::smaller(kUsers, t.users_count);
    if (n < t.users_count) return gradient_of(t, n);
    n -= t.users_count;
    return beyond(t, n < t.templates ? template_of(t, n) : gradient_of(t, n - t.templates));
  }

  // kCount templates from number k and kWide users from number u: the products of their gradients with the templates,
  // and what they add to the templates' gradients.
  template <int kWide, int kCount, bool kFirst>
  static SPIN_INLINE void gradients(const ComposeTile& t, int64_t u, int64_t k) {
    const int64_t width = width_of(t), area = t.rows * width, step = 2 * kLanes * kBytes;
    const float* templates = packed(t, k);
    float* sums = gradient_sums(t, k);
    const ComposeUser* users = t.users + u;
    Burst own[kWide], next[kWide];
    F product[kWide][kCount][2], weight[kWide][kCount];
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) {
      own[w] = gradient_of(t, u + w), next[w] = k == 0 ? after(t, u + w) : own[w];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        product[w][i][0] = product[w][i][1] = V::zero(), weight[w][i] = V::set(users[w].coefficients[k + i]);
      }
    }
    auto two = [&](const F(&g)[kWide][2], int64_t at) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t place = i * area + at + v * kLanes;
          const F x = V::load(templates + place);
          F sum = kFirst ? V::mul(weight[0][i], g[0][v]) : V::fma(weight[0][i], g[0][v], V::load(sums + place));
          product[0][i][v] = V::fma(g[0][v], x, product[0][i][v]);
          if constexpr (kWide > 1) {
            sum = V::fma(weight[1][i], g[1][v], sum);
            product[1][i][v] = V::fma(g[1][v], x, product[1][i][v]);
          }
          V::store(sums + place, sum);
        }
      }
    };
    F g[kWide][2];
    for (int64_t r = 0; r < t.rows; ++r) {
      int64_t j = 0;
      for (; j + 2 * kLanes <= t.columns; j += 2 * kLanes) {
#pragma GCC unroll 2
        for (int w = 0; w < kWide; ++w) {
          const char* from = own[w].at(r, j);
          next[w].prefetch(r, j, 2 * kLanes);
          g[w][0] = load(from), g[w][1] = load(from + step / 2);
        }
        two(g, r * width + j);
      }
      if (const int64_t left = t.columns - j; left > 0) {
#pragma GCC unroll 2
        for (int w = 0; w < kWide; ++w) {
          const char* from = own[w].at(r, j);
          g[w][0] = load_part(from, left);
          g[w][1] = left > kLanes ? load_part(from + step / 2, left - kLanes) : V::zero();
        }
        two(g, r * width + j);
      }
    }
#pragma GCC unroll 2
    for (int w = 0; w < kWide; ++w) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        alignas(64) float total[kLanes];
        V::store(total, V::add(product[w][i][0], product[w][i][1]));
        Base::reduce(total, 1, t.products + (u + w) * t.templates + k + i);
      }
    }
  }

  // kCount templates or more, as many as registers hold.
  template <int kWide, int kCount = 1>
  static SPIN_INLINE void some(const ComposeTile& t, int64_t u, int64_t k) {
    if constexpr (kCount < kTemplates) {
      if (t.templates - k > kCount) return some<kWide, kCount + 1>(t, u, k);
    }
    if (u == 0) {
      gradients<kWide, kCount, true>(t, u, k);
    } else {
      gradients<kWide, kCount, false>(t, u, k);
    }
  }

  // Row r of template k's sums into the bank's gradient.
  static SPIN_INLINE void put(const ComposeTile& t, int64_t k, int64_t r, Burst next) {
    const float* from = gradient_sums(t, k) + r * width_of(t);
    float* to = t.bank_gradient + k * t.stride + r * t.pitch;
    auto bytes = [&](int64_t j) { return reinterpret_cast<char*>(to + j); };
    int64_t j = 0;
    if (t.first && t.stream) {  // whole lines only
      j = Floats::before_stream(bytes(0), t.columns);
      std::memcpy(to, from, j * sizeof(float));
      for (; j + kLanes <= t.columns; j += kLanes) {
        next.prefetch(r, j, kLanes);
        V::stream(bytes(j), V::load(from + j));
      }
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
      pack(t, k, k + 1 < t.templates ? template_of(t, k + 1) : gradient_of(t, 0));
    }
    for (int64_t u = 0; u < t.users_count; u += kUsers) {
      for (int64_t k = 0; k < t.templates; k += kTemplates) {
        if (u + 1 < t.users_count) {
          some<kUsers>(t, u, k);
        } else {
          some<1>(t, u, k);
        }
      }
    }
    for (int64_t k = 0; k < t.templates; ++k) {  // one template after the other: windows may overlap
      const Burst next = after(t, t.users_count + k);
      for (int64_t r = 0; r < t.rows; ++r) put(t, k, r, next);
    }
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
