// AVX2 + FMA + F16C: 8 float lanes, 16 registers. Register tile of the product: 4 channels x 24 tokens.
#pragma once
#include <immintrin.h>

#include "types.h"

namespace spin {

struct Avx2 {
  using F = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kTogether = 4;  // vectors side by side in an activation (several.h)
  static constexpr int kPanelVectors = 3;
  static constexpr int kTileRows = 4;   // 12 accumulators + 3 inputs + 1 broadcast; 6 x 2 leaves 4 x 2 of 8 rows: 1.13
  static constexpr int kTileSteps = 8;  // unrolled
  static constexpr int kRowColumns = 8;
  static constexpr int kLineVectors = 1;
  static constexpr int kTapStep = 1;  // taps of a depthwise row that a step takes
  static constexpr DType kChain = DType::kFloat32;

  static SPIN_INLINE F zero() { return _mm256_setzero_ps(); }
  static SPIN_INLINE F set(float x) { return _mm256_set1_ps(x); }
  static SPIN_INLINE F load(const void* p) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
  static SPIN_INLINE void store(void* p, F x) { _mm256_storeu_ps(static_cast<float*>(p), x); }
  // Past the caches; p is aligned. Others see it after the fence of a Team.
  static SPIN_INLINE void stream(void* p, F x) { _mm256_stream_ps(static_cast<float*>(p), x); }
  static SPIN_INLINE F broadcast(const void* unit) { return _mm256_broadcast_ss(static_cast<const float*>(unit)); }
  // Of a product, whose tile takes all registers: the sum stays where it is. Left to itself gcc moves some, or loads
  // operands again; how many changes with the code around it: 0.93 to 1.0 of a product's time.
  static SPIN_INLINE F mac(F sum, F weights, F unit) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(unit));
    return sum;
  }
  static SPIN_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static SPIN_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static SPIN_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static SPIN_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static SPIN_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static SPIN_INLINE float sum(F x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static SPIN_INLINE F abs(F x) { return _mm256_andnot_ps(set(-0.f), x); }
  static SPIN_INLINE F copysign(F magnitude, F sign) {
    return _mm256_or_ps(magnitude, _mm256_and_ps(sign, set(-0.f)));  // magnitude >= 0
  }
  static SPIN_INLINE F where_positive(F x, F value) {  // 0 where x <= 0
    return _mm256_and_ps(_mm256_cmp_ps(x, zero(), _CMP_NLE_UQ), value);
  }
  // A NaN in the second operand is returned, as the instruction does.
  static SPIN_INLINE F max(F bound, F x) { return _mm256_max_ps(bound, x); }
  static SPIN_INLINE F min(F bound, F x) { return _mm256_min_ps(bound, x); }
  static SPIN_INLINE F exp2_integer(F n) {  // 2^n for integral n in [-126, 127]
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_add_ps(n, set(127.f))), 23));
  }
  static SPIN_INLINE F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static SPIN_INLINE F load_as(const void* p, DType type) {
    if (type == DType::kFloat32) return load(p);
    const __m128i bits = _mm_loadu_si128(static_cast<const __m128i*>(p));
    if (type == DType::kFloat16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  static SPIN_INLINE void store_as(void* p, DType type, F x) {
    if (type == DType::kFloat32) return store(p, x);
    if (type == DType::kFloat16) {
      _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
    alignas(32) float values[kLanes];
    store(values, x);
    for (int i = 0; i < kLanes; ++i) static_cast<uint16_t*>(p)[i] = float_to_bfloat16(values[i]);
  }

  static SPIN_INLINE F load_chain(const void* p) { return load(p); }
  static SPIN_INLINE void store_chain(void* p, F x) { store(p, x); }
  static SPIN_INLINE F to_units(const F* line) { return line[0]; }

  static SPIN_INLINE void transpose(F (&r)[8]) {
    F t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
      r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
  }

  static constexpr bool kHasMasks = false;    // of parts of vectors
  static constexpr bool kHasPermute = false;  // 8 entries are too few for the table of erf
};

}  // namespace spin
