// The table of kernels of one instruction set: included by one source file per instruction set, each
// compiled with its own flags.
#pragma once
#include "compose_tile.h"
#include "depthwise.h"
#include "elementwise.h"
#include "layout.h"
#include "product.h"
#include "repeat_tile.h"
#include "taps_gradient.h"
#include "weight_gradient.h"

// Tells the compiler that a vector register is used and changed here.
#if defined(__x86_64__)
#define SPIN_KEEP(x) asm volatile("" : "+v"(x))
#else
#define SPIN_KEEP(x) asm volatile("" : "+w"(x))
#endif

namespace spin {

template <class V>
void activate_all(Activation activation, const float* from, float* to, int64_t count) {
  with_activation(activation, [&](auto constant) {
    for (int64_t i = 0; i < count; i += V::kLanes) {
      V::store(to + i, activate<V, decltype(constant)::value>(V::load(from + i)));
    }
  });
}

template <class V>
double multiply_add_loop(int64_t iterations) {
  constexpr int kSums = 12;  // more than latency x issue rate of any processor this runs on
  typename V::F sum[kSums], weight = V::set(1e-20f), unit = V::set(0.5f);
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) sum[i] = V::set(1e-8f);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kSums; ++i) {
      SPIN_KEEP(weight);  // or the compiler would see twelve times the same sum
      sum[i] = V::mac(sum[i], weight, unit);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kSums; ++i) SPIN_KEEP(sum[i]);
  return 2.0 * kSums * V::kLanes * V::kLineVectors * iterations;
}

// V: the chain; Operand: what is multiplied in products.
template <class V, class Operand = V>
constexpr Kernels make_kernels(const char* name) {
  Kernels kernels{
      .name = name,
      .lanes = V::kLanes,
      .line_channels = Layout<V>::kLineChannels,
      .line_bytes = Layout<V>::kLineBytes,
      .chain = V::kChain,
      .operand = Operand::kChain,
      .product = Product<Operand, V>::run,
      .depthwise = Depthwise<V>::run,
      .depthwise_scratch = Depthwise<V>::scratch,
      .pack_tokens = Product<Operand, V>::pack_tokens,
      .pack_rows = Layout<Operand>::pack_rows,
      .pack_taps = Layout<V>::pack_taps,
      .load = Layout<V>::load,
      .store = Layout<V>::store,
      .load_patches = Layout<V>::load_patches,
      .pool = Layout<V>::pool,
      .multiply_add_loop = multiply_add_loop<V>,
      .activate = activate_all<V>,
  };
  if constexpr (V::kChain == DType::kFloat32) {
    kernels.transform = Elementwise<V>::transform;
    kernels.moments = Elementwise<V>::moments;
    kernels.gradient_sums = Elementwise<V>::gradient_sums;
    kernels.activation_gradient = Elementwise<V>::activation_gradient;
    kernels.narrow = Elementwise<V>::narrow;
    kernels.taps_gradient = TapsGradient<V>::run;
    if constexpr (Operand::kChain != DType::kFloat32) kernels.pack_gradient = WeightGradient<Operand>::pack;
    kernels.weight_gradient = WeightGradient<Operand>::run;
    kernels.transpose = WeightGradient<Operand>::transpose;
  }
  if constexpr (V::kChain == DType::kFloat32 && Operand::kChain == DType::kFloat32) {  // once per chain: no products
    kernels.compose = compose<V>;
    kernels.compose_gradient = compose_gradient<V>;
    kernels.repeat = repeat<V>;
    kernels.repeat_gradient = repeat_gradient<V>;
  }
  return kernels;
}

}  // namespace spin
