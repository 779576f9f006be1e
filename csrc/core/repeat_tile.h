// A piece of the base of a repetition for all its tiles (see repeat.h).
//
// Forward walks the users, each a stream to memory (past the caches in large calls). Backward holds some vectors of
// the base's gradient in registers and walks the users, a dozen streams at a time.
//
// Numerics: with s = 1 / (1 + exp(beta w))
//   d/dw = alpha s (1 - beta w (1 - s)),  d/dalpha = w s,  d/dbeta = -alpha w^2 s (1 - s)
// (where exp(beta w) overflows, s and what it multiplies are 0).
#pragma once
#include <cstring>

#include "activation.h"
#include "several.h"
#include "weight_tile.h"

namespace spin {

template <class V, DType kType, Modulation kModulation>
struct Repeat : WeightTile<V, kType> {
  using Base = WeightTile<V, kType>;
  using Base::kLanes, Base::kBytes, Base::load_part, Base::store_part, Base::smaller;
  using typename Base::F;
  static constexpr int kTogether = V::kTogether;
  static constexpr int64_t kStreams = 12;  // users read at a time, by what prefetchers follow

  template <int kCount>
  using Vectors = typename Several<V, kCount>::F;

  static SPIN_INLINE int64_t part(int64_t left, int v) {  // of vector v
    const int64_t count = smaller(left - v * kLanes, kLanes);
    return count > 0 ? count : 0;
  }
  template <int kCount>
  static SPIN_INLINE Vectors<kCount> load(const char* from, int64_t left) {
    return Several<V, kCount>::make([&](int v) { return load_part(from + v * kLanes * kBytes, part(left, v)); });
  }

  // s, and 1 - s as exp(beta w) s: a difference would cancel where s is near 1. Where the exponential is infinite s is
  // 0, and so is everything that it is multiplied with.
  template <class S>
  static SPIN_INLINE void gates(const typename S::F& w, float beta, typename S::F& s, typename S::F& rest) {
    const auto one = S::set(1.f), e = exp_vector<S>(S::mul(S::set(beta), w));
    s = S::div(one, S::add(one, e)), rest = S::mul(S::min(S::set(1e38f), e), s);
  }

  // ---- forward ----

  template <int kCount, bool kStream>
  static SPIN_INLINE void put(const RepeatUser& user, const char* from, const char* gate, char* to, int64_t j,
                              int64_t left) {
    using S = Several<V, kCount>;
    auto y = load<kCount>(from + j * kBytes, left);
    if constexpr (kModulation == Modulation::kGate) y = S::mul(y, load<kCount>(gate + j * kBytes, left));
    if constexpr (kModulation == Modulation::kSwish) {
      Vectors<kCount> s, rest;
      gates<S>(y, user.beta, s, rest);
      y = S::mul(S::set(user.alpha), S::mul(y, s));
    }
    S::visit(y, [&](int v, F x) {
      char* at = to + (j + v * kLanes) * kBytes;
      if constexpr (kStream) {
        V::stream(at, x);
      } else {
        store_part(at, x, part(left, v));
      }
    });
  }

  template <bool kStream>
  static SPIN_INLINE void row(const RepeatUser& user, const char* from, const char* gate, char* to) {
    constexpr int64_t kWide = kTogether * kLanes;
    int64_t j = 0;
    if constexpr (kStream) {  // whole lines only
      j = Base::before_stream(to, user.columns);
      if (j > 0) put<1, false>(user, from, gate, to, 0, j);
    }
    for (; j + kWide <= user.columns; j += kWide) put<kTogether, kStream>(user, from, gate, to, j, kWide);
    for (; j < user.columns; j += kLanes) put<1, false>(user, from, gate, to, j, user.columns - j);
  }

  static void forward(const RepeatTile& t) {
    for (int64_t u = 0; u < t.users_count; ++u) {
      const RepeatUser& user = t.users[u];
      for (int64_t r = 0; r < user.rows; ++r) {
        const char* from = t.base + r * t.pitch * kBytes;
        const char* gate = kModulation == Modulation::kGate ? user.gate + r * user.pitch * kBytes : nullptr;
        char* to = user.data + r * user.pitch * kBytes;
        t.stream ? row<true>(user, from, gate, to) : row<false>(user, from, gate, to);
      }
    }
  }

  // ---- backward ----

  template <int kCount>
  static SPIN_INLINE void add_up(float* to, const Vectors<kCount>& x) {
    F sum = V::load(to);
    Several<V, kCount>::visit(x, [&](int, F one) { sum = V::add(sum, one); });
    V::store(to, sum);
  }

  // What a user adds to kCount vectors of the base's gradient, in column j of row r; `left` values of them are there.
  template <int kCount>
  static SPIN_INLINE void add_gradient(const RepeatTile& t, int64_t u, int64_t r, int64_t j, int64_t left,
                                       Vectors<kCount>& sum) {
    using S = Several<V, kCount>;
    const RepeatUser& user = t.users[u];
    const int64_t at = (r * user.pitch + j) * kBytes;
    const auto g = load<kCount>(user.data + at, left);
    if constexpr (kModulation == Modulation::kPlain) {
      sum = S::add(sum, g);
      return;
    }
    const auto w = load<kCount>(t.base + (r * t.pitch + j) * kBytes, left);
    if constexpr (kModulation == Modulation::kGate) {
      sum = S::fma(g, load<kCount>(user.gate + at, left), sum);
      S::visit(S::mul(g, w),
               [&](int v, F x) { store_part(user.gate_gradient + at + v * kLanes * kBytes, x, part(left, v)); });
    }
    if constexpr (kModulation == Modulation::kSwish) {
      const auto alpha = S::set(user.alpha);
      Vectors<kCount> s, rest;
      gates<S>(w, user.beta, s, rest);
      const auto gs = S::mul(g, s);
      rest = S::mul(w, rest);
      sum = S::fma(S::mul(alpha, gs), S::sub(S::set(1.f), S::mul(S::set(user.beta), rest)), sum);
      float* sums = t.sums + 2 * u * kLanes;
      add_up<kCount>(sums, S::mul(gs, w));
      add_up<kCount>(sums + kLanes, S::mul(S::mul(alpha, gs), S::mul(w, rest)));
    }
  }

  // The base's gradient there, from users `first` to `last`.
  template <int kCount>
  static SPIN_INLINE void gradient(const RepeatTile& t, int64_t first, int64_t last, int64_t r, int64_t j) {
    constexpr int64_t kWide = kCount * kLanes;
    auto sum = Several<V, kCount>::zero();
    for (int64_t u = first; u < last; ++u) {
      const int64_t left = t.users[u].columns - j;
      if (r >= t.users[u].rows || left <= 0) continue;
      if (left >= kWide) {
        add_gradient<kCount>(t, u, r, j, kWide, sum);
      } else {
        add_gradient<kCount>(t, u, r, j, left, sum);
      }
    }
    Several<V, kCount>::visit(sum, [&](int v, F x) {
      char* to = reinterpret_cast<char*>(t.base_gradient + r * t.pitch + j + v * kLanes);
      const int64_t count = part(t.columns - j, v);
      if (first > 0) x = V::add(x, load_part(to, count, DType::kFloat32));
      store_part(to, x, count, DType::kFloat32);
    });
  }

  static void backward(const RepeatTile& t) {
    const int64_t count = kModulation == Modulation::kSwish ? 2 * t.users_count : 0;
    std::memset(t.sums, 0, count * kLanes * sizeof(float));
    for (int64_t u = 0; u < t.users_count; u += kStreams) {
      const int64_t last = smaller(u + kStreams, t.users_count);
      for (int64_t r = 0; r < t.rows; ++r) {
        int64_t j = 0;
        for (; j + kTogether * kLanes <= t.columns; j += kTogether * kLanes) gradient<kTogether>(t, u, last, r, j);
        for (; j < t.columns; j += kLanes) gradient<1>(t, u, last, r, j);
      }
    }
    for (int64_t i = 0; i < count; ++i) t.products[i] = V::sum(V::load(t.sums + i * kLanes));
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
