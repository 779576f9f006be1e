#include "kernels.h"

#ifdef __AVX512F__
#include "make_kernels.h"
#include "simd_avx512.h"

namespace spin {

const Kernels* kernels_avx512() {
  static constexpr Kernels kernels = make_kernels<Avx512>("avx512");
  return &kernels;
}

}  // namespace spin

#else

namespace spin {
const Kernels* kernels_avx512() { return nullptr; }
}  // namespace spin

#endif
