// The table of kernels of one instruction set: included by one source file per instruction set, each
// compiled with its own flags.
#pragma once
#include "compose_tile.h"
#include "depthwise.h"
#include "elementwise.h"
#include "layout.h"
#include "product.h"
#include "repeat_tile.h"
#include "strassen.h"
#include "taps_gradient.h"
#include "weight_gradient.h"

namespace spin {

template <class V>
void activate_all(Activation activation, const float* from, float* to, int64_t count) {
  with_activation(activation, [&](auto constant) {
    for (int64_t i = 0; i < count; i += V::kLanes) {
      V::store(to + i, activate<V, decltype(constant)::value>(V::load(from + i)));
    }
  });
}

// The products of a table. V: the chain; Operand: what is multiplied.
template <class V, class Operand, template <class, class> class P = Product>
constexpr void set_products(Kernels& kernels) {
  kernels.operand = Operand::kChain;
  kernels.product = P<Operand, V>::run;
  if constexpr (Operand::kChain == V::kChain) kernels.panel_product = P<Operand, V>::run_panel;
  if constexpr (Operand::kChain == V::kChain && V::kChain == DType::kFloat32) kernels.token_sums = token_sums<V>;
  kernels.pack_panels = P<Operand, V>::pack_panels;
  kernels.pack_rows = Layout<Operand>::pack_rows;
  if constexpr (V::kChain == DType::kFloat32) {
    if constexpr (Operand::kChain != DType::kFloat32) kernels.pack_gradient = WeightGradient<Operand>::pack;
    kernels.weight_gradient = WeightGradient<Operand>::run;
    kernels.transpose = WeightGradient<Operand>::transpose;
  }
}

template <class V, template <class, class> class P = Product>
constexpr Kernels make_kernels(const char* name) {
  Kernels kernels{
      .name = name,
      .lanes = V::kLanes,
      .panel_vectors = V::kPanelVectors,
      .line_channels = Layout<V>::kLineChannels,
      .line_bytes = Layout<V>::kLineBytes,
      .chain = V::kChain,
      .depthwise = Depthwise<V>::run,
      .depthwise_scratch = Depthwise<V>::scratch,
      .pack_taps = Layout<V>::pack_taps,
      .load = Layout<V>::load,
      .store = Layout<V>::store,
      .load_patches = Layout<V>::load_patches,
      .sum_tokens = Layout<V>::sum_tokens,
      .mean = Layout<V>::mean,
      .multiply_add_loop = P<V, V>::multiply_add_loop,
      .activate = activate_all<V>,
  };
  set_products<V, V, P>(kernels);
  if constexpr (V::kChain == DType::kFloat32) {
    kernels.transform = Elementwise<V>::transform;
    kernels.moments = Elementwise<V>::moments;
    kernels.gradient_sums = Elementwise<V>::gradient_sums;
    kernels.activation_gradient = Elementwise<V>::activation_gradient;
    kernels.narrow = Elementwise<V>::narrow;
    kernels.taps_gradient = TapsGradient<V>::run;
    kernels.compose = compose<V>;
    kernels.compose_gradient = compose_gradient<V>;
    kernels.repeat = repeat<V>;
    kernels.repeat_gradient = repeat_gradient<V>;
  }
  return kernels;
}

}  // namespace spin
