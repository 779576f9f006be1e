// A chain of mixer blocks, with or without a patch embedding in front and a classifier behind, in the form
// that the kernels read: everything in one block of memory, position independent.
#pragma once
#include <string>
#include <vector>

#include "cpu.h"
#include "kernels.h"
#include "strassen.h"

namespace spin {

struct NetworkShape {
  int64_t channels = 0, kernel_size = 0, depth = 0;
  int64_t filters = 0, matrices = 0;        // distinct depthwise filters, distinct pointwise matrices
  std::vector<int64_t> dw_index, pw_index;  // which of them block d uses; `depth` entries each
  Activation activation = Activation::kGelu;
  bool pw_residual = false;
  DType type = DType::kFloat32;  // of the tensors outside
  // Patch embedding and classifier: both or none (patch = 0).
  int64_t in_channels = 0, patch = 0, patch_stride = 0, patch_padding = 0, classes = 0;

  bool whole() const { return patch > 0; }
};

// Plain tensors, contiguous, in the shapes of the operator's documentation. Null where optional and absent.
struct MixerWeights {
  DType type;
  const char *dw_weight, *dw_bias;
  const float* dw_affine;
  const char *pw_weight, *pw_bias;
  const float* pw_affine;
  const float* pw_coefficients;
  int64_t templates;
  const float* pw_gain;
};
struct EndWeights {
  const char *patch_weight, *patch_bias;
  const float* patch_affine;  // (2, channels): scale, shift
  const char *head_weight, *head_bias;
};

constexpr int64_t kSmallMatrix = 1 << 20;   // an L2 keeps it beside the rest
constexpr int64_t kStrassenChannels = 256;  // at least; with 192 it takes 0.96 to 0.98 of the time, small images 1.08

// How the matrices in a network's memory lie (kernels.h). Quarters: panels, but larger matrices between channels in
// float32 in quarters, for Strassen's product (strassen.h).
enum class MatrixForm { kRows, kPanels, kQuarters };

// Of a frozen network: tokens of a whole one end in the same logits anyway, those of blocks alone stay apart.
inline MatrixForm frozen_form(const NetworkShape& shape) {
  return shape.whole() ? MatrixForm::kQuarters : MatrixForm::kPanels;
}

// A matrix with the four vectors of its epilogue.
struct Pointwise {
  const char* matrix;
  int64_t row_stride;  // bytes; 0: panels
  int64_t input_channels, output_channels;
  bool quartered;
  const float *bias, *gain, *scale, *shift;
};

class Network {
 public:
  // With `slots` places for pointwise matrices: shape.matrices of them, or fewer that are used in turn.
  Network(const Kernels& kernels, NetworkShape shape, int64_t slots, MatrixForm form);

  const Kernels& kernels() const { return *kernels_; }
  const NetworkShape& shape() const { return shape_; }
  int64_t bytes() const { return bytes_; }
  int64_t row_stride(int64_t inputs) const;
  int64_t matrix_bytes(int64_t inputs, int64_t outputs) const;
  // Of panels: a vector of output channels with all its inputs, and what a product takes at once.
  int64_t vector_bytes(int64_t inputs) const { return lines(inputs) * kernels_->lanes * kernels_->line_bytes; }
  Panels panels(int64_t outputs) const { return {outputs, kernels_->lanes, kernels_->panel_vectors}; }
  int64_t lines(int64_t channels) const { return ceil_div(channels, kernels_->line_channels); }
  int64_t vectors(int64_t channels) const { return ceil_div(channels, kernels_->lanes); }
  int64_t patch_inputs() const { return shape_.in_channels * shape_.patch * shape_.patch; }

  // `memory`: bytes() of it, 64-byte aligned; outlives the network's use.
  void bind(char* memory) { memory_ = memory; }

  // Whether matrices between channels lie in quarters, a panel of each after the other; of one of them.
  bool quartered() const { return quartered_; }
  int64_t quarter_bytes(int64_t vectors) const { return vectors * vector_bytes(shape_.channels / 2); }
  Panels quarter_panels() const {  // an even number: two threads have the same of them
    return {shape_.channels / 2, kernels_->lanes, kernels_->panel_vectors, 2};
  }

  // Packing, in independent items: everything but the matrices, and parts of a matrix.
  int64_t parameter_items() const { return shape_.filters + shape_.depth + shape_.matrices; }
  void pack_parameters(const MixerWeights& weights, int64_t item) const;
  int64_t matrix_items() const {
    if (quartered_) return quarter_panels().count;
    return form_ == MatrixForm::kRows ? vectors(shape_.channels) : panels(shape_.channels).count;
  }
  void pack_matrix(const MixerWeights& weights, int64_t matrix, int64_t slot, int64_t item) const;
  void pack_ends(const EndWeights& weights) const;

  // Reading.
  struct Depthwise {
    const float *taps, *bias, *scale, *shift;
  };
  Depthwise depthwise(int64_t block, int64_t line) const;
  Pointwise pointwise(int64_t block, int64_t slot) const;
  // The same with the plain matrix itself.
  Pointwise pointwise(int64_t block, const MixerWeights& weights) const;
  // Whether products can read plain matrices where they are: in the element type of the operands, rows of whole units.
  static bool reads(const Kernels& kernels, const NetworkShape& shape, const MixerWeights& weights);
  Pointwise stem() const;
  Pointwise head() const;

 private:
  char* at(int64_t offset) const { return memory_ + offset; }
  float* floats(int64_t offset) const { return reinterpret_cast<float*>(memory_ + offset); }
  void pack_panel(PackRowsArgs rows, int64_t panel, char* matrix) const;
  void pack_quarters(PackRowsArgs rows, int64_t panel, char* matrix) const;
  // Of a matrix between channels.
  int64_t pointwise_bytes() const {
    return quartered_ ? kQuarters * quarter_bytes(vectors(shape_.channels / 2))
                      : matrix_bytes(shape_.channels, shape_.channels);
  }
  int64_t padded(int64_t channels) const { return round_up(channels, kernels_->line_channels); }

  const Kernels* kernels_;
  NetworkShape shape_;
  MatrixForm form_;
  bool quartered_;
  char* memory_ = nullptr;
  int64_t bytes_ = 0;
  // Offsets in bytes.
  int64_t taps_, dw_bias_, dw_affine_, pw_bias_, pw_gain_, pw_affine_, matrices_, stem_, stem_vectors_, head_,
      head_vectors_;
};

// A frozen network is one self-describing blob: a header, the shape, then the packed memory.
int64_t blob_bytes(const Network& network);
void write_blob_header(const Network& network, char* blob);  // and binds the network to the blob
// Throws std::runtime_error for anything that write_blob_header did not write.
Network open_blob(char* blob, int64_t bytes);

}  // namespace spin
