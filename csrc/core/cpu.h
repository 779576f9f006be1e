// Which instruction sets this processor has, and which kernels a call takes.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace spin {

struct CpuFeatures {
  std::string vendor;  // "intel", "amd" or "other"
  bool avx2_fma, avx512, avx512_bf16;
  bool amx_bf16;       // and the system lets this process use it
  bool few_l1_misses;  // at a time: what is asked for far ahead had better stop in L2
};
const CpuFeatures& cpu_features();

// Of a block's y or its panels: what one core's L2 holds beside the rows of weights that stream through it, or an L3
// soon gives again.
int64_t band_bytes();

// Names that SPIN_CPU_ISA accepts here, slowest first.
std::vector<std::string> available_isas();

// Kernels for tensors of `type`. `isa` empty: the fastest. Throws std::runtime_error when `isa` is not a
// name or not there. float16, and bf16 without useful bf16 instructions, run in float32 kernels that
// convert on the way in and out.
const Kernels& select_kernels(DType type, const std::string& isa);
// The same for training: the chain is float32, at most the operands of products are bf16.
const Kernels& select_training_kernels(DType type, const std::string& isa);

// The value of the environment variable SPIN_CPU_ISA, empty when it is not set.
std::string forced_isa();

}  // namespace spin
