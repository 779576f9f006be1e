// Backward, two phases per block, from the last to the first:
//
//   lines:   gradient of block d + 1's y -> of its depthwise -> of its input, which is block d's output -> of block d's
//            product (panels for the next phase); and block d's y again from what was saved
//   bands x lines, and lines:  the product's gradient with respect to y (transposed matrix) and to the matrix
//
// A line item has all tokens of its channels: BatchNorm's sums, biases, affines and filters end where they begin. The
// gradient of a matrix is summed over all blocks that share it in one float32 buffer, by the item that owns its rows.
// Cost: two products and two depthwise convolutions per block; the transposed matrix is made once for all
// blocks in a row that share it (0.1 ns per element).
// Numerics: every sum has one order, whatever the threads.
#include "train_common.h"

namespace spin {
namespace {

class Backward : Training {
 public:
  Backward(const Kernels& kernels, const TrainingCall& call, const External& gradient, int64_t gradient_stride,
           const MixerGradients& gradients, const Parallel& parallel)
      : Training(kernels, call, parallel), gradient_(gradient), gradient_stride_(gradient_stride), out_(gradients) {
    const int64_t depth = shape_.depth;
    group_ = std::clamp<int64_t>(lines_ / (2 * threads_), 1, kGroupLines);
    groups_ = ceil_div(lines_, group_);
    direct_ = !call.weights.pw_gain && shape_.channels % lanes_ == 0;
    place();
    Workspace workspace(used_);
    memory_ = workspace.data(), used_ = 0;
    place();

    Team team(threads_, 2 * depth + 3);
    parallel.run(threads_, [&](int thread) {
      int64_t phase = 0;
      team.phase(thread, phase++, packing_items() + sums_ / kClearFloats + 1, [&](int64_t item) {
        if (item < packing_items()) return pack(item);
        clear(item - packing_items());
      });
      for (int64_t d = depth - 1; d >= 0; --d) {
        const bool transposed = d + 1 < depth && shape_.pw_index[d + 1] == shape_.pw_index[d];
        const int64_t transposing = transposed ? 0 : lines_;
        team.phase(thread, phase++, transposing + lines_, [&](int64_t item) {
          if (item < transposing) return transpose(d, item);
          line_item(d, item - transposing, thread);
        });
        team.phase(thread, phase++, bands_ * chunks_ + groups_, [&](int64_t item) {
          if (item < bands_ * chunks_) return input_gradient(item / chunks_, item % chunks_);
          weight_gradient(d, item - bands_ * chunks_, thread);
        });
      }
      team.phase(thread, phase++, lines_, [&](int64_t line) { line_item(-1, line, thread); });
      const int64_t rows = matrix_items();
      team.phase(thread, phase++, rows + shape_.filters + shape_.matrices, [&](int64_t item) {
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

  void place() {
    net_.bind(take(net_.bytes()));
    panels_ = take_floats(panel_floats());
    chain_gradient_ = take_floats(lines_ * line_);
    product_gradient_ = take_floats(lines_ * line_);
    y_ = take_floats(lines_ * line_);
    inputs_ = take_floats(shape_.pw_residual ? std::min(kAnchorInterval, shape_.depth) * lines_ * line_ : 0);
    transposed_stride_ = round_up(shape_.channels, lanes_);
    transposed_ = take_floats(padded() * transposed_stride_);
    planes_ = take_floats(threads_ * 2 * line_);
    flipped_ = take_floats(threads_ * area() * lanes_);
    rows_ = take_floats(direct_ ? 0 : threads_ * lanes_ * padded());
    scratch_ = take(threads_ * scratch_bytes());
    // From here on: sums, zero at first.
    const int64_t before = used_;
    taps_ = take_floats(shape_.filters * padded() * area());
    filter_bias_ = take_floats(shape_.filters * padded());
    matrix_bias_ = take_floats(shape_.matrices * padded());
    matrices_ = take_floats(in_place_ ? 0 : shape_.matrices * shape_.channels * shape_.channels);
    sums_ = (used_ - before) / 4;
    if (in_place_) matrices_ = reinterpret_cast<float*>(out_.pw_weight);  // which came as zeros
  }
  void clear(int64_t part) const {
    const int64_t first = part * kClearFloats, last = std::min(sums_, first + kClearFloats);
    std::fill(taps_ + first, taps_ + std::max(first, last), 0.f);
  }

  float* line_of(float* lines, int64_t line) const { return lines + line * line_; }
  float* plane(int thread, int64_t which) const { return planes_ + (2 * thread + which) * line_; }

  // ---- lines ----

  void line_item(int64_t d, int64_t line, int thread) const {
    float* gradient = line_of(chain_gradient_, line);
    if (d + 1 < shape_.depth) {
      through_depthwise(d + 1, line, thread);
    } else {
      load(gradient_, gradient_stride_, line, gradient);
    }
    if (d >= 0) return through_activation(d, line, thread);
    store(gradient, line, out_.x, out_.x_stride);
  }

  // x of block d, in `to` or where it is already.
  const float* input_of(int64_t d, int64_t line, float* to) const {
    if (shape_.pw_residual) return line_of(inputs_, d % kAnchorInterval * lines_ + line);
    if (d == 0) {
      load(call_.input, call_.input_stride, line, to);
    } else {
      transform(Stage::kPointwise, d - 1, line, nullptr, to);
    }
    return to;
  }

  // With residuals: the inputs of block d and of those before it, back to the last that was saved.
  void restore_inputs(int64_t d, int64_t line, int thread) const {
    const int64_t first = d / kAnchorInterval * kAnchorInterval;
    float* x = line_of(inputs_, line);
    if (first == 0) {
      load(call_.input, call_.input_stride, line, x);
    } else {
      k_.transform({anchor(first, line), kZeros, kOnes, kZeros, nullptr, x});
    }
    float* y = plane(thread, 0);
    for (int64_t block = first; block < d; ++block) {
      transform(Stage::kDepthwise, block, line, x, y);
      x = line_of(inputs_, (block + 1) % kAnchorInterval * lines_ + line);
      transform(Stage::kPointwise, block, line, y, x);
    }
  }

  // The gradient of an activation's input from that of its normalised output, with those of the affine and of the bias.
  void through(Stage stage, int64_t d, int64_t line, const float* gradient, float* out, float* affine,
               float* bias) const {
    const Norm n = norm(stage, d, line);
    const Activated a = activated(stage, d, line);
    alignas(kCacheLine) float sums[2 * kMaxLanes], q[kMaxLanes] = {}, r[kMaxLanes] = {};
    k_.gradient_sums({a, gradient, n.center, sums});
    float* affine_line = affine + 2 * d * shape_.channels + line * lanes_;
    for (int64_t lane = 0; lane < channels_of(line); ++lane) {
      const float sum = sums[lane], moment = sums[lanes_ + lane];
      const float inverse = call_.eps ? n.inverse_deviation[lane] : 1.f;
      affine_line[lane] = moment * inverse;
      affine_line[shape_.channels + lane] = sum;
      if (!call_.eps) continue;
      q[lane] = -n.scale[lane] * inverse * inverse * moment / float(tokens_);
      r[lane] = -n.scale[lane] * sum / float(tokens_);
    }
    k_.activation_gradient({a, gradient, n.center, n.scale, call_.eps ? q : nullptr, r, out, bias});
  }

  void through_depthwise(int64_t d, int64_t line, int thread) const {
    const int64_t filter = shape_.dw_index[d], vector = filter * lines_ + line;
    float *gradient = line_of(chain_gradient_, line), *a = plane(thread, 0);
    through(Stage::kDepthwise, d, line, gradient, a, out_.dw_affine, filter_bias_ + vector * lanes_);
    const float* x = input_of(d, line, plane(thread, 1));
    float *taps = taps_ + vector * area() * lanes_, *flipped = flipped_ + thread * area() * lanes_;
    const float* forward = net_.depthwise(d, line).taps;
    for (int64_t i = 0; i < area(); ++i) {
      std::copy_n(forward + (area() - 1 - i) * lanes_, lanes_, flipped + i * lanes_);
    }
    for (int64_t i = 0; i < call_.batch; ++i) {
      k_.taps_gradient({a + i * plane_, x + i * plane_, height_, width_, shape_.kernel_size, taps});
      char* image = reinterpret_cast<char*>(gradient + i * plane_);
      convolve(a + i * plane_, flipped, kZeros, image, image, scratch_ + thread * scratch_bytes());
    }
  }

  void through_activation(int64_t d, int64_t line, int thread) const {
    float *c = line_of(product_gradient_, line), *panel_input = c;
    through(Stage::kPointwise, d, line, line_of(chain_gradient_, line), c, out_.pw_affine,
            matrix_bias_ + shape_.pw_index[d] * padded() + line * lanes_);
    if (call_.weights.pw_gain) {
      panel_input = plane(thread, 0);
      const float* gain = net_.pointwise(d, 0).gain + line * lanes_;
      const Activated same{reinterpret_cast<const char*>(c), DType::kFloat32, Activation::kIdentity, true, tokens_};
      k_.transform({same, kZeros, gain, kZeros, nullptr, panel_input});
    }
    pack_tokens(panel_input, line, panels_);
    if (shape_.pw_residual && (d + 1 == shape_.depth || (d + 1) % kAnchorInterval == 0)) {
      restore_inputs(d, line, thread);
    }
    transform(Stage::kDepthwise, d, line, input_of(d, line, plane(thread, 1)), line_of(y_, line));
  }

  // ---- products ----

  void transpose(int64_t d, int64_t line) const {
    const Pointwise w = matrix(d);
    k_.transpose({w.rows, w.row_stride, shape_.channels, shape_.channels, line * lanes_,
                  transposed_ + line * lanes_ * transposed_stride_, transposed_stride_});
  }

  // Of y, and with a residual of what passes by the product.
  void input_gradient(int64_t b, int64_t chunk) const {
    const Band at = band(b);
    for (int64_t line = chunk * lines_ / chunks_; line < (chunk + 1) * lines_ / chunks_; ++line) {
      char* out = reinterpret_cast<char*>(line_of(chain_gradient_, line) + at.first * lanes_);
      const float* rows = transposed_ + line * lanes_ * transposed_stride_;
      product({reinterpret_cast<const char*>(rows), transposed_stride_ * 4, kZeros, kOnes}, line, at, panels_,
              shape_.pw_residual ? out : nullptr, out);
    }
  }

  void weight_gradient(int64_t d, int64_t group, int thread) const {
    const int64_t first = group * group_, last = std::min(lines_, first + group_);
    const int64_t channels = shape_.channels;
    float* matrix_sum = matrices_ + shape_.pw_index[d] * channels * channels;
    auto add = [&](int64_t line, const Band& at, float* to, int64_t stride) {
      k_.weight_gradient({line_of(product_gradient_, line) + at.first * lanes_, y_ + at.first * lanes_, lines_, line_,
                          at.tokens, to, stride});
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
        const float *row = rows + lane * padded(), *weights = reinterpret_cast<const float*>(w.rows + o * w.row_stride);
        float* sum = matrix_sum + o * channels;
        double product = 0;
        for (int64_t i = 0; i < channels; ++i) {
          sum[i] += w.gain[o] * row[i];
          product += double(weights[i]) * row[i];
        }
        if (out_.pw_gain) out_.pw_gain[d * channels + o] = float(product);
      }
    }
  }

  // ---- results ----

  int64_t matrix_items() const {
    if (in_place_) return 0;
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
  bool direct_;  // sums of a matrix are made where they stay
  float *panels_, *chain_gradient_, *product_gradient_, *y_, *inputs_, *transposed_, *planes_, *flipped_, *rows_;
  float *taps_, *filter_bias_, *matrix_bias_, *matrices_;
  int64_t transposed_stride_, sums_;
  char* scratch_;
};

}  // namespace

void train_backward(const Kernels& kernels, const TrainingCall& call, const External& gradient, int64_t gradient_stride,
                    const MixerGradients& gradients, const Parallel& parallel) {
  Backward(kernels, call, gradient, gradient_stride, gradients, parallel);
}

}  // namespace spin
