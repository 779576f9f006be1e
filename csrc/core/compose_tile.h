// One tile of a composition: rows of a window of the bank, all its templates, all its users (see compose.h).
//
// Forward makes two lines of several users' results in registers while it walks the templates, so that those come from
// L2 once; results of a large call are streamed past the caches, where a plain store would first read the line that it
// replaces.
//
// Backward packs as many templates as registers have room for into scratch, next to sums for their gradients, and walks
// the users in groups: their gradients go into a sum per template in L1, times the templates into products in
// registers. The sums then go to the bank's gradient. Other templates follow, with the users' gradients in L2.
//
// So memory sees bursts, a template's or a user's part of the tile each, and every burst asks for what comes after it;
// while results are written, that is the next tile's templates. Time of what is left out or done otherwise, for
// WRN-28-10 at 10 to 100 % of its parameters (this order: 1):
//
//   Zen 4, two cores on one complex, and on two, whose memory is half as fast again:
//     forward, users one at a time                      1.0 to 1.3    1.05 to 1.65
//              users up to four at a time               1.0 to 1.08   1.0 to 1.26
//     backward, users two at a time, all templates held 1.0 to 1.1    1.0 to 1.16
//              bursts asked for into L1, not L2         1.16 to 1.3   (its L1 waits for few lines at a time)
//              and a user's own lines into L1, 768 bytes ahead  0.98 to 1.03  0.97 to 1.05
//              sums written line by line while the next tile is read  1.1 to 1.14
//   Zen 5 (against users one at a time forward and two backward):
//     forward, nothing asked for                        1.02 to 1.12
//     backward, users one at a time 1.06 to 1.09, nothing asked for during writes 1.08 to 1.2; a vector of every user
//     at a time, with lines 1 KB ahead, 1.0 to 1.12 (in huge pages 1.0 to 1.16: strides of weights are often multiples
//     of 64 KB, and many streams then fight for one set of L1 and of L2)
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
  static constexpr int kVectors = 128 / (kLanes * sizeof(float));  // forward: two lines
  // At a time, by registers: users forward; users and templates backward.
  static constexpr int kResults = 12 / kVectors;
  static constexpr int kUsers = kLanes == 16 ? 4 : 2, kTemplates = kLanes == 16 ? kHeldTemplates : 2;

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

  // How many of `left` come next where all are taken in groups of much the same size.
  static SPIN_INLINE int64_t share(int64_t left, int64_t most) { return ceil_div(left, ceil_div(left, most)); }

  // Element j and the ones after it, in row r, of kWide users from number u: kCount vectors each, or `part` elements.
  template <int kWide, int kCount, bool kStream>
  static SPIN_INLINE void combine(const ComposeTile& t, int64_t u, int64_t r, int64_t j, int64_t part = kLanes) {
    constexpr int64_t step = kLanes * kBytes;
    const ComposeUser* users = t.users + u;
    const char* from = t.bank + (r * t.pitch + j) * kBytes;
    F sum[kWide][kCount];
    auto add = [&](int64_t k, bool first) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) {
        const F x = kCount == 1 ? load_part(from, part) : load(from + v * step);
#pragma GCC unroll 8
        for (int w = 0; w < kWide; ++w) {
          const F weight = V::set(users[w].coefficients[k]);
          sum[w][v] = first ? V::mul(weight, x) : V::fma(weight, x, sum[w][v]);
        }
      }
    };
    add(0, true);
    for (int64_t k = 1; k < t.templates; ++k) from += t.stride * kBytes, add(k, false);
#pragma GCC unroll 8
    for (int w = 0; w < kWide; ++w) {
      char* to = users[w].data + (r * users[w].pitch + j) * kBytes;
#pragma GCC unroll 8
      for (int v = 0; v < kCount; ++v) {
        if constexpr (kStream) {
          V::stream(to + v * step, sum[w][v]);
        } else if constexpr (kCount == 1) {
          store_part(to, sum[w][v], part);
        } else {
          V::store_as(to + v * step, kType, sum[w][v]);
        }
      }
    }
  }

  // Row r of kWide users from number u. The last users ask for the next tile's templates.
  template <int kWide, bool kStream>
  static SPIN_INLINE void row(const ComposeTile& t, int64_t u, int64_t r) {
    int64_t j = 0;
    if constexpr (kStream) {  // whole lines only
      auto begin = [&](int w) {
        const ComposeUser& user = t.users[u + w];
        return Base::before_stream(user.data + r * user.pitch * kBytes, t.columns);
      };
      j = begin(0);
      if constexpr (kWide > 1) {
        bool together = true;
        for (int w = 1; w < kWide; ++w) together = together && begin(w) == j;
        if (!together) {
          for (int w = 0; w < kWide; ++w) row<1, true>(t, u + w, r);
          return;
        }
      }
      if (j > 0) combine<kWide, 1, false>(t, u, r, 0, j);
    }
    constexpr int64_t step = kVectors * kLanes;
    for (; j + step <= t.columns; j += step) {
      for (int w = 0; w < kWide; ++w) {
        for (int64_t k = t.users_count - 1 - u - w; k < t.templates; k += t.users_count) {
          beyond(t, template_of(t, k)).prefetch(r, j, step);
        }
      }
      combine<kWide, kVectors, kStream>(t, u, r, j);
    }
    for (; j < t.columns; j += kLanes) combine<kWide, 1, false>(t, u, r, j, t.columns - j);
  }

  template <int kWide>
  static void all_rows(const ComposeTile& t, int64_t u) {
    for (int64_t r = 0; r < t.rows; ++r) {
      if (kType == DType::kFloat32 && t.stream) {
        row<kWide, kType == DType::kFloat32>(t, u, r);
      } else {
        row<kWide, false>(t, u, r);
      }
    }
  }

  // `wide` users, kWide or fewer.
  template <int kWide = kResults>
  static SPIN_INLINE void some_rows(const ComposeTile& t, int64_t u, int64_t wide) {
    if constexpr (kWide > 1) {
      if (wide < kWide) return some_rows<kWide - 1>(t, u, wide);
    }
    all_rows<kWide>(t, u);
  }

  static void forward(const ComposeTile& t) {
    for (int64_t u = 0, wide; u < t.users_count; u += wide) {
      wide = share(t.users_count - u, kResults);
      some_rows(t, u, wide);
    }
  }

  static int64_t width_of(const ComposeTile& t) { return round_up(t.columns, kLanes); }  // of a row of scratch
  // Of template number i of those in scratch; their gradients come after them.
  static float* packed(const ComposeTile& t, int64_t i) { return t.scratch + i * t.rows * width_of(t); }

  static void pack(const ComposeTile& t, int64_t i, Burst own, Burst next) {
    const int64_t width = width_of(t), step = 2 * kLanes * kBytes;
    for (int64_t r = 0; r < t.rows; ++r) {
      const char* from = own.at(r, 0);
      float* to = packed(t, i) + r * width;
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

  // What burst number n asks for, where users come first, then the sums that are written: what is read kUsers later,
  // templates that are not among the first ones, and then the next tile.
  static SPIN_INLINE Burst after(const ComposeTile& t, int64_t n) {
    const int64_t first = share(t.templates, kTemplates);
    n += Base::smaller(kUsers, t.users_count);
    if (n < t.users_count) return gradient_of(t, n);
    n += first - t.users_count;
    if (n < t.templates) return template_of(t, n);
    n -= t.templates;
    return beyond(t, n < first ? template_of(t, n) : gradient_of(t, n - first));
  }

  // kCount templates from number k and kWide users from number u: the products of their gradients with the templates,
  // and what they add to the templates' gradients.
  template <int kWide, int kCount, bool kFirst>
  static SPIN_INLINE void gradients(const ComposeTile& t, int64_t u, int64_t k) {
    const int64_t width = width_of(t), area = t.rows * width;
    const float* templates = packed(t, 0);
    float* sums = packed(t, kCount);
    Burst own[kWide], next[kWide];
    F product[kWide][kCount], weight[kWide][kCount];
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
      own[w] = gradient_of(t, u + w), next[w] = k == 0 ? after(t, u + w) : own[w];
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        product[w][i] = V::zero(), weight[w][i] = V::set(t.users[u + w].coefficients[k + i]);
      }
    }
    auto add = [&](const F(&g)[kWide], int64_t at) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const int64_t place = i * area + at;
        const F x = V::load(templates + place);
        F sum = kFirst ? V::mul(weight[0][i], g[0]) : V::fma(weight[0][i], g[0], V::load(sums + place));
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) {
          if (w > 0) sum = V::fma(weight[w][i], g[w], sum);
          product[w][i] = V::fma(g[w], x, product[w][i]);
        }
        V::store(sums + place, sum);
      }
    };
    F g[kWide];
    for (int64_t r = 0; r < t.rows; ++r) {
      int64_t j = 0;
      for (; j + kLanes <= t.columns; j += kLanes) {
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) {
          next[w].prefetch(r, j, kLanes);
          g[w] = load(own[w].at(r, j));
        }
        add(g, r * width + j);
      }
      if (const int64_t left = t.columns - j; left > 0) {
#pragma GCC unroll 4
        for (int w = 0; w < kWide; ++w) g[w] = load_part(own[w].at(r, j), left);
        add(g, r * width + j);
      }
    }
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        t.products[(u + w) * t.templates + k + i] = V::sum(product[w][i]);
      }
    }
  }

  // `wide` users and `count` templates, kWide and kCount or fewer.
  template <int kWide = kUsers, int kCount = kTemplates>
  static SPIN_INLINE void some(const ComposeTile& t, int64_t u, int64_t wide, int64_t k, int64_t count) {
    if constexpr (kWide > 1) {
      if (wide < kWide) return some<kWide - 1, kCount>(t, u, wide, k, count);
    }
    if constexpr (kCount > 1) {
      if (count < kCount) return some<kWide, kCount - 1>(t, u, wide, k, count);
    }
    if (u == 0) {
      gradients<kWide, kCount, true>(t, u, k);
    } else {
      gradients<kWide, kCount, false>(t, u, k);
    }
  }

  // Row r of template k's sums into the bank's gradient.
  static SPIN_INLINE void put(const ComposeTile& t, int64_t k, const float* from, int64_t r, Burst next) {
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
    for (int64_t first = 0, count; first < t.templates; first += count) {
      count = share(t.templates - first, kTemplates);
      for (int64_t i = 0; i < count; ++i) {
        pack(t, i, template_of(t, first + i), i + 1 < count ? template_of(t, first + i + 1) : gradient_of(t, 0));
      }
      for (int64_t u = 0, wide; u < t.users_count; u += wide) {
        wide = share(t.users_count - u, kUsers);
        some(t, u, wide, first, count);
      }
      for (int64_t i = 0; i < count; ++i) {  // one template after the other: windows may overlap
        const float* sums = packed(t, count + i);
        const Burst next = after(t, t.users_count + first + i);
        for (int64_t r = 0; r < t.rows; ++r) put(t, first + i, sums + r * width_of(t), r, next);
      }
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
