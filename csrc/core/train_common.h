// What the two directions of training share: where things lie, and the input of a block from what was saved.
//
// The whole batch is one row of tokens: a line is [token of the batch][lane], so a line item sees all values of its
// channels and BatchNorm's sums need no other thread. It may be larger than L2 (2 MB at batch 32 of 32 x 32), so it is
// passed as few times as can be: image by image around a convolution, band by band (256 tokens, 16 KB) elsewhere.
// Products take bands of tokens whose panels fit L2.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "train.h"
#include "workspace.h"

namespace spin {

constexpr int64_t kMaxLanes = 16;
constexpr int64_t kAnchorInterval = 8;  // blocks between two saved inputs where residuals chain the blocks
alignas(kCacheLine) inline constexpr float kZeros[kMaxLanes] = {};
alignas(kCacheLine) inline constexpr float kOnes[kMaxLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

enum class Stage { kDepthwise = 0, kPointwise = 1 };  // of a block: which of its two activations

// Some tokens of the batch.
struct Tokens {
  int64_t first, count;
};

// Mean and sum of squared deviations of a vector of channels, from those of parts that are added in order.
struct Moments {
  double mean[kMaxLanes] = {}, deviations[kMaxLanes] = {}, count = 0;

  // Chan, Golub and LeVeque's update.
  void add(const double* part, int64_t lanes, int64_t tokens) {  // part: mean, then deviations
    const double share = double(tokens) / (count + double(tokens));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const double delta = part[lane] - mean[lane];
      mean[lane] += delta * share;
      deviations[lane] += part[lanes + lane] + delta * delta * share * count;
    }
    count += double(tokens);
  }
};

// A normalisation of one vector of channels: scale * (u - center) + shift.
struct Norm {
  alignas(kCacheLine) float scale[kMaxLanes], shift[kMaxLanes], center[kMaxLanes], inverse_deviation[kMaxLanes];
};

class Training {
 protected:
  Training(const Kernels& kernels, const TrainingCall& call, const Parallel& parallel)
      : k_(kernels),
        call_(call),
        shape_(call.shape),
        composed_(call.weights.pw_coefficients != nullptr),
        in_place_(Network::reads(kernels, call.shape, call.weights)),
        net_(kernels, call.shape, in_place_ ? 0 : call.shape.matrices, MatrixForm::kRows),
        lanes_(kernels.lanes),
        lines_(net_.lines(shape_.channels)),
        height_(call.input.height),
        width_(call.input.width),
        plane_(height_ * width_ * lanes_),
        tokens_(call.batch * height_ * width_),
        line_(tokens_ * lanes_) {
    const double flops = 2.0 * shape_.depth * tokens_ * shape_.channels * shape_.channels;
    threads_ = useful_threads(flops, parallel);
    const int64_t fitting = round_up(std::clamp(band_bytes() / (lines_ * lanes_ * 4), kLeastBand, kMostBand), lanes_);
    bands_ = ceil_div(tokens_, fitting);
    band_tokens_ = round_up(ceil_div(tokens_, bands_), lanes_);
    bands_ = ceil_div(tokens_, band_tokens_);
    chunks_ = std::min(lines_, std::max<int64_t>(1, ceil_div(4 * threads_, bands_)));
  }

  // Tokens: a panel at least; past the most, reading a matrix once more per band costs nothing.
  static constexpr int64_t kLeastBand = 48, kMostBand = 256;

  Tokens band(int64_t b) const {
    const int64_t first = b * band_tokens_;
    return {first, std::min(band_tokens_, tokens_ - first)};
  }
  Tokens image(int64_t i) const { return {i * height_ * width_, height_ * width_}; }
  // Of a line, in floats.
  int64_t at(const Tokens& tokens) const { return tokens.first * lanes_; }

  // Of all tokens, in units. A line of panels holds one or two lines.
  int64_t panel_lines() const { return ceil_div(lines_ * size_of(k_.operand), kUnitBytes); }
  int64_t panel_bytes() const { return panel_lines() * lanes_ * kUnitBytes * round_up(tokens_, lanes_); }

  // ---- memory ----

  float* take_floats(int64_t count) { return reinterpret_cast<float*>(take(count * 4)); }
  // The first pass only counts; the second hands out.
  char* take(int64_t bytes) {
    char* at = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(bytes, kCacheLine);
    return at;
  }

  // ---- parameters ----

  int64_t packing_items() const {
    return net_.parameter_items() + (in_place_ ? 0 : shape_.matrices * net_.matrix_items());
  }
  void pack(int64_t item) const {
    const int64_t parameters = net_.parameter_items(), parts = net_.matrix_items();
    if (item < parameters) return net_.pack_parameters(call_.weights, item);
    const int64_t matrix = (item - parameters) / parts;
    net_.pack_matrix(call_.weights, matrix, matrix, (item - parameters) % parts);
  }
  Pointwise matrix(int64_t d) const {
    return in_place_ ? net_.pointwise(d, call_.weights) : net_.pointwise(d, shape_.pw_index[d]);
  }

  float* statistics(Stage stage, int64_t d, int64_t line) const {
    float* base = stage == Stage::kDepthwise ? call_.dw_stats : call_.pw_stats;
    return base + 2 * d * shape_.channels + line * lanes_;
  }
  int64_t channels_of(int64_t line) const { return std::min(lanes_, shape_.channels - line * lanes_); }

  Norm norm(Stage stage, int64_t d, int64_t line) const {
    const float *scale, *shift;
    if (stage == Stage::kDepthwise) {
      const Network::Depthwise w = net_.depthwise(d, line);
      scale = w.scale, shift = w.shift;
    } else {
      const Pointwise w = net_.pointwise(d, 0);
      scale = w.scale + line * lanes_, shift = w.shift + line * lanes_;
    }
    Norm n{};
    const float* stats = call_.eps ? statistics(stage, d, line) : nullptr;
    for (int64_t lane = 0; lane < channels_of(line); ++lane) {
      n.scale[lane] = scale[lane], n.shift[lane] = shift[lane];
      if (!stats) continue;
      n.center[lane] = stats[lane];
      n.inverse_deviation[lane] = 1 / std::sqrt(stats[shape_.channels + lane] + *call_.eps);
      n.scale[lane] *= n.inverse_deviation[lane];
    }
    return n;
  }

  // ---- pre-activations and inputs ----

  int64_t line_bytes() const { return line_ * size_of(shape_.type); }
  bool is_kept(Stage stage) const { return call_.kept == 2 || (call_.kept == 1 && stage == Stage::kPointwise); }

  // Those that are not kept have places of their own, for `slots` blocks in turn.
  void place_recomputed(int64_t slots) {
    slots_ = slots;
    recomputed_ = take((2 - call_.kept) * slots * lines_ * line_bytes());
  }
  Activated activated(Stage stage, int64_t d, int64_t line, const Tokens& tokens) const {
    char* pre;
    if (is_kept(stage)) {
      pre = call_.saved + ((call_.kept * (d + 1) - 2 + int64_t(stage)) * lines_ + line) * line_bytes();
    } else {
      pre = recomputed_ + ((int64_t(stage) * slots_ + d % slots_) * lines_ + line) * line_bytes();
    }
    return {pre + at(tokens) * size_of(shape_.type), shape_.type, shape_.activation, call_.eps.has_value(),
            tokens.count};
  }
  bool anchored(int64_t d) const { return shape_.pw_residual && d > 0 && d % kAnchorInterval == 0; }
  Activated anchor(int64_t d, int64_t line, const Tokens& tokens) const {
    const int64_t index = call_.kept * shape_.depth + d / kAnchorInterval - 1;
    return {call_.saved + (index * lines_ + line) * line_bytes() + at(tokens) * size_of(shape_.type), shape_.type,
            Activation::kIdentity, true, tokens.count};
  }

  // Normalised act(pre) (+ residual).
  void transform(const Activated& a, const Norm& n, const float* residual, float* out) const {
    k_.transform({a, n.center, n.scale, n.shift, residual, out});
  }
  // As it is.
  void widen(const Activated& a, float* out) const { k_.transform({a, kZeros, kOnes, kZeros, nullptr, out}); }

  void load(const External& first, int64_t stride, int64_t image, int64_t line, float* out) const {
    External from = first;
    from.data += image * stride * size_of(first.type);
    k_.load(from, line, reinterpret_cast<char*>(out));
  }
  void store(const float* from, int64_t line, const External& first, int64_t stride, int64_t image) const {
    External to = first;
    to.data += image * stride * size_of(first.type);
    k_.store(reinterpret_cast<const char*>(from), line, to);
  }

  // The depthwise of an image into its pre-activation; `wide` holds a plane.
  void depthwise(int64_t d, int64_t line, const Activated& to, const float* x, float* wide, char* scratch) const {
    const Network::Depthwise w = net_.depthwise(d, line);
    char* pre = const_cast<char*>(to.pre);
    const bool narrow = to.type != DType::kFloat32;
    convolve(x, w.taps, w.bias, nullptr, narrow ? reinterpret_cast<char*>(wide) : pre, scratch);
    if (narrow) k_.narrow(wide, to.type, plane_, pre);
  }

  // ---- kernels ----

  void pack_panels(const float* band, int64_t line, const Tokens& tokens, char* panels) const {
    k_.pack_panels({reinterpret_cast<const char*>(band), lanes_ * 4, tokens.count, line, lines_,
                    panels + at(tokens) * panel_lines() * kUnitBytes});
  }

  // A line of a product without activation: gain * (rows * panels) + bias (+ residual), for a band of tokens.
  struct Rows {
    const char* first;
    int64_t stride;  // bytes
    const float *bias, *gain;
  };
  void product(const Rows& rows, int64_t line, const Tokens& tokens, const char* panels, const char* residual,
               char* output) const {
    const int64_t next = line + 1 < lines_ ? channels_of(line + 1) : 0;
    k_.product({
        .panels = panels + at(tokens) * panel_lines() * kUnitBytes,
        .tokens = tokens.count,
        .input_channels = shape_.channels,
        .weights = rows.first,
        .row_stride = rows.stride,
        .output_channels = channels_of(line),
        .to = {.first_vector = 0,
               .bias = rows.bias,
               .gain = rows.gain,
               .scale = kOnes,
               .shift = kZeros,
               .residual = residual,
               .residual_stride = 0,
               .output = output,
               .output_stride = 0,
               .activation = Activation::kIdentity,
               .ahead = {rows.first + channels_of(line) * rows.stride, next * rows.stride}},
    });
  }

  // A depthwise convolution of an image without activation, plus what is in `residual` (null: nothing).
  void convolve(const float* input, const float* taps, const float* bias, const char* residual, char* output,
                char* scratch) const {
    k_.depthwise({reinterpret_cast<const char*>(input), residual, output, height_, width_, shape_.kernel_size, 0,
                  height_, taps, bias, kOnes, kZeros, Activation::kIdentity, reinterpret_cast<float*>(scratch)});
  }
  int64_t scratch_bytes() const {
    return round_up(k_.depthwise_scratch(height_, width_, shape_.kernel_size) * 4, kCacheLine);
  }

  const Kernels& k_;
  const TrainingCall& call_;
  const NetworkShape& shape_;
  const bool composed_, in_place_;  // matrices are sums; are read where they are
  Network net_;
  const int64_t lanes_, lines_, height_, width_;
  const int64_t plane_, tokens_, line_;  // floats of an image in a line; tokens of the batch; floats of a line
  int64_t bands_, band_tokens_, chunks_;
  int threads_;
  char* memory_ = nullptr;
  int64_t used_ = 0;
  char* recomputed_;
  int64_t slots_;
};

}  // namespace spin
