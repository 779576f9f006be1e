// The CUDA part of the operators: loaded by spin_kernels where torch has CUDA. It reports what it was built
// for; kernels register themselves beside it.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

namespace spin {
namespace {

// Version of the CUDA runtime this library carries, e.g. 13000.
int64_t cuda_runtime_version() { return CUDART_VERSION; }

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_FRAGMENT(spin, m) { m.def("_cuda_runtime_version() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(spin, CompositeExplicitAutograd, m) {
  m.impl("_cuda_runtime_version", TORCH_BOX(&spin::cuda_runtime_version));
}
