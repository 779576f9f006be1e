// What every kernel does to its sums on the way out: scale * act(gain * sum + bias) + shift (+ residual),
// the depthwise without gain and with the bias in the sum from the start.
// The sums come from a buffer that the kernel has just filled: spilling them costs store and load slots,
// which a kernel at the multiply-add peak leaves free, and saves one copy of each tile per activation.
#pragma once
#include "activation.h"
#include "several.h"

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

// One vector of channels: kRows rows from `row` on.
template <class V, Activation kActivation, bool kBiased, int kRows>
SPIN_INLINE void epilogue_rows(const EpilogueArgs& a, int64_t row) {
  using S = Several<V, kRows>;
  auto value = S::make([&](int i) { return V::load(a.sums + (row + i) * a.sum_stride); });
  if constexpr (!kBiased) value = S::fma(value, S::all(V::load(a.gain)), S::all(V::load(a.bias)));
  value = S::fma(activate<S, kActivation>(value), S::all(V::load(a.scale)), S::all(V::load(a.shift)));
  S::visit(value, [&](int i, typename V::F y) {
    const int64_t place = (row + i) * a.row_bytes;
    V::store_chain(a.output + place, a.residual ? V::add(y, V::load_chain(a.residual + place)) : y);
  });
}

template <class V, Activation kActivation, bool kBiased>
SPIN_INLINE void epilogue(const EpilogueArgs& a) {
  int64_t row = 0;
  for (; row + V::kTogether <= a.rows; row += V::kTogether)
    epilogue_rows<V, kActivation, kBiased, V::kTogether>(a, row);
  for (; row < a.rows; ++row) epilogue_rows<V, kActivation, kBiased, 1>(a, row);
}

}  // namespace spin
