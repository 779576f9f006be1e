// Training: the blocks' forward pass that keeps what the backward pass needs, and the backward pass. With `eps` the
// activations are normalised by their statistics over the batch, without by the given affines (frozen statistics).
#pragma once
#include <optional>

#include "network.h"
#include "team.h"

namespace spin {

// What both directions see. Everything contiguous and plain but the input.
struct TrainingCall {
  NetworkShape shape;
  MixerWeights weights;
  int64_t batch;
  External input;  // of the first image
  int64_t input_stride;
  std::optional<float> eps;
  float *dw_stats, *pw_stats;  // (depth, 2, channels): mean, biased variance; written forward, read backward
  int64_t kept;                // pre-activations per block that are saved: 0 (no backward pass), 1 (the product's) or 2
  char* saved;                 // saved_elements() of the shape's type
};

// What is kept, and with pw_residual every eighth input of a block too. Channels in whole vectors of any instruction
// set.
int64_t saved_elements(const NetworkShape& shape, int64_t kept, int64_t tokens);

void train_forward(const Kernels& kernels, const TrainingCall& call, const External& output, int64_t output_stride,
                   const Parallel& parallel);

// Gradients in the types of what they belong to, null where that is absent. Matrices and filters that no block uses
// get zeros.
struct MixerGradients {
  External x;
  int64_t x_stride;
  char *dw_weight, *dw_bias;
  float* dw_affine;
  char *pw_weight, *pw_bias;
  float *pw_affine, *pw_coefficients, *pw_gain;
};

void train_backward(const Kernels& kernels, const TrainingCall& call, const External& gradient, int64_t gradient_stride,
                    const MixerGradients& gradients, const Parallel& parallel);

}  // namespace spin
