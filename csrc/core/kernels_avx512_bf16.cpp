#include "kernels.h"

#ifdef __AVX512BF16__
#include "make_kernels.h"
#include "simd_avx512.h"

namespace spin {

const Kernels* kernels_avx512_bf16() {
  static constexpr Kernels kernels = make_kernels<Avx512Bf16>("avx512_bf16");
  return &kernels;
}

const Kernels* kernels_avx512_bf16_training() {
  static const Kernels kernels = [] {
    // Not instantiated again here: the linker would keep one copy, and this file's may have bf16 instructions.
    Kernels made = *kernels_avx512();
    made.name = "avx512_bf16";
    set_products<Avx512, Avx512Bf16>(made);
    return made;
  }();
  return &kernels;
}

}  // namespace spin

#else

namespace spin {
const Kernels* kernels_avx512_bf16() { return nullptr; }
const Kernels* kernels_avx512_bf16_training() { return nullptr; }
}  // namespace spin

#endif
