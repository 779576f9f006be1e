// One tile of a composition: rows of a window of the bank, all its templates, all its users (see compose.h).
//
// Forward makes two lines of several users' results in registers while it walks the templates, so that those come from
// L2 once; results of a large call are streamed past the caches, where a plain store would first read the line that it
// replaces.
//
// Backward, a vector of several users' gradients goes into the sums for several templates' gradients and, times the
// templates, into products, all in registers: up to three templates, and as many users as there is then room for. If
// those are all, nothing is read or written twice. Else sums wait in scratch for more users (or in the bank's gradient,
// where others have added to it before), and users' gradients in L2 for more templates.
//
// So memory sees bursts, a template's or a user's part of the tile each, and every burst asks for one that comes later.
// Time of what is left out or done otherwise, for WRN-28-10 at 10 to 100 % of its parameters (this order: 1):
//
//   Zen 4, two cores on one complex, and on two, whose memory is half as fast again:
//     forward, users one at a time                                1.0 to 1.3    1.05 to 1.65
//              users up to four at a time                         1.0 to 1.08   1.0 to 1.26
//     backward, tiles in L1: templates packed, sums beside them   1.14 to 1.3   1.34 to 1.48
//              users up to four at a time                         1.02 to 1.12  1.1 to 1.26
//              all gradients in registers, then all sums          1.0 to 1.02   1.02 to 1.06
//              bursts of 4 to 6 KB                                1.03 to 1.04  1.05 to 1.09
//              and a user's own lines into L1, 512 bytes ahead    1.0 to 1.01   0.98 to 1.03
//     AVX2 forced, backward, tiles in L1 with two users at a time 1.0 to 1.2    1.1
//   Zen 5: forward, nothing asked for                             1.02 to 1.12
//
// Cost: one multiply-add per template and vector forward, two backward.
// Numerics: float32 sums in a tile, double across tiles.
#pragma once
#include "weight_tile.h"

namespace spin {

template <class V, DType kType>
struct Compose : WeightTile<V, kType> {
  using Base = WeightTile<V, kType>;
  using Floats = WeightTile<V, DType::kFloat32>;
  using Base::kLanes, Base::kBytes, Base::load, Base::load_part, Base::store_part;
  using typename Base::F;
  static constexpr int kVectors = 128 / (kLanes * sizeof(float));  // forward: two lines
  static constexpr int kResults = 12 / kVectors;                   // forward: users at a time
  // Backward: templates at a time, and as many users as leave room beside their products.
  static constexpr int kTemplates = kHeldTemplates, kProducts = kLanes == 16 ? 24 : 10, kUsers = 12;
  static constexpr int most_users(int64_t templates) { return int(Base::smaller(kProducts / templates, kUsers)); }

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

  // ---- backward ----

  // What a tile reads, one burst after the other: the templates taken first, the users, the other templates, and then
  // the same of the next tile.
  static SPIN_INLINE Burst burst(const ComposeTile& t, int64_t number, int64_t at_first) {
    const int64_t all = t.templates + t.users_count;
    const bool next = number >= all;
    if (next) number -= all;
    const int64_t user = number - at_first;
    const Burst burst = user < 0               ? template_of(t, number)
                        : user < t.users_count ? gradient_of(t, user)
                                               : template_of(t, number - t.users_count);
    return next ? beyond(t, burst) : burst;
  }

  // Sums for the gradients of templates, from where the tile begins.
  struct Sums {
    float* data;
    int64_t stride, pitch;  // from template to template, from row to row
    SPIN_INLINE char* at(int64_t i, int64_t row, int64_t column) const {
      return reinterpret_cast<char*>(data + i * stride + row * pitch + column);
    }
  };

  // The products of kWide users' gradients, from number u, with kCount templates, from number k, and what they add to
  // the templates' gradients. `at_first` templates are taken first; what is read `lag` bursts later is asked for.
  template <int kWide, int kCount>
  static void gradients(const ComposeTile& t, int64_t u, int64_t k, int64_t at_first, int64_t lag) {
    constexpr int64_t kLine = 64 / kBytes;
    const bool begins = u == 0, ends = u + kWide == t.users_count;
    const bool zero = t.first && begins, stream = t.first && t.stream && ends;
    const int64_t width = round_up(t.columns, kLanes);
    const Sums bank{t.bank_gradient + k * t.stride, t.stride, t.pitch}, scratch{t.scratch, t.rows * width, width};
    const Sums from = t.first ? scratch : bank, to = t.first && !ends ? scratch : bank;
    Burst templates[kCount], users[kWide], later_templates[kCount], later_users[kWide];
    const float* weights[kWide];
    F product[kWide][kCount];
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      templates[i] = template_of(t, k + i);
      later_templates[i] = burst(t, (k == 0 ? 0 : t.users_count) + k + i + lag, at_first);
    }
#pragma GCC unroll 16
    for (int w = 0; w < kWide; ++w) {
      users[w] = gradient_of(t, u + w), weights[w] = t.users[u + w].coefficients + k;
      later_users[w] = burst(t, at_first + u + w + lag, at_first);
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) product[w][i] = V::zero();
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      auto step = [&](auto whole, int64_t j, int64_t count) __attribute__((always_inline)) {
        constexpr bool kWhole = decltype(whole)::value;
        auto load_at = [&](const Burst& burst) __attribute__((always_inline)) {
          return kWhole ? load(burst.at(r, j)) : load_part(burst.at(r, j), count);
        };
        F x[kCount], sum[kCount];
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
          x[i] = load_at(templates[i]);
          sum[i] = zero     ? V::zero()
                   : kWhole ? V::load(from.at(i, r, j))
                            : load_part(from.at(i, r, j), count, DType::kFloat32);
        }
#pragma GCC unroll 16
        for (int w = 0; w < kWide; ++w) {
          const F g = load_at(users[w]);
#pragma GCC unroll 16
          for (int i = 0; i < kCount; ++i) {
            sum[i] = V::fma(V::set(weights[w][i]), g, sum[i]);
            product[w][i] = V::fma(g, x[i], product[w][i]);
          }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
          if (!kWhole) {
            store_part(to.at(i, r, j), sum[i], count, DType::kFloat32);
          } else if (stream) {
            V::stream(to.at(i, r, j), sum[i]);
          } else {
            V::store(to.at(i, r, j), sum[i]);
          }
        }
      };
      int64_t j = 0;
      if (stream) {  // whole lines only
        j = Floats::before_stream(to.at(0, r, 0), t.columns);
        if (j > 0) step(std::false_type(), 0, j);
      }
      for (; j + kLanes <= t.columns; j += kLanes) {
        if (j % kLine < kLanes) {
          if (begins) {
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i) later_templates[i].prefetch(r, j, kLine);
          }
          if (k == 0) {
#pragma GCC unroll 16
            for (int w = 0; w < kWide; ++w) later_users[w].prefetch(r, j, kLine);
          }
        }
        step(std::true_type(), j, kLanes);
      }
      if (j < t.columns) step(std::false_type(), j, t.columns - j);
    }
#pragma GCC unroll 16
    for (int w = 0; w < kWide; ++w) {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; ++i) t.products[(u + w) * t.templates + k + i] = V::sum(product[w][i]);
    }
  }

  // `count` templates and `wide` users, kCount and kWide or fewer.
  template <int kCount = kTemplates, int kWide = most_users(kCount)>
  static SPIN_INLINE void some(int64_t count, int64_t wide, const ComposeTile& t, int64_t u, int64_t k,
                               int64_t at_first, int64_t lag) {
    if constexpr (kCount > 1) {
      if (count < kCount) return some<kCount - 1>(count, wide, t, u, k, at_first, lag);
    }
    if constexpr (kWide > 1) {
      if (wide < kWide) return some<kCount, kWide - 1>(count, wide, t, u, k, at_first, lag);
    }
    gradients<kWide, kCount>(t, u, k, at_first, lag);
  }

  static void backward(const ComposeTile& t) {
    // One template after the other where a vector of one's sums has some of the next one's, or where lines that go past
    // the caches begin in different places.
    const bool apart = t.stride >= kLanes && !(t.first && t.stream && t.stride % kLanes);
    const int64_t most = apart ? kTemplates : 1;
    const int64_t at_first = share(t.templates, most), lag = at_first + share(t.users_count, most_users(at_first));
    for (int64_t k = 0, count; k < t.templates; k += count) {
      count = share(t.templates - k, most);
      for (int64_t u = 0, wide; u < t.users_count; u += wide) {
        wide = share(t.users_count - u, most_users(count));
        some(count, wide, t, u, k, at_first, lag);
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
