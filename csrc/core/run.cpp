// The schedule. A block is two kernels over one blocked layout:
//
//     depthwise: a line of x -> the same line of y, and from there into the panels that the product reads
//     pointwise: all panels -> a line of x
//
// A frozen network has its matrices in panels and reads y as it is (product.h):
//
//     depthwise: a line of x -> the same line of y
//     pointwise: all of y -> a panel's channels of x
//
// and the product of larger matrices in float32 is Strassen's (strassen.h): of the halves of each of two bands of rows,
// whoever takes them, so that results do not depend on threads. A line's partner in the other half of the channels
// follows it, and sums of both.
//
// y stays in the L2 of the thread that uses it. Images are taken in groups, as many as it takes to fill the vectors
// of tokens and to read a matrix for 256 of them (four images of 7 x 7, one of 16 x 16); their planes lie side by side
// in a line, so that a product sees one long row of tokens.
//
//  - A batch: every thread takes a group at a time through all blocks; nothing waits for anything.
//  - Groups left over (fewer than threads): the threads share one group, a line each, a phase per block: the pointwise
//    of block d for a line, then the depthwise of block d + 1 for the same line, which needs no other. The two
//    kinds of panels alternate, so that one barrier per block is enough. (Frozen: the channels of a panel are no whole
//    lines, so both have a phase of their own. Strassen's: items of the first band come first.)
//  - Images too large for their y to stay in L2: bands of rows, one after the other or shared. x alternates between two
//    buffers then, because the neighbours still read the old one. A shared image whose matrices or filters are small
//    is cut into bands too, if that costs no vectors of tokens; and one of Strassen's product by two threads.
//
// A line that another core has fetched takes 8 ns to write, where the cores have no L3 in common (two threads of a
// virtual machine may find themselves on two core complexes of a Zen 5 processor, for seconds or minutes). So no data
// of another thread follow y: the product goes from line to line of it, and hardware goes on behind the last one, by 16
// lines at least. In turns, with and without kLinesAhead, on two complexes: 256/8 in bf16 0.79, in float32 0.84 to
// 0.87, at batch 8 as at 1; 768/32 at batch 8 in bf16 0.94; on one complex 0.99 to 1.00.
//
// Plain matrices are read where they are; of another element type than the chain's, a vector of rows is
// converted right before its use. Compositions are summed once for all blocks that share one, segment by
// segment (plan_packing), so that those in use stay few and warm.
//
// Two alternatives for sharing one image:
//  - A band of rows each, whatever the size: no core reads what another one has computed but halo rows, yet every core
//    streams the whole matrix and the vectors of tokens are cut once more (14 x 14: 2 x 7 instead of 13). Two cores of
//    an Emerald Rapids, batch 1, in turns, time by bands / by lines: 1024 k9 1.07, 768 k3 1.00, 512 k5 0.97, 256 k5
//    0.94, 128 k5 0.83; at 14 x 14 tokens 1024 1.17 to 1.29, 768 1.18 to 1.26, 256 1.03 to 1.07. Zen 5, on two core
//    complexes and on one: 768 k3 bf16 0.92 and 1.00, not frozen 0.94 and 0.98, float32 not frozen 0.93 and 0.98; 1024
//    k9 bf16 1.00 and 1.01. Zen 4, likewise: Strassen's product by bands instead of by panels of half the tokens: 768
//    k3 0.73 and 0.97, 1024 k9 0.83 and 1.00; 1024 k9 bf16 0.95 and 0.99.
//  - One kernel over the whole batch before the next: activations then leave the caches between kernels.
// Fusing the pointwise with the next depthwise of an image that is not shared gains nothing: both passes hit the
// caches.
#include "run.h"

#include <algorithm>
#include <utility>

#include "packing_plan.h"
#include "products.h"
#include "workspace.h"

namespace spin {
namespace {

constexpr int64_t kPackedBytes = 4 << 20;  // of compositions that are summed ahead of their use
constexpr int64_t kGroupTokens = 256;      // of small images together: weights are read once for all of them
constexpr int64_t kLinesAhead = 24;        // behind y, of nothing
constexpr int64_t kCuts = 2;               // bands of an image for Strassen's product

// What happens to a group, one step after the other. Items of a step are independent of each other.
struct Step {
  enum Kind {
    kLoad,       // items: lines
    kPatches,    // bands of every image, into y
    kStem,       // panels
    kEmbed,      // bands: both
    kDepthwise,  // lines
    kPointwise,  // lines; frozen: panels
    kFused,      // lines: kPointwise, then the next block's kDepthwise
    kBand,       // bands: a block whole
    kStore,      // lines
    kPool,       // lines
  } kind;
  int64_t block;
};

// What some images own while they pass.
struct Group {
  int64_t first, count;
  bool shared;      // by all threads
  char* x[2];       // one twice without bands
  char* y;          // frozen, or where a residual reads it again
  char* panels[2];  // of blocks with even and odd numbers; one twice unless shared. Frozen: none
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
        parallel_(parallel),
        height_(grid(batch.input.height)),
        width_(grid(batch.input.width)),
        threads_(useful_threads(flops(), parallel)),
        frozen_(!weights),
        plain_(weights && !weights->pw_coefficients),
        lines_(net_.lines(shape_.channels)),
        plane_bytes_(height_ * width_ * k_.line_bytes),
        strassen_(net_.quartered() && lines_ * plane_bytes_ <= band_bytes() && 2 * height_ * width_ > kGroupTokens),
        cuts_(strassen_ && height_ >= 4 ? kCuts : 1),
        products_(network, threads_, plain_ && !Network::reads(k_, shape_, *weights) ? &weights->type : nullptr,
                  cuts_) {
    keeps_y_ = frozen_ || shape_.pw_residual;
    const int64_t image_bytes = lines_ * plane_bytes_;
    const int64_t fitting = std::min(band_bytes() / image_bytes, kGroupTokens / (height_ * width_));
    const int64_t fair = batch.size < threads_ ? batch.size : ceil_div(batch.size, int64_t(threads_));
    group_ = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(fair, 1));
    groups_ = ceil_div(batch.size, group_);
    alone_ = groups_ / threads_ * threads_;
    line_bytes_ = line_stride(group_ * plane_bytes_);
    const int64_t sharers = alone_ < groups_ ? threads_ : 1;
    bands_ = ceil_div(image_bytes, band_bytes());
    if (bands_ > 1 || (alone_ == 0 && group_ == 1 && bands_are_free())) {
      bands_ = std::min(round_up(bands_, sharers), height_);
    }
  }

  void operator()() {
    const std::vector<Segment>& segments = plan_.segments;
    std::vector<std::vector<Step>> alone, shared;
    for (const Segment& segment : segments) {
      alone.push_back(steps(segment, false));
      shared.push_back(steps(segment, true));
    }
    // Between segments every group waits in its x; a single segment needs an x per thread only.
    const int64_t places = segments.size() > 1 ? groups_ : threads_;
    Workspace workspace(measure(places));
    place(workspace.data(), places);

    Team team(threads_);
    parallel_.run(threads_, [&](int thread) {
      for (size_t i = 0; i < segments.size(); ++i) {
        if (weights_) pack(team, thread, segments[i]);
        team.phase(thread, alone_, [&](int64_t index) {
          const Group group = group_at(index, segments.size() > 1 ? index : thread, thread);
          for (const Step& step : alone[i]) {
            for (int64_t item = 0; item < items(step, group); ++item) run_item(step, item, group, thread);
          }
        });
        for (int64_t index = alone_; index < groups_; ++index) {
          const Group group = group_at(index, segments.size() > 1 ? index : 0, 0, true);
          for (const Step& step : shared[i]) {
            team.phase(thread, items(step, group), [&](int64_t item) { run_item(step, item, group, thread); });
          }
        }
      }
      if (shape_.whole()) classify(team, thread);
    });
  }

 private:
  int64_t grid(int64_t pixels) const {
    if (!shape_.whole()) return pixels;
    return (pixels + 2 * shape_.patch_padding - shape_.patch) / shape_.patch_stride + 1;
  }
  double flops() const {
    return 2.0 * batch_.size * shape_.depth * height_ * width_ * shape_.channels * shape_.channels;
  }

  // ---- plan ----

  // Whether a band for each thread takes no more vectors of tokens than the image, and either matrices stay in every L2
  // or cores read much less of what others have written: a few rows of x instead of their lines of y.
  bool bands_are_free() const {
    if (strassen_) return threads_ == cuts_;
    const int64_t vectors = ceil_div(ceil_div(height_, int64_t(threads_)) * width_, k_.lanes);
    if (threads_ * vectors > ceil_div(height_ * width_, k_.lanes)) return false;
    const int64_t others_rows = 2 * (shape_.kernel_size / 2) * threads_, most = frozen_ ? height_ : height_ / 2;
    return others_rows <= most || net_.matrix_bytes(shape_.channels, shape_.channels) <= kSmallMatrix;
  }

  std::vector<Step> steps(const Segment& segment, bool shared) const {
    std::vector<Step> steps;
    const bool fused = shared && !frozen_;
    if (segment.first_block == 0) {
      if (shape_.whole() && bands_ == 1) steps.push_back({Step::kPatches, 0});
      steps.push_back({!shape_.whole() ? Step::kLoad : bands_ > 1 ? Step::kEmbed : Step::kStem, 0});
    }
    for (int64_t block = segment.first_block; block < segment.last_block; ++block) {
      if (bands_ > 1) {
        steps.push_back({Step::kBand, block});
        continue;
      }
      if (!fused || block == segment.first_block) steps.push_back({Step::kDepthwise, block});
      steps.push_back({fused && block + 1 < segment.last_block ? Step::kFused : Step::kPointwise, block});
    }
    if (segment.last_block == shape_.depth) {
      steps.push_back({shape_.whole() ? Step::kPool : Step::kStore, shape_.depth});
    }
    return steps;
  }

  // ---- memory ----

  // From one line to the next. A power of two would map the same tokens of all lines to a few sets of L1.
  int64_t line_stride(int64_t bytes) const { return bytes + kTileTokens * k_.line_bytes; }

  int64_t measure(int64_t places) {
    x_bytes_ = lines_ * line_bytes_;
    x_count_ = bands_ > 1 ? 2 : 1;
    const int64_t bands = std::max(bands_, cuts_);
    const Band largest = band(bands - 1, bands);
    const int64_t tokens = bands_ > 1 ? largest.tokens : group_ * height_ * width_;
    const int64_t patch_lines = shape_.whole() ? net_.lines(net_.patch_inputs()) : 0;
    const int64_t y_lines = keeps_y_ && !strassen_ ? lines_ : 1;
    const int64_t ahead = threads_ > 1 ? kLinesAhead : 0;
    band_stride_ = line_stride(largest.bytes);
    cut_bytes_ = (2 * lines_ + ahead) * band_stride_;
    y_bytes_ = (std::max(y_lines, patch_lines) + ahead) * line_stride(tokens * k_.line_bytes);
    if (strassen_) y_bytes_ = std::max(y_bytes_, cuts_ * cut_bytes_);
    panels_bytes_ = frozen_ ? 0 : lines_ * round_up(tokens, k_.lanes) * k_.line_bytes;
    scratch_bytes_ = round_up(k_.depthwise_scratch(height_, width_, shape_.kernel_size) * 4, kCacheLine);
    product_bytes_ = products_.scratch_bytes(strassen_ ? largest.tokens : tokens);
    packed_bytes_ = weights_ ? round_up(net_.bytes(), kCacheLine) : 0;
    pooled_bytes_ = shape_.whole() ? lines_ * batch_.size * k_.line_bytes : 0;
    logits_bytes_ = shape_.whole() ? net_.lines(shape_.classes) * batch_.size * k_.line_bytes : 0;
    return packed_bytes_ + places * x_count_ * x_bytes_ +
           threads_ * (y_bytes_ + panels_bytes_ + product_bytes_ + scratch_bytes_) + pooled_bytes_ + logits_bytes_;
  }

  void place(char* memory, int64_t places) {
    auto take = [&](int64_t bytes) { return std::exchange(memory, memory + bytes); };
    char* packed = take(packed_bytes_);
    if (weights_) net_.bind(packed);
    x_ = take(places * x_count_ * x_bytes_);
    y_ = take(threads_ * y_bytes_);
    panels_ = take(threads_ * panels_bytes_);
    products_.bind(take(threads_ * product_bytes_), product_bytes_);
    scratch_ = take(threads_ * scratch_bytes_);
    pooled_ = take(pooled_bytes_);
    logits_ = take(logits_bytes_);
  }

  // ---- phases ----

  void pack(Team& team, int thread, const Segment& segment) const {
    const int64_t parameters = segment.first_block == 0 ? net_.parameter_items() : 0;
    const int64_t parts = net_.matrix_items();
    team.phase(thread, parameters + int64_t(segment.packings.size()) * parts, [&](int64_t item) {
      if (item < parameters) return net_.pack_parameters(*weights_, item);
      const Segment::Packing& p = segment.packings[(item - parameters) / parts];
      net_.pack_matrix(*weights_, p.matrix, p.slot, (item - parameters) % parts);
    });
  }

  // `place`: which x; `thread`: whose y and panels.
  Group group_at(int64_t index, int64_t place, int thread, bool shared = false) const {
    const int64_t first = index * batch_.size / groups_, last = (index + 1) * batch_.size / groups_;
    char *x = x_ + place * x_count_ * x_bytes_, *panels = panels_ + thread * panels_bytes_;
    return {first,
            last - first,
            shared,
            {x, x + (x_count_ - 1) * x_bytes_},
            y_ + thread * y_bytes_,
            {panels, shared ? panels + panels_bytes_ : panels}};
  }

  int64_t items(const Step& step, const Group& group) const {
    switch (step.kind) {
      case Step::kPatches:
        return group.count * patch_bands(group);
      case Step::kStem:
        return products_.parts(net_.stem(), group.shared);
      case Step::kEmbed:
      case Step::kBand:
        return bands_;
      case Step::kPointwise:
        return products_.parts(matrix(step.block), group.shared);
      case Step::kDepthwise:
        return strassen_ ? cuts_ * (lines_ / 2) : lines_;
      default:
        return lines_;
    }
  }

  void run_item(const Step& step, int64_t item, const Group& group, int thread) const {
    const char* x = group.x[bands_ > 1 ? step.block & 1 : 0] + item * line_bytes_;
    switch (step.kind) {
      case Step::kLoad:
        for (int64_t i = 0; i < group.count; ++i) {
          k_.load(input(group.first + i), item, group.x[0] + item * line_bytes_ + i * plane_bytes_);
        }
        return;
      case Step::kStore:
        for (int64_t i = 0; i < group.count; ++i) k_.store(x + i * plane_bytes_, item, output(group.first + i));
        return;
      case Step::kPool:
        for (int64_t i = 0; i < group.count; ++i) {
          k_.pool(x + i * plane_bytes_, height_ * width_,
                  pooled_ + (item * batch_.size + group.first + i) * k_.line_bytes);
        }
        return;
      case Step::kPatches: {
        const int64_t bands = patch_bands(group), image = item / bands;
        const Band band = this->band(item % bands, bands);
        return load_patches(group.first + image, band, group.y + image * plane_bytes_ + band.offset, line_bytes_);
      }
      case Step::kStem:
        return stem(item, group, thread);
      case Step::kEmbed:
        return embed(item, group, thread);
      case Step::kDepthwise:
        if (strassen_) {
          const int64_t pairs = lines_ / 2, cut = item / pairs;
          return depthwise_pair(step.block, item % pairs, band(cut, cuts_), group.x[0], group.y + cut * cut_bytes_,
                                thread);
        }
        return depthwise(step.block, item, group, thread);
      case Step::kPointwise:
        return pointwise(step.block, item, group, thread);
      case Step::kFused:
        pointwise(step.block, item, group, thread);
        return depthwise(step.block + 1, item, group, thread);
      case Step::kBand:
        return block(step.block, item, group, thread);
    }
  }

  struct Band {
    int64_t first_row, last_row, tokens, bytes, offset;  // bytes: of one line of the band; offset: in a plane
  };
  Band band(int64_t i, int64_t bands) const {
    // Strassen's product writes an even number of tokens; behind the last line of x there is room for one more.
    const int64_t even = strassen_ && width_ % 2 ? 2 : 1;
    auto begin = [&](int64_t i) { return i < bands ? i * height_ / bands / even * even : height_; };
    const int64_t first = begin(i), last = begin(i + 1), row = width_ * k_.line_bytes;
    return {first, last, (last - first) * width_, (last - first) * row, first * row};
  }

  int64_t patch_bands(const Group& group) const { return group.shared ? std::min<int64_t>(threads_, height_) : 1; }

  void load_patches(int64_t image, const Band& band, char* to, int64_t stride) const {
    k_.load_patches({input(image), shape_.patch, shape_.patch_stride, shape_.patch_padding, width_, band.first_row,
                     band.last_row, to, stride});
  }

  void embed(int64_t item, const Group& group, int thread) const {
    const Band band = this->band(item, bands_);
    const int64_t stride = line_stride(band.bytes);
    char* patches = y_ + thread * y_bytes_;
    load_patches(group.first, band, patches, stride);
    products_.whole(
        net_.stem(), after_stem(),
        {patches, stride, band.tokens, nullptr, 0, group.x[0] + band.offset, line_bytes_, shape_.activation}, thread);
  }

  // A line of y, of all rows of all images, and its place in the panels if there are any.
  void depthwise(int64_t d, int64_t line, const Group& group, int thread) const {
    char* y = keeps_y_ ? group.y + line * line_bytes_ : y_ + thread * y_bytes_;
    for (int64_t i = 0; i < group.count; ++i) {
      depthwise(d, line, {0, height_, height_ * width_, plane_bytes_, 0},
                group.x[0] + line * line_bytes_ + i * plane_bytes_, y + i * plane_bytes_, thread);
    }
    pack_panels(y, group.count * height_ * width_, line, group.panels[d & 1]);
  }

  // Of Strassen's product (strassen.h): a line of a band, its partner in the other half of the channels and their sums.
  void depthwise_pair(int64_t d, int64_t line, const Band& band, const char* x, char* y, int thread) const {
    const int64_t lines[] = {line, line + lines_ / 2};
    for (const int64_t l : lines) depthwise(d, l, band, x + l * line_bytes_, y + l * band_stride_, thread);
    char* sums = y + lines_ * band_stride_;
    k_.token_sums({{y + lines[0] * band_stride_, y + lines[1] * band_stride_},
                   {sums + lines[0] * band_stride_, sums + lines[1] * band_stride_},
                   band.tokens});
  }

  void pack_panels(const char* y, int64_t tokens, int64_t line, char* panels) const {
    if (!frozen_) k_.pack_panels({y, k_.line_bytes, tokens, line, lines_, panels});
  }

  void depthwise(int64_t d, int64_t line, const Band& band, const char* x, char* y, int thread) const {
    const Network::Depthwise w = net_.depthwise(d, line);
    k_.depthwise({x, x, y, height_, width_, shape_.kernel_size, band.first_row, band.last_row, w.taps, w.bias, w.scale,
                  w.shift, shape_.activation, reinterpret_cast<float*>(scratch_ + thread * scratch_bytes_)});
  }

  // Part of the output channels of all tokens.
  void stem(int64_t part, const Group& group, int thread) const {
    const ProductOperands o = operands(group, group.y);
    products_.part(net_.stem(), after_stem(), part, {&o, 1}, group.shared, thread);
  }
  // The same; of Strassen's product, of a band's or of all bands'.
  void pointwise(int64_t d, int64_t part, const Group& group, int thread) const {
    ProductOperands o[kCuts] = {operands(group, frozen_ ? group.y : group.panels[d & 1])};
    if (shape_.pw_residual) o[0].residual = group.y, o[0].residual_stride = line_bytes_;
    for (int64_t i = 0; strassen_ && i < cuts_; ++i)
      o[i] = operands(band(i, cuts_), group.y + i * cut_bytes_, group.x[0]);
    products_.part(matrix(d), next_matrix(d), part, {o, size_t(cuts_)}, group.shared, thread);
  }
  ProductOperands operands(const Group& group, const char* input) const {
    const int64_t tokens = group.count * height_ * width_;
    return {input, line_bytes_, tokens, nullptr, 0, group.x[0], line_bytes_, shape_.activation};
  }
  ProductOperands operands(const Band& band, const char* y, char* x) const {
    return {.input = y,
            .input_stride = band_stride_,
            .tokens = band.tokens,
            .residual = shape_.pw_residual ? y : nullptr,
            .residual_stride = band_stride_,
            .output = x + band.offset,
            .output_stride = line_bytes_,
            .activation = shape_.activation,
            .sums = strassen_ ? y + lines_ * band_stride_ : nullptr};
  }

  void block(int64_t d, int64_t item, const Group& group, int thread) const {
    const Band band = this->band(item, bands_);
    const char* x = group.x[d & 1];
    char *y = y_ + thread * y_bytes_, *panels = panels_ + thread * panels_bytes_;
    for (int64_t line = 0; strassen_ && line < lines_ / 2; ++line) depthwise_pair(d, line, band, x, y, thread);
    for (int64_t line = 0; !strassen_ && line < lines_; ++line) {
      char* y_line = keeps_y_ ? y + line * band_stride_ : y;
      depthwise(d, line, band, x + line * line_bytes_, y_line, thread);
      pack_panels(y_line, band.tokens, line, panels);
    }
    ProductOperands o = operands(band, y, group.x[(d + 1) & 1]);
    if (!frozen_) o.input = panels;
    products_.whole(matrix(d), next_matrix(d), o, thread);
  }

  Pointwise matrix(int64_t d) const {
    return plain_ ? net_.pointwise(d, *weights_) : net_.pointwise(d, plan_.slot_of_block[d]);
  }
  Pointwise after_stem() const { return shape_.depth > 0 ? matrix(0) : net_.stem(); }
  Pointwise next_matrix(int64_t d) const { return matrix(std::min(d + 1, shape_.depth - 1)); }

  // The classifier: one product whose tokens are the images of the batch.
  void classify(Team& team, int thread) const {
    const Pointwise w = net_.head();
    const int64_t stride = batch_.size * k_.line_bytes;
    const ProductOperands o{pooled_, stride, batch_.size, nullptr, 0, logits_, stride, Activation::kIdentity};
    team.phase(thread, products_.parts(w, true),
               [&](int64_t part) { products_.part(w, w, part, {&o, 1}, true, thread); });
    External to = batch_.output;
    to.channels = shape_.classes, to.height = 1, to.width = batch_.size;
    to.channel_stride = 1, to.row_stride = 0, to.column_stride = batch_.output_stride;
    team.phase(thread, net_.lines(shape_.classes), [&](int64_t line) { k_.store(logits_ + line * stride, line, to); });
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
  const int64_t height_, width_;  // tokens
  const int threads_;
  const bool frozen_, plain_;          // matrices lie in panels; they are read where they are
  const int64_t lines_, plane_bytes_;  // of channels; of an image in one of them
  const bool strassen_;                // sums of y are needed, too (strassen.h)
  const int64_t cuts_;                 // bands of y then
  Products products_;
  int64_t bands_;
  int64_t group_, groups_, alone_;           // images in a group; groups; those that a thread takes alone
  bool keeps_y_;                             // all lines of y are needed at once
  int64_t line_bytes_ = 0;                   // of a group, in one line of channels
  int64_t band_stride_ = 0, cut_bytes_ = 0;  // from line to line of a band of y; from band to band
  int64_t panels_bytes_ = 0, product_bytes_ = 0, x_bytes_ = 0, x_count_ = 1, y_bytes_ = 0, scratch_bytes_ = 0;
  int64_t packed_bytes_ = 0, pooled_bytes_ = 0, logits_bytes_ = 0;
  char *x_ = nullptr, *y_ = nullptr, *panels_ = nullptr, *scratch_ = nullptr, *pooled_ = nullptr, *logits_ = nullptr;
};

}  // namespace

void run_packed(Network& network, const Batch& batch, const Parallel& parallel) {
  if (batch.size == 0) return;
  const NetworkShape& shape = network.shape();
  PackingPlan plan{{{0, shape.depth, {}}}, shape.pw_index, shape.matrices};
  Runner(network, nullptr, std::move(plan), batch, parallel)();
}

void run_unpacked(const Kernels& kernels, NetworkShape shape, const MixerWeights& weights, const Batch& batch,
                  const Parallel& parallel) {
  if (batch.size == 0) return;
  const Network measure(kernels, shape, 0, MatrixForm::kRows);
  PackingPlan plan{{{0, shape.depth, {}}}, std::vector<int64_t>(shape.depth, 0), 0};
  if (weights.pw_coefficients) {
    plan = plan_packing(shape.pw_index,
                        std::max<int64_t>(kPackedBytes / measure.matrix_bytes(shape.channels, shape.channels), 1));
  }
  Network network(kernels, std::move(shape), plan.slots, MatrixForm::kRows);
  Runner(network, &weights, std::move(plan), batch, parallel)();
}

}  // namespace spin
