// The activation functions on vectors, to float32 accuracy.
//
// gelu(x) = x/2 + |x| h(|x|) with h(t) = erf(t / sqrt 2) / 2. With this form minus infinity gives NaN and
// plus infinity itself, as x * Phi(x) does, and small x keep their relative accuracy.
//   32-entry permutations: h in 31 pieces, degree 3 in the distance from the middle, and 1/2 from 5.6 on:
//     4 permutations, 6 fma, 4 others, 14 operations, 7 clocks per 16 values where all share two ports (counted).
//     |error| of gelu <= 5e-7 (the usual x/2 (1 + erf) in float32: 1.2e-6). 16 pieces of degree 4 take 18 (256/8: 4 %
//     slower).
//     In training degree 4, |error| of h <= 3.3e-8, its rounding: BatchNorm magnifies an error where all values are
//     small.
//   elsewhere: h = 1/2 - 1/2 / p(t)^16, p of degree 7, by weighted least squares for the smallest |error| of t h: 5e-8,
//     in float32 gelu's is 3.5e-7 (measured; portable 4.7e-7): 12 operations and a division (256/8 on AVX2: 5 to 10 %
//     faster than by the next).
//     In training 1 - erf(z) = (a1 q + ... + a5 q^5) exp(-z^2), q = 1 / (1 + p z), Abramowitz & Stegun 7.1.26, |error|
//     <= 1.5e-7: twice as many operations, but the slope comes along, and small t are three times as accurate.
// The derivative of gelu is Phi(x) + x phi(x), phi the slope of h: of the same pieces of degree 4 (|error| <= 6e-7 in
// the sum, for 4 operations instead of the 18 of an exponential), elsewhere exp(-x^2/2) / sqrt(2 pi). exp(x) = 2^n e^r,
// n = round(x / ln 2), e^r to degree 6 on |r| <= ln 2 / 2 (1e-8 relative before rounding; interpolated in the Chebyshev
// nodes with the first two coefficients of the series).
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

// The same to degree 4.
alignas(64) static const float kHalfErfFine[5][32] = {
    {0.f,          0.0729572028f, 0.143494815f, 0.20943132f,  0.269022703f, 0.32109347f,  0.365083724f, 0.401014954f,
     0.429390192f, 0.451055229f,  0.467048317f, 0.478462845f, 0.48633936f,  0.491594255f, 0.494983822f, 0.497097701f,
     0.498372287f, 0.499115318f,  0.4995341f,   0.499762297f, 0.499882549f, 0.499943793f, 0.499973953f, 0.499988317f,
     0.499994934f, 0.499997854f,  0.499999136f, 0.499999672f, 0.499999881f, 0.49999994f,  0.49999997f,  0.5f},
    {0.0733686537f,   0.0721383467f,   0.0685698241f,   0.0630102456f,
     0.0559758283f,   0.04807299f,     0.0399128683f,   0.0320358314f,
     0.0248582307f,   0.0186472852f,   0.0135229733f,   0.00948068872f,
     0.00642567454f,  0.00421025744f,  0.00266691786f,  0.00163313339f,
     0.000966817839f, 0.000553322898f, 0.000306142436f, 0.000163749268f,
     8.46732073e-05f, 4.23275815e-05f, 2.04555745e-05f, 9.55675841e-06f,
     4.316385e-06f,   1.88469198e-06f, 7.95556673e-07f, 3.24647715e-07f,
     1.28074902e-07f, 4.88456671e-08f, 1.80093647e-08f, 0.f},
    {0.f,
     -0.00121993723f,
     -0.00231917924f,
     -0.00319671328f,
     -0.0037864456f,
     -0.00406482909f,
     -0.00404981617f,
     -0.00379232131f,
     -0.00336303422f,
     -0.00283811009f,
     -0.00228688004f,
     -0.00176361552f,
     -0.00130398176f,
     -0.000925601053f,
     -0.000631407718f,
     -0.000414272101f,
     -0.000261600217f,
     -0.000159074989f,
     -9.31904651e-05f,
     -5.26150106e-05f,
     -2.8638764e-05f,
     -1.50322103e-05f,
     -7.61055981e-06f,
     -3.71726196e-06f,
     -1.75193918e-06f,
     -7.96840254e-07f,
     -3.49815537e-07f,
     -1.48243274e-07f,
     -6.06492847e-08f,
     -2.39570337e-08f,
     -9.13765152e-09f,
     0.f},
    {-0.000412926369f, -0.000392291695f, -0.00033378668f, -0.000246833166f,
     -0.000144774996f, -4.20472206e-05f, 4.86221652e-05f, 0.000118297081f,
     0.000162801545f,  0.000182528529f,  0.000181358933f, 0.000165135294f,
     0.00014014414f,   0.000111942303f,  8.46826515e-05f, 6.09259514e-05f,
     4.18136151e-05f,  2.74347894e-05f,  1.72379896e-05f, 1.03859256e-05f,
     6.00667772e-06f,  3.3375286e-06f,   1.78288394e-06f, 9.16186707e-07f,
     4.53130752e-07f,  2.1578721e-07f,   9.89803297e-08f, 4.37452066e-08f,
     1.86333278e-08f,  7.65128227e-09f,  3.02939029e-09f, 0.f},
    {0.f,
     1.01812011e-05f,
     1.86941616e-05f,
     2.42491169e-05f,
     2.62040612e-05f,
     2.46537365e-05f,
     2.03278541e-05f,
     1.43474508e-05f,
     7.92490664e-06f,
     2.09680275e-06f,
     -2.44686908e-06f,
     -5.4144225e-06f,
     -6.86130988e-06f,
     -7.07669005e-06f,
     -6.45392902e-06f,
     -5.38145105e-06f,
     -4.17300453e-06f,
     -3.03944989e-06f,
     -2.09269911e-06f,
     -1.36797428e-06f,
     -8.51664481e-07f,
     -5.0616643e-07f,
     -2.87695229e-07f,
     -1.56603576e-07f,
     -8.17325869e-08f,
     -4.09372376e-08f,
     -1.96928269e-08f,
     -9.10430753e-09f,
     -4.04739797e-09f,
     -1.73101922e-09f,
     -7.12531201e-10f,
     0.f},
};

// gelu itself on the pieces |3.5 x - i| <= 1/2, i mod 32 being the entry: row d holds the coefficients of x^d. Least
// maximum error of each piece, at most 9.4e-5, around 0 of error / x (1e-4); x on the last, 0 on the first, where it is
// 7e-5: rounding to bfloat16 takes up to 3.9e-3 of it.
alignas(64) static const float kGelu[3][32] = {
    {0.f,           -0.0010733296f, -0.017242547f, -0.07275516f, -0.17426096f, -0.29608926f,
     -0.39333132f,  -0.4303775f,    -0.39907324f,  -0.32047182f, -0.22574243f, -0.1408312f,
     -0.078339115f, -0.03903351f,   -0.017523095f, 0.f,          0.f,          0.f,
     -0.017554563f, -0.039095923f,  -0.07831097f,  -0.1407911f,  -0.22572698f, -0.32047182f,
     -0.39907324f,  -0.4303775f,    -0.39333132f,  -0.29608926f, -0.17426096f, -0.07275516f,
     -0.017242547f, -0.0010732063f},
    {0.5f,         0.5116685f,  0.58468395f,   0.7392198f,    0.9427389f,    1.1335567f,   1.2587295f,   1.2996453f,
     1.2709424f,   1.2063364f,  1.1364383f,    1.0796671f,    1.0414864f,    1.019382f,    1.008178f,    1.f,
     0.f,          0.f,         -0.008193736f, -0.019415693f, -0.041470014f, -0.07964161f, -0.13642725f, -0.20633642f,
     -0.27094245f, -0.2996453f, -0.2587295f,   -0.13355672f,  0.057261113f,  0.26078022f,  0.41531605f,  0.48833296f},
    {0.3979274f,      0.36595893f,  0.28287104f,  0.17497368f,  0.072789334f,    -0.0020024425f, -0.042306963f,
     -0.053603597f,   -0.04702412f, -0.03374485f, -0.02084797f, -0.01135704f,    -0.0055243964f, -0.002416315f,
     -9.5721794e-04f, 0.f,          0.f,          0.f,          -9.5918466e-04f, -0.002420841f,  -0.005522014f,
     -0.011353001f,   -0.02084602f, -0.03374485f, -0.04702412f, -0.053603597f,   -0.042306963f,  -0.0020024383f,
     0.072789334f,    0.17497368f,  0.28287104f,  0.3659618f},
};

template <class V>
SPIN_INLINE typename V::F exp_vector(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::set(-87.f), V::min(V::set(89.f), x));  // 2^128 is infinity, as it should be
  const F n = V::round(V::mul(x, V::set(1.44269504f)));
  F r = V::fma(n, V::set(-0.693359375f), x);  // ln 2 in two parts
  r = V::fma(n, V::set(2.12194440e-4f), r);
  F p = V::set(0.00139261759f);
  p = V::fma(p, r, V::set(0.00836317334f));
  p = V::fma(p, r, V::set(0.0416665561f));
  p = V::fma(p, r, V::set(0.166665778f));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1.f));
  p = V::fma(p, r, V::set(1.f));
  return V::mul(p, V::exp2_integer(n));
}

// erf(t / sqrt 2) / 2 for t >= 0, and at `slope` (not null) its derivative.
template <class V, bool kFine>
SPIN_INLINE typename V::F half_erf(typename V::F t, typename V::F* slope = nullptr) {
  using F = typename V::F;
  if constexpr (V::kHasPermute) {
    const F magic = V::set(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are the nearest piece
    t = V::min(V::set(31 / kPiecesPerUnit), t);
    const F index = V::fma(t, V::set(kPiecesPerUnit), magic);
    const F u = V::fma(t, V::set(kPiecesPerUnit), V::sub(magic, index));
    constexpr int kDegree = kFine ? 4 : 3;
    const auto& table = [&]() -> const auto& {
      if constexpr (kFine)
        return kHalfErfFine;
      else
        return kHalfErf;
    }();
    F p = V::lookup(table[kDegree], index), dp = V::zero();
#pragma GCC unroll 4
    for (int d = kDegree - 1; d >= 0; --d) {
      if (slope) dp = d == kDegree - 1 ? p : V::fma(dp, u, p);
      p = V::fma(p, u, V::lookup(table[d], index));
    }
    if (slope) *slope = V::mul(dp, V::set(kPiecesPerUnit));
    return p;
  } else if constexpr (kFine) {
    const F z = V::mul(t, V::set(0.70710678f));
    const F q = V::div(V::set(1.f), V::fma(V::set(0.3275911f), z, V::set(1.f)));
    F p = V::set(1.061405429f);
    p = V::fma(p, q, V::set(-1.453152027f));
    p = V::fma(p, q, V::set(1.421413741f));
    p = V::fma(p, q, V::set(-0.284496736f));
    p = V::fma(p, q, V::set(0.254829592f));
    const F e = exp_vector<V>(V::mul(V::mul(z, V::set(-1.f)), z));
    if (slope) *slope = V::mul(e, V::set(0.398942280f));
    return V::mul(V::set(0.5f), V::sub(V::set(1.f), V::mul(V::mul(p, q), e)));
  } else {
    F p = V::set(8.16897909e-07f);
    p = V::fma(p, t, V::set(-2.07358221e-06f));
    p = V::fma(p, t, V::set(7.47864469e-05f));
    p = V::fma(p, t, V::set(-5.15019246e-06f));
    p = V::fma(p, t, V::set(0.0033133023f));
    p = V::fma(p, t, V::set(0.0211275145f));
    p = V::fma(p, t, V::set(0.0498690978f));
    p = V::fma(p, t, V::set(1.f));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) p = V::mul(p, p);
    return V::sub(V::set(0.5f), V::div(V::set(0.5f), p));
  }
}

// For values that are rounded to bfloat16: 7 instructions where half_erf makes 14, none of which a product has to
// spare. In turns, 9 instead of 14 took 0.94 of the time in 256/8 and 0.98 in 1024/20 on a Zen 5 processor, 7 instead
// of 9 another 0.97 and 0.99 on a Zen 4.
template <class V>
SPIN_INLINE typename V::F coarse_gelu(typename V::F x) {
  using F = typename V::F;
  const F t = V::bounded(x, 15 / 3.5f);
  const F index =
      V::fma(t, V::set(3.5f), V::set(12582912.f));  // 1.5 * 2^23: the low mantissa bits are the nearest piece
  const F slope = V::fma(V::lookup(kGelu[2], index), t, V::lookup(kGelu[1], index));
  return V::fma(slope, x, V::lookup(kGelu[0], index));
}

template <class V, Activation kActivation, bool kFine = false>
SPIN_INLINE typename V::F activate(typename V::F x) {
  using F = typename V::F;
  if constexpr (kActivation == Activation::kGelu && V::kChain == DType::kBFloat16) {
    return coarse_gelu<V>(x);
  } else if constexpr (kActivation == Activation::kGelu) {
    const F t = V::abs(x);
    return V::fma(t, half_erf<V, kFine>(t), V::mul(V::set(0.5f), x));
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

// act'(x) * value; relu' (0) is 0, as in PyTorch, and what is cut off there may be infinite.
template <class V, Activation kActivation>
SPIN_INLINE typename V::F differentiate(typename V::F x, typename V::F value) {
  using F = typename V::F;
  const F one = V::set(1.f);
  // Past this what vanishes is cut off, not multiplied with something infinite.
  const F bounded = V::max(V::set(-30.f), V::min(V::set(30.f), x));
  if constexpr (kActivation == Activation::kGelu) {
    F density;
    const F probability = V::add(V::set(0.5f), V::copysign(half_erf<V, true>(V::abs(x), &density), x));
    return V::mul(V::fma(bounded, density, probability), value);
  } else if constexpr (kActivation == Activation::kGeluTanh || kActivation == Activation::kSilu) {
    // act(x) = x s with s = 1 / (1 + exp(-z(x))): act' = s + x s (1 - s) z'.
    F minus_z, slope;
    if constexpr (kActivation == Activation::kSilu) {
      minus_z = V::mul(x, V::set(-1.f)), slope = one;
    } else {
      const F square = V::mul(bounded, bounded);
      minus_z = V::mul(bounded, V::fma(square, V::set(-2 * 0.79788456f * 0.044715f), V::set(-2 * 0.79788456f)));
      slope = V::fma(square, V::set(6 * 0.79788456f * 0.044715f), V::set(2 * 0.79788456f));
    }
    const F s = V::div(one, V::add(one, exp_vector<V>(minus_z)));
    return V::mul(V::fma(V::mul(bounded, slope), V::mul(s, V::sub(one, s)), s), value);
  } else if constexpr (kActivation == Activation::kRelu) {
    return V::where_positive(x, value);
  } else {
    return value;
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
