// What training does to one vector of channels between the convolutions: normalise, measure, differentiate.
//
//   transform            out = scale * (act(pre) - center) + shift (+ residual)
//   moments              mean and squared deviations of act(pre)
//   gradient_sums        sum g, sum g (act(pre) - center)
//   activation_gradient  act'(pre) (p g + q (act(pre) - center) + r), and its sum
//
// The center is not folded into the shift: the scale of a small variance would magnify the rounding of values that are
// far from zero. With u = act(pre), BatchNorm's (m, v) over N values and s = gamma / sqrt(v + eps), the gradient of
// s (u - m) + beta is
//   du = s g - (s / N) sum g - (u - m) (s / (v + eps) / N) sum g (u - m):
// p = s, q and r are the other two factors; with frozen statistics there are none.
//
// Activations are computed again wherever they are needed: saving them would double what training holds, and 7 (gelu)
// or 1 (relu) clocks per vector are less than a product with 64 channels takes for it.
// Cost: one to two passes over planes that fit L1 or L2.
// Numerics: sums in chunks of 256 tokens, each in four chains, added up in order: the same bits at any number of
// threads. Moments are two passes over a chunk in L1, of which the second corrects the first one's mean; chunks are
// combined in double by Chan, Golub and LeVeque's update: normalising magnifies the last bit of a mean.
#pragma once
#include "activation.h"
#include "kernels.h"
#include "several.h"

namespace spin {

template <class V>
struct Elementwise {
  using F = typename V::F;
  static constexpr int64_t kLanes = V::kLanes;
  static constexpr int64_t kChunk = 256;

  // What a pre-activation is: element type, activation and accuracy are compile-time constants.
  template <Activation kActivation, bool kFine, bool kFloats>
  struct Values {
    const Activated& a;
    template <class S>
    SPIN_INLINE typename S::F pre(S, int64_t token) const {
      return S::make([&](int i) {
        const int64_t at = (token + i) * kLanes;
        return kFloats ? V::load(a.pre + at * 4) : V::load_as(a.pre + at * 2, a.type);
      });
    }
    template <class S>
    SPIN_INLINE typename S::F act(S, const typename S::F& pre) const {
      return activate<S, kActivation, kFine>(pre);
    }
    template <class S>
    SPIN_INLINE typename S::F differentiate(S, const typename S::F& pre, const typename S::F& value) const {
      return spin::differentiate<S, kActivation>(pre, value);
    }
  };

  // Calls body(values).
  template <class Body>
  static SPIN_INLINE void specialise(const Activated& a, const Body& body) {
    with_activation(a.activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
      constexpr bool kTwo = kActivation == Activation::kGelu;  // accuracies
      const bool floats = a.type == DType::kFloat32;
      if (kTwo && !a.fine) {
        floats ? body(Values<kActivation, !kTwo, true>{a}) : body(Values<kActivation, !kTwo, false>{a});
      } else {
        floats ? body(Values<kActivation, true, true>{a}) : body(Values<kActivation, true, false>{a});
      }
    });
  }

  template <class S>
  static SPIN_INLINE typename S::F load(S, const float* from, int64_t token) {
    return S::make([&](int i) { return V::load(from + (token + i) * kLanes); });
  }
  template <class S>
  static SPIN_INLINE void store(S, const typename S::F& x, float* to, int64_t token) {
    S::visit(x, [&](int i, F one) { V::store(to + (token + i) * kLanes, one); });
  }

  using One = Several<V, 1>;
  using Some = Several<V, V::kTogether>;

  // body(several, token, sums) adds what some tokens have to the sums of their chains, one of four each; chunk by
  // chunk they are added to `total`.
  template <int kSums, class Body>
  static SPIN_INLINE void sum(int64_t tokens, float* total, const Body& body) {
    F all[kSums];
    for (int i = 0; i < kSums; ++i) all[i] = V::load(total + i * kLanes);
    for (int64_t first = 0; first < tokens; first += kChunk) {
      const int64_t last = first + kChunk < tokens ? first + kChunk : tokens;
      typename Some::F chain[4 / V::kTogether][kSums];
      for (auto& sums : chain) {
        for (auto& s : sums) s = Some::zero();
      }
      int64_t t = first;
      for (; t + 4 <= last; t += 4) {
#pragma GCC unroll 4
        for (int c = 0; c < 4 / V::kTogether; ++c) body(Some(), t + c * V::kTogether, chain[c]);
      }
      typename One::F rest[kSums];
      for (int i = 0; i < kSums; ++i) rest[i].v[0] = chain[0][i].v[0];
      for (; t < last; ++t) body(One(), t, rest);
      for (int i = 0; i < kSums; ++i) {
        chain[0][i].v[0] = rest[i].v[0];
        auto of = [&](int c) { return chain[c / V::kTogether][i].v[c % V::kTogether]; };
        all[i] = V::add(all[i], V::add(V::add(of(0), of(1)), V::add(of(2), of(3))));
      }
    }
    for (int i = 0; i < kSums; ++i) V::store(total + i * kLanes, all[i]);
  }

  static void transform(const TransformArgs& args) {
    const F center = V::load(args.center), scale = V::load(args.scale), shift = V::load(args.shift);
    specialise(args.a, [&](auto values) {
      auto some = [&](auto s, int64_t t) __attribute__((always_inline)) {
        using S = decltype(s);
        const auto u = values.act(s, values.pre(s, t));
        auto out = S::fma(S::sub(u, S::all(center)), S::all(scale), S::all(shift));
        if (args.residual) out = S::add(out, load(s, args.residual, t));
        store(s, out, args.out, t);
      };
      int64_t t = 0;
      for (; t + V::kTogether <= args.a.tokens; t += V::kTogether) some(Some(), t);
      for (; t < args.a.tokens; ++t) some(One(), t);
    });
  }

  static void moments(const MomentsArgs& args) {
    specialise(args.a, [&](auto values) {
      double mean[kLanes] = {}, deviations[kLanes] = {};
      alignas(64) float chunk[kChunk * kLanes], middle[kLanes], rest[2 * kLanes];
      for (int64_t first = 0; first < args.a.tokens; first += kChunk) {
        const int64_t count = first + kChunk < args.a.tokens ? kChunk : args.a.tokens - first;
        V::store(middle, V::zero());
        sum<1>(count, middle, [&](auto s, int64_t t, auto& sums) __attribute__((always_inline)) {
          using S = decltype(s);
          const auto u = values.act(s, values.pre(s, first + t));
          store(s, u, chunk, t);
          sums[0] = S::add(sums[0], u);
        });
        const F chunk_mean = V::mul(V::load(middle), V::set(1.f / float(count)));
        V::store(middle, chunk_mean);
        for (int i = 0; i < 2; ++i) V::store(rest + i * kLanes, V::zero());
        sum<2>(count, rest, [&](auto s, int64_t t, auto& sums) __attribute__((always_inline)) {
          using S = decltype(s);
          const auto off = S::sub(load(s, chunk, t), S::all(chunk_mean));
          sums[0] = S::add(sums[0], off);
          sums[1] = S::fma(off, off, sums[1]);
        });
        const double share = double(count) / double(first + count);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const double correction = double(rest[lane]) / double(count);
          const double delta = middle[lane] + correction - mean[lane];
          mean[lane] += delta * share;
          deviations[lane] += rest[kLanes + lane] - correction * rest[lane] + delta * delta * share * double(first);
        }
      }
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        args.mean[lane] = mean[lane], args.deviations[lane] = deviations[lane];
      }
    });
  }

  static void gradient_sums(const GradientSumsArgs& args) {
    const F center = V::load(args.center);
    for (int i = 0; i < 2; ++i) V::store(args.sums + i * kLanes, V::zero());
    specialise(args.a, [&](auto values) {
      sum<2>(args.a.tokens, args.sums, [&](auto s, int64_t t, auto& sums) __attribute__((always_inline)) {
        using S = decltype(s);
        const auto g = load(s, args.gradient, t), u = values.act(s, values.pre(s, t));
        sums[0] = S::add(sums[0], g);
        sums[1] = S::fma(g, S::sub(u, S::all(center)), sums[1]);
      });
    });
  }

  static void activation_gradient(const ActivationGradientArgs& args) {
    const F center = V::load(args.center), p = V::load(args.p);
    const F q = args.q ? V::load(args.q) : V::zero(), r = args.q ? V::load(args.r) : V::zero();
    specialise(args.a, [&](auto values) {
      sum<1>(args.a.tokens, args.sum, [&](auto s, int64_t t, auto& sums) __attribute__((always_inline)) {
        using S = decltype(s);
        const auto pre = values.pre(s, t);
        auto du = S::mul(S::all(p), load(s, args.gradient, t));
        if (args.q) {
          du = S::add(du, S::fma(S::all(q), S::sub(values.act(s, pre), S::all(center)), S::all(r)));
        }
        const auto value = values.differentiate(s, pre, du);
        store(s, value, args.out, t);
        sums[0] = S::add(sums[0], value);
      });
    });
  }

  static void narrow(const float* from, DType type, int64_t count, char* to) {
    for (int64_t i = 0; i < count; i += kLanes) V::store_as(to + i * size_of(type), type, V::load(from + i));
  }
};

}  // namespace spin
