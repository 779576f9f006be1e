// CPU kernels of compose_superweights: tensors in, raw pointers to csrc/core.
#include "../core/compose.h"
#include "tensors.h"

namespace spin {
namespace {

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
    call.composition.run(weight_kernels(), call.type, call.bank, call.coefficients, mutable_bytes(result),
                         torch_parallel());
    return result;
  });
}

std::tuple<Tensor, Tensor> compose_backward(const Tensor& grad, const Tensor& bank, const Tensor& coefficients,
                                            std::vector<int64_t> pieces, std::vector<int64_t> shapes) {
  return within_memory("pieces", [&] {
    Call call = read(bank, coefficients, pieces, shapes);
    const char* gradient = data_of(grad, call.type, {call.composition.numel()}, "grad", call.keep);
    Tensor to_bank = pooled(bank, bank.numel(), size_of(call.type));
    Tensor to_coefficients = new_tensor(coefficients, {coefficients.numel()}, ScalarType::Float);
    fill_as_floats(to_bank, call.type, [&](float* floats) {
      call.composition.backward(weight_kernels(), call.type, gradient, call.bank, call.coefficients, floats,
                                bank.numel(), mutable_floats(to_coefficients), coefficients.numel(), torch_parallel());
    });
    return std::make_tuple(to_bank, to_coefficients);
  });
}

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_IMPL(spin, CPU, m) {
  m.impl("_compose_superweights_cpu", TORCH_BOX(&spin::compose));
  m.impl("_compose_superweights_backward_cpu", TORCH_BOX(&spin::compose_backward));
}
