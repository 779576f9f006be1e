// Learnable repetition: a small filter bank tiled into a large layer's weight, and modulated.
//
//   result[a, b, tap] = modulate(base[a mod o, b mod i, tap]),  tile t = (a div o, b div i), the last ones partial
//     plain: w      swish: w * alpha[t] / (1 + exp(beta[t] * w))      gate: w * gate[a, b, tap]
//
// As in compose.h the base is cut into pieces that stay in L1 and serve all tiles, its *users*, before the next one is
// read: base and result pass through memory once, and backward the result's gradient and the base's. Every piece of the
// base's gradient belongs to one thread; a tile's alpha and beta are summed in double over pieces in their order.
// Cost per element of the result: a load and a store; swish an exponential in both directions, some 20 operations.
#pragma once
#include "kernels.h"
#include "team.h"

namespace spin {

struct RepeatShape {
  int64_t base_out, base_in, out, in, taps;
  int64_t row_tiles() const { return ceil_div(out, base_out); }
  int64_t column_tiles() const { return ceil_div(in, base_in); }
  int64_t tiles() const { return row_tiles() * column_tiles(); }
  int64_t base_elements() const { return base_out * base_in * taps; }
  int64_t elements() const { return out * in * taps; }
};

// alpha and beta (one per tile), or gate (like the result), or neither.
struct RepeatWeights {
  DType type;
  const char* base;
  const float *alpha, *beta;
  const char* gate;
};

void repeat_weight(const Kernels& kernels, const RepeatShape& shape, const RepeatWeights& weights, char* result,
                   const Parallel& parallel);

// Fills the gradients: of the base as floats, and of what there is of alpha, beta and gate.
void repeat_weight_backward(const Kernels& kernels, const RepeatShape& shape, const RepeatWeights& weights,
                            const char* gradient, float* base_gradient, float* alpha_gradient, float* beta_gradient,
                            char* gate_gradient, const Parallel& parallel);

}  // namespace spin
