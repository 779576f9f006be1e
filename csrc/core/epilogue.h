// What every kernel does to its sums on the way out: scale * act(gain * sum + bias) + shift (+ residual),
// the depthwise without gain and with the bias in the sum from the start.
// The sums come from a buffer that the kernel has just filled: spilling them costs store and load slots,
// which a kernel at the multiply-add peak leaves free, and saves one copy of each tile per activation.
#pragma once
#include "activation.h"

namespace spin {

struct EpilogueArgs {
  const float* sums;   // [row][sum_stride]
  int64_t sum_stride;  // floats from one row to the next
  int64_t rows;
  const float* gain;  // kBiased (the bias is in the sums already): both unused
  const float* bias;
  const float* scale;
  const float* shift;
  const char* residual;  // null or chain elements, row_bytes apart
  char* output;          // chain elements, row_bytes apart
  int64_t row_bytes;
};

// One vector of channels.
template <class V, Activation kActivation, bool kBiased>
SPIN_INLINE void epilogue(const EpilogueArgs& a) {
  using F = typename V::F;
  const F gain = kBiased ? V::zero() : V::load(a.gain), bias = kBiased ? V::zero() : V::load(a.bias);
  const F scale = V::load(a.scale), shift = V::load(a.shift);
#pragma GCC unroll 4
  for (int64_t row = 0; row < a.rows; ++row) {
    F value = V::load(a.sums + row * a.sum_stride);
    if constexpr (!kBiased) value = V::fma(value, gain, bias);
    value = V::fma(activate<V, kActivation>(value), scale, shift);
    if (a.residual) value = V::add(value, V::load_chain(a.residual + row * a.row_bytes));
    V::store_chain(a.output + row * a.row_bytes, value);
  }
}

}  // namespace spin
