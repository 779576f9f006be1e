// CPU kernels of the mixer operators: tensors in, raw pointers to csrc/core.
#include "../core/train.h"
#include "mixer_arguments.h"

namespace spin {
namespace {

External view_of(const Tensor& t, DType type) {  // of the first image of a (B, C, H, W) tensor
  return {
      static_cast<char*>(t.data_ptr()), type, t.size(1), t.size(2), t.size(3), t.stride(1), t.stride(2), t.stride(3)};
}

Batch batch_of(const Tensor& x, const Tensor& y, DType type) {
  return {x.size(0), view_of(x, type), x.stride(0), view_of(y, type), y.stride(0)};
}

Tensor mixer_cpu(const Tensor& x, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                 const Tensor& dw_affine, const Tensor& pw_weight, const std::optional<Tensor>& pw_bias,
                 const Tensor& pw_affine, const std::optional<Tensor>& pw_coefficients,
                 const std::optional<Tensor>& pw_gain, const std::vector<int64_t>& pw_index,
                 const std::optional<std::vector<int64_t>>& dw_index, const std::string& activation, bool pw_residual) {
  const Mixer m = read_mixer(dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain,
                             pw_index, dw_index, activation, pw_residual);
  check_input(x, m.shape);
  return within_memory("x", [&] {
    Tensor y = output_for(x);
    run_unpacked(select_kernels(m.shape.type, forced_isa()), m.shape, m.weights, batch_of(x, y, m.shape.type),
                 torch_parallel());
    return y;
  });
}

// ---- training ----

TrainingCall training_call(const Mixer& m, const Tensor& x, std::optional<double> eps, const Tensor& dw_stats,
                           const Tensor& pw_stats, int64_t kept, const Tensor& saved) {
  check_input(x, m.shape);
  return {m.shape,
          m.weights,
          x.size(0),
          view_of(x, m.shape.type),
          x.stride(0),
          eps ? std::optional<float>(float(*eps)) : std::nullopt,
          static_cast<float*>(dw_stats.data_ptr()),
          static_cast<float*>(pw_stats.data_ptr()),
          kept,
          static_cast<char*>(saved.data_ptr())};
}

const Kernels& training_kernels(DType type) { return select_training_kernels(type, forced_isa()); }

using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors9 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensors4 mixer_train_cpu(const Tensor& x, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                         const Tensor& dw_affine, const Tensor& pw_weight, const std::optional<Tensor>& pw_bias,
                         const Tensor& pw_affine, const std::optional<Tensor>& pw_coefficients,
                         const std::optional<Tensor>& pw_gain, const std::vector<int64_t>& pw_index,
                         const std::optional<std::vector<int64_t>>& dw_index, const std::string& activation,
                         bool pw_residual, std::optional<double> eps, int64_t save) {
  const Mixer m = read_mixer(dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain,
                             pw_index, dw_index, activation, pw_residual);
  check_input(x, m.shape);
  STD_TORCH_CHECK(save >= 0 && save <= 2, "save: expected 0, 1 or 2 tensors per block, got ", save);
  return within_memory("x", [&] {
    const int64_t depth = m.shape.depth, tokens = x.size(0) * x.size(2) * x.size(3);
    const std::vector<int64_t> stats = eps ? std::vector<int64_t>{depth, 2, m.shape.channels} : std::vector<int64_t>{0};
    Tensor y = output_for(x), dw_stats = new_tensor(x, stats, ScalarType::Float),
           pw_stats = new_tensor(x, stats, ScalarType::Float),
           saved = pooled(x, saved_elements(m.shape, save, tokens), size_of(m.shape.type));
    if (tokens > 0) {
      train_forward(training_kernels(m.shape.type), training_call(m, x, eps, dw_stats, pw_stats, save, saved),
                    view_of(y, m.shape.type), y.stride(0), torch_parallel());
    }
    return Tensors4{y, dw_stats, pw_stats, saved};
  });
}

Tensor zeros_like(const std::optional<Tensor>& t, const Tensor& like) {
  if (!t) return new_tensor(like, {0}, ScalarType::Float);
  Tensor zeros = new_tensor(*t, {t->sizes().begin(), t->sizes().end()}, t->scalar_type());
  return torch::stable::zero_(zeros);
}

Tensors9 mixer_backward_cpu(const Tensor& grad, const Tensor& dw_stats, const Tensor& pw_stats, const Tensor& saved,
                            const Tensor& x, const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                            const Tensor& dw_affine, const Tensor& pw_weight, const std::optional<Tensor>& pw_bias,
                            const Tensor& pw_affine, const std::optional<Tensor>& pw_coefficients,
                            const std::optional<Tensor>& pw_gain, const std::vector<int64_t>& pw_index,
                            const std::optional<std::vector<int64_t>>& dw_index, const std::string& activation,
                            bool pw_residual, std::optional<double> eps) {
  const Mixer m = read_mixer(dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain,
                             pw_index, dw_index, activation, pw_residual);
  check_input(x, m.shape);
  check_input(grad, m.shape);
  const int64_t tokens = x.size(0) * x.size(2) * x.size(3), stats = eps ? m.shape.depth * 2 * m.shape.channels : 0;
  for (int64_t i = 0; i < 4; ++i) STD_TORCH_CHECK(grad.size(i) == x.size(i), "grad: expected the shape of x");
  const int64_t kept = saved.numel() == saved_elements(m.shape, 1, tokens) ? 1 : 2;
  for (const Tensor* t : {&saved, &dw_stats, &pw_stats}) m.keep.check(*t, "saved, dw_stats, pw_stats");
  STD_TORCH_CHECK(dtype_of(saved, "saved") == m.shape.type && saved.is_contiguous() &&
                      saved.numel() == saved_elements(m.shape, kept, tokens),
                  "saved: expected what the forward pass with the same arguments saved");
  for (const Tensor* t : {&dw_stats, &pw_stats}) {
    STD_TORCH_CHECK(dtype_of(*t, "stats") == DType::kFloat32 && t->is_contiguous() && t->numel() == stats,
                    "dw_stats, pw_stats: expected what the forward pass with the same arguments returned");
  }
  return within_memory("x", [&] {
    Tensor x_grad = output_for(x);
    Tensors9 grads{x_grad,
                   zeros_like(dw_weight, x),
                   zeros_like(dw_bias, x),
                   zeros_like(dw_affine, x),
                   zeros_like(pw_weight, x),
                   zeros_like(pw_bias, x),
                   zeros_like(pw_affine, x),
                   zeros_like(pw_coefficients, x),
                   zeros_like(pw_gain, x)};
    if (tokens == 0) return grads;
    const MixerGradients out{view_of(x_grad, m.shape.type),      x_grad.stride(0),
                             mutable_bytes(std::get<1>(grads)),  mutable_bytes(std::get<2>(grads)),
                             mutable_floats(std::get<3>(grads)), mutable_bytes(std::get<4>(grads)),
                             mutable_bytes(std::get<5>(grads)),  mutable_floats(std::get<6>(grads)),
                             mutable_floats(std::get<7>(grads)), mutable_floats(std::get<8>(grads))};
    train_backward(training_kernels(m.shape.type), training_call(m, x, eps, dw_stats, pw_stats, kept, saved),
                   view_of(grad, m.shape.type), grad.stride(0), out, torch_parallel());
    return grads;
  });
}

// ---- frozen networks ----

Tensor pack(const Tensor& like, NetworkShape shape, const MixerWeights& weights, const EndWeights* ends) {
  const Kernels& kernels = select_kernels(shape.type, forced_isa());
  const int64_t matrices = shape.matrices;
  const MatrixForm form = frozen_form(shape);
  Network network(kernels, std::move(shape), matrices, form);
  const int64_t bytes = blob_bytes(network);
  Tensor blob = torch::stable::new_empty(like, {&bytes, 1}, ScalarType::Byte);
  char* data = mutable_bytes(blob);
  advise_huge_pages(data, bytes);
  write_blob_header(network, data);
  network.bind(data + bytes - network.bytes());
  if (ends) network.pack_ends(*ends);
  const int64_t parameters = network.parameter_items(), parts = network.matrix_items();
  torch::stable::parallel_for(0, parameters + matrices * parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      if (item < parameters) {
        network.pack_parameters(weights, item);
      } else {
        const int64_t matrix = (item - parameters) / parts;
        network.pack_matrix(weights, matrix, matrix, (item - parameters) % parts);
      }
    }
  });
  return blob;
}

Network open(const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "packed: expected the contiguous uint8 CPU tensor that freeze() made");
  return open_blob(static_cast<char*>(packed.data_ptr()), packed.numel());
}

Tensor pack_mixer(const Tensor& dw_weight, const std::optional<Tensor>& dw_bias, const Tensor& dw_affine,
                  const Tensor& pw_weight, const std::optional<Tensor>& pw_bias, const Tensor& pw_affine,
                  const std::optional<Tensor>& pw_coefficients, const std::optional<Tensor>& pw_gain,
                  const std::vector<int64_t>& pw_index, const std::optional<std::vector<int64_t>>& dw_index,
                  const std::string& activation, bool pw_residual) {
  const Mixer m = read_mixer(dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain,
                             pw_index, dw_index, activation, pw_residual);
  return pack(dw_weight, m.shape, m.weights, nullptr);
}

Tensor frozen_mixer(const Tensor& x, const Tensor& packed) {
  Network network = open(packed);
  STD_TORCH_CHECK(!network.shape().whole(), "packed: expected a frozen mixer, got a whole frozen network");
  check_input(x, network.shape());
  return within_memory("x", [&] {
    Tensor y = output_for(x);
    run_packed(network, batch_of(x, y, network.shape().type), torch_parallel());
    return y;
  });
}

Tensor pack_network(const Tensor& patch_weight, const std::optional<Tensor>& patch_bias, const Tensor& patch_affine,
                    int64_t patch_stride, int64_t patch_padding, const Tensor& head_weight,
                    const std::optional<Tensor>& head_bias, const Tensor& dw_weight,
                    const std::optional<Tensor>& dw_bias, const Tensor& dw_affine, const Tensor& pw_weight,
                    const std::optional<Tensor>& pw_bias, const Tensor& pw_affine,
                    const std::optional<Tensor>& pw_coefficients, const std::optional<Tensor>& pw_gain,
                    const std::vector<int64_t>& pw_index, const std::optional<std::vector<int64_t>>& dw_index,
                    const std::string& activation, bool pw_residual) {
  Mixer m = read_mixer(dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain, pw_index,
                       dw_index, activation, pw_residual);
  NetworkShape& s = m.shape;
  STD_TORCH_CHECK(patch_weight.dim() == 4 && head_weight.dim() == 2,
                  "patch_weight, head_weight: expected ranks 4 and 2");
  s.in_channels = patch_weight.size(1), s.patch = patch_weight.size(2), s.classes = head_weight.size(0);
  s.patch_stride = patch_stride, s.patch_padding = patch_padding;
  STD_TORCH_CHECK(s.in_channels >= 1 && s.in_channels <= 1024 && s.patch >= 1 && s.patch <= 64,
                  "patch_weight: expected 1 to 1024 input channels and a patch of 1 to 64");
  STD_TORCH_CHECK(patch_stride >= 1 && patch_stride <= 1024 && patch_padding >= 0 && patch_padding <= 1024,
                  "patch_stride, patch_padding: out of range");
  STD_TORCH_CHECK(s.classes >= 1 && s.classes <= (1 << 20), "head_weight: expected 1 to ", 1 << 20, " classes");
  EndWeights ends;
  Keep keep;
  ends.patch_weight =
      data_of(patch_weight, s.type, {s.channels, s.in_channels, s.patch, s.patch}, "patch_weight", keep);
  ends.patch_bias = data_of(patch_bias, s.type, {s.channels}, "patch_bias", keep);
  ends.patch_affine = floats_of(patch_affine, {2, s.channels}, "patch_affine", keep);
  ends.head_weight = data_of(head_weight, s.type, {s.classes, s.channels}, "head_weight", keep);
  ends.head_bias = data_of(head_bias, s.type, {s.classes}, "head_bias", keep);
  return pack(patch_weight, s, m.weights, &ends);
}

Tensor frozen_network(const Tensor& image, const Tensor& packed, int64_t num_classes) {
  Network network = open(packed);
  const NetworkShape& s = network.shape();
  STD_TORCH_CHECK(s.whole(), "packed: expected a whole frozen network, got a frozen mixer");
  STD_TORCH_CHECK(num_classes == s.classes, "num_classes: expected ", s.classes, ", got ", num_classes);
  STD_TORCH_CHECK(image.dim() == 4 && image.size(1) == s.in_channels, "image: expected shape (batch, ", s.in_channels,
                  ", height, width)");
  STD_TORCH_CHECK(image.size(2) + 2 * s.patch_padding >= s.patch && image.size(3) + 2 * s.patch_padding >= s.patch,
                  "image: expected height and width of at least one patch of ", s.patch, " pixels, got ", image.size(2),
                  " x ", image.size(3));
  Keep{}.check(image, "image");
  const DType type = dtype_of(image, "image");
  STD_TORCH_CHECK(type == s.type || type == DType::kFloat32, "image: expected float32 or the dtype of the weights");
  Tensor logits = empty_like(image, {image.size(0), s.classes});
  External out{mutable_bytes(logits), type, s.classes, 1, 1, 1, 0, 0};
  run_packed(network, {image.size(0), view_of(image, type), image.stride(0), out, s.classes}, torch_parallel());
  return logits;
}

std::string cpu_isa(std::string dtype, bool training) {
  const DType type = dtype == "bfloat16" ? DType::kBFloat16 : dtype == "float16" ? DType::kFloat16 : DType::kFloat32;
  return (training ? select_training_kernels : select_kernels)(type, forced_isa()).name;
}

int64_t release_workspace() { return Workspace::release_pool(); }

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_IMPL(spin, CPU, m) {
  m.impl("_mixer_cpu", TORCH_BOX(&spin::mixer_cpu));
  m.impl("_mixer_train_cpu", TORCH_BOX(&spin::mixer_train_cpu));
  m.impl("_mixer_backward_cpu", TORCH_BOX(&spin::mixer_backward_cpu));
  m.impl("_frozen_mixer", TORCH_BOX(&spin::frozen_mixer));
  m.impl("_frozen_network", TORCH_BOX(&spin::frozen_network));
  m.impl("_pack_mixer", TORCH_BOX(&spin::pack_mixer));
  m.impl("_pack_network", TORCH_BOX(&spin::pack_network));
}

STABLE_TORCH_LIBRARY_IMPL(spin, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&spin::cpu_isa));
  m.impl("_release_workspace", TORCH_BOX(&spin::release_workspace));
}
