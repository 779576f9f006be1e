#include "make_kernels.h"
#include "simd_portable.h"

namespace spin {

const Kernels* kernels_portable() {
  static constexpr Kernels kernels = make_kernels<Portable>("portable");
  return &kernels;
}

}  // namespace spin
