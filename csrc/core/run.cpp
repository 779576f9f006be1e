// The schedule. Every block is two kernels, image by image over one blocked layout:
//
//     depthwise: x -> y   (items: lines of channels)        pointwise: y -> x   (items: panels of channels)
//
//  - Small images of a batch: a thread takes an image through all blocks; x and y stay in its caches.
//  - Images left over (fewer than threads): all threads work on one image, a phase per kernel. A thread's
//    own panels write the very lines that its next depthwise reads.
//  - Images whose y does not fit the caches are cut into bands of rows: the depthwise makes a band of y
//    (reading the halo rows of x where they are), the pointwise turns it into that band of the next x; x
//    alternates between two buffers, because the next band still reads the old one.
//
// Alternatives that were considered: one launch per kernel over the whole batch (activations then pass
// through memory twice per block: 1 to 2 % slower from 256 tokens on, more for small channels), and fusing
// the pointwise with the next depthwise (nothing to gain while both passes hit the caches).
#include "run.h"

#include <algorithm>
#include <utility>

#include "workspace.h"

namespace spin {
namespace {

constexpr int64_t kBandBytes = 2 << 20;      // of y: about what one core's L2 holds beside the panels
constexpr int64_t kPackedBytes = 16 << 20;   // of matrices that are packed ahead of their use
constexpr double kFlopsPerThread = 2e6;      // below this a second thread costs more than it brings

struct Step {
  enum Kind { kLoad, kPatches, kStem, kDepthwise, kPointwise, kStore, kPool } kind;
  int64_t block, first_row, last_row;
};

// What one image uses while it passes: two x (the second only with bands), a band of y, scratch.
struct Buffers {
  char* x[2];
  char* y;
  float* scratch;
};

class Runner {
 public:
  // With `weights` the network has no memory yet: it lives in the workspace and is packed on the way.
  Runner(Network& network, const MixerWeights* weights, PackingPlan plan, const Batch& batch, const Parallel& parallel)
      : net_(network), k_(network.kernels()), shape_(network.shape()), weights_(weights), plan_(std::move(plan)),
        batch_(batch), parallel_(parallel) {
    height_ = shape_.whole() ? grid(batch.input.height) : batch.input.height;
    width_ = shape_.whole() ? grid(batch.input.width) : batch.input.width;
    lines_ = net_.lines(shape_.channels);
    input_lines_ = shape_.whole() ? std::max(lines_, net_.lines(net_.patch_inputs())) : lines_;
    const int64_t plane = height_ * width_ * k_.line_bytes;
    band_rows_ = ceil_div(height_, std::clamp<int64_t>(ceil_div(lines_ * plane, kBandBytes), 1, height_));
    const double flops = 2.0 * batch.size * shape_.depth * height_ * width_ * shape_.channels * shape_.channels;
    threads_ = std::clamp<int64_t>(int64_t(flops / kFlopsPerThread), 1, parallel.threads);
    single_images_ = batch.size / threads_ * threads_;
  }

  void operator()() {
    const std::vector<Segment>& segments = plan_.segments;
    std::vector<std::vector<Step>> steps;
    int64_t phases = 4;
    for (const Segment& segment : segments) {
      steps.push_back(image_steps(segment));
      phases += 2 + (batch_.size - single_images_) * int64_t(steps.back().size());
    }
    // Between segments every image waits in its x; a single segment needs an x per thread only.
    const int64_t images = segments.size() > 1 ? batch_.size : threads_;
    Workspace workspace(layout(images));
    place(workspace.data(), images);

    Team team(threads_, phases);
    parallel_.run(threads_, [&](int thread) {
      int64_t phase = 0;
      for (size_t i = 0; i < segments.size(); ++i) {
        const Segment& segment = segments[i];
        if (weights_) pack(team, thread, phase++, segment);
        team.phase(thread, phase++, single_images_, [&](int64_t image, int64_t, int64_t) {
          const Buffers buffers = buffers_of(images == batch_.size ? image : thread, thread);
          for (const Step& step : steps[i]) run_items(step, 0, items(step), items(step), image, buffers, 0);
        });
        for (int64_t image = single_images_; image < batch_.size; ++image) {
          Buffers buffers = buffers_of(images == batch_.size ? image : 0, 0);
          for (const Step& step : steps[i]) {
            buffers.scratch = scratch(thread);
            team.phase(thread, phase++, items(step), [&](int64_t item, int64_t own_first, int64_t own_last) {
              run_items(step, item, item + 1, own_last, image, buffers, own_first);
            });
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
    auto bands = [&](auto add) {
      for (int64_t row = 0; row < height_; row += band_rows_) add(row, std::min(row + band_rows_, height_));
    };
    if (segment.first_block == 0 && shape_.whole()) {
      bands([&](int64_t first, int64_t last) {
        steps.push_back({Step::kPatches, 0, first, last});
        steps.push_back({Step::kStem, 0, first, last});
      });
    } else if (segment.first_block == 0) {
      steps.push_back({Step::kLoad, 0, 0, height_});
    }
    for (int64_t block = segment.first_block; block < segment.last_block; ++block) {
      bands([&](int64_t first, int64_t last) {
        steps.push_back({Step::kDepthwise, block, first, last});
        steps.push_back({Step::kPointwise, block, first, last});
      });
    }
    if (segment.last_block == shape_.depth) {
      steps.push_back({shape_.whole() ? Step::kPool : Step::kStore, shape_.depth, 0, height_});
    }
    return steps;
  }

  // ---- memory ----

  int64_t layout(int64_t images) {
    plane_bytes_ = height_ * width_ * k_.line_bytes;
    x_bytes_ = lines_ * plane_bytes_;
    x_count_ = band_rows_ < height_ ? 2 : 1;
    y_bytes_ = input_lines_ * band_rows_ * width_ * k_.line_bytes;
    scratch_bytes_ = round_up(k_.depthwise_scratch(height_, width_, shape_.kernel_size) * 4, kCacheLine);
    packed_bytes_ = weights_ ? round_up(net_.bytes(), kCacheLine) : 0;
    pooled_bytes_ = shape_.whole() ? lines_ * batch_.size * k_.line_bytes : 0;
    logits_bytes_ = shape_.whole() ? net_.lines(shape_.classes) * batch_.size * k_.line_bytes : 0;
    return packed_bytes_ + images * x_count_ * x_bytes_ + threads_ * (y_bytes_ + scratch_bytes_) + pooled_bytes_ +
           logits_bytes_;
  }

  void place(char* memory, int64_t images) {
    auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
    char* packed = take(packed_bytes_);
    if (weights_) net_.bind(packed);
    x_ = take(images * x_count_ * x_bytes_);
    y_ = take(threads_ * y_bytes_);
    scratch_ = take(threads_ * scratch_bytes_);
    pooled_ = take(pooled_bytes_);
    logits_ = take(logits_bytes_);
  }

  float* scratch(int thread) const { return reinterpret_cast<float*>(scratch_ + thread * scratch_bytes_); }

  Buffers buffers_of(int64_t x, int thread) const {
    char* first = x_ + x * x_count_ * x_bytes_;
    return {{first, first + (x_count_ - 1) * x_bytes_}, y_ + thread * y_bytes_, scratch(thread)};
  }

  // ---- phases ----

  void pack(Team& team, int thread, int64_t phase, const Segment& segment) const {
    const int64_t parameters = segment.first_block == 0 ? net_.parameter_items() : 0;
    const int64_t panels = net_.panels(shape_.channels);
    team.phase(thread, phase, parameters + int64_t(segment.packings.size()) * panels, [&](int64_t item, int64_t, int64_t) {
      if (item < parameters) return net_.pack_parameters(*weights_, item);
      const Segment::Packing& p = segment.packings[(item - parameters) / panels];
      net_.pack_matrix_panel(*weights_, p.matrix, p.slot, (item - parameters) % panels);
    });
  }

  int64_t items(const Step& step) const {
    switch (step.kind) {
      case Step::kPatches: return step.last_row - step.first_row;
      case Step::kStem:
      case Step::kPointwise: return net_.panels(shape_.channels);
      default: return lines_;
    }
  }

  void run_items(const Step& step, int64_t first, int64_t last, int64_t own_last, int64_t image, const Buffers& b,
                 int64_t own_first) const {
    const int64_t bands = x_count_ - 1;
    const int64_t row_bytes = width_ * k_.line_bytes, band_bytes = (step.last_row - step.first_row) * row_bytes;
    const char* x_in = b.x[step.block & bands];
    char* x_out = b.x[(step.block + 1) & bands];
    switch (step.kind) {
      case Step::kLoad:
        for (int64_t line = first; line < last; ++line) k_.load(input(image), line, b.x[0] + line * plane_bytes_);
        break;
      case Step::kStore:
        for (int64_t line = first; line < last; ++line) k_.store(x_in + line * plane_bytes_, line, output(image));
        break;
      case Step::kPool:
        for (int64_t line = first; line < last; ++line) {
          k_.pool(x_in + line * plane_bytes_, height_ * width_, pooled_ + (line * batch_.size + image) * k_.line_bytes);
        }
        break;
      case Step::kPatches:
        k_.load_patches({input(image), shape_.patch, shape_.patch_stride, shape_.patch_padding, width_,
                         step.first_row + first, step.first_row + last, b.y + first * row_bytes, band_bytes});
        break;
      case Step::kDepthwise:
        for (int64_t line = first; line < last; ++line) {
          const Network::Depthwise w = net_.depthwise(step.block, line);
          k_.depthwise({x_in + line * plane_bytes_, b.y + line * band_bytes, height_, width_, shape_.kernel_size,
                        step.first_row, step.last_row, w.taps, w.bias, w.scale, w.shift, shape_.activation, b.scratch});
        }
        break;
      case Step::kStem:
        product(net_.stem(), net_.stem().panels, first, last, own_last, own_first, b.y, band_bytes, nullptr,
                b.x[0] + step.first_row * row_bytes, plane_bytes_, band_bytes / k_.line_bytes, shape_.activation);
        break;
      case Step::kPointwise: {
        const Pointwise w = net_.pointwise(step.block, plan_.slot_of_block[step.block]);
        const int64_t next = step.last_row < height_ ? step.block : std::min(step.block + 1, shape_.depth - 1);
        product(w, net_.pointwise(next, plan_.slot_of_block[next]).panels, first, last, own_last, own_first, b.y, band_bytes,
                shape_.pw_residual ? b.y : nullptr, x_out + step.first_row * row_bytes, plane_bytes_,
                band_bytes / k_.line_bytes, shape_.activation);
        break;
      }
    }
  }

  // Panels [first, last); after the last of its own a thread goes on with panel own_first of `next_panels`.
  void product(const Pointwise& w, const char* next_panels, int64_t first, int64_t last, int64_t own_last, int64_t own_first,
               const char* in, int64_t in_stride, const char* residual, char* out, int64_t out_stride, int64_t tokens,
               Activation activation) const {
    auto offset = [&](int64_t panel) { return net_.panel_offset(panel, w.input_channels, w.output_channels); };
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t begin = net_.panel_begin(panel, w.output_channels), channel = begin * k_.lanes;
      const int64_t next = panel + 1 < own_last ? panel + 1 : own_first;
      k_.product({
          .input = in,
          .input_lines = net_.lines(w.input_channels),
          .input_stride = in_stride,
          .panel = w.panels + offset(panel),
          .vectors = net_.panel_begin(panel + 1, w.output_channels) - begin,
          .first_vector = begin,
          .bias = w.bias + channel,
          .gain = w.gain + channel,
          .scale = w.scale + channel,
          .shift = w.shift + channel,
          .residual = residual,
          .residual_stride = in_stride,
          .output = out,
          .output_stride = out_stride,
          .tokens = tokens,
          .activation = activation,
          .prefetch = (panel + 1 < own_last ? w.panels : next_panels) + offset(next),
          .prefetch_bytes = offset(next + 1) - offset(next),
      });
    }
  }

  // The classifier: one product whose tokens are the images of the batch.
  void classify(Team& team, int thread, int64_t phase) const {
    const Pointwise w = net_.head();
    const int64_t stride = batch_.size * k_.line_bytes;
    team.phase(thread, phase, net_.panels(shape_.classes), [&](int64_t panel, int64_t own_first, int64_t own_last) {
      product(w, w.panels, panel, panel + 1, own_last, own_first, pooled_, stride, nullptr, logits_, stride, batch_.size,
              Activation::kIdentity);
    });
    External to = batch_.output;
    to.channels = shape_.classes, to.height = 1, to.width = batch_.size;
    to.channel_stride = 1, to.row_stride = 0, to.column_stride = batch_.output_stride;
    team.phase(thread, phase + 1, net_.lines(shape_.classes), [&](int64_t line, int64_t, int64_t) {
      k_.store(logits_ + line * stride, line, to);
    });
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
  int64_t height_, width_, lines_, input_lines_, band_rows_, single_images_;
  int threads_;
  int64_t plane_bytes_ = 0, x_bytes_ = 0, x_count_ = 1, y_bytes_ = 0, scratch_bytes_ = 0, packed_bytes_ = 0;
  int64_t pooled_bytes_ = 0, logits_bytes_ = 0;
  char *x_ = nullptr, *y_ = nullptr, *scratch_ = nullptr, *pooled_ = nullptr, *logits_ = nullptr;
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
  const int64_t bytes = Network(kernels, shape, 0).matrix_bytes(shape.channels, shape.channels);
  PackingPlan plan = plan_packing(shape.pw_index, std::max<int64_t>(kPackedBytes / bytes, 1));
  Network network(kernels, std::move(shape), plan.slots);
  Runner(network, &weights, std::move(plan), batch, parallel)();
}

}  // namespace spin
