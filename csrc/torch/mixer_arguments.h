// The arguments of a mixer, the same for every backend, as csrc/core describes them.
#pragma once
#include <string>

#include "../core/run.h"
#include "tensors.h"

namespace spin {

inline Activation activation_of(const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  if (name == "silu") return Activation::kSilu;
  STD_TORCH_CHECK(name == "identity", "activation: expected gelu, gelu_tanh, relu, silu or identity, got ", name);
  return Activation::kIdentity;
}

struct Mixer {
  NetworkShape shape;
  MixerWeights weights;
  Keep keep;
};

inline Mixer read_mixer(const Tensor& dw_weight, const std::optional<Tensor>& dw_bias, const Tensor& dw_affine,
                        const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Tensor& pw_affine,
                        const std::optional<Tensor>& pw_coefficients, const std::optional<Tensor>& pw_gain,
                        const std::vector<int64_t>& pw_index, const std::optional<std::vector<int64_t>>& dw_index,
                        const std::string& activation, bool pw_residual, bool cuda = false) {
  STD_TORCH_CHECK(dw_weight.dim() == 4, "dw_weight: expected rank 4");
  STD_TORCH_CHECK(pw_weight.dim() == 3, "pw_weight: expected rank 3");
  STD_TORCH_CHECK(!pw_coefficients || pw_coefficients->dim() == 2, "pw_coefficients: expected rank 2");
  STD_TORCH_CHECK(!pw_coefficients || pw_weight.size(0) >= 1, "pw_weight: expected at least one template");
  Mixer m;
  m.keep.cuda = cuda;
  NetworkShape& s = m.shape;
  s.filters = dw_weight.size(0), s.channels = dw_weight.size(1), s.kernel_size = dw_weight.size(2);
  s.depth = int64_t(pw_index.size());
  s.matrices = pw_coefficients ? pw_coefficients->size(0) : pw_weight.size(0);
  s.pw_index = pw_index;
  s.activation = activation_of(activation), s.pw_residual = pw_residual;
  s.type = dtype_of(dw_weight, "dw_weight");
  STD_TORCH_CHECK(s.channels >= 1 && s.channels <= kMaxChannels, "dw_weight: expected 1 to ", kMaxChannels,
                  " channels");
  STD_TORCH_CHECK(s.kernel_size % 2 == 1 && s.kernel_size <= kMaxKernelSize,
                  "dw_weight: expected an odd kernel size up to ", kMaxKernelSize);
  if (dw_index) {
    s.dw_index = *dw_index;
  } else {
    for (int64_t d = 0; d < s.depth; ++d) s.dw_index.push_back(d);
  }
  STD_TORCH_CHECK(int64_t(s.dw_index.size()) == s.depth, "dw_index: expected one entry per block");
  for (int64_t d = 0; d < s.depth; ++d) {
    STD_TORCH_CHECK(s.dw_index[d] >= 0 && s.dw_index[d] < s.filters, "dw_index: out of range");
    STD_TORCH_CHECK(s.pw_index[d] >= 0 && s.pw_index[d] < s.matrices, "pw_index: out of range");
  }
  const int64_t C = s.channels, k = s.kernel_size, D = s.depth;
  MixerWeights& w = m.weights;
  w.type = s.type;
  w.templates = pw_weight.size(0);
  w.dw_weight = data_of(dw_weight, s.type, {s.filters, C, k, k}, "dw_weight", m.keep);
  w.dw_bias = data_of(dw_bias, s.type, {s.filters, C}, "dw_bias", m.keep);
  w.dw_affine = floats_of(dw_affine, {D, 2, C}, "dw_affine", m.keep);
  w.pw_weight = data_of(pw_weight, s.type, {w.templates, C, C}, "pw_weight", m.keep);
  w.pw_bias = data_of(pw_bias, s.type, {s.matrices, C}, "pw_bias", m.keep);
  w.pw_affine = floats_of(pw_affine, {D, 2, C}, "pw_affine", m.keep);
  w.pw_coefficients = floats_of(pw_coefficients, {s.matrices, w.templates}, "pw_coefficients", m.keep);
  w.pw_gain = floats_of(pw_gain, {D, C}, "pw_gain", m.keep);
  return m;
}

inline Tensor empty_like(const Tensor& t, std::vector<int64_t> shape) {
  return torch::stable::new_empty(t, {shape.data(), shape.size()});
}

// Results are channels_last when x is channels_last-contiguous and not contiguous.
inline bool is_channels_last(const Tensor& x) {
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  auto fits = [](int64_t size, int64_t stride, int64_t expected) { return size == 1 || stride == expected; };
  return fits(C, x.stride(1), 1) && fits(W, x.stride(3), C) && fits(H, x.stride(2), W * C) &&
         fits(B, x.stride(0), H * W * C) && !x.is_contiguous();
}

// Views of (B, C, H, W) as (B, H, W, C) and back.
inline Tensor channels_to_last(const Tensor& t) {
  return torch::stable::transpose(torch::stable::transpose(t, 1, 2), 2, 3);
}
inline Tensor channels_to_front(const Tensor& t) {
  return torch::stable::transpose(torch::stable::transpose(t, 2, 3), 1, 2);
}

inline Tensor output_for(const Tensor& x) {
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  return is_channels_last(x) ? channels_to_front(empty_like(x, {B, H, W, C})) : empty_like(x, {B, C, H, W});
}

inline void check_input(const Tensor& x, const NetworkShape& shape, bool cuda = false) {
  Keep{cuda, {}}.check(x, "x");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) == shape.channels && x.size(2) >= 1 && x.size(3) >= 1,
                  "x: expected shape (batch, ", shape.channels, ", height, width)");
  STD_TORCH_CHECK(dtype_of(x, "x") == shape.type, "x: expected the dtype of the weights");
}

}  // namespace spin
