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

// The same for all rows.
template <class V, bool kBiased>
struct EpilogueVectors {
  typename V::F gain, bias, scale, shift;
  explicit SPIN_INLINE EpilogueVectors(const EpilogueArgs& a) : scale(V::load(a.scale)), shift(V::load(a.shift)) {
    if constexpr (!kBiased) gain = V::load(a.gain), bias = V::load(a.bias);
  }
};

// One vector of channels: kRows rows from `row` on.
template <class V, Activation kActivation, bool kBiased, int kRows>
SPIN_INLINE void epilogue_rows(const EpilogueArgs& a, const EpilogueVectors<V, kBiased>& by, int64_t row) {
  using S = Several<V, kRows>;
  auto value = S::make([&](int i) { return V::load(a.sums + (row + i) * a.sum_stride); });
  if constexpr (!kBiased) value = S::fma(value, S::all(by.gain), S::all(by.bias));
  value = S::fma(activate<S, kActivation>(value), S::all(by.scale), S::all(by.shift));
  S::visit(value, [&](int i, typename V::F y) {
    const int64_t place = (row + i) * a.row_bytes;
    V::store_chain(a.output + place, a.residual ? V::add(y, V::load_chain(a.residual + place)) : y);
  });
}

// Not inlined: in a function of its own the tables of gelu and the four vectors stay in registers. One per kind of
// operands: those of bf16 are compiled with instructions that a processor with V alone may not have, and of two
// functions of one name the linker keeps either.
template <class V, Activation kActivation, bool kBiased, class Operands>
__attribute__((noinline)) void epilogue(const EpilogueArgs& args) {
  const EpilogueArgs a = args;  // what is stored could change the one behind the reference
  const EpilogueVectors<V, kBiased> by(a);
  int64_t row = 0;
  for (; row + V::kTogether <= a.rows; row += V::kTogether)
    epilogue_rows<V, kActivation, kBiased, V::kTogether>(a, by, row);
  for (; row < a.rows; ++row) epilogue_rows<V, kActivation, kBiased, 1>(a, by, row);
}

}  // namespace spin
