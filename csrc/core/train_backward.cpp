// Backward, two phases per block, from the last to the first:
//
//   lines:            gradient of block d + 1's y -> of its depthwise -> of its input, which is block d's output -> of
//                     block d's product (panels for the next phase); and block d's y again from what was kept
//   bands x lines:    the gradient of y by the transposed matrix, with its sums for the BatchNorm before it
//   groups of lines:  the gradient of the matrix
//
// A line item has all tokens of its channels: BatchNorm's sums, biases, affines and filters end where they begin. It
// passes over them twice: image by image through the depthwise, then band by band. The gradient of a matrix is summed
// over all blocks that share it in one float32 buffer, by the item that owns its rows.
// Cost: two products and two depthwise convolutions per block, a third where its pre-activation was not kept; the
// transposed matrix is made once for all blocks in a row that share it (0.1 ns per element).
// Numerics: every sum has one order, whatever the threads.
#include "train_common.h"

namespace spin {
namespace {

// Two sums of a vector of channels: of the gradient, and of the gradient times the centered activation.
struct GradientSums {
  double sum[2 * kMaxLanes] = {};

  void add(const float* part, int64_t lanes) {
    for (int64_t i = 0; i < 2 * lanes; ++i) sum[i] += part[i];
  }
};

class Backward : Training {
 public:
  Backward(const Kernels& kernels, const TrainingCall& call, const External& gradient, int64_t gradient_stride,
           const MixerGradients& gradients, const Parallel& parallel)
      : Training(kernels, call, parallel), gradient_(gradient), gradient_stride_(gradient_stride), out_(gradients) {
    const int64_t depth = shape_.depth;
    group_ = std::clamp<int64_t>(lines_ / (2 * threads_), 1, kGroupLines);
    groups_ = ceil_div(lines_, group_);
    direct_ = !call.weights.pw_gain && shape_.channels % lanes_ == 0;
    sums_in_place_ = !composed_ && call.weights.type == DType::kFloat32;
    place();
    Workspace workspace(used_);
    memory_ = workspace.data(), used_ = 0;
    place();

    Team team(threads_);
    parallel.run(threads_, [&](int thread) {
      team.phase(thread, packing_items() + sums_ / kClearFloats + 1, [&](int64_t item) {
        if (item < packing_items()) return pack(item);
        clear(item - packing_items());
      });
      for (int64_t d = depth - 1; d >= 0; --d) {
        const bool transposed = d + 1 < depth && shape_.pw_index[d + 1] == shape_.pw_index[d];
        const int64_t transposing = transposed ? 0 : lines_;
        team.phase(thread, transposing + lines_, [&](int64_t item) {
          if (item < transposing) return transpose(d, item);
          line_item(d, item - transposing, thread);
        });
        team.phase(thread, bands_ * chunks_ + groups_, [&](int64_t item) {
          if (item < bands_ * chunks_) return input_gradient(d, item / chunks_, item % chunks_);
          weight_gradient(d, item - bands_ * chunks_, thread);
        });
      }
      team.phase(thread, lines_, [&](int64_t line) { line_item(-1, line, thread); });
      const int64_t rows = matrix_items();
      team.phase(thread, rows + shape_.filters + shape_.matrices, [&](int64_t item) {
        if (item < rows) return finish_matrix(item);
        item -= rows;
        if (item < shape_.filters) return finish_filter(item);
        finish_biases(item - shape_.filters);
      });
    });
  }

 private:
  static constexpr int64_t kGroupLines = 4;  // of output channels: the input's band comes from L2 for all but the first
  static constexpr int64_t kClearFloats = 1 << 16;

  int64_t area() const { return shape_.kernel_size * shape_.kernel_size; }
  int64_t padded() const { return lines_ * lanes_; }
  // Blocks whose inputs are there at once.
  int64_t interval() const { return shape_.pw_residual ? std::min(kAnchorInterval, shape_.depth) : 1; }

  void place() {
    net_.bind(take(net_.bytes()));
    panels_ = take(panel_bytes());
    chain_gradient_ = take_floats(lines_ * line_);
    product_gradient_ = take(lines_ * operand_line({0, tokens_}));
    y_ = take(lines_ * operand_line({0, tokens_}));
    inputs_ = take_floats((shape_.pw_residual ? interval() * lines_ : threads_) * line_);
    place_recomputed(interval());
    transposed_stride_ = round_up(shape_.channels, lanes_) * size_of(k_.operand);
    transposed_ = take(padded() * transposed_stride_);
    plane_floats_ = round_up(std::max(plane_, band_tokens_ * lanes_), kMaxLanes);
    planes_ = take_floats(threads_ * 2 * plane_floats_);
    flipped_ = take_floats(threads_ * area() * lanes_);
    rows_ = take_floats(direct_ ? 0 : threads_ * lanes_ * padded());
    scratch_ = take(threads_ * scratch_bytes());
    parts_ = take_floats(lines_ * bands_ * 2 * lanes_);
    // From here on: sums, zero at first.
    const int64_t before = used_;
    taps_ = take_floats(shape_.filters * padded() * area());
    filter_bias_ = take_floats(shape_.filters * padded());
    matrix_bias_ = take_floats(shape_.matrices * padded());
    matrices_ = take_floats(sums_in_place_ ? 0 : shape_.matrices * shape_.channels * shape_.channels);
    sums_ = (used_ - before) / 4;
    if (sums_in_place_) matrices_ = reinterpret_cast<float*>(out_.pw_weight);  // which came as zeros
  }
  void clear(int64_t part) const {
    const int64_t first = part * kClearFloats, last = std::min(sums_, first + kClearFloats);
    std::fill(taps_ + first, taps_ + std::max(first, last), 0.f);
  }

  float* line_of(float* lines, int64_t line) const { return lines + line * line_; }
  float* plane(int thread, int64_t which) const { return planes_ + (2 * thread + which) * plane_floats_; }
  float* part(int64_t line, int64_t band) const { return parts_ + (line * bands_ + band) * 2 * lanes_; }
  char* scratch(int thread) const { return scratch_ + thread * scratch_bytes(); }

  // Operands of the matrix' gradient lie band by band: lines a power of two apart would share few sets of L2.
  int64_t operand_line(const Tokens& band) const {
    return lanes_ * size_of(k_.operand) * round_up(band.count, kUnitBytes / size_of(k_.operand));
  }
  char* operand_of(char* bands, int64_t line, const Tokens& band) const {
    return bands + lines_ * at(band) * size_of(k_.operand) + line * operand_line(band);
  }

  // ---- lines ----

  void line_item(int64_t d, int64_t line, int thread) const {
    GradientSums sums;
    if (d + 1 < shape_.depth) {
      through_depthwise(d + 1, line, thread, sums);
    } else {
      for (int64_t i = 0; i < call_.batch; ++i) {
        float* gradient = line_of(chain_gradient_, line) + at(image(i));
        load(gradient_, gradient_stride_, i, line, gradient);
        if (d >= 0) measure(Stage::kPointwise, d, line, image(i), gradient, sums);
        if (d < 0) store(gradient, line, out_.x, out_.x_stride, i);  // no blocks at all
      }
    }
    if (d >= 0) through_product(d, line, thread, sums);
  }

  // What `activation_gradient` multiplies with.
  struct Factors {
    Norm n;
    alignas(kCacheLine) float q[kMaxLanes], r[kMaxLanes];
  };
  // From an activation's complete sums, which are the gradients of its affine, too.
  Factors factors(Stage stage, int64_t d, int64_t line, const GradientSums& sums) const {
    Factors f{norm(stage, d, line), {}, {}};
    float* affine = (stage == Stage::kDepthwise ? out_.dw_affine : out_.pw_affine) + 2 * d * shape_.channels;
    for (int64_t lane = 0; lane < channels_of(line); ++lane) {
      const double inverse = call_.eps ? f.n.inverse_deviation[lane] : 1.;
      const double sum = sums.sum[lane], moment = sums.sum[lanes_ + lane] * inverse;
      affine[line * lanes_ + lane] = float(moment);
      affine[shape_.channels + line * lanes_ + lane] = float(sum);
      f.q[lane] = float(-f.n.scale[lane] * inverse * moment / double(tokens_));
      f.r[lane] = float(-f.n.scale[lane] * sum / double(tokens_));
    }
    return f;
  }
  void differentiate(const Activated& a, const Factors& f, const float* gradient, float* out, float* bias) const {
    const float *q = call_.eps ? f.q : nullptr, *r = call_.eps ? f.r : nullptr;
    k_.activation_gradient({a, gradient, f.n.center, f.n.scale, q, r, out, bias});
  }

  // The sums of some tokens behind an activation.
  void measure(Stage stage, int64_t d, int64_t line, const Tokens& tokens, const float* gradient, float* part) const {
    alignas(kCacheLine) float center[kMaxLanes] = {};
    if (call_.eps) std::copy_n(statistics(stage, d, line), channels_of(line), center);
    k_.gradient_sums({activated(stage, d, line, tokens), gradient, center, part});
  }
  void measure(Stage stage, int64_t d, int64_t line, const Tokens& tokens, const float* gradient,
               GradientSums& sums) const {
    alignas(kCacheLine) float part[2 * kMaxLanes];
    measure(stage, d, line, tokens, gradient, part);
    sums.add(part, lanes_);
  }

  // Through the depthwise of block d to its input, image by image, with the sums for the activation before it.
  void through_depthwise(int64_t d, int64_t line, int thread, GradientSums& sums) const {
    const int64_t vector = shape_.dw_index[d] * lines_ + line;
    GradientSums own;
    for (int64_t b = 0; b < bands_; ++b) own.add(part(line, b), lanes_);
    const Factors f = factors(Stage::kDepthwise, d, line, own);
    float *taps = taps_ + vector * area() * lanes_, *flipped = flipped_ + thread * area() * lanes_;
    const float* forward = net_.depthwise(d, line).taps;
    for (int64_t i = 0; i < area(); ++i) {
      std::copy_n(forward + (area() - 1 - i) * lanes_, lanes_, flipped + i * lanes_);
    }
    const Input input = input_of(d, line);
    float* a = plane(thread, 0);
    for (int64_t i = 0; i < call_.batch; ++i) {
      const Tokens tokens = image(i);
      float* gradient = line_of(chain_gradient_, line) + at(tokens);
      differentiate(activated(Stage::kDepthwise, d, line, tokens), f, gradient, a, filter_bias_ + vector * lanes_);
      const float* x = image_of(input, i, plane(thread, 1));
      k_.taps_gradient({a, x, height_, width_, shape_.kernel_size, taps});
      char* image = reinterpret_cast<char*>(gradient);
      convolve(a, flipped, kZeros, image, image, scratch(thread));
      if (d > 0) {
        measure(Stage::kPointwise, d - 1, line, tokens, gradient, sums);
      } else {
        store(gradient, line, out_.x, out_.x_stride, i);
      }
    }
  }

  // Through the activation behind block d's product, and the operands of the next phase.
  void through_product(int64_t d, int64_t line, int thread, const GradientSums& sums) const {
    if (d + 1 == shape_.depth || (d + 1) % interval() == 0) restore(d, line, thread);
    Input input = input_of(d, line);
    if (!shape_.pw_residual && d == 0) {  // bands are not images
      input.values = inputs_ + thread * line_;
      for (int64_t i = 0; i < call_.batch; ++i) {
        load(call_.input, call_.input_stride, i, line, inputs_ + thread * line_ + at(image(i)));
      }
    }
    const Factors f = factors(Stage::kPointwise, d, line, sums);
    const Norm n = norm(Stage::kDepthwise, d, line);
    const float* gain = call_.weights.pw_gain ? net_.pointwise(d, 0).gain + line * lanes_ : nullptr;
    float* bias = matrix_bias_ + shape_.pw_index[d] * padded() + line * lanes_;
    const bool packs = k_.pack_gradient != nullptr;
    auto as_operand = [&](const float* values, const Tokens& tokens, char* lines) {
      if (packs) k_.pack_gradient({values, tokens.count, operand_of(lines, line, tokens)});
    };
    auto place_for = [&](char* lines, const Tokens& tokens) {
      return packs ? plane(thread, 0) : reinterpret_cast<float*>(operand_of(lines, line, tokens));
    };
    for (int64_t b = 0; b < bands_; ++b) {
      const Tokens tokens = band(b);
      float* c = place_for(product_gradient_, tokens);
      differentiate(activated(Stage::kPointwise, d, line, tokens), f, line_of(chain_gradient_, line) + at(tokens), c,
                    bias);
      as_operand(c, tokens, product_gradient_);
      if (gain) {
        const Activated plain{reinterpret_cast<const char*>(c), DType::kFloat32, Activation::kIdentity, true,
                              tokens.count};
        c = plane(thread, 1);
        k_.transform({plain, kZeros, gain, kZeros, nullptr, c});
      }
      pack_panels(c, line, tokens, panels_);
      float* y = place_for(y_, tokens);
      const float* x = some_of(input, tokens, plane(thread, 1));
      transform(activated(Stage::kDepthwise, d, line, tokens), n, x, y);
      as_operand(y, tokens, y_);
    }
  }

  // ---- inputs of blocks ----

  // A line of a block's input: values that are there, or what they are made from.
  struct Input {
    const float* values;
    int64_t d, line;
    Norm before;  // of the block before
  };
  float* input_slot(int64_t d, int64_t line) const { return line_of(inputs_, d % kAnchorInterval * lines_ + line); }
  Input input_of(int64_t d, int64_t line) const {
    if (shape_.pw_residual) return {input_slot(d, line), d, line, {}};
    return {nullptr, d, line, d > 0 ? norm(Stage::kPointwise, d - 1, line) : Norm{}};
  }
  // Either in `to` or where it is already.
  const float* some_of(const Input& x, const Tokens& tokens, float* to) const {
    if (x.values) return x.values + at(tokens);
    transform(activated(Stage::kPointwise, x.d - 1, x.line, tokens), x.before, nullptr, to);
    return to;
  }
  const float* image_of(const Input& x, int64_t i, float* to) const {
    if (x.values || x.d > 0) return some_of(x, image(i), to);
    load(call_.input, call_.input_stride, i, x.line, to);
    return to;
  }

  // What was not kept of block d and of the interval() - 1 before it.
  void restore(int64_t d, int64_t line, int thread) const {
    const bool convolves = !is_kept(Stage::kDepthwise);
    if (!shape_.pw_residual && !convolves) return;
    const int64_t first = d / interval() * interval();
    for (int64_t block = first; block <= d; ++block) {
      const Norm a = norm(Stage::kDepthwise, block, line), c = norm(Stage::kPointwise, block, line);
      const Input input = input_of(block, line);
      for (int64_t i = 0; i < call_.batch; ++i) {
        const Tokens tokens = image(i);
        if (shape_.pw_residual && block == first) restore_input(first, line, i);
        const float* x = image_of(input, i, plane(thread, 0));
        const Activated pre = activated(Stage::kDepthwise, block, line, tokens);
        if (convolves) depthwise(block, line, pre, x, plane(thread, 1), scratch(thread));
        if (block == d) continue;
        float *y = plane(thread, 1), *next = input_slot(block + 1, line) + at(tokens);
        transform(pre, a, x, y);
        transform(activated(Stage::kPointwise, block, line, tokens), c, y, next);
      }
    }
  }
  // With residuals: an image of an input that was saved or given.
  void restore_input(int64_t d, int64_t line, int64_t i) const {
    float* to = input_slot(d, line) + at(image(i));
    if (d == 0) return load(call_.input, call_.input_stride, i, line, to);
    widen(anchor(d, line, image(i)), to);
  }

  // ---- products ----

  void transpose(int64_t d, int64_t line) const {
    const Pointwise w = matrix(d);
    k_.transpose({w.matrix, w.row_stride, shape_.channels, shape_.channels, line * lanes_,
                  transposed_ + line * lanes_ * transposed_stride_, transposed_stride_});
  }

  // Of y, and with a residual of what passes by the product; and its sums.
  void input_gradient(int64_t d, int64_t b, int64_t chunk) const {
    const Tokens tokens = band(b);
    for (int64_t line = chunk * lines_ / chunks_; line < (chunk + 1) * lines_ / chunks_; ++line) {
      float* gradient = line_of(chain_gradient_, line) + at(tokens);
      char* out = reinterpret_cast<char*>(gradient);
      product({transposed_ + line * lanes_ * transposed_stride_, transposed_stride_, kZeros, kOnes}, line, tokens,
              panels_, shape_.pw_residual ? out : nullptr, out);
      measure(Stage::kDepthwise, d, line, tokens, gradient, part(line, b));
    }
  }

  void weight_gradient(int64_t d, int64_t group, int thread) const {
    const int64_t first = group * group_, last = std::min(lines_, first + group_);
    const int64_t channels = shape_.channels;
    float* matrix_sum = matrices_ + shape_.pw_index[d] * channels * channels;
    auto add = [&](int64_t line, const Tokens& tokens, float* to, int64_t stride) {
      k_.weight_gradient({operand_of(product_gradient_, line, tokens), operand_of(y_, 0, tokens), lines_,
                          operand_line(tokens), tokens.count, to, stride});
    };
    if (direct_) {
      for (int64_t b = 0; b < bands_; ++b) {
        for (int64_t line = first; line < last; ++line) {
          add(line, band(b), matrix_sum + line * lanes_ * channels, channels);
        }
      }
      return;
    }
    const Pointwise w = matrix(d);
    float* rows = rows_ + thread * lanes_ * padded();
    for (int64_t line = first; line < last; ++line) {
      std::fill_n(rows, lanes_ * padded(), 0.f);
      for (int64_t b = 0; b < bands_; ++b) add(line, band(b), rows, padded());
      for (int64_t lane = 0; lane < channels_of(line); ++lane) {
        const int64_t o = line * lanes_ + lane;
        const float* row = rows + lane * padded();
        float* sum = matrix_sum + o * channels;
        double product = 0;
        for (int64_t i = 0; i < channels; ++i) {
          sum[i] += w.gain[o] * row[i];
          product += double(load_scalar(w.matrix + o * w.row_stride, k_.operand, i)) * row[i];
        }
        if (out_.pw_gain) out_.pw_gain[d * channels + o] = float(product);
      }
    }
  }

  // ---- results ----

  int64_t matrix_items() const {
    if (sums_in_place_) return 0;
    return composed_ ? call_.weights.templates * shape_.channels + shape_.matrices : shape_.matrices * shape_.channels;
  }

  void finish_matrix(int64_t item) const {
    const int64_t channels = shape_.channels, size = channels * channels;
    if (!composed_) {
      return narrow(matrices_ + item * channels, channels, out_.pw_weight, item * channels);
    }
    const MixerWeights& w = call_.weights;
    if (item < w.templates * channels) {  // a row of a template's gradient
      const int64_t t = item / channels, row = item % channels;
      for (int64_t i = 0; i < channels; ++i) {
        float sum = 0;
        for (int64_t s = 0; s < shape_.matrices; ++s) {
          sum += w.pw_coefficients[s * w.templates + t] * matrices_[s * size + row * channels + i];
        }
        store_scalar(out_.pw_weight, w.type, (t * channels + row) * channels + i, sum);
      }
      return;
    }
    const int64_t s = item - w.templates * channels;
    for (int64_t t = 0; t < w.templates; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < size; ++i) {
        sum += double(matrices_[s * size + i]) * load_scalar(w.pw_weight, w.type, t * size + i);
      }
      out_.pw_coefficients[s * w.templates + t] = float(sum);
    }
  }

  void narrow(const float* from, int64_t count, char* to, int64_t at) const {
    if (!to) return;
    for (int64_t i = 0; i < count; ++i) store_scalar(to, call_.weights.type, at + i, from[i]);
  }

  void finish_filter(int64_t filter) const {
    const int64_t channels = shape_.channels;
    const float* taps = taps_ + filter * padded() * area();
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < area(); ++i) {
        const float value = taps[(c / lanes_ * area() + i) * lanes_ + c % lanes_];
        store_scalar(out_.dw_weight, call_.weights.type, (filter * channels + c) * area() + i, value);
      }
    }
    narrow(filter_bias_ + filter * padded(), channels, out_.dw_bias, filter * channels);
  }

  void finish_biases(int64_t matrix) const {
    narrow(matrix_bias_ + matrix * padded(), shape_.channels, out_.pw_bias, matrix * shape_.channels);
  }

  External gradient_;
  int64_t gradient_stride_;
  MixerGradients out_;
  int64_t group_, groups_;
  bool direct_, sums_in_place_;  // sums of a matrix are made where they stay; in the result itself
  char *panels_, *product_gradient_, *y_, *transposed_, *scratch_;
  float *chain_gradient_, *inputs_, *planes_, *flipped_, *rows_, *parts_;
  float *taps_, *filter_bias_, *matrix_bias_, *matrices_;
  int64_t transposed_stride_, plane_floats_, sums_;
};

}  // namespace

void train_backward(const Kernels& kernels, const TrainingCall& call, const External& gradient, int64_t gradient_stride,
                    const MixerGradients& gradients, const Parallel& parallel) {
  Backward(kernels, call, gradient, gradient_stride, gradients, parallel);
}

}  // namespace spin
