// The kernels that an instruction set provides, as a table of functions over raw pointers.
//
// Layout of activations ("blocked"): [line][token][lane]. A line holds `line_channels` consecutive
// channels; the pixels of a plane are its tokens, row by row. What stands in channels past the last is
// undefined (an infinity times a padding weight of zero is a NaN), and no kernel lets it reach another.
//
// Layout of a product's input ("panels"): tokens in groups of up to three vectors; inside a panel
// one 4-byte unit of the channels (a float, or a pair of bf16) after the other, each with the panel's tokens
// side by side: exactly the order in which the product reads them.
//
// Layout of a matrix ("rows"): row-major like PyTorch's, a row per output channel, in the element type of the
// chain, rows `row_stride` bytes apart. A row that does not fill its last unit is followed by a zero.
#pragma once
#include "types.h"

namespace spin {

// One line of tokens into panels.
struct PackTokensArgs {
  const char* input;  // first token of the line
  int64_t tokens;
  int64_t line, lines;  // which one, of how many
  char* panels;
};

// out = scale * act(gain * (W in) + bias) + shift (+ residual), for a vector of output channels.
struct ProductArgs {
  const char* panels;  // all tokens
  int64_t input_channels;
  const char* weights;      // first row
  int64_t row_stride;       // bytes
  int64_t output_channels;  // at most a vector
  int64_t first_vector;     // this vector, counted over all output channels
  const float* bias;        // these four point at the first output channel
  const float* gain;
  const float* scale;
  const float* shift;
  const char* residual;  // first line, first token; null: none
  int64_t residual_stride;
  char* output;  // first line, first token
  int64_t output_stride;
  int64_t tokens;
  Activation activation;
  const char* prefetch;  // what this core reads next: brought to L2 while this vector is computed
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

// Rows of a matrix: W = sum_t coefficients[t] * templates[t], or templates[0], in the element type of the chain.
struct PackRowsArgs {
  const char* source;  // first row; row-major (templates, rows, columns)
  DType type;
  int64_t templates;
  int64_t template_stride;    // elements
  const float* coefficients;  // null: a single plain matrix
  int64_t rows, columns;
  char* to;
  int64_t row_stride;  // bytes
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
  DType chain;  // element type of the activations between blocks
  void (*product)(const ProductArgs&);
  void (*depthwise)(const DepthwiseArgs&);
  int64_t (*depthwise_scratch)(int64_t height, int64_t width, int64_t kernel_size);
  void (*pack_tokens)(const PackTokensArgs&);
  void (*pack_rows)(const PackRowsArgs&);
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
