// Any processor: the compiler's generic vectors of 4 floats. Register tile: 4 tokens x 8 channels.
#pragma once
#include "types.h"

namespace spin {

struct Portable {
  using F = float __attribute__((vector_size(16)));
  using I = int32_t __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kTogether = 4;  // vectors side by side in an activation (several.h)
  static constexpr int kPanelVectors = 2;
  static constexpr int kTileRows = 4;
  static constexpr int kTileSteps = 4;
  static constexpr int kRowColumns = 8;
  static constexpr int kLineVectors = 1;
  static constexpr int kTapStep = 1;  // taps of a depthwise row that a step takes
  static constexpr DType kChain = DType::kFloat32;

  static SPIN_INLINE F zero() { return F{}; }
  static SPIN_INLINE F set(float x) { return F{x, x, x, x}; }
  static SPIN_INLINE F load(const void* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  static SPIN_INLINE void store(void* p, F x) { __builtin_memcpy(p, &x, sizeof(x)); }
  static SPIN_INLINE void stream(void* p, F x) { store(p, x); }
  static SPIN_INLINE F broadcast(const void* unit) { return set(*static_cast<const float*>(unit)); }
  static SPIN_INLINE F mac(F sum, F weights, F unit) { return sum + weights * unit; }
  static SPIN_INLINE F fma(F a, F b, F c) { return a * b + c; }
  static SPIN_INLINE F add(F a, F b) { return a + b; }
  static SPIN_INLINE F sub(F a, F b) { return a - b; }
  static SPIN_INLINE F mul(F a, F b) { return a * b; }
  static SPIN_INLINE F div(F a, F b) { return a / b; }
  static SPIN_INLINE float sum(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static SPIN_INLINE F abs(F x) { return (F)((I)x & 0x7fffffff); }
  static SPIN_INLINE F copysign(F magnitude, F sign) { return (F)((I)magnitude | ((I)sign & INT32_MIN)); }
  static SPIN_INLINE F where_positive(F x, F value) { return x <= 0.f ? zero() : value; }  // 0 where x <= 0
  // A NaN in the second operand is returned, as x86 instructions do.
  static SPIN_INLINE F max(F bound, F x) { return bound > x ? bound : x; }
  static SPIN_INLINE F min(F bound, F x) { return bound < x ? bound : x; }
  static SPIN_INLINE F exp2_integer(F n) { return (F)(__builtin_convertvector(n + 127.f, I) << 23); }
  static SPIN_INLINE F round(F x) {  // |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits
    const F magic = set(12582912.f);
    return (x + magic) - magic;
  }

  static SPIN_INLINE F load_as(const void* p, DType type) {
    if (type == DType::kFloat32) return load(p);
    F x{};
    for (int i = 0; i < kLanes; ++i) x[i] = load_scalar(p, type, i);
    return x;
  }
  static SPIN_INLINE void store_as(void* p, DType type, F x) {
    if (type == DType::kFloat32) return store(p, x);
    for (int i = 0; i < kLanes; ++i) store_scalar(p, type, i, x[i]);
  }

  static SPIN_INLINE F load_chain(const void* p) { return load(p); }
  static SPIN_INLINE void store_chain(void* p, F x) { store(p, x); }
  static SPIN_INLINE F to_units(const F* line) { return line[0]; }

  static SPIN_INLINE void transpose(F (&r)[4]) {
    F t[4];
    for (int i = 0; i < 4; ++i) t[i] = F{r[0][i], r[1][i], r[2][i], r[3][i]};
    for (int i = 0; i < 4; ++i) r[i] = t[i];
  }

  static constexpr bool kHasMasks = false;
  static constexpr bool kHasPermute = false;
};

}  // namespace spin
