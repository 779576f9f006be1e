// Forward, two phases per block:
//
//   lines:            x = normalised act of the last product; depthwise -> kept, statistics; y -> panels
//   bands x lines:    product -> kept, statistics of a band
//
// A line item has all tokens of its channels, so the statistics of the depthwise are complete where they are made;
// those of the product are combined, band by band in order, by the next line item. Cost: inference's, plus the
// activations a second time for the statistics, plus writing what is kept.
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

    Team team(threads_);
    parallel.run(threads_, [&](int thread) {
      team.phase(thread, packing_items(), [&](int64_t item) { pack(item); });
      for (int64_t d = 0; d < shape_.depth; ++d) {
        team.phase(thread, lines_, [&](int64_t line) { line_item(d, line, thread); });
        team.phase(thread, bands_ * chunks_,
                   [&](int64_t item) { pointwise(d, item / chunks_, item % chunks_, thread); });
      }
      team.phase(thread, lines_, [&](int64_t line) { finish(line, thread); });
    });
  }

 private:
  void place() {
    net_.bind(take(net_.bytes()));
    panels_ = take(panel_bytes());
    chain_ = take_floats((shape_.pw_residual ? lines_ : threads_) * line_);
    place_recomputed(1);
    parts_ = reinterpret_cast<double*>(take(lines_ * bands_ * 2 * lanes_ * 8));
    wide_ = take_floats(threads_ * wide_floats());
    scratch_ = take(threads_ * scratch_bytes());
  }

  // Where residuals chain the blocks, x of a line, then its y; else a thread's own.
  float* chain(int64_t line, int thread) const { return chain_ + (shape_.pw_residual ? line : thread) * line_; }
  int64_t wide_floats() const { return std::max(plane_, band_tokens_ * lanes_); }
  float* wide(int thread) const { return wide_ + thread * wide_floats(); }
  double* part(int64_t line, int64_t band) const { return parts_ + (line * bands_ + band) * 2 * lanes_; }

  void line_item(int64_t d, int64_t line, int thread) const {
    float* chain = this->chain(line, thread);
    const Norm before = d > 0 ? finished(d - 1, line) : Norm{};
    Moments moments;
    for (int64_t i = 0; i < call_.batch; ++i) {
      const Tokens tokens = image(i);
      float* x = chain + at(tokens);
      input(d, line, i, before, x, thread);
      const Activated a = activated(Stage::kDepthwise, d, line, tokens);
      depthwise(d, line, a, x, wide(thread), scratch_ + thread * scratch_bytes());
      if (call_.eps) measure(a, moments);
    }
    if (call_.eps) write(Stage::kDepthwise, d, line, moments);
    const Norm n = norm(Stage::kDepthwise, d, line);
    for (int64_t b = 0; b < bands_; ++b) {
      const Tokens tokens = band(b);
      const float* x = chain + at(tokens);
      float* y = shape_.pw_residual ? chain + at(tokens) : wide(thread);
      transform(activated(Stage::kDepthwise, d, line, tokens), n, x, y);
      pack_panels(y, line, tokens, panels_);
    }
  }

  // An image of block d's input. Of block `depth`: of the result.
  void input(int64_t d, int64_t line, int64_t i, const Norm& before, float* x, int thread) const {
    if (d == 0) return load(call_.input, call_.input_stride, i, line, x);
    transform(activated(Stage::kPointwise, d - 1, line, image(i)), before, shape_.pw_residual ? x : nullptr, x);
    if (d == shape_.depth || !anchored(d)) return;
    // Rounded, as the backward pass will find it.
    Activated to = anchor(d, line, image(i));
    if (call_.kept == 0) to.pre = reinterpret_cast<const char*>(wide(thread));
    k_.narrow(x, shape_.type, plane_, const_cast<char*>(to.pre));
    widen(to, x);
  }

  void pointwise(int64_t d, int64_t b, int64_t chunk, int thread) const {
    const Pointwise w = matrix(d);
    const Tokens tokens = band(b);
    const bool narrow = shape_.type != DType::kFloat32;
    for (int64_t line = chunk * lines_ / chunks_; line < (chunk + 1) * lines_ / chunks_; ++line) {
      const int64_t channel = line * lanes_;
      const Activated a = activated(Stage::kPointwise, d, line, tokens);
      char* pre = const_cast<char*>(a.pre);
      product({w.matrix + channel * w.row_stride, w.row_stride, w.bias + channel, w.gain + channel}, line, tokens,
              panels_, nullptr, narrow ? reinterpret_cast<char*>(wide(thread)) : pre);
      if (narrow) k_.narrow(wide(thread), shape_.type, tokens.count * lanes_, pre);
      if (call_.eps) k_.moments({a, part(line, b), part(line, b) + lanes_});
    }
  }

  void finish(int64_t line, int thread) const {
    const Norm before = shape_.depth > 0 ? finished(shape_.depth - 1, line) : Norm{};
    for (int64_t i = 0; i < call_.batch; ++i) {
      float* x = chain(line, thread) + at(image(i));
      input(shape_.depth, line, i, before, x, thread);
      store(x, line, output_, output_stride_, i);
    }
  }

  // ---- statistics ----

  // The normalisation behind a product, whose statistics are those of its bands.
  Norm finished(int64_t d, int64_t line) const {
    if (call_.eps) {
      Moments moments;
      for (int64_t b = 0; b < bands_; ++b) moments.add(part(line, b), lanes_, band(b).count);
      write(Stage::kPointwise, d, line, moments);
    }
    return norm(Stage::kPointwise, d, line);
  }

  void measure(const Activated& a, Moments& moments) const {
    double part[2 * kMaxLanes];
    k_.moments({a, part, part + lanes_});
    moments.add(part, lanes_, a.tokens);
  }

  void write(Stage stage, int64_t d, int64_t line, const Moments& moments) const {
    float* to = statistics(stage, d, line);
    for (int64_t lane = 0; lane < channels_of(line); ++lane) {
      to[lane] = float(moments.mean[lane]);
      to[shape_.channels + lane] = float(moments.deviations[lane] / moments.count);
    }
  }

  External output_;
  int64_t output_stride_;
  char* panels_;
  float *chain_, *wide_;
  double* parts_;
  char* scratch_;
};

}  // namespace

int64_t saved_elements(const NetworkShape& shape, int64_t kept, int64_t tokens) {
  if (kept == 0) return 0;
  const int64_t anchors = shape.pw_residual && shape.depth ? (shape.depth - 1) / kAnchorInterval : 0;
  return (kept * shape.depth + anchors) * round_up(shape.channels, kMaxLanes) * tokens;
}

void train_forward(const Kernels& kernels, const TrainingCall& call, const External& output, int64_t output_stride,
                   const Parallel& parallel) {
  Forward(kernels, call, output, output_stride, parallel);
}

}  // namespace spin
