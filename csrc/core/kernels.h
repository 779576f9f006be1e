// The kernels that an instruction set provides, as a table of functions over raw pointers.
//
// Layout of activations ("blocked"): [line][token][lane]. A line holds `line_channels` consecutive
// channels; the pixels of a plane are its tokens, row by row. What stands in channels past the last is
// undefined (an infinity times a padding weight of zero is a NaN), and no kernel lets it reach another.
//
// Layout of a plain matrix ("rows"): row-major like PyTorch's, a row per output channel, in the element type of the
// operands, rows `row_stride` bytes apart. A row that does not fill its last unit is followed by a zero.
//
// Layout of the other operand of a product ("panels"): tokens in groups of up to three vectors; inside a panel
// one 4-byte unit of the input channels (a float, or a pair of bf16) after the other, each with the panel's tokens
// side by side: exactly the order in which the product reads them. Of a frozen network it is the matrices
// that lie in panels, with output channels in the place of tokens.
//
// Operands of products have the element type of the chain, but in training with vdpbf16ps: there the chain is float32.
#pragma once
#include "prefetch.h"
#include "types.h"

namespace spin {

constexpr int64_t kTileTokens = 8;  // of a product for a panel of output channels, at most

// The panels of some tokens, or of a matrix' rows: vectors are dealt out evenly.
struct Panels {
  int64_t vectors, count;
  SPIN_INLINE Panels(int64_t tokens, int64_t lanes, int64_t panel_vectors, int64_t multiple = 1)
      : vectors(ceil_div(tokens, lanes)), count(round_up(ceil_div(vectors, panel_vectors), multiple)) {}
  SPIN_INLINE int64_t begin(int64_t panel) const { return panel * vectors / count; }
};

// One line of tokens, or of rows, into panels.
struct PackPanelsArgs {
  const char* input;  // first token of the line
  int64_t stride;     // bytes from one token to the next
  int64_t tokens;
  int64_t line, lines;  // of the chain: which one, of how many
  char* panels;
};

// out = scale * act(gain * (W in) + bias) + shift (+ residual): what a product does with its sums, and what comes
// after.
struct ProductTarget {
  int64_t first_vector;  // counted over all output channels
  const float* bias;     // these four point at its first channel
  const float* gain;
  const float* scale;
  const float* shift;
  const char* residual;  // first line, first token; null: none
  int64_t residual_stride;
  char* output;  // first line, first token
  int64_t output_stride;
  Activation activation;
  Ahead ahead;  // asked for meanwhile
};

// A product for a vector of output channels.
struct ProductArgs {
  const char* panels;  // all tokens
  int64_t tokens;
  int64_t input_channels;
  const char* weights;      // first row
  int64_t row_stride;       // bytes
  int64_t output_channels;  // at most a vector
  ProductTarget to;
};

// Tokens that lie together in a product's input and in its output.
struct TokenSpan {
  int64_t token, tokens;  // the first one's number in the input, the residual and what is kept; how many
  int64_t output;         // bytes from the output's first token to the first of these
};

// A product for a panel of output channels and tokens as they are.
struct PanelProductArgs {
  const char* panel;
  int64_t vectors;  // in the panel
  int64_t input_channels;
  const char* input;     // first line, first token
  int64_t input_stride;  // bytes from one line to the next
  const TokenSpan* spans;
  int64_t spans_count;
  ProductTarget to;
  // One of several products that are added up: `from` plus this goes to `keep`, `base` plus this is finished. Null:
  // from zero, nowhere, from zero; what is kept and has no base is not finished. There a token has all vectors of the
  // panel.
  const float* from = nullptr;
  float* keep = nullptr;
  const float* base = nullptr;
  SPIN_INLINE bool finished() const { return base || !keep; }
};

struct TokenSumsArgs;  // strassen.h

// Sizes with kernels of their own (depthwise.h).
constexpr bool has_row_tiles(int64_t kernel_size) { return kernel_size >= 3 && kernel_size <= 9; }

// out = residual + scale * act(depthwise(x) + bias) + shift, for one line of channels and some rows.
struct DepthwiseArgs {
  const char* input;     // the whole plane of this line
  const char* residual;  // likewise: the input itself, another or (null) none
  char* output;          // first_row of this line
  int64_t height, width, kernel_size;
  int64_t first_row, last_row;
  const float* taps;  // [vector of the line][k * k][lane]; row tiles of bf16 chains: units of two taps of a row
  const float* bias;  // these three point at the line's first channel
  const float* scale;
  const float* shift;
  Activation activation;
  float* scratch;             // depthwise_scratch() floats
  Ahead ahead[2] = {};        // asked for meanwhile
  int64_t split = INT64_MAX;  // from this token of the output on they go to `second`
  char* second = nullptr;
};

// Rows of a matrix: W = sum_t coefficients[t] * templates[t], or templates[0], in the element type of the operands.
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

// ---- training: planes of floats, [token][lane] of one vector of channels ----

// A pre-activation as it was saved, one vector of channels. `fine`: gelu to the accuracy that BatchNorm's statistics
// ask for; without it as in inference.
struct Activated {
  const char* pre;
  DType type;
  Activation activation;
  bool fine;
  int64_t tokens;
};

// out = scale * (act(pre) - center) + shift (+ residual); the residual may be the output.
struct TransformArgs {
  Activated a;
  const float *center, *scale, *shift;
  const float* residual;  // null: none
  float* out;
};

// Mean and sum of squared deviations of act(pre).
struct MomentsArgs {
  Activated a;
  double *mean, *deviations;
};

// sums[0] = sum of gradient, sums[1] = sum of gradient * (act(pre) - center), a vector each.
struct GradientSumsArgs {
  Activated a;
  const float *gradient, *center;
  float* sums;
};

// out = act'(pre) * (p * gradient + q * (act(pre) - center) + r); adds the sum of out to `sum`. Without q and r (null)
// their terms are left out.
struct ActivationGradientArgs {
  Activated a;
  const float *gradient, *center, *p, *q, *r;
  float *out, *sum;
};

// taps[i][j] += sum over outputs of gradient[row, column] * x[row + i - pad, column + j - pad], for one image.
struct TapsGradientArgs {
  const float *gradient, *input;
  int64_t height, width, kernel_size;
  float* taps;  // [k * k][lane]
};

// One vector of channels as the operand of weight_gradient where that is bf16: a 4-byte unit holds two tokens of a
// channel. Floats are their own operand.
struct PackGradientArgs {
  const float* input;  // [token][lane]
  int64_t tokens;
  char* to;  // [unit][lane]; a token without a partner gets a zero
};

// G[o, i] += sum over tokens of gradient[o, t] * input[i, t], for a vector of output channels o.
struct WeightGradientArgs {
  const char* gradient;            // one vector of channels, [unit of tokens][lane]
  const char* input;               // all, [vector][unit of tokens][lane]
  int64_t vectors, vector_stride;  // of the input; bytes
  int64_t tokens;
  float* out;  // [lane of o], rows of `out_stride` floats; added to
  int64_t out_stride;
};

// Rows of the transposed matrix: a vector of columns of the matrix.
struct TransposeArgs {
  const char* rows;  // row-major, of `row_stride` bytes
  int64_t row_stride;
  int64_t outputs, inputs, first_input;
  char* to;  // lanes rows (fewer at the end) of `to_stride` bytes, one value per output channel
  int64_t to_stride;
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

constexpr int64_t kStreamBytes = 8 << 20;  // made weights beyond this are read again from memory anyway

// A part of a window of the bank for all layers that use it (compose.h). Elements but where it says otherwise.
struct ComposeUser {
  char* data;  // forward the result, backward its gradient; where the tile begins
  int64_t pitch;
  const float* coefficients;  // one per template
};
constexpr int64_t kHeldTemplates = 3;  // of a tile, backward at a time: with some users as many as registers hold
struct ComposeTile {
  const char* bank;  // the first template, where the tile begins
  DType type;
  int64_t stride, templates;  // from one template to the next
  int64_t rows, columns, pitch;
  const ComposeUser* users;
  int64_t users_count;
  bool stream;       // what is written goes past the caches; results in float32 only
  bool ask_into_l2;  // what is read next; else into L1
  // Backward.
  float* bank_gradient;  // like `bank`
  bool first;            // it is written, else added to
  float* scratch;        // as many of the tile's templates as are taken at a time, in rows of whole vectors
  double* products;      // <gradient, template>: [user][template]
};

enum class Modulation : uint32_t { kPlain, kSwish, kGate };

// A piece of the base of a repetition for all its tiles (repeat.h). Elements but where it says otherwise.
struct RepeatUser {
  char* data;  // forward the result, backward its gradient; where the piece begins
  int64_t pitch;
  int64_t rows, columns;  // of the piece that this tile has; the last tiles may be partial
  float alpha, beta;
  const char* gate;
  char* gate_gradient;
};
struct RepeatTile {
  const char* base;  // where the piece begins
  DType type;
  Modulation modulation;
  int64_t rows, columns, pitch;
  const RepeatUser* users;
  int64_t users_count;
  bool stream;  // results go past the caches; float32 only
  // Backward.
  float* base_gradient;  // like `base`; written
  float* sums;           // scratch, two vectors per user
  double* products;      // of alpha, and of -beta: [user][2]
};

struct Kernels {
  const char* name;
  int64_t lanes;          // channels in a vector
  int64_t panel_vectors;  // in a panel, at most
  int64_t line_channels;  // channels in a line
  int64_t line_bytes;
  DType chain;         // element type of the activations between blocks
  DType operand = {};  // of matrices and panels
  // Where products need a state of the thread: before its first and after its last.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;
  void (*product)(const ProductArgs&) = nullptr;
  void (*panel_product)(const PanelProductArgs&) = nullptr;  // null where operands are not the chain's
  void (*token_sums)(const TokenSumsArgs&) = nullptr;        // likewise, and in float32 only
  void (*depthwise)(const DepthwiseArgs&);
  int64_t (*depthwise_scratch)(int64_t height, int64_t width, int64_t kernel_size);
  void (*pack_panels)(const PackPanelsArgs&) = nullptr;
  void (*pack_rows)(const PackRowsArgs&) = nullptr;
  // (channels, area) filters -> DepthwiseArgs::taps, for all lines
  void (*pack_taps)(const char* source, DType type, int64_t channels, int64_t area, float* taps);
  void (*load)(const External& from, int64_t line, char* blocked_line);
  void (*store)(const char* blocked_line, int64_t line, const External& to);
  void (*load_patches)(const PatchArgs&);
  // Global average pool: a line's tokens are added to floats; of `parts` of these, `stride` apart, one line entry.
  void (*sum_tokens)(const char* blocked_line, int64_t tokens, float* sums);
  void (*mean)(const float* sums, int64_t parts, int64_t stride, int64_t tokens, char* pooled);
  // A register-only loop of multiply-adds; returns the floating-point operations it has done.
  double (*multiply_add_loop)(int64_t iterations);
  void (*activate)(Activation, const float* from, float* to, int64_t count);  // for tests of the activations
  // Training and making weights; null in a table whose chain is not float32.
  void (*transform)(const TransformArgs&) = nullptr;
  void (*moments)(const MomentsArgs&) = nullptr;
  void (*gradient_sums)(const GradientSumsArgs&) = nullptr;
  void (*activation_gradient)(const ActivationGradientArgs&) = nullptr;
  void (*taps_gradient)(const TapsGradientArgs&) = nullptr;
  void (*pack_gradient)(const PackGradientArgs&) = nullptr;  // null where operands are float32
  void (*weight_gradient)(const WeightGradientArgs&) = nullptr;
  void (*transpose)(const TransposeArgs&) = nullptr;
  void (*narrow)(const float* from, DType type, int64_t count, char* to) = nullptr;
  void (*compose)(const ComposeTile&) = nullptr;
  void (*compose_gradient)(const ComposeTile&) = nullptr;
  void (*repeat)(const RepeatTile&) = nullptr;
  void (*repeat_gradient)(const RepeatTile&) = nullptr;
};

// One table per instruction set; null where the compiler had no support for it.
const Kernels* kernels_portable();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_avx512_bf16_training();
const Kernels* kernels_amx();

}  // namespace spin
