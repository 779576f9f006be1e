// AMX beside AVX-512: eight tiles of 16 rows of 64 bytes, and a product of two of them that is added to a third:
//   C[r][n] += A[r][2k] * B[k][2n] + A[r][2k + 1] * B[k][2n + 1], k = 0 ... 15; A and B in bf16, C in float.
#pragma once
#include "simd_avx512.h"

namespace spin {

struct Amx : Avx512Bf16 {
  static constexpr int kPanelVectors = 2;
  static constexpr int kTapStep = 1;  // processors with tiles issue vdpbf16ps half as often as a float multiply-add
  static constexpr int64_t kTileRows = 16;

  // What tiles hold. Until it is set they can't be used; setting it takes 100 ns and clears them.
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  };
  // Of A and C; B always has 16.
  static SPIN_INLINE void set_rows(int64_t rows) {
    Shapes shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.rows[tile] = uint8_t(tile < 6 ? rows : kTileRows);
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  static void enter() { set_rows(kTileRows); }
  static void leave() { asm volatile("tilerelease"); }  // or they are saved at every switch to another thread

  // Tiles 0 to 5 have the rows of A and C, 6 and 7 those of B.
  template <int kTile>
  static SPIN_INLINE void clear() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static SPIN_INLINE void load_tile(const void* from, int64_t row_stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static SPIN_INLINE void store_tile(void* to, int64_t row_stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_stride), "i"(kTile) : "memory");
  }
  template <int kC, int kA, int kB>
  static SPIN_INLINE void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }

  // The first channels of a line, zeros after them.
  static SPIN_INLINE F load_channels(const void* line, int64_t count) {
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << count) - 1), line));
  }
};

}  // namespace spin
