// CPU kernels of repeat_weight: tensors in, raw pointers to csrc/core.
#include "../core/repeat.h"
#include "tensors.h"

namespace spin {
namespace {

struct Call {
  RepeatShape shape;
  RepeatWeights weights;
  Keep keep;
};

Call read(const Tensor& weight, const std::optional<Tensor>& alpha, const std::optional<Tensor>& beta,
          const std::optional<Tensor>& gate, int64_t out, int64_t in) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0 && out > 0 && in > 0 &&
                      out <= (int64_t(1) << 60) / in / (weight.size(2) * weight.size(3)),
                  "weight: expected shape (o, i, kh, kw) and sizes of the result above 0");
  STD_TORCH_CHECK(alpha.has_value() == beta.has_value() && !(alpha && gate), "gate: expected alpha and beta, or gate");
  Call call{{weight.size(0), weight.size(1), out, in, weight.size(2) * weight.size(3)}, {}, {}};
  RepeatWeights& w = call.weights;
  const int64_t rows = call.shape.row_tiles(), columns = call.shape.column_tiles();
  w.type = dtype_of(weight, "weight");
  w.base =
      data_of(weight, w.type, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, "weight", call.keep);
  w.alpha = floats_of(alpha, {rows, columns}, "alpha", call.keep);
  w.beta = floats_of(beta, {rows, columns}, "beta", call.keep);
  w.gate = data_of(gate, w.type, {out, in, weight.size(2), weight.size(3)}, "gate", call.keep);
  return call;
}

// A new tensor of the shape; large ones from the workspaces' pool.
Tensor shaped(const Tensor& like, int64_t out, int64_t in, const Tensor& weight) {
  const int64_t sizes[] = {out, in, weight.size(2), weight.size(3)};
  const Tensor flat = pooled(like, out * in * sizes[2] * sizes[3], size_of(dtype_of(like, "weight")));
  return torch::stable::view(flat, {sizes, 4});
}

Tensor repeat(const Tensor& weight, const std::optional<Tensor>& alpha, const std::optional<Tensor>& beta,
              const std::optional<Tensor>& gate, int64_t out, int64_t in) {
  return within_memory("weight", [&] {
    const Call call = read(weight, alpha, beta, gate, out, in);
    Tensor result = shaped(weight, out, in, weight);
    repeat_weight(weight_kernels(), call.shape, call.weights, mutable_bytes(result), torch_parallel());
    return result;
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> repeat_backward(const Tensor& grad, const Tensor& weight,
                                                           const std::optional<Tensor>& alpha,
                                                           const std::optional<Tensor>& beta,
                                                           const std::optional<Tensor>& gate, int64_t out, int64_t in) {
  return within_memory("weight", [&] {
    Call call = read(weight, alpha, beta, gate, out, in);
    const char* gradient =
        data_of(grad, call.weights.type, {out, in, weight.size(2), weight.size(3)}, "grad", call.keep);
    Tensor to_weight = shaped(weight, weight.size(0), weight.size(1), weight);
    auto none = [&] { return new_tensor(grad, {0}, grad.scalar_type()); };
    const std::vector<int64_t> tiles{call.shape.row_tiles(), call.shape.column_tiles()};
    Tensor to_alpha = alpha ? new_tensor(*alpha, tiles, ScalarType::Float) : none();
    Tensor to_beta = beta ? new_tensor(*beta, tiles, ScalarType::Float) : none();
    Tensor to_gate = gate ? shaped(*gate, out, in, weight) : none();
    fill_as_floats(to_weight, call.weights.type, [&](float* floats) {
      repeat_weight_backward(weight_kernels(), call.shape, call.weights, gradient, floats, mutable_floats(to_alpha),
                             mutable_floats(to_beta), mutable_bytes(to_gate), torch_parallel());
    });
    return std::make_tuple(to_weight, to_alpha, to_beta, to_gate);
  });
}

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_IMPL(spin, CPU, m) {
  m.impl("_repeat_weight_cpu", TORCH_BOX(&spin::repeat));
  m.impl("_repeat_weight_backward_cpu", TORCH_BOX(&spin::repeat_backward));
}
