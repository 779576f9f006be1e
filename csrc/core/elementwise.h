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

namespace spin {

template <class V>
struct Elementwise {
  using F = typename V::F;
  static constexpr int64_t kLanes = V::kLanes;
  static constexpr int64_t kChunk = 256;

  // Calls body(act, differentiate, load) with element type, activation and accuracy as compile-time constants.
  template <class Body>
  static SPIN_INLINE void specialise(const Activated& a, const Body& body) {
    with_activation(a.activation, [&](auto constant) {
      constexpr Activation kActivation = decltype(constant)::value;
      auto with_load = [&](auto act) {
        auto through = [](F pre, F value) { return differentiate<V, kActivation>(pre, value); };
        if (a.type == DType::kFloat32) {
          body(act, through, [&](int64_t t) { return V::load(a.pre + t * kLanes * 4); });
        } else {
          body(act, through, [&](int64_t t) { return V::load_as(a.pre + t * kLanes * 2, a.type); });
        }
      };
      if (kActivation == Activation::kGelu && !a.fine) {
        with_load([](F pre) { return activate<V, kActivation, false>(pre); });
      } else {
        with_load([](F pre) { return activate<V, kActivation, true>(pre); });
      }
    });
  }

  // body(token, sums) adds to the sums of its chain; chunk by chunk they are added to `total`.
  template <int kSums, class Body>
  static SPIN_INLINE void sum(int64_t tokens, float* total, const Body& body) {
    F all[kSums];
    for (int i = 0; i < kSums; ++i) all[i] = V::load(total + i * kLanes);
    for (int64_t first = 0; first < tokens; first += kChunk) {
      const int64_t last = first + kChunk < tokens ? first + kChunk : tokens;
      F chain[4][kSums];
      for (auto& sums : chain) {
        for (F& s : sums) s = V::zero();
      }
      int64_t t = first;
      for (; t + 4 <= last; t += 4) {
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) body(t + c, chain[c]);
      }
      for (; t < last; ++t) body(t, chain[0]);
      for (int i = 0; i < kSums; ++i) {
        all[i] = V::add(all[i], V::add(V::add(chain[0][i], chain[1][i]), V::add(chain[2][i], chain[3][i])));
      }
    }
    for (int i = 0; i < kSums; ++i) V::store(total + i * kLanes, all[i]);
  }

  static void transform(const TransformArgs& args) {
    const F center = V::load(args.center), scale = V::load(args.scale), shift = V::load(args.shift);
    specialise(args.a, [&](auto act, auto, auto load) {
      for (int64_t t = 0; t < args.a.tokens; ++t) {
        F value = V::fma(V::sub(act(load(t)), center), scale, shift);
        if (args.residual) value = V::add(value, V::load(args.residual + t * kLanes));
        V::store(args.out + t * kLanes, value);
      }
    });
  }

  static void moments(const MomentsArgs& args) {
    specialise(args.a, [&](auto act, auto, auto load) {
      double mean[kLanes] = {}, deviations[kLanes] = {};
      alignas(64) float values[kChunk * kLanes], middle[kLanes], rest[2 * kLanes];
      for (int64_t first = 0; first < args.a.tokens; first += kChunk) {
        const int64_t count = first + kChunk < args.a.tokens ? kChunk : args.a.tokens - first;
        V::store(middle, V::zero());
        sum<1>(count, middle, [&](int64_t t, F(&s)[1]) {
          const F u = act(load(first + t));
          V::store(values + t * kLanes, u);
          s[0] = V::add(s[0], u);
        });
        const F chunk_mean = V::mul(V::load(middle), V::set(1.f / float(count)));
        V::store(middle, chunk_mean);
        for (int i = 0; i < 2; ++i) V::store(rest + i * kLanes, V::zero());
        sum<2>(count, rest, [&](int64_t t, F(&s)[2]) {
          const F off = V::sub(V::load(values + t * kLanes), chunk_mean);
          s[0] = V::add(s[0], off);
          s[1] = V::fma(off, off, s[1]);
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
    specialise(args.a, [&](auto act, auto, auto load) {
      sum<2>(args.a.tokens, args.sums, [&](int64_t t, F(&s)[2]) {
        const F g = V::load(args.gradient + t * kLanes);
        s[0] = V::add(s[0], g);
        s[1] = V::fma(g, V::sub(act(load(t)), center), s[1]);
      });
    });
  }

  static void activation_gradient(const ActivationGradientArgs& args) {
    const F center = V::load(args.center), p = V::load(args.p);
    const F q = args.q ? V::load(args.q) : V::zero(), r = args.q ? V::load(args.r) : V::zero();
    specialise(args.a, [&](auto act, auto through, auto load) {
      sum<1>(args.a.tokens, args.sum, [&](int64_t t, F(&s)[1]) {
        const F pre = load(t);
        F du = V::mul(p, V::load(args.gradient + t * kLanes));
        if (args.q) du = V::add(du, V::fma(q, V::sub(act(pre), center), r));
        const F value = through(pre, du);
        V::store(args.out + t * kLanes, value);
        s[0] = V::add(s[0], value);
      });
    });
  }

  static void narrow(const float* from, DType type, int64_t count, char* to) {
    for (int64_t i = 0; i < count; i += kLanes) V::store_as(to + i * size_of(type), type, V::load(from + i));
  }
};

}  // namespace spin
