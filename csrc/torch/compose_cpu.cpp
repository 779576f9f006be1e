// CPU kernels of compose_superweights: tensors in, raw pointers to csrc/core.
#include "../core/compose.h"
#include "../core/run.h"
#include "tensors.h"

namespace spin {
namespace {

const Kernels& kernels() { return select_kernels(DType::kFloat32, forced_isa()); }

struct Call {
  Composition composition;
  DType type;
  const char* bank;
  const float* coefficients;
  std::vector<Tensor> keep;
};

Call read(const Tensor& bank, const Tensor& coefficients, const std::vector<int64_t>& pieces,
          const std::vector<int64_t>& shapes) {
  Call call{Composition(pieces, shapes), dtype_of(bank, "bank"), nullptr, nullptr, {}};
  STD_TORCH_CHECK(call.composition.bank_end() <= bank.numel(), "pieces: expected a bank of at least ",
                  call.composition.bank_end(), " elements, got ", bank.numel());
  STD_TORCH_CHECK(call.composition.coefficient_end() <= coefficients.numel(), "pieces: expected at least ",
                  call.composition.coefficient_end(), " coefficients, got ", coefficients.numel());
  call.bank = data_of(bank, call.type, {bank.numel()}, "bank", call.keep);
  call.coefficients = floats_of(coefficients, {coefficients.numel()}, "coefficients", call.keep);
  return call;
}

Tensor compose(const Tensor& bank, const Tensor& coefficients, std::vector<int64_t> pieces,
               std::vector<int64_t> shapes) {
  return within_memory("pieces", [&] {
    const Call call = read(bank, coefficients, pieces, shapes);
    Tensor result = pooled(bank, call.composition.numel(), size_of(call.type));
    call.composition.run(kernels(), call.type, call.bank, call.coefficients,
                         static_cast<char*>(result.mutable_data_ptr()), torch_parallel());
    return result;
  });
}

std::tuple<Tensor, Tensor> compose_backward(const Tensor& grad, const Tensor& bank, const Tensor& coefficients,
                                            std::vector<int64_t> pieces, std::vector<int64_t> shapes) {
  return within_memory("pieces", [&] {
    Call call = read(bank, coefficients, pieces, shapes);
    const char* gradient = data_of(grad, call.type, {call.composition.numel()}, "grad", call.keep);
    const int64_t size = bank.numel(), bytes = size_of(call.type);
    Tensor to_bank = pooled(bank, size, bytes);
    Tensor to_coefficients = new_tensor(coefficients, {coefficients.numel()}, ScalarType::Float);
    char* out = static_cast<char*>(to_bank.mutable_data_ptr());
    const bool narrow = call.type != DType::kFloat32;
    const Workspace wide(narrow ? 4 * round_up(size, 64) : 0);
    call.composition.backward(kernels(), call.type, gradient, call.bank, call.coefficients,
                              reinterpret_cast<float*>(narrow ? wide.data() : out), size,
                              static_cast<float*>(to_coefficients.mutable_data_ptr()), coefficients.numel(),
                              torch_parallel());
    if (narrow) kernels().narrow(reinterpret_cast<const float*>(wide.data()), call.type, size, out);
    return std::make_tuple(to_bank, to_coefficients);
  });
}

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_IMPL(spin, CPU, m) {
  m.impl("_compose_superweights_cpu", TORCH_BOX(&spin::compose));
  m.impl("_compose_superweights_backward_cpu", TORCH_BOX(&spin::compose_backward));
}
