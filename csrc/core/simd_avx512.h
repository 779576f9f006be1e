// AVX-512: 16 float lanes, 32 registers. Register tile of the product: 8 rows x 48 tokens.
#pragma once
#include <immintrin.h>

#include "types.h"

namespace spin {

struct Avx512 {
  using F = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kTogether = 1;  // in an activation (several.h)
  static constexpr int kPanelVectors = 3;
  static constexpr int kTileRows = 8;     // 24 accumulators + 3 inputs + broadcasts
  static constexpr int kTileSteps = 4;    // unrolled
  static constexpr int kRowColumns = 16;  // outputs of a depthwise row held in registers
  static constexpr int kLineVectors = 1;
  static constexpr int kTapStep = 1;  // taps of a depthwise row that a step takes
  static constexpr DType kChain = DType::kFloat32;

  static SPIN_INLINE F zero() { return _mm512_setzero_ps(); }
  static SPIN_INLINE F set(float x) { return _mm512_set1_ps(x); }
  static SPIN_INLINE F load(const void* p) { return _mm512_loadu_ps(p); }
  static SPIN_INLINE void store(void* p, F x) { _mm512_storeu_ps(p, x); }
  // The first `count` lanes, zeros after them.
  static constexpr bool kHasMasks = true;
  static SPIN_INLINE __mmask16 mask_of(int64_t count) { return __mmask16((1u << count) - 1); }
  static SPIN_INLINE F load_first(const void* p, int64_t count) { return _mm512_maskz_loadu_ps(mask_of(count), p); }
  static SPIN_INLINE void store_first(void* p, F x, int64_t count) { _mm512_mask_storeu_ps(p, mask_of(count), x); }
  // Past the caches; p is aligned. Others see it after the fence of a Team.
  static SPIN_INLINE void stream(void* p, F x) { _mm512_stream_ps(static_cast<float*>(p), x); }
  static SPIN_INLINE F broadcast(const void* unit) { return _mm512_set1_ps(*static_cast<const float*>(unit)); }
  static SPIN_INLINE F mac(F sum, F weights, F unit) { return _mm512_fmadd_ps(weights, unit, sum); }
  static SPIN_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static SPIN_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static SPIN_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static SPIN_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static SPIN_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static SPIN_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
  static SPIN_INLINE F abs(F x) { return _mm512_abs_ps(x); }
  static SPIN_INLINE F copysign(F magnitude, F sign) {
    return _mm512_or_ps(magnitude, _mm512_and_ps(sign, _mm512_set1_ps(-0.f)));  // magnitude >= 0
  }
  static SPIN_INLINE F where_positive(F x, F value) {  // 0 where x <= 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NLE_UQ), value);
  }
  // A NaN in the second operand is returned, as the instruction does.
  static SPIN_INLINE F max(F bound, F x) { return _mm512_max_ps(bound, x); }
  static SPIN_INLINE F min(F bound, F x) { return _mm512_min_ps(bound, x); }
  // With the sign of x, and its magnitude up to `most`. A NaN becomes `most`.
  static SPIN_INLINE F bounded(F x, float most) { return _mm512_range_ps(x, set(most), 2); }
  static SPIN_INLINE F exp2_integer(F n) {  // 2^n for integral n in [-126, 127]
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtps_epi32(_mm512_add_ps(n, set(127.f))), 23));
  }
  static SPIN_INLINE F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

  static SPIN_INLINE F load_as(const void* p, DType type) {
    if (type == DType::kFloat32) return _mm512_loadu_ps(p);
    const __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if (type == DType::kFloat16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }

  static SPIN_INLINE __m256i to_bfloat16(F x) {  // nearest even, NaN kept
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }

  static SPIN_INLINE void store_as(void* p, DType type, F x) {
    if (type == DType::kFloat32) return _mm512_storeu_ps(p, x);
    _mm256_storeu_si256(static_cast<__m256i*>(p),
                        type == DType::kFloat16 ? _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT) : to_bfloat16(x));
  }

  // Loads and stores of the chain's own element type.
  static SPIN_INLINE F load_chain(const void* p) { return load(p); }
  static SPIN_INLINE void store_chain(void* p, F x) { store(p, x); }

  // One line's worth of units from a vector of floats per line vector.
  static SPIN_INLINE F to_units(const F* line) { return line[0]; }

  static SPIN_INLINE void transpose(F (&r)[16]) {
    __m512i t[16];
    auto cast = [](F x) { return _mm512_castps_si512(x); };
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_epi32(cast(r[i]), cast(r[i + 1]));
      t[i + 1] = _mm512_unpackhi_epi32(cast(r[i]), cast(r[i + 1]));
    }
    __m512i u[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
      t[i + 8] = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xdd);
      t[i + 12] = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i], t[i + 4], 0x88));
      r[i + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd));
      r[i + 4] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88));
      r[i + 12] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd));
    }
  }

  // Entry number (low 5 bits of `index`) of a table with 32 entries, by one permutation.
  static constexpr bool kHasPermute = true;
  static SPIN_INLINE F lookup(const float* table, F index) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), _mm512_castps_si512(index), _mm512_load_ps(table + 16));
  }
};

#ifdef __AVX512BF16__
// The same with activations and weights kept in bf16 and vdpbf16ps for the product: pairs of channels.
struct Avx512Bf16 : Avx512 {
  static constexpr int kLineVectors = 2;
  static constexpr int kTapStep = 2;
  static constexpr DType kChain = DType::kBFloat16;
  static SPIN_INLINE F mac(F sum, F weights, F unit) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(unit));
  }
  static SPIN_INLINE F first_of_pair(F unit) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(unit), _mm512_set1_epi32(0xffff)));
  }
  static SPIN_INLINE F load_chain(const void* p) { return load_as(p, DType::kBFloat16); }
  static SPIN_INLINE void store_chain(void* p, F x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  static SPIN_INLINE F to_units(const F* line) { return reinterpret_cast<F>(_mm512_cvtne2ps_pbh(line[1], line[0])); }
  // Two tokens of a vector of channels, one unit per channel.
  static SPIN_INLINE F interleave(F tokens) {
    const __m512i low = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(low, _mm512_castps_si512(tokens)));
  }
  static SPIN_INLINE F interleave(const F* tokens) { return interleave(to_units(tokens)); }
  static SPIN_INLINE F interleave(const void* first, const void* second) {  // of the chain
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256(static_cast<const __m256i*>(first)));
    const __m256i high = _mm256_loadu_si256(static_cast<const __m256i*>(second));
    return interleave(_mm512_castsi512_ps(_mm512_inserti64x4(low, high, 1)));
  }
};
#endif

}  // namespace spin
