// What the kernels that make weights share: parts of vectors.
#pragma once
#include <type_traits>

#include "kernels.h"

namespace spin {

template <class V, DType kType>
struct WeightTile {
  using F = typename V::F;
  static constexpr int64_t kLanes = V::kLanes, kBytes = size_of(kType);

  static constexpr SPIN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

  static SPIN_INLINE F load(const char* from) { return V::load_as(from, kType); }
  // The first `count` values, zeros after them.
  static SPIN_INLINE F load_part(const char* from, int64_t count, DType type = kType) {
    if (count >= kLanes) return V::load_as(from, type);
    if constexpr (V::kHasMasks) {
      if (type == DType::kFloat32) return V::load_first(from, count);
    }
    alignas(64) char values[kLanes * 4] = {};
    __builtin_memcpy(values, from, count * size_of(type));
    return V::load_as(values, type);
  }
  static SPIN_INLINE void store_part(char* to, F x, int64_t count, DType type = kType) {
    if (count >= kLanes) return V::store_as(to, type, x);
    if constexpr (V::kHasMasks) {
      if (type == DType::kFloat32) return V::store_first(to, x, count);
    }
    alignas(64) char values[kLanes * 4];
    V::store_as(values, type, x);
    __builtin_memcpy(to, values, count * size_of(type));
  }

  // Values of a row before the first whole vector that may go past the caches.
  static SPIN_INLINE int64_t before_stream(const char* to, int64_t columns) {
    return smaller(-reinterpret_cast<intptr_t>(to) / kBytes & (kLanes - 1), columns);
  }
};

// run() with `type` as a constant.
template <class Run>
SPIN_INLINE void with_type(DType type, const Run& run) {
  if (type == DType::kFloat32) return run(std::integral_constant<DType, DType::kFloat32>());
  if (type == DType::kBFloat16) return run(std::integral_constant<DType, DType::kBFloat16>());
  run(std::integral_constant<DType, DType::kFloat16>());
}

}  // namespace spin
