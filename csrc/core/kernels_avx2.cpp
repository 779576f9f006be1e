#include "kernels.h"

#ifdef __AVX2__
#include "make_kernels.h"
#include "simd_avx2.h"

namespace spin {

const Kernels* kernels_avx2() {
  static constexpr Kernels kernels = make_kernels<Avx2>("avx2");
  return &kernels;
}

}  // namespace spin

#else

namespace spin {
const Kernels* kernels_avx2() { return nullptr; }
}  // namespace spin

#endif
