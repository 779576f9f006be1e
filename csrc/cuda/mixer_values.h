// Two-byte values and activations, the same on the GPU and in the tests of it that run without one.
#pragma once
#include <cmath>

#include "mixer_shape.h"

namespace spin::hopper {

struct Pair {
  float first, second;
};

// Two neighbouring values in a register, the first in the lower half.
struct BFloat16 {
  // Rows of 7 or more taps are summed in pairs of bfloat16: half the instructions, within the rule for low precision.
  static constexpr int kPackedKernel = 7;

  static SPIN_DEVICE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(a), "r"(b), "r"(c));
    return bits;
#else
    const Pair x = unpack(a), y = unpack(b), z = unpack(c);
    return pack(fmaf(x.first, y.first, z.first), fmaf(x.second, y.second, z.second));
#endif
  }
  static SPIN_DEVICE Pair unpack(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
#else
    return {bfloat16_to_float(uint16_t(bits)), bfloat16_to_float(uint16_t(bits >> 16))};
#endif
  }
  static SPIN_DEVICE uint32_t pack(float first, float second) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
#else
    return float_to_bfloat16(first) | uint32_t(float_to_bfloat16(second)) << 16;
#endif
  }
};

struct Float16 {
  // None: a row's sum may leave the range of float16 where the whole does not.
  static constexpr int kPackedKernel = 1 << 30;

  static SPIN_DEVICE Pair unpack(uint32_t bits) {
#ifdef __CUDA_ARCH__
    Pair values;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(values.first), "=f"(values.second)
        : "r"(bits));
    return values;
#else
    return {float16_to_float(uint16_t(bits)), float16_to_float(uint16_t(bits >> 16))};
#endif
  }
  static SPIN_DEVICE uint32_t pack(float first, float second) {
#ifdef __CUDA_ARCH__
    uint32_t bits;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    return bits;
#else
    return float_to_float16(first) | uint32_t(float_to_float16(second)) << 16;
#endif
  }
};

SPIN_DEVICE float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}
SPIN_DEVICE float fast_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// x * Phi(x), |error| < 5e-5 (or 1e-6 |x|): Phi(x) = 1/2 + x * P(x^2) up to |x| = 4.5, where P is such that Phi(-4.5)
// is 0. Seventeen instructions, none of the special functions; the exponential and the reciprocal of erf would take
// twice that on theirs.
SPIN_DEVICE float gelu(float x) {
  const float t = fminf(fmaxf(x, -4.5f), 4.5f), s = t * t;
  float p = 3.00000615e-11f;
  p = fmaf(p, s, -3.28391159e-09f);
  p = fmaf(p, s, 1.58025685e-07f);
  p = fmaf(p, s, -4.43168392e-06f);
  p = fmaf(p, s, 8.1209706e-05f);
  p = fmaf(p, s, -0.00103625329f);
  p = fmaf(p, s, 0.00958065316f);
  p = fmaf(p, s, -0.0659772679f);
  p = fmaf(p, s, 0.3987088f);  // more than the fit has it by 2e-7: the sum below is -1e-6 at -4.5
  return x * fmaxf(fmaf(t, p, 0.5f), 0.0f);
}
SPIN_DEVICE float sigmoid(float x) { return fast_reciprocal(1.0f + fast_exp(-x)); }
SPIN_DEVICE float gelu_tanh(float x) { return x * sigmoid(1.5957691216f * x * fmaf(0.044715f * x, x, 1.0f)); }

template <int kCount>
SPIN_DEVICE void activate(Activation activation, float (&values)[kCount]) {
  switch (activation) {
    case Activation::kGelu:
#pragma unroll
      for (float& v : values) v = gelu(v);
      break;
    case Activation::kGeluTanh:
#pragma unroll
      for (float& v : values) v = gelu_tanh(v);
      break;
    case Activation::kRelu:
#pragma unroll
      for (float& v : values) v = v < 0.0f ? 0.0f : v;  // NaN passes
      break;
    case Activation::kSilu:
#pragma unroll
      for (float& v : values) v *= sigmoid(v);
      break;
    case Activation::kIdentity:
      break;
  }
}

}  // namespace spin::hopper
