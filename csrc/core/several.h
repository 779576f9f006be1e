// Several vectors as one. An activation is a chain of 15 to 30 instructions, each of which waits for the one before, 60
// clocks and more; written vector after vector, a core's window of instructions is full of such waiting when it has
// seen a few. With the vectors side by side in every step there is always one that can start.
//
// Four instead of one on an AMD EPYC (AVX2, 16 registers), in turns: gelu in an epilogue 3.8 instead of 4.7 ns per
// vector, ConvMixer 256/8 0.97 of the time, its training step 0.95, repetition with swish 0.74 forward and 0.64
// backward; two and three gain less, eight nothing more. AVX-512, whose core sees further, keeps one: two on an AMD
// EPYC (Zen 5) take 0.98 to 1.01 of the time of 256/8, four 1.0 to 1.08.
#pragma once
#include "types.h"

namespace spin {

template <class V, int kCount>
struct Several {
  struct F {
    typename V::F v[kCount];
  };
  static constexpr bool kHasPermute = V::kHasPermute;
  static constexpr DType kChain = V::kChain;

  // op(i), a vector each.
  template <class Op>
  static SPIN_INLINE F make(const Op& op) {
    F y;
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) y.v[i] = op(i);
    return y;
  }
  // use(i, vector i)
  template <class Use>
  static SPIN_INLINE void visit(const F& x, const Use& use) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) use(i, x.v[i]);
  }
  template <class Op, class... Operands>
  static SPIN_INLINE F each(const Op& op, const Operands&... x) {
    return make([&](int i) __attribute__((always_inline)) { return op(x.v[i]...); });
  }
  static SPIN_INLINE F all(typename V::F x) {
    return make([&](int) __attribute__((always_inline)) { return x; });
  }

  static SPIN_INLINE F zero() { return all(V::zero()); }
  static SPIN_INLINE F set(float x) { return all(V::set(x)); }
  static SPIN_INLINE F fma(const F& a, const F& b, const F& c) { return each(V::fma, a, b, c); }
  static SPIN_INLINE F add(const F& a, const F& b) { return each(V::add, a, b); }
  static SPIN_INLINE F sub(const F& a, const F& b) { return each(V::sub, a, b); }
  static SPIN_INLINE F mul(const F& a, const F& b) { return each(V::mul, a, b); }
  static SPIN_INLINE F div(const F& a, const F& b) { return each(V::div, a, b); }
  static SPIN_INLINE F abs(const F& x) { return each(V::abs, x); }
  static SPIN_INLINE F copysign(const F& magnitude, const F& sign) { return each(V::copysign, magnitude, sign); }
  static SPIN_INLINE F where_positive(const F& x, const F& value) { return each(V::where_positive, x, value); }
  static SPIN_INLINE F max(const F& bound, const F& x) { return each(V::max, bound, x); }
  static SPIN_INLINE F min(const F& bound, const F& x) { return each(V::min, bound, x); }
  static SPIN_INLINE F bounded(const F& x, float most) {
    return each([most](typename V::F one) __attribute__((always_inline)) { return V::bounded(one, most); }, x);
  }
  static SPIN_INLINE F exp2_integer(const F& n) { return each(V::exp2_integer, n); }
  static SPIN_INLINE F round(const F& x) { return each(V::round, x); }
  static SPIN_INLINE F lookup(const float* table, const F& index) {
    return each([table](typename V::F i) __attribute__((always_inline)) { return V::lookup(table, i); }, index);
  }
};

}  // namespace spin
