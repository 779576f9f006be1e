// Forward, two phases per block:
//
//   lines:            x = normalised act of the last product; depthwise -> saved, statistics; y -> panels
//   bands x lines:    product -> saved, statistics of a band
//
// A line item has all tokens of its channels, so the statistics of the depthwise are complete where they are made;
// those of the product are combined, band by band in order, by the next line item. Cost: inference's, plus the
// activations a second time for the statistics, plus writing two tensors per block.
#include "train_common.h"

namespace spin {
namespace {

class Forward : Training {
 public:
  Forward(const Kernels& kernels, const TrainingCall& call, const External& output, int64_t output_stride,
          const Parallel& parallel)
      : Training(kernels, call, parallel), output_(output), output_stride_(output_stride) {
    place();
    Workspace workspace(used_);
    memory_ = workspace.data(), used_ = 0;
    place();

    Team team(threads_, 2 * shape_.depth + 2);
    parallel.run(threads_, [&](int thread) {
      int64_t phase = 0;
      team.phase(thread, phase++, packing_items(), [&](int64_t item) { pack(item); });
      for (int64_t d = 0; d < shape_.depth; ++d) {
        team.phase(thread, phase++, lines_, [&](int64_t line) { depthwise(d, line, thread); });
        team.phase(thread, phase++, bands_ * chunks_,
                   [&](int64_t item) { pointwise(d, item / chunks_, item % chunks_, thread); });
      }
      team.phase(thread, phase++, lines_, [&](int64_t line) {
        float* x = input_of(shape_.depth, line, thread);
        store(x, line, output_, output_stride_);
      });
    });
  }

 private:
  void place() {
    net_.bind(take(net_.bytes()));
    panels_ = take_floats(panel_floats());
    chain_ = take_floats((shape_.pw_residual ? lines_ : threads_) * line_);
    parts_ = reinterpret_cast<double*>(take(lines_ * bands_ * 2 * lanes_ * 8));
    wide_ = take_floats(threads_ * std::max(plane_, band_tokens_ * lanes_));
    scratch_ = take(threads_ * scratch_bytes());
  }

  float* chain(int64_t line, int thread) const { return chain_ + (shape_.pw_residual ? line : thread) * line_; }
  float* wide(int thread) const { return wide_ + thread * std::max(plane_, band_tokens_ * lanes_); }
  double* part(int64_t line, int64_t band) const { return parts_ + (line * bands_ + band) * 2 * lanes_; }

  // Input of block d; of block `depth`: the result. Where residuals chain the blocks, y of the last is there.
  float* input_of(int64_t d, int64_t line, int thread) const {
    float* x = chain(line, thread);
    if (d == 0) {
      load(call_.input, call_.input_stride, line, x);
      return x;
    }
    if (call_.eps) combine(d - 1, line);
    transform(Stage::kPointwise, d - 1, line, shape_.pw_residual ? x : nullptr, x);
    if (d < shape_.depth && anchored(d)) {  // rounded, as the backward pass will find it
      const Activated at = anchor(d, line);
      k_.narrow(x, shape_.type, line_, const_cast<char*>(at.pre));
      k_.transform({at, kZeros, kOnes, kZeros, nullptr, x});
    }
    return x;
  }

  void depthwise(int64_t d, int64_t line, int thread) const {
    float* x = input_of(d, line, thread);
    const Network::Depthwise w = net_.depthwise(d, line);
    const Activated a = activated(Stage::kDepthwise, d, line);
    const bool narrow = shape_.type != DType::kFloat32;
    for (int64_t i = 0; i < call_.batch; ++i) {
      char* to = const_cast<char*>(a.pre) + i * plane_ * size_of(shape_.type);
      char* plane = narrow ? reinterpret_cast<char*>(wide(thread)) : to;
      convolve(x + i * plane_, w.taps, w.bias, nullptr, plane, scratch_ + thread * scratch_bytes());
      if (narrow) k_.narrow(wide(thread), shape_.type, plane_, to);
    }
    if (call_.eps) {
      double mean[kMaxLanes], deviations[kMaxLanes];
      k_.moments({a, mean, deviations});
      write(Stage::kDepthwise, d, line, mean, deviations);
    }
    transform(Stage::kDepthwise, d, line, x, x);
    pack_tokens(x, line, panels_);
  }

  void pointwise(int64_t d, int64_t b, int64_t chunk, int thread) const {
    const Pointwise w = matrix(d);
    const Band at = band(b);
    const bool narrow = shape_.type != DType::kFloat32;
    for (int64_t line = chunk * lines_ / chunks_; line < (chunk + 1) * lines_ / chunks_; ++line) {
      const int64_t channel = line * lanes_;
      Activated a = activated(Stage::kPointwise, d, line);
      a.pre += at.first * lanes_ * size_of(shape_.type), a.tokens = at.tokens;
      char* saved = const_cast<char*>(a.pre);
      product({w.rows + channel * w.row_stride, w.row_stride, w.bias + channel, w.gain + channel}, line, at, panels_,
              nullptr, narrow ? reinterpret_cast<char*>(wide(thread)) : saved);
      if (narrow) k_.narrow(wide(thread), shape_.type, at.tokens * lanes_, saved);
      if (call_.eps) k_.moments({a, part(line, b), part(line, b) + lanes_});
    }
  }

  // The statistics of a product from those of its bands.
  void combine(int64_t d, int64_t line) const {
    double mean[kMaxLanes] = {}, deviations[kMaxLanes] = {};
    for (int64_t b = 0; b < bands_; ++b) {
      const Band at = band(b);
      const double *other = part(line, b), share = double(at.tokens) / double(at.first + at.tokens);
      for (int64_t lane = 0; lane < lanes_; ++lane) {
        const double delta = other[lane] - mean[lane];
        mean[lane] += delta * share;
        deviations[lane] += other[lanes_ + lane] + delta * delta * share * double(at.first);
      }
    }
    write(Stage::kPointwise, d, line, mean, deviations);
  }

  void write(Stage stage, int64_t d, int64_t line, const double* mean, const double* deviations) const {
    float* to = statistics(stage, d, line);
    for (int64_t lane = 0; lane < channels_of(line); ++lane) {
      to[lane] = float(mean[lane]);
      to[shape_.channels + lane] = float(deviations[lane] / double(tokens_));
    }
  }

  External output_;
  int64_t output_stride_;
  float *panels_, *chain_, *wide_;
  double* parts_;
  char* scratch_;
};

}  // namespace

int64_t saved_elements(const NetworkShape& shape, int64_t tokens) {
  const int64_t anchors = shape.pw_residual && shape.depth ? (shape.depth - 1) / kAnchorInterval : 0;
  return (2 * shape.depth + anchors) * round_up(shape.channels, kMaxLanes) * tokens;
}

void train_forward(const Kernels& kernels, const TrainingCall& call, const External& output, int64_t output_stride,
                   const Parallel& parallel) {
  Forward(kernels, call, output, output_stride, parallel);
}

}  // namespace spin
