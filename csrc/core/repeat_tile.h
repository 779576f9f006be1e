// A piece of the base of a repetition for all its tiles (see repeat.h).
//
// Forward walks the users, each a stream to memory (past the caches in large calls). Backward holds a vector of the
// base's gradient in registers and walks the users, a dozen streams at a time. Numerics: with s = 1 / (1 + exp(beta w))
//   d/dw = alpha s (1 - beta w (1 - s)),  d/dalpha = w s,  d/dbeta = -alpha w^2 s (1 - s)
// (where exp(beta w) overflows, s and what it multiplies are 0).
#pragma once
#include <cstring>

#include "activation.h"
#include "weight_tile.h"

namespace spin {

template <class V, DType kType, Modulation kModulation>
struct Repeat : WeightTile<V, kType> {
  using Base = WeightTile<V, kType>;
  using Base::kLanes, Base::kBytes, Base::load_part, Base::store_part, Base::smaller;
  using typename Base::F;
  static constexpr int64_t kStreams = 12;  // users read at a time, by what prefetchers follow

  // s, and 1 - s as exp(beta w) s: a difference would cancel where s is near 1. Where the exponential is infinite s is
  // 0, and so is everything that it is multiplied with.
  static SPIN_INLINE void gates(F w, F beta, F& s, F& rest) {
    const F one = V::set(1.f), e = exp_vector<V>(V::mul(beta, w));
    s = V::div(one, V::add(one, e)), rest = V::mul(V::min(V::set(1e38f), e), s);
  }

  static void forward(const RepeatTile& t) {
    for (int64_t u = 0; u < t.users_count; ++u) {
      const RepeatUser& user = t.users[u];
      const F alpha = V::set(user.alpha), beta = V::set(user.beta);
      for (int64_t r = 0; r < user.rows; ++r) {
        const char* from = t.base + r * t.pitch * kBytes;
        char* to = user.data + r * user.pitch * kBytes;
        const char* gate = kModulation == Modulation::kGate ? user.gate + r * user.pitch * kBytes : nullptr;
        auto vector = [&](int64_t j, int64_t count) {
          const F w = load_part(from + j * kBytes, count);
          if constexpr (kModulation == Modulation::kPlain) return w;
          if constexpr (kModulation == Modulation::kGate) return V::mul(w, load_part(gate + j * kBytes, count));
          F s, rest;
          gates(w, beta, s, rest);
          return V::mul(alpha, V::mul(w, s));
        };
        int64_t j = 0;
        if (t.stream) {
          j = Base::before_stream(to, user.columns);
          if (j > 0) store_part(to, vector(0, j), j);
          for (; j + kLanes <= user.columns; j += kLanes) V::stream(to + j * kBytes, vector(j, kLanes));
        }
        for (; j < user.columns; j += kLanes) {
          const int64_t count = smaller(kLanes, user.columns - j);
          store_part(to + j * kBytes, vector(j, count), count);
        }
      }
    }
    if (t.stream) V::fence();
  }

  // A vector (or a part of one) of the base's gradient, in column j of row r, by users from `first` to `last`.
  static SPIN_INLINE F gradient(const RepeatTile& t, int64_t first, int64_t last, int64_t r, int64_t j) {
    F sum = V::zero();
    for (int64_t u = first; u < last; ++u) {
      const RepeatUser& user = t.users[u];
      const int64_t count = smaller(kLanes, user.columns - j);
      if (r >= user.rows || count <= 0) continue;
      const int64_t at = (r * user.pitch + j) * kBytes;
      const F g = load_part(user.data + at, count);
      if constexpr (kModulation == Modulation::kPlain) {
        sum = V::add(sum, g);
      } else {
        const F w = load_part(t.base + (r * t.pitch + j) * kBytes, count);
        if constexpr (kModulation == Modulation::kGate) {
          sum = V::fma(g, load_part(user.gate + at, count), sum);
          store_part(user.gate_gradient + at, V::mul(g, w), count);
        } else {
          const F alpha = V::set(user.alpha), beta = V::set(user.beta);
          F s, rest;
          gates(w, beta, s, rest);
          const F gs = V::mul(g, s);
          rest = V::mul(w, rest);
          float* sums = t.sums + 2 * u * kLanes;
          V::store(sums, V::fma(gs, w, V::load(sums)));
          V::store(sums + kLanes, V::fma(V::mul(alpha, gs), V::mul(w, rest), V::load(sums + kLanes)));
          sum = V::fma(V::mul(alpha, gs), V::sub(V::set(1.f), V::mul(beta, rest)), sum);
        }
      }
    }
    return sum;
  }

  static void backward(const RepeatTile& t) {
    const int64_t count = kModulation == Modulation::kSwish ? 2 * t.users_count : 0;
    std::memset(t.sums, 0, count * kLanes * sizeof(float));
    for (int64_t u = 0; u < t.users_count; u += kStreams) {
      const int64_t last = smaller(u + kStreams, t.users_count);
      for (int64_t r = 0; r < t.rows; ++r) {
        for (int64_t j = 0; j < t.columns; j += kLanes) {
          const int64_t part = smaller(kLanes, t.columns - j);
          char* to = reinterpret_cast<char*>(t.base_gradient + r * t.pitch + j);
          F x = gradient(t, u, last, r, j);
          if (u > 0) x = V::add(x, load_part(to, part, DType::kFloat32));
          store_part(to, x, part, DType::kFloat32);
        }
      }
    }
    Base::reduce(t.sums, count, t.products);
  }
};

template <class V, class Run>
SPIN_INLINE void with_repeat(const RepeatTile& t, const Run& run) {
  with_type(t.type, [&](auto type) {
    if (t.modulation == Modulation::kPlain) return run(Repeat<V, type.value, Modulation::kPlain>());
    if (t.modulation == Modulation::kGate) return run(Repeat<V, type.value, Modulation::kGate>());
    run(Repeat<V, type.value, Modulation::kSwish>());
  });
}

template <class V>
void repeat(const RepeatTile& t) {
  with_repeat<V>(t, [&](auto kernel) { decltype(kernel)::forward(t); });
}

template <class V>
void repeat_gradient(const RepeatTile& t) {
  with_repeat<V>(t, [&](auto kernel) { decltype(kernel)::backward(t); });
}

}  // namespace spin
