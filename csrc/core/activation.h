// The activation functions on vectors, to float32 accuracy.
//
// gelu(x) = x/2 + |x| h(|x|) with h(t) = erf(t / sqrt 2) / 2. With this form minus infinity gives NaN and
// plus infinity itself, as x * Phi(x) does, and small x keep their relative accuracy.
//   32-entry permutations: h in 31 pieces, degree 3 in the distance from the middle, and 1/2 from 5.6 on:
//     4 permutations, 6 fma, 4 others, 14 operations, 7 clocks per 16 values where all share two ports (counted).
//     |error| of gelu <= 5e-7 (the usual x/2 (1 + erf) in float32: 1.2e-6). 16 pieces of degree 4 take 18 (256/8: 4 %
//     slower).
//   elsewhere: 1 - erf(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z), Abramowitz & Stegun
//     7.1.26, |error| <= 1.5e-7.
// exp(x) = 2^n e^r, n = round(x / ln 2), e^r by its series to degree 6 on |r| <= ln 2 / 2 (2e-7 relative).
#pragma once
#include "types.h"

namespace spin {

// h(t) for |5.4375 t - i| <= 1/2 as a polynomial in u = 5.4375 t - i; row d holds the coefficients of u^d.
// Interpolation in the Chebyshev nodes of each piece, computed with 40 digits; the last piece is 1/2.
constexpr float kPiecesPerUnit = 5.4375f;
alignas(64) static const float kHalfErf[4][32] = {
    {0.f,          0.0729571208f, 0.143494666f, 0.209431127f, 0.269022524f, 0.321093261f, 0.365083575f, 0.401014835f,
     0.429390132f, 0.451055229f,  0.467048347f, 0.478462875f, 0.48633942f,  0.491594315f, 0.494983882f, 0.49709776f,
     0.498372316f, 0.499115318f,  0.4995341f,   0.499762326f, 0.499882549f, 0.499943793f, 0.499973953f, 0.499988317f,
     0.499994934f, 0.499997854f,  0.499999136f, 0.499999672f, 0.499999881f, 0.49999994f,  0.49999997f,  0.5f},
    {0.073368758f,    0.0721383691f,   0.0685698465f,   0.063010253f,
     0.0559758283f,   0.0480729826f,   0.0399128571f,   0.0320358165f,
     0.0248582158f,   0.018647274f,    0.0135229649f,   0.00948068406f,
     0.00642567268f,  0.0042102579f,   0.00266691996f,  0.00163313607f,
     0.000966820633f, 0.000553325342f, 0.000306144415f, 0.000163750708f,
     8.46741968e-05f, 4.23282254e-05f, 2.04559692e-05f, 9.55698943e-06f,
     4.3165137e-06f,  1.8847602e-06f,  7.95591347e-07f, 3.24664569e-07f,
     1.2808276e-07f,  4.88491878e-08f, 1.80108763e-08f, 0.f},
    {-5.89233707e-07f, -0.00121739169f,  -0.0023145054f,   -0.00319065037f,
     -0.00377989421f,  -0.0040586656f,   -0.00404473394f,  -0.00378873432f,
     -0.00336105307f,  -0.00283758622f,  -0.00228749192f,  -0.00176496932f,
     -0.00130569725f,  -0.000927370333f, -0.000633021293f, -0.000415617484f,
     -0.000262643473f, -0.000159834832f, -9.37136065e-05f, -5.2956977e-05f,
     -2.88516567e-05f, -1.51587356e-05f, -7.68247264e-06f, -3.7564057e-06f,
     -1.77236802e-06f, -8.07072126e-07f, -3.54737409e-07f, -1.50518659e-07f,
     -6.1660792e-08f,  -2.43896263e-08f, -9.31571176e-09f, 0.f},
    {-0.00041214074f,  -0.000392411777f, -0.000333876727f, -0.000246880692f,
     -0.000144776568f, -4.20084252e-05f, 4.86891586e-05f,  0.000118377058f,
     0.00016287998f,   0.000182594376f,  0.000181406096f,  0.000165162463f,
     0.000140153759f,  0.000111938891f,  8.46712937e-05f,  6.09111412e-05f,
     4.17986448e-05f,  2.74216436e-05f,  1.72275322e-05f,  1.03782322e-05f,
     6.00138264e-06f,  3.33409434e-06f,  1.78077437e-06f,  9.14955137e-07f,
     4.52445562e-07f,  2.15423228e-07f,  9.87954039e-08f,  4.36552341e-08f,
     1.85913667e-08f,  7.63250707e-09f,  3.02132341e-09f,  0.f},
};

template <class V>
SPIN_INLINE typename V::F exp_vector(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::set(-87.f), V::min(V::set(89.f), x));  // 2^128 is infinity, as it should be
  const F n = V::round(V::mul(x, V::set(1.44269504f)));
  F r = V::fma(n, V::set(-0.693359375f), x);  // ln 2 in two parts
  r = V::fma(n, V::set(2.12194440e-4f), r);
  F p = V::set(1.f / 720);
  p = V::fma(p, r, V::set(1.f / 120));
  p = V::fma(p, r, V::set(1.f / 24));
  p = V::fma(p, r, V::set(1.f / 6));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1.f));
  p = V::fma(p, r, V::set(1.f));
  return V::mul(p, V::exp2_integer(n));
}

// erf(t / sqrt 2) / 2 for t >= 0.
template <class V>
SPIN_INLINE typename V::F half_erf(typename V::F t) {
  using F = typename V::F;
  if constexpr (V::kHasPermute) {
    const F magic = V::set(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are the nearest piece
    t = V::min(V::set(31 / kPiecesPerUnit), t);
    const F index = V::fma(t, V::set(kPiecesPerUnit), magic);
    const F u = V::fma(t, V::set(kPiecesPerUnit), V::sub(magic, index));
    F p = V::lookup(kHalfErf[3], index);
#pragma GCC unroll 3
    for (int d = 2; d >= 0; --d) p = V::fma(p, u, V::lookup(kHalfErf[d], index));
    return p;
  } else {
    const F z = V::mul(t, V::set(0.70710678f));
    const F q = V::div(V::set(1.f), V::fma(V::set(0.3275911f), z, V::set(1.f)));
    F p = V::set(1.061405429f);
    p = V::fma(p, q, V::set(-1.453152027f));
    p = V::fma(p, q, V::set(1.421413741f));
    p = V::fma(p, q, V::set(-0.284496736f));
    p = V::fma(p, q, V::set(0.254829592f));
    const F tail = V::mul(V::mul(p, q), exp_vector<V>(V::mul(V::mul(z, V::set(-1.f)), z)));
    return V::mul(V::set(0.5f), V::sub(V::set(1.f), tail));
  }
}

template <class V, Activation kActivation>
SPIN_INLINE typename V::F activate(typename V::F x) {
  using F = typename V::F;
  if constexpr (kActivation == Activation::kGelu) {
    const F t = V::abs(x);
    return V::fma(t, half_erf<V>(t), V::mul(V::set(0.5f), x));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // x (1 + tanh u) / 2 = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)
    const F cubic = V::fma(V::mul(x, x), V::set(-2 * 0.79788456f * 0.044715f), V::set(-2 * 0.79788456f));
    return V::div(x, V::add(V::set(1.f), exp_vector<V>(V::mul(x, cubic))));
  } else if constexpr (kActivation == Activation::kRelu) {
    return V::max(V::zero(), x);
  } else if constexpr (kActivation == Activation::kSilu) {
    return V::div(x, V::add(V::set(1.f), exp_vector<V>(V::mul(x, V::set(-1.f)))));
  } else {
    return x;
  }
}

// Calls body with the activation as a compile-time constant.
template <Activation kActivation>
struct ActivationConstant {
  static constexpr Activation value = kActivation;
};
template <class Body>
SPIN_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kGelu:
      return body(ActivationConstant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return body(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kRelu:
      return body(ActivationConstant<Activation::kRelu>{});
    case Activation::kSilu:
      return body(ActivationConstant<Activation::kSilu>{});
    case Activation::kIdentity:
      return body(ActivationConstant<Activation::kIdentity>{});
  }
}

}  // namespace spin
