// The kernels that an instruction set provides, as a table of functions over raw pointers.
//
// Layout of activations ("blocked"): [line][token][lane]. A line holds `line_channels` consecutive
// channels; the pixels of a plane are its tokens, row by row. What stands in channels past the last is
// undefined (an infinity times a padding weight of zero is a NaN), and no kernel lets it reach another.
//
// Layout of a matrix ("panels"): output channels in groups of up to `panel_vectors` vectors; inside a
// panel one 4-byte unit of the input (a float, or a pair of bf16) after the other, each with the weights
// of the panel's output channels side by side: exactly the order in which the product reads them.
#pragma once
#include "types.h"

namespace spin {

// out = scale * act(gain * (W in) + bias) + shift (+ residual), for the channels of one panel.
struct ProductArgs {
  const char* input;  // first line, first token
  int64_t input_channels;
  int64_t input_stride;  // bytes from one line to the next
  const char* panel;
  int64_t vectors;       // vectors of output channels in this panel
  int64_t first_vector;  // the panel's first vector, counted over all output channels
  const float* bias;     // these four point at the panel's first channel
  const float* gain;
  const float* scale;
  const float* shift;
  const char* residual;  // first line, first token; null: none
  int64_t residual_stride;
  char* output;  // first line, first token
  int64_t output_stride;
  int64_t tokens;
  Activation activation;
  const char* prefetch;  // what this core reads next: brought to L2 while this panel is computed
  int64_t prefetch_bytes;
};

// out = x + scale * act(depthwise(x) + bias) + shift, for one line of channels and some rows.
struct DepthwiseArgs {
  const char* input;  // the whole plane of this line
  char* output;       // first_row of this line
  int64_t height, width, kernel_size;
  int64_t first_row, last_row;
  const float* taps;  // [vector of the line][k * k][lane]
  const float* bias;  // these three point at the line's first channel
  const float* scale;
  const float* shift;
  Activation activation;
  float* scratch;  // depthwise_scratch() floats
};

// One panel of matrix rows = output channels: W = sum_t coefficients[t] * templates[t], or templates[0].
struct PackArgs {
  const char* source;  // row-major (templates, rows, columns)
  DType type;
  int64_t templates;
  int64_t template_stride;    // elements
  const float* coefficients;  // null: a single plain matrix
  int64_t rows, columns;
  int64_t first_row;  // the panel's first output channel
  int64_t vectors;
  char* panel;
};

// A tensor outside the engine: any strides, in elements.
struct External {
  char* data;
  DType type;
  int64_t channels, height, width;
  int64_t channel_stride, row_stride, column_stride;
};

// Patches of an image as the input channels of a product: token (y, x) has channels (c, ky, kx).
struct PatchArgs {
  External image;
  int64_t patch, stride, padding;
  int64_t grid_width;
  int64_t first_row, last_row;  // rows of the token grid
  char* output;                 // first_row's first token in the first line of channels
  int64_t output_stride;        // bytes from one line to the next
};

struct Kernels {
  const char* name;
  int64_t lanes;          // channels in a vector
  int64_t line_channels;  // channels in a line
  int64_t line_bytes;
  int64_t panel_vectors;
  int64_t units_per_line;  // 4-byte units in a line: the steps of the product per line
  DType chain;             // element type of the activations between blocks
  void (*product)(const ProductArgs&);
  void (*depthwise)(const DepthwiseArgs&);
  int64_t (*depthwise_scratch)(int64_t height, int64_t width, int64_t kernel_size);
  void (*pack_panel)(const PackArgs&);
  // (channels, area) filters -> DepthwiseArgs::taps, for all lines
  void (*pack_taps)(const char* source, DType type, int64_t channels, int64_t area, float* taps);
  void (*load)(const External& from, int64_t line, char* blocked_line);
  void (*store)(const char* blocked_line, int64_t line, const External& to);
  void (*load_patches)(const PatchArgs&);
  void (*pool)(const char* blocked_line, int64_t tokens, char* pooled);  // mean over tokens -> one line entry
  // A register-only loop of multiply-adds; returns the floating-point operations it has done.
  double (*multiply_add_loop)(int64_t iterations);
  void (*activate)(Activation, const float* from, float* to, int64_t count);  // for tests of the activations
};

// One table per instruction set; null where the compiler had no support for it.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();

}  // namespace spin
