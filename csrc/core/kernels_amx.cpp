#include "kernels.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "make_kernels.h"
#include "product_tiles.h"
#include "simd_amx.h"

namespace spin {

const Kernels* kernels_amx() {
  static constexpr Kernels kernels = [] {
    Kernels made = make_kernels<Amx, TileProduct>("amx");
    made.enter = Amx::enter;
    made.leave = Amx::leave;
    return made;
  }();
  return &kernels;
}

}  // namespace spin

#else

namespace spin {
const Kernels* kernels_amx() { return nullptr; }
}  // namespace spin

#endif
