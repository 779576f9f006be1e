// The schedule. A block is two kernels over one blocked layout, on a band of rows of one image:
//
//     depthwise: rows of x (and the halo rows around them) -> band of y       pointwise: band of y -> rows of x
//
// The band of y is the thread's own and stays in its L2, in the panels that the product reads; the depthwise
// hands it over line by line. A small image is one band, and x is overwritten in place; with several bands x
// alternates between two buffers, because the neighbours still read the old one.
//
//  - A batch: every thread takes an image at a time through all blocks; nothing waits for anything.
//  - Images left over (fewer than threads): the threads share one image, a band each, a phase per block.
//  - Large images: as many bands as it takes for y to fit.
//
// Plain matrices are read where they are; of another element type than the chain's, a vector of rows is
// converted right before its use. Compositions are summed once for all blocks that share one, segment by
// segment (plan_packing), so that those in use stay few and warm.
//
// Two alternatives for sharing one image:
//  - Channels: a thread computes some output channels of all tokens. Then every core reads the half of y that
//    the other one has just written, through the other's cache, twice per block a barrier; bands exchange
//    halo rows only, but every core streams the whole matrix. Two cores of an Emerald Rapids, batch 1, best
//    of three runs in turns: 256/8 k5 0.92 (channels) against 0.81 ms (bands), 1024/20 k9 32.2 against 30.0,
//    768/32 k3 level. Channels would win where cores outnumber the rows.
//  - One kernel over the whole batch before the next: activations then leave the caches between kernels.
// Fusing the pointwise with the next depthwise gains nothing while both passes hit the caches.
#include "run.h"

#include <algorithm>
#include <utility>

#include "workspace.h"

namespace spin {
namespace {

// Measured (best calls): at 32 x 32 tokens of 1024 channels, batch 2, bands of 0.6, 1.1, 2 and 5 MB take 264, 262,
// 268 and 312 ms.
constexpr int64_t kBandBytes = 9 << 17;    // of y: what one core's L2 holds beside the rows of weights
constexpr int64_t kPackedBytes = 4 << 20;  // of compositions that are summed ahead of their use
constexpr double kFlopsPerThread = 2e6;    // below this a second thread costs more than it brings

// What happens to an image, one step after the other. Items of a step are independent of each other.
struct Step {
  enum Kind { kLoad, kEmbed, kBlock, kStore, kPool } kind;  // items: lines, bands, bands, lines, lines
  int64_t block;
};

// What an image owns while it passes: two x, or one twice when there is a single band.
struct Image {
  int64_t index;
  char* x[2];
};

class Runner {
 public:
  // With `weights` the network has no memory yet: it lives in the workspace and is packed on the way.
  Runner(Network& network, const MixerWeights* weights, PackingPlan plan, const Batch& batch, const Parallel& parallel)
      : net_(network),
        k_(network.kernels()),
        shape_(network.shape()),
        weights_(weights),
        plan_(std::move(plan)),
        batch_(batch),
        parallel_(parallel) {
    plain_ = weights_ && !weights_->pw_coefficients;
    converted_ = plain_ && !net_.reads(*weights_);
    height_ = shape_.whole() ? grid(batch.input.height) : batch.input.height;
    width_ = shape_.whole() ? grid(batch.input.width) : batch.input.width;
    lines_ = net_.lines(shape_.channels);
    plane_bytes_ = height_ * width_ * k_.line_bytes;
    const double flops = 2.0 * batch.size * shape_.depth * height_ * width_ * shape_.channels * shape_.channels;
    threads_ = int(std::clamp(flops / kFlopsPerThread, 1.0, double(parallel.threads)));
    single_images_ = batch.size / threads_ * threads_;
    const int64_t sharers = single_images_ < batch.size ? threads_ : 1;  // of one image
    bands_ = std::min(round_up(ceil_div(lines_ * plane_bytes_, kBandBytes), sharers), height_);
  }

  void operator()() {
    const std::vector<Segment>& segments = plan_.segments;
    std::vector<std::vector<Step>> steps;
    int64_t phases = 2;  // of the classifier
    for (const Segment& segment : segments) {
      steps.push_back(image_steps(segment));
      phases += 2 + (batch_.size - single_images_) * int64_t(steps.back().size());
    }
    // Between segments every image waits in its x; a single segment needs an x per thread only.
    const int64_t places = segments.size() > 1 ? batch_.size : threads_;
    Workspace workspace(measure(places));
    place(workspace.data(), places);
    auto image_at = [&](int64_t image, int thread) {
      char* x = x_ + (segments.size() > 1 ? image : thread) * x_count_ * x_bytes_;
      return Image{image, {x, x + (x_count_ - 1) * x_bytes_}};
    };

    Team team(threads_, phases);
    parallel_.run(threads_, [&](int thread) {
      int64_t phase = 0;
      for (size_t i = 0; i < segments.size(); ++i) {
        if (weights_) pack(team, thread, phase++, segments[i]);
        team.phase(thread, phase++, single_images_, [&](int64_t index) {
          const Image image = image_at(index, thread);
          for (const Step& step : steps[i]) {
            for (int64_t item = 0; item < items(step); ++item) run_item(step, item, image, thread);
          }
        });
        for (int64_t index = single_images_; index < batch_.size; ++index) {
          const Image image = image_at(index, 0);
          for (const Step& step : steps[i]) {
            team.phase(thread, phase++, items(step), [&](int64_t item) { run_item(step, item, image, thread); });
          }
        }
      }
      if (shape_.whole()) classify(team, thread, phase);
    });
  }

 private:
  int64_t grid(int64_t pixels) const {
    return (pixels + 2 * shape_.patch_padding - shape_.patch) / shape_.patch_stride + 1;
  }

  // ---- plan ----

  std::vector<Step> image_steps(const Segment& segment) const {
    std::vector<Step> steps;
    if (segment.first_block == 0) steps.push_back({shape_.whole() ? Step::kEmbed : Step::kLoad, 0});
    for (int64_t block = segment.first_block; block < segment.last_block; ++block)
      steps.push_back({Step::kBlock, block});
    if (segment.last_block == shape_.depth) {
      steps.push_back({shape_.whole() ? Step::kPool : Step::kStore, shape_.depth});
    }
    return steps;
  }

  // ---- memory ----

  int64_t measure(int64_t places) {
    x_bytes_ = lines_ * plane_bytes_;
    x_count_ = bands_ > 1 ? 2 : 1;
    const int64_t tokens = ceil_div(height_, bands_) * width_, images = shape_.whole() ? batch_.size : 0;
    const int64_t patch_lines = shape_.whole() ? net_.lines(net_.patch_inputs()) : 0;
    y_bytes_ = std::max(shape_.pw_residual ? lines_ : 1, patch_lines) * tokens * k_.line_bytes;
    panels_bytes_ =
        std::max(std::max(lines_, patch_lines) * round_up(tokens, k_.lanes), lines_ * round_up(images, k_.lanes)) *
        k_.line_bytes;
    scratch_bytes_ = round_up(k_.depthwise_scratch(height_, width_, shape_.kernel_size) * 4, kCacheLine);
    rows_bytes_ = converted_ ? k_.lanes * net_.row_stride(shape_.channels) : 0;
    packed_bytes_ = weights_ ? round_up(net_.bytes(), kCacheLine) : 0;
    pooled_bytes_ = shape_.whole() ? lines_ * batch_.size * k_.line_bytes : 0;
    logits_bytes_ = shape_.whole() ? net_.lines(shape_.classes) * batch_.size * k_.line_bytes : 0;
    return packed_bytes_ + places * x_count_ * x_bytes_ +
           threads_ * (y_bytes_ + panels_bytes_ + rows_bytes_ + scratch_bytes_) + pooled_bytes_ + logits_bytes_;
  }

  void place(char* memory, int64_t places) {
    auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
    char* packed = take(packed_bytes_);
    if (weights_) net_.bind(packed);
    x_ = take(places * x_count_ * x_bytes_);
    y_ = take(threads_ * y_bytes_);
    panels_ = take(threads_ * panels_bytes_);
    rows_ = take(threads_ * rows_bytes_);
    scratch_ = take(threads_ * scratch_bytes_);
    pooled_ = take(pooled_bytes_);
    logits_ = take(logits_bytes_);
  }

  // ---- phases ----

  void pack(Team& team, int thread, int64_t phase, const Segment& segment) const {
    const int64_t parameters = segment.first_block == 0 ? net_.parameter_items() : 0;
    const int64_t vectors = net_.vectors(shape_.channels);
    team.phase(thread, phase, parameters + int64_t(segment.packings.size()) * vectors, [&](int64_t item) {
      if (item < parameters) return net_.pack_parameters(*weights_, item);
      const Segment::Packing& p = segment.packings[(item - parameters) / vectors];
      net_.pack_rows(*weights_, p.matrix, p.slot, (item - parameters) % vectors);
    });
  }

  int64_t items(const Step& step) const {
    return step.kind == Step::kEmbed || step.kind == Step::kBlock ? bands_ : lines_;
  }

  void run_item(const Step& step, int64_t item, const Image& image, int thread) const {
    const char* x_in = image.x[step.block & 1];
    switch (step.kind) {
      case Step::kLoad:
        return k_.load(input(image.index), item, image.x[0] + item * plane_bytes_);
      case Step::kStore:
        return k_.store(x_in + item * plane_bytes_, item, output(image.index));
      case Step::kPool:
        return k_.pool(x_in + item * plane_bytes_, height_ * width_,
                       pooled_ + (item * batch_.size + image.index) * k_.line_bytes);
      case Step::kEmbed:
        return embed(item, image, thread);
      case Step::kBlock:
        return block(step.block, item, image, thread);
    }
  }

  struct Band {
    int64_t first_row, last_row, tokens, bytes, offset;  // bytes: of one line of the band; offset: in a plane
  };
  Band band(int64_t i) const {
    const int64_t first = i * height_ / bands_, last = (i + 1) * height_ / bands_, row = width_ * k_.line_bytes;
    return {first, last, (last - first) * width_, (last - first) * row, first * row};
  }

  void embed(int64_t item, const Image& image, int thread) const {
    const Band band = this->band(item);
    char *patches = y_ + thread * y_bytes_, *panels = panels_ + thread * panels_bytes_;
    k_.load_patches({input(image.index), shape_.patch, shape_.patch_stride, shape_.patch_padding, width_,
                     band.first_row, band.last_row, patches, band.bytes});
    const int64_t lines = net_.lines(net_.patch_inputs());
    for (int64_t line = 0; line < lines; ++line) {
      k_.pack_tokens({patches + line * band.bytes, band.tokens, line, lines, panels});
    }
    const Pointwise stem = net_.stem();
    product(stem, stem, {panels, band.tokens, nullptr, 0, image.x[0] + band.offset, plane_bytes_, shape_.activation},
            thread);
  }

  void block(int64_t d, int64_t item, const Image& image, int thread) const {
    const Band band = this->band(item);
    const char* x = image.x[d & 1];
    char *y = y_ + thread * y_bytes_, *panels = panels_ + thread * panels_bytes_;
    float* scratch = reinterpret_cast<float*>(scratch_ + thread * scratch_bytes_);
    for (int64_t line = 0; line < lines_; ++line) {
      const Network::Depthwise w = net_.depthwise(d, line);
      char* y_line = shape_.pw_residual ? y + line * band.bytes : y;  // only the residual reads it again
      k_.depthwise({x + line * plane_bytes_, y_line, height_, width_, shape_.kernel_size, band.first_row, band.last_row,
                    w.taps, w.bias, w.scale, w.shift, shape_.activation, scratch});
      k_.pack_tokens({y_line, band.tokens, line, lines_, panels});
    }
    product(pointwise(d), pointwise(std::min(d + 1, shape_.depth - 1)),
            {panels, band.tokens, shape_.pw_residual ? y : nullptr, band.bytes, image.x[(d + 1) & 1] + band.offset,
             plane_bytes_, shape_.activation},
            thread);
  }

  Pointwise pointwise(int64_t d) const {
    return plain_ ? net_.pointwise(d, *weights_) : net_.pointwise(d, plan_.slot_of_block[d]);
  }

  struct Operands {
    const char* panels;
    int64_t tokens;
    const char* residual;
    int64_t residual_stride;
    char* out;
    int64_t out_stride;
    Activation activation;
  };

  // All rows of a matrix; `next` is the one that this thread reads after it.
  void product(const Pointwise& w, const Pointwise& next, const Operands& o, int thread) const {
    for (int64_t vector = 0; vector < net_.vectors(w.output_channels); ++vector) run_vector(w, next, vector, o, thread);
  }

  void run_vector(const Pointwise& w, const Pointwise& next, int64_t vector, const Operands& o, int thread) const {
    const int64_t channel = vector * k_.lanes, after = channel + k_.lanes;
    const bool last = after >= w.output_channels;
    const Pointwise& ahead = last ? next : w;
    const int64_t first_ahead = last ? 0 : after, rows = std::min(k_.lanes, w.output_channels - channel);
    const char* weights = w.rows + channel * w.row_stride;
    int64_t row_stride = w.row_stride;
    if (converted_) {
      char* to = rows_ + thread * rows_bytes_;
      row_stride = net_.row_stride(w.input_channels);
      k_.pack_rows({weights, weights_->type, 1, 0, nullptr, rows, w.input_channels, to, row_stride});
      weights = to;
    }
    k_.product({
        .panels = o.panels,
        .input_channels = w.input_channels,
        .weights = weights,
        .row_stride = row_stride,
        .output_channels = rows,
        .first_vector = vector,
        .bias = w.bias + channel,
        .gain = w.gain + channel,
        .scale = w.scale + channel,
        .shift = w.shift + channel,
        .residual = o.residual,
        .residual_stride = o.residual_stride,
        .output = o.out,
        .output_stride = o.out_stride,
        .tokens = o.tokens,
        .activation = o.activation,
        .prefetch = ahead.rows + first_ahead * ahead.row_stride,
        .prefetch_bytes = std::min(k_.lanes, ahead.output_channels - first_ahead) * ahead.row_stride,
    });
  }

  // The classifier: one product whose tokens are the images of the batch.
  void classify(Team& team, int thread, int64_t phase) const {
    const Pointwise w = net_.head();
    const int64_t stride = batch_.size * k_.line_bytes;
    char* panels = panels_ + thread * panels_bytes_;
    for (int64_t line = 0; line < lines_; ++line) {
      k_.pack_tokens({pooled_ + line * stride, batch_.size, line, lines_, panels});
    }
    team.phase(thread, phase, net_.vectors(shape_.classes), [&](int64_t vector) {
      run_vector(w, w, vector, {panels, batch_.size, nullptr, 0, logits_, stride, Activation::kIdentity}, thread);
    });
    External to = batch_.output;
    to.channels = shape_.classes, to.height = 1, to.width = batch_.size;
    to.channel_stride = 1, to.row_stride = 0, to.column_stride = batch_.output_stride;
    team.phase(thread, phase + 1, net_.lines(shape_.classes),
               [&](int64_t line) { k_.store(logits_ + line * stride, line, to); });
  }

  External input(int64_t image) const {
    External t = batch_.input;
    t.data += image * batch_.input_stride * size_of(t.type);
    return t;
  }
  External output(int64_t image) const {
    External t = batch_.output;
    t.data += image * batch_.output_stride * size_of(t.type);
    return t;
  }

  Network& net_;
  const Kernels& k_;
  const NetworkShape& shape_;
  const MixerWeights* weights_;
  const PackingPlan plan_;
  const Batch& batch_;
  const Parallel& parallel_;
  int64_t height_, width_, lines_, bands_, single_images_;
  int threads_;
  bool plain_, converted_;  // matrices are read where they are; and are of another type
  int64_t plane_bytes_ = 0, panels_bytes_ = 0, rows_bytes_ = 0, x_bytes_ = 0, x_count_ = 1, y_bytes_ = 0,
          scratch_bytes_ = 0, packed_bytes_ = 0;
  int64_t pooled_bytes_ = 0, logits_bytes_ = 0;
  char *x_ = nullptr, *y_ = nullptr, *panels_ = nullptr, *rows_ = nullptr, *scratch_ = nullptr, *pooled_ = nullptr,
       *logits_ = nullptr;
};

}  // namespace

PackingPlan plan_packing(const std::vector<int64_t>& pw_index, int64_t slot_budget) {
  const int64_t depth = pw_index.size();
  const int64_t matrices = depth ? *std::max_element(pw_index.begin(), pw_index.end()) + 1 : 0;
  std::vector<int64_t> last_use(matrices, -1), slot_of(matrices, -1), free_slots;
  for (int64_t d = 0; d < depth; ++d) last_use[pw_index[d]] = d;

  PackingPlan plan;
  plan.segments.push_back({0, depth, {}});
  for (int64_t d = 0; d < depth; ++d) {
    const int64_t matrix = pw_index[d];
    if (slot_of[matrix] < 0) {
      if (free_slots.empty() && plan.slots >= slot_budget) {
        // Blocks before d are done with these once the segment ends: their slots are free for the next.
        for (int64_t m = 0; m < matrices; ++m) {
          if (slot_of[m] >= 0 && last_use[m] < d) free_slots.push_back(std::exchange(slot_of[m], -2));
        }
        if (!free_slots.empty()) {
          plan.segments.back().last_block = d;
          plan.segments.push_back({d, depth, {}});
        }
      }
      if (free_slots.empty()) free_slots.push_back(plan.slots++);
      slot_of[matrix] = free_slots.back();
      free_slots.pop_back();
      plan.segments.back().packings.push_back({matrix, slot_of[matrix]});
    }
    plan.slot_of_block.push_back(slot_of[matrix]);
  }
  return plan;
}

void run_packed(Network& network, const Batch& batch, const Parallel& parallel) {
  if (batch.size == 0) return;
  const NetworkShape& shape = network.shape();
  PackingPlan plan{{{0, shape.depth, {}}}, shape.pw_index, shape.matrices};
  Runner(network, nullptr, std::move(plan), batch, parallel)();
}

void run_unpacked(const Kernels& kernels, NetworkShape shape, const MixerWeights& weights, const Batch& batch,
                  const Parallel& parallel) {
  if (batch.size == 0) return;
  const Network measure(kernels, shape, 0);
  PackingPlan plan{{{0, shape.depth, {}}}, std::vector<int64_t>(shape.depth, 0), 0};
  if (weights.pw_coefficients) {
    plan = plan_packing(shape.pw_index,
                        std::max<int64_t>(kPackedBytes / measure.matrix_bytes(shape.channels, shape.channels), 1));
  }
  Network network(kernels, std::move(shape), plan.slots);
  Runner(network, &weights, std::move(plan), batch, parallel)();
}

}  // namespace spin
