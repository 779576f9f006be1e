// The CUDA kernels of the mixer operators: tensors in, raw pointers to csrc/cuda.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/mixer.h"
#include "mixer_arguments.h"

namespace spin {
namespace {

Tensor mixer_cuda(const Tensor& x, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                  const Tensor& dw_affine, const Tensor& pw_weight, const std::optional<Tensor>& pw_bias,
                  const Tensor& pw_affine, const std::optional<Tensor>& pw_coefficients,
                  const std::optional<Tensor>& pw_gain, const std::vector<int64_t>& pw_index,
                  const std::optional<std::vector<int64_t>>& dw_index, const std::string& activation,
                  bool pw_residual) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Mixer m = read_mixer(dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain, pw_index,
                       dw_index, activation, pw_residual, /*cuda=*/true);
  const NetworkShape& s = m.shape;
  check_input(x, s, /*cuda=*/true);
  const int64_t batch = x.size(0), C = s.channels, height = x.size(2), width = x.size(3);
  const auto tokens = [&] { return empty_like(x, {batch, height, width, C}); };
  const Tensor out = tokens(), buffers[] = {tokens(), tokens()};
  const Tensor taps = empty_like(dw_weight, {s.filters, hopper::taps_of(C, s.kernel_size)});
  const Tensor composed = empty_like(pw_weight, {pw_coefficients ? s.matrices : 0, C, C});
  const char* input = data_of(channels_to_last(x), s.type, {batch, height, width, C}, "x", m.keep);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const std::string error = hopper::run({s,
                                         m.weights,
                                         batch,
                                         height,
                                         width,
                                         input,
                                         mutable_bytes(out),
                                         {mutable_bytes(buffers[0]), mutable_bytes(buffers[1])},
                                         mutable_bytes(taps),
                                         mutable_bytes(composed),
                                         stream});
  STD_TORCH_CHECK(error.empty(), "x: the CUDA kernel could not be launched: ", error);

  const Tensor y = channels_to_front(out);
  return is_channels_last(x) ? y : torch::stable::contiguous(y);
}

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_IMPL(spin, CUDA, m) { m.impl("_mixer_cuda", TORCH_BOX(&spin::mixer_cuda)); }
