// The activation functions on vectors, to float32 accuracy.
//
// gelu(x) = x/2 + |x| h(|x|) with h(t) = erf(t / sqrt 2) / 2. With this form minus infinity gives NaN and
// plus infinity itself, as x * Phi(x) does, and small x keep their relative accuracy.
//   16-entry permutations: h in 15 pieces of 3/8, degree 4 in the distance from the middle, and 1/2 from
//     5.625 on. 5 permutations, 5 fma: 6 to 7 clocks per 16 values. |error| of gelu <= 5e-7 (the usual
//     x/2 (1 + erf) in float32: 1.2e-6).
//   elsewhere: 1 - erf(z) = (a1 t + ... + a5 t^5) exp(-z^2), t = 1 / (1 + p z), Abramowitz & Stegun
//     7.1.26, |error| <= 1.5e-7.
// exp(x) = 2^n e^r, n = round(x / ln 2), e^r by its series to degree 6 on |r| <= ln 2 / 2 (2e-7 relative).
#pragma once
#include "types.h"

namespace spin {

// h on [3i/8, 3(i+1)/8] as a polynomial in u = 8t/3 - i - 1/2; row d holds the coefficients of u^d.
// Interpolation in the Chebyshev nodes of each piece, computed with 40 digits.
alignas(64) static const float kHalfErf[5][16] = {
    {0.07436569035053253f, 0.21311229467391968f, 0.3257492780685425f, 0.405324250459671f, 0.4542463719844818f, 0.48041993379592896f, 0.49260538816452026f, 0.4975421130657196f, 0.49928244948387146f, 0.49981632828712463f, 0.4999588429927826f, 0.49999192357063293f, 0.49999862909317017f, 0.4999997913837433f, 0.4999999701976776f, 0.5f},
    {0.14699527621269226f, 0.12771235406398773f, 0.09640317410230637f, 0.06322332471609116f, 0.03602375462651253f, 0.017832964658737183f, 0.007669689133763313f, 0.002865811111405492f, 0.0009303111582994461f, 0.00026237007114104927f, 6.428349297493696e-05f, 1.3682855751540046e-05f, 2.5301030746049946e-06f, 4.064200425091258e-07f, 5.671236635862442e-08f, 0.0f},
    {-0.005167767871171236f, -0.013469542376697063f, -0.01694566383957863f, -0.01555863581597805f, -0.011397987604141235f, -0.006896312814205885f, -0.003505351021885872f, -0.0015113577246665955f, -0.0005560773424804211f, -0.0001752954995026812f, -4.7477285988861695e-05f, -1.1070317668782081e-05f, -2.22562312046648e-06f, -3.8624745002380223e-07f, -5.791590496073695e-08f, 0.0f},
    {-0.003303073113784194f, -0.0020382895600050688f, -0.00028099908377043903f, 0.0010566547280177474f, 0.0015488936332985759f, 0.0013559035724028945f, 0.0008892915211617947f, 0.0004668246256187558f, 0.00020192540250718594f, 7.31047402950935e-05f, 2.236306136182975e-05f, 5.816331849928247e-06f, 1.2917489584651776e-06f, 2.457438768033171e-07f, 4.014102117366747e-08f, 0.0f},
    {0.00017825911345425993f, 0.00042085128370672464f, 0.0004191878833808005f, 0.00023269439407158643f, 2.139290882041678e-05f, -0.00010021981870522723f, -0.00012027800403302535f, -8.692348637850955e-05f, -4.681798964156769e-05f, -2.005728310905397e-05f, -7.039486263238359e-06f, -2.0572338144120295e-06f, -5.056757004240353e-07f, -1.0525224070079275e-07f, -1.8639344290249937e-08f, 0.0f},
};

template <class V>
SPIN_INLINE typename V::F exp_vector(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::set(-87.f), V::min(V::set(88.f), x));
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
    const F s = V::min(V::set(15.5f), V::mul(t, V::set(8.f / 3)));
    const auto index = V::indices(s);
    const F u = V::sub(V::sub(s, V::truncated(index)), V::set(0.5f));
    F p = V::lookup(kHalfErf[4], index);
#pragma GCC unroll 4
    for (int d = 3; d >= 0; --d) p = V::fma(p, u, V::lookup(kHalfErf[d], index));
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
    case Activation::kGelu: return body(ActivationConstant<Activation::kGelu>{});
    case Activation::kGeluTanh: return body(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kRelu: return body(ActivationConstant<Activation::kRelu>{});
    case Activation::kSilu: return body(ActivationConstant<Activation::kSilu>{});
    case Activation::kIdentity: return body(ActivationConstant<Activation::kIdentity>{});
  }
}

}  // namespace spin
