// Element types, activations and their scalar conversions. No torch, no vector code.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace spin {

enum class DType : uint32_t { kFloat32, kBFloat16, kFloat16 };
enum class Activation : uint32_t { kGelu, kGeluTanh, kRelu, kSilu, kIdentity };

constexpr int64_t kMaxChannels = 8192;
constexpr int64_t kMaxKernelSize = 31;
constexpr int64_t kCacheLine = 64;
constexpr int64_t kUnitBytes = 4;  // of an operand of a product: a float or a pair of bf16

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

constexpr int64_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// The compiler may place a non-inlined copy of a plain inline function in any object file, also in one
// that is built for a newer processor; so everything the vector files call is forced inline.
#define SPIN_INLINE inline __attribute__((always_inline))

template <class To, class From>
SPIN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

SPIN_INLINE float bfloat16_to_float(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

SPIN_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t((bits >> 16) | 0x40);  // NaN stays NaN
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);                  // nearest, ties to even
}

SPIN_INLINE float float16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // 2^112 moves the exponent from bias 15 to bias 127 and normalises subnormals on the way.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f));
}

SPIN_INLINE uint16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65520 or more: infinity
  if (magnitude < 0x38800000u) {                        // subnormal: let a float addition do the rounding
    return sign | uint16_t(bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | uint16_t((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13);
}

SPIN_INLINE float load_scalar(const void* data, DType type, int64_t i) {
  if (type == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == DType::kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

SPIN_INLINE void store_scalar(void* data, DType type, int64_t i, float value) {
  if (type == DType::kFloat32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] = type == DType::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
  }
}

}  // namespace spin
