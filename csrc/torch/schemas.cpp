// Every operator of the namespace, once. Public operators are documented in spin_kernels/functional.py;
// kernels are registered beside their code: C++ for the CPU in mixer_cpu.cpp, Python in spin_kernels/ops.py.
#include <torch/csrc/stable/library.h>

// The tensors and attributes of a mixer, in the order that all private operators share.
#define MIXER_WEIGHTS                                                                             \
  "Tensor dw_weight, Tensor? dw_bias, Tensor dw_affine, Tensor pw_weight, Tensor? pw_bias, "      \
  "Tensor pw_affine, Tensor? pw_coefficients, Tensor? pw_gain, int[] pw_index, int[]? dw_index, " \
  "str activation, bool pw_residual"
#define PUBLIC_MIXER                                                                  \
  "Tensor x, Tensor dw_weight, Tensor? dw_bias, Tensor dw_affine, Tensor pw_weight, " \
  "Tensor? pw_bias, Tensor pw_affine, int[] pw_index, *, int[]? dw_index=None, "      \
  "Tensor? pw_coefficients=None, Tensor? pw_gain=None, str activation=\"gelu\", bool pw_residual=False"
#define ENDS                                                                         \
  "Tensor patch_weight, Tensor? patch_bias, Tensor patch_affine, int patch_stride, " \
  "int patch_padding, Tensor head_weight, Tensor? head_bias, "

STABLE_TORCH_LIBRARY(spin, m) {
  m.def("shared_mixer_block(" PUBLIC_MIXER ") -> Tensor");
  m.def("shared_mixer_block_train(" PUBLIC_MIXER
        ", float eps=1e-5) -> "
        "(Tensor y, Tensor dw_stats, Tensor pw_stats)");
  m.def("compose_superweights(Tensor bank, Tensor coefficients, int[] pieces, int[] shapes) -> Tensor");
  m.def(
      "repeat_weight(Tensor weight, Tensor? alpha, Tensor? beta, Tensor? gate, int out_channels, "
      "int in_channels) -> Tensor");

  // Both of the mixers (eps None: frozen statistics, empty stats), keeping one tensor per block for backward, not two.
  m.def("_checkpointed_mixer_block(" PUBLIC_MIXER ", float? eps=None) -> (Tensor y, Tensor dw_stats, Tensor pw_stats)");
  // y, dw_stats, pw_stats and what backward needs: `save` tensors per block, 0, 1 or 2. eps None: frozen statistics.
  m.def("_mixer(Tensor x, " MIXER_WEIGHTS ", float? eps, int save) -> (Tensor, Tensor, Tensor, Tensor)");
  // Gradients of the nine tensors in order, empty for absent ones.
  m.def("_mixer_backward(Tensor grad, Tensor dw_stats, Tensor pw_stats, Tensor saved, Tensor x, " MIXER_WEIGHTS
        ", float? eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // `composition`: pieces and shapes in one text, because every pass through the dispatcher or autograd takes lists
  // apart, a network's 1,870 integers in 60 us.
  m.def("_compose_flat(Tensor bank, Tensor coefficients, str composition) -> Tensor");
  m.def("_compose_layers(Tensor bank, Tensor coefficients, str composition) -> Tensor[]");
  m.def(
      "_compose_superweights_backward(Tensor[] grads, Tensor bank, Tensor coefficients, str composition) -> "
      "(Tensor, Tensor)");
  m.def(
      "_repeat_weight_backward(Tensor grad, Tensor weight, Tensor? alpha, Tensor? beta, Tensor? gate, "
      "int out_channels, int in_channels) -> (Tensor, Tensor, Tensor, Tensor)");

  // The C++ CPU kernels: inference with frozen statistics, from plain or from packed weights.
  m.def("_mixer_cpu(Tensor x, " MIXER_WEIGHTS ") -> Tensor");
  m.def("_mixer_train_cpu(Tensor x, " MIXER_WEIGHTS ", float? eps, int save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("_mixer_backward_cpu(Tensor grad, Tensor dw_stats, Tensor pw_stats, Tensor saved, Tensor x, " MIXER_WEIGHTS
        ", float? eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("_compose_superweights_cpu(Tensor bank, Tensor coefficients, str composition, bool apart) -> Tensor[]");
  m.def(
      "_compose_superweights_backward_cpu(Tensor[] grads, Tensor bank, Tensor coefficients, str composition) -> "
      "(Tensor, Tensor)");
  m.def(
      "_plan_composition(int[] pieces, int[] shapes, int block) -> "
      "(Tensor firsts, Tensor cells, Tensor users, Tensor sums, Tensor terms, Tensor steps)");
  m.def(
      "_repeat_weight_cpu(Tensor weight, Tensor? alpha, Tensor? beta, Tensor? gate, int out_channels, "
      "int in_channels) -> Tensor");
  m.def(
      "_repeat_weight_backward_cpu(Tensor grad, Tensor weight, Tensor? alpha, Tensor? beta, Tensor? gate, "
      "int out_channels, int in_channels) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("_pack_mixer(" MIXER_WEIGHTS ") -> Tensor");
  m.def("_frozen_mixer(Tensor x, Tensor packed) -> Tensor");
  m.def("_pack_network(" ENDS MIXER_WEIGHTS ") -> Tensor");
  m.def("_frozen_network(Tensor image, Tensor packed, int num_classes) -> Tensor");
  m.def("_cpu_isa(str dtype, bool training=False) -> str");
  m.def("_release_workspace() -> int");

  // The CUDA kernel, where its library is built and loaded.
  m.def("_mixer_cuda(Tensor x, " MIXER_WEIGHTS ") -> Tensor");
}
