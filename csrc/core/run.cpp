// Runs blocks. A block is two kernels over one blocked layout:
//
//     depthwise: a line of x -> the same line of y, and from there into the panels that the product reads
//     pointwise: all panels -> a line of x
//
// A frozen network has its matrices in panels and reads y as it is (product.h):
//
//     depthwise: a line of x -> the same line of y
//     pointwise: all of y -> a panel's channels of x
//
// and the product of larger matrices in float32 is Strassen's (strassen.h): a line and its partner in the other half of
// the channels become a line of each quarter and of their sums.
//
// y stays in the L2 of the thread that uses it. Which images, rows and lines a thread takes: schedule.h.
//
// A line that another core has fetched takes 8 ns to write, where the cores have no L3 in common (two threads of a
// virtual machine may find themselves on two core complexes of a Zen 4 or 5 processor, for seconds or minutes). So no
// data of another thread follow y: the product goes from line to line of it, and hardware goes on behind the last one,
// by 16 lines at least. In turns, with and without kLinesAhead, on two complexes: 256/8 in bf16 0.79, in float32 0.84
// to 0.87, at batch 8 as at 1; 768/32 at batch 8 in bf16 0.94; on one complex 0.99 to 1.00.
//
// Plain matrices are read where they are; of another element type than the chain's, a vector of rows is
// converted right before its use. Compositions are summed once for all blocks that share one, segment by
// segment (plan_packing), so that those in use stay few and warm.
#include "run.h"

#include <algorithm>
#include <utility>

#include "classifier.h"
#include "products.h"
#include "schedule.h"
#include "workspace.h"

namespace spin {
namespace {

constexpr int64_t kPackedBytes = 4 << 20;  // of compositions that are summed ahead of their use
constexpr int64_t kLinesAhead = 24;        // behind y, of nothing

// What some images own while they pass.
struct Group {
  int64_t first, count;
  bool shared;      // by all threads
  char* x[2];       // one twice without bands
  char* y;          // frozen, or where a residual reads it again
  char* panels[2];  // of blocks with even and odd numbers; one twice unless shared. Frozen: none
  float* sums;      // of tokens, for the classifier
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
        frozen_(!weights),
        plain_(weights && !weights->pw_coefficients),
        schedule_(network, batch, frozen_, parallel),
        plane_(schedule_.plane),
        threads_(schedule_.threads),
        bands_(schedule_.bands),
        strassen_(schedule_.strassen),
        lines_(net_.lines(shape_.channels)),
        keeps_y_(frozen_ || shape_.pw_residual),
        line_bytes_(line_stride(schedule_.group * plane_.bytes())),
        products_(network, threads_, plain_ && !Network::reads(k_, shape_, *weights) ? &weights->type : nullptr),
        classifier_(network, plane_, bands_, batch, threads_) {
    if (strassen_) make_halves();
  }

  void operator()() {
    const std::vector<Segment>& segments = plan_.segments;
    std::vector<std::vector<Step>> alone, shared;
    for (const Segment& segment : segments) {
      alone.push_back(schedule_.steps(shape_, segment, frozen_, false));
      shared.push_back(schedule_.steps(shape_, segment, frozen_, true));
    }
    // Between segments every group waits in its x; a single segment needs an x per thread only.
    const int64_t places = segments.size() > 1 ? schedule_.groups : threads_;
    Workspace workspace(measure(places));
    place(workspace.data(), places);

    Team team(threads_);
    parallel_.run(threads_, [&](int thread) {
      if (k_.enter) k_.enter();
      for (size_t i = 0; i < segments.size(); ++i) {
        if (weights_) pack(team, thread, segments[i]);
        team.phase(thread, schedule_.alone, [&](int64_t index) {
          const Group group = group_at(index, segments.size() > 1 ? index : thread, thread);
          for (const Step& step : alone[i]) {
            const int64_t count = items(step, group);
            for (int64_t item = 0; item < count; ++item) run_item(step, item, group, thread);
          }
        });
        for (int64_t index = schedule_.alone; index < schedule_.groups; ++index) {
          const Group group = group_at(index, segments.size() > 1 ? index : 0, 0, true);
          for (const Step& step : shared[i]) {
            team.phase(thread, items(step, group), [&](int64_t item) { run_item(step, item, group, thread); });
          }
        }
      }
      if (shape_.whole()) classifier_.classify(team, thread, products_);
      if (k_.leave) k_.leave();
    });
  }

 private:
  // ---- memory ----

  // From one line to the next. A power of two would map the same tokens of all lines to a few sets of L1.
  int64_t line_stride(int64_t bytes) const { return bytes + kTileTokens * k_.line_bytes; }

  int64_t measure(int64_t places) {
    x_bytes_ = lines_ * line_bytes_;
    x_count_ = bands_ > 1 ? 2 : 1;
    const int64_t tokens = bands_ > 1 ? plane_.largest(bands_).tokens : schedule_.group * plane_.tokens();
    const int64_t patch_lines = shape_.whole() ? net_.lines(net_.patch_inputs()) : 0;
    const int64_t y_lines = keeps_y_ && !strassen_ ? lines_ : 1;
    const int64_t ahead = threads_ > 1 ? kLinesAhead : 0;
    y_bytes_ = (std::max(y_lines, patch_lines) + ahead) * line_stride(tokens * k_.line_bytes);
    product_bytes_ = products_.scratch_bytes(strassen_ ? half_tokens_ : tokens, strassen_);
    if (strassen_) {
      half_stride_ = line_stride(half_tokens_ * k_.line_bytes);
      quarter_stride_ = line_stride(lines_ / 2 * half_stride_);
      y_bytes_ = std::max(y_bytes_, kTokenQuarters * quarter_stride_ + ahead * half_stride_);
    }
    panels_bytes_ = frozen_ ? 0 : lines_ * round_up(tokens, k_.lanes) * k_.line_bytes;
    scratch_bytes_ = round_up(k_.depthwise_scratch(plane_.height, plane_.width, shape_.kernel_size) * 4, kCacheLine);
    packed_bytes_ = weights_ ? round_up(net_.bytes(), kCacheLine) : 0;
    return packed_bytes_ + places * x_count_ * x_bytes_ +
           threads_ * (y_bytes_ + panels_bytes_ + product_bytes_ + scratch_bytes_) +
           (shape_.whole() ? classifier_.bytes() : 0);
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
    if (shape_.whole()) classifier_.bind(memory);
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
    const int64_t first = index * batch_.size / schedule_.groups, last = (index + 1) * batch_.size / schedule_.groups;
    char *x = x_ + place * x_count_ * x_bytes_, *panels = panels_ + thread * panels_bytes_;
    return Group{first,
                 last - first,
                 shared,
                 {x, x + (x_count_ - 1) * x_bytes_},
                 y_ + thread * y_bytes_,
                 {panels, shared ? panels + panels_bytes_ : panels},
                 shape_.whole() ? classifier_.sums(thread) : nullptr};
  }

  int64_t items(const Step& step, const Group& group) const {
    switch (step.kind) {
      case Step::kPatches:
        return group.count * patch_bands(group);
      case Step::kStem:
        return products_.parts(net_.stem(), operands(group, group.y), group.shared);
      case Step::kEmbed:
      case Step::kBand:
      case Step::kPoolBand:
        return bands_;
      case Step::kPointwise:
        return products_.parts(matrix(step.block), pointwise_operands(step.block, group), group.shared);
      case Step::kDepthwise:
        return strassen_ ? cuts(group) * (lines_ / 2) : lines_;
      default:
        return lines_;
    }
  }

  void run_item(const Step& step, int64_t item, const Group& group, int thread) const {
    auto x = [&] { return group.x[bands_ > 1 ? step.block & 1 : 0] + item * line_bytes_; };
    switch (step.kind) {
      case Step::kLoad:
        for (int64_t i = 0; i < group.count; ++i) {
          k_.load(input(group.first + i), item, group.x[0] + item * line_bytes_ + i * plane_.bytes());
        }
        return;
      case Step::kStore:
        for (int64_t i = 0; i < group.count; ++i) k_.store(x() + i * plane_.bytes(), item, output(group.first + i));
        return;
      case Step::kPoolBand:
        return classifier_.pool_band(item, group.x[step.block & 1], line_bytes_, group.sums);
      case Step::kPool:
        return classifier_.pool(item, group.x[0] + item * line_bytes_, group.first, group.count, group.sums);
      case Step::kPatches: {
        const int64_t bands = patch_bands(group), image = item / bands;
        const Band band = patch_band(item % bands, bands);
        return load_patches(group.first + image, band, group.y + image * plane_.bytes() + band.offset, line_bytes_);
      }
      case Step::kStem:
        return stem(item, group, thread);
      case Step::kEmbed:
        return embed(item, group, thread);
      case Step::kDepthwise:
        if (!strassen_) return depthwise(step.block, item, group, thread);
        return depthwise_pair(step.block, item % (lines_ / 2), item / (lines_ / 2), group.x[0], group.y, thread);
      case Step::kPointwise:
        return pointwise(step.block, item, group, thread);
      case Step::kFused:
        pointwise(step.block, item, group, thread);
        return depthwise(step.block + 1, item, group, thread);
      case Step::kBand:
        return block(step.block, item, group, thread);
    }
  }

  // Of a group's patches, by rows.
  int64_t patch_bands(const Group& group) const {
    return group.shared ? std::min<int64_t>(threads_, plane_.height) : 1;
  }
  Band patch_band(int64_t i, int64_t n) const {
    return plane_.rows(i * plane_.height / n, (i + 1) * plane_.height / n);
  }

  void load_patches(int64_t image, const Band& band, char* to, int64_t stride) const {
    k_.load_patches({input(image), shape_.patch, shape_.patch_stride, shape_.patch_padding, plane_.width,
                     band.first_row, band.last_row, to, stride});
  }

  void embed(int64_t item, const Group& group, int thread) const {
    const Band band = plane_.band(item, bands_);
    const int64_t stride = line_stride(band.bytes);
    char* patches = y_ + thread * y_bytes_;
    load_patches(group.first, band, patches, stride);
    const ProductOperands o{patches,     stride,           band.tokens, nullptr, 0, group.x[0] + band.offset,
                            line_bytes_, shape_.activation};
    products_.whole(net_.stem(), after_stem(), o, thread);
  }

  // A line of y, of all rows of all images, and its place in the panels if there are any.
  void depthwise(int64_t d, int64_t line, const Group& group, int thread) const {
    char* y = keeps_y_ ? group.y + line * line_bytes_ : y_ + thread * y_bytes_;
    for (int64_t i = 0; i < group.count; ++i) {
      depthwise(d, line, plane_.rows(0, plane_.height), group.x[0] + line * line_bytes_ + i * plane_.bytes(),
                y + i * plane_.bytes(), thread);
    }
    pack_panels(y, group.count * plane_.tokens(), line, group.panels[d & 1]);
  }

  int64_t cuts(const Group& group) const { return group.count * plane_.cuts; }

  // The halves of what Strassen's product cuts images into: of all images of a group, or of all bands, which have
  // quarters of their own. In a line of a quarter they lie side by side.
  void make_halves() {
    const int64_t most = ceil_div(plane_.largest(plane_.cuts).tokens, 2);
    for (int64_t band = 0; band < bands_; ++band) {
      const int64_t first = plane_.first_cut(band, bands_);
      const int64_t last = bands_ > 1 ? plane_.first_cut(band + 1, bands_) : schedule_.group * plane_.cuts;
      for (int64_t i = first; i < last; ++i) {
        const Band cut = plane_.cut(i % plane_.cuts, i % plane_.cuts + 1);
        const int64_t token = (i - first) * most, split = ceil_div(cut.tokens, 2), output = image_of(i) + cut.offset;
        halves_[0].push_back({token, split, output});
        halves_[1].push_back({token, cut.tokens - split, output + split * k_.line_bytes});
        half_tokens_ = std::max(half_tokens_, token + most);
      }
    }
  }
  // Where the image of a cut of a group begins in a line of x.
  int64_t image_of(int64_t cut) const { return cut / plane_.cuts * plane_.bytes(); }

  // A line and its partner in the other half of the channels, by quarters, of a cut.
  void depthwise_pair(int64_t d, int64_t line, int64_t cut, const char* x, char* y, int thread,
                      const Band* owned = nullptr) const {
    const Band band = plane_.cut(cut % plane_.cuts, cut % plane_.cuts + 1);
    char* const quarters = y + line * half_stride_ + halves_[0][cut].token * k_.line_bytes;
    for (const int64_t half : {0, 1}) {
      const int64_t l = line + half * lines_ / 2;
      char* const to = quarters + (half ? k21 : k11).number * quarter_stride_;
      depthwise(d, l, band, x + l * line_bytes_ + image_of(cut), to, thread, line + 1 < lines_ / 2 ? owned : nullptr,
                halves_[0][cut].tokens, to + quarter_stride_);
    }
    k_.token_sums({band.tokens, quarters, quarter_stride_});
  }

  void pack_panels(const char* y, int64_t tokens, int64_t line, char* panels) const {
    if (!frozen_) k_.pack_panels({y, k_.line_bytes, tokens, line, lines_, panels});
  }

  // What lies above and below `owned` (null: nothing does) is another thread's, whose lines come one in 8 ns; of the
  // next line of x it is asked for meanwhile. In turns, two threads of an Emerald Rapids, batch 1: 256/8 0.993 to
  // 0.997, 1024/20 0.992 to 0.995, 768/32 0.98 to 0.99 (all of it at once: 1.00 to 1.02). What others read and write
  // still costs 256/8 2 %: that much less takes a run in which no thread reads another's rows.
  void depthwise(int64_t d, int64_t line, const Band& band, const char* x, char* y, int thread,
                 const Band* owned = nullptr, int64_t split = INT64_MAX, char* second = nullptr) const {
    const Network::Depthwise w = net_.depthwise(d, line);
    const int64_t pad = shape_.kernel_size / 2;
    auto of_next = [&](int64_t first, int64_t last) -> Ahead {
      const Band rows = plane_.rows(std::max<int64_t>(first, 0), std::min(last, plane_.height));
      return {x + line_bytes_ + rows.offset, rows.bytes};
    };
    Ahead above, below;
    if (owned && owned->first_row == band.first_row) above = of_next(band.first_row - pad, band.first_row);
    if (owned && owned->last_row == band.last_row) below = of_next(band.last_row, band.last_row + pad);
    k_.depthwise({x,
                  x,
                  y,
                  plane_.height,
                  plane_.width,
                  shape_.kernel_size,
                  band.first_row,
                  band.last_row,
                  w.taps,
                  w.bias,
                  w.scale,
                  w.shift,
                  shape_.activation,
                  reinterpret_cast<float*>(scratch_ + thread * scratch_bytes_),
                  {above, below},
                  split,
                  second});
  }

  // Part of the output channels of all tokens.
  void stem(int64_t part, const Group& group, int thread) const {
    products_.part(net_.stem(), after_stem(), part, operands(group, group.y), group.shared, thread);
  }
  void pointwise(int64_t d, int64_t part, const Group& group, int thread) const {
    products_.part(matrix(d), next_matrix(d), part, pointwise_operands(d, group), group.shared, thread);
  }
  ProductOperands pointwise_operands(int64_t d, const Group& group) const {
    if (strassen_) return operands(0, cuts(group), group.y, group.x[0]);
    ProductOperands o = operands(group, frozen_ ? group.y : group.panels[d & 1]);
    if (shape_.pw_residual) o.residual = group.y, o.residual_stride = line_bytes_;
    return o;
  }
  ProductOperands operands(const Group& group, const char* input) const {
    const int64_t tokens = group.count * plane_.tokens();
    return {input, line_bytes_, tokens, nullptr, 0, group.x[0], line_bytes_, shape_.activation};
  }
  // Of some cuts' quarters.
  ProductOperands operands(int64_t first_cut, int64_t count, const char* y, char* x) const {
    auto of_cuts = [&](const std::vector<TokenSpan>& half) { return std::span(half).subspan(first_cut, count); };
    return {y,
            half_stride_,
            0,
            shape_.pw_residual ? y : nullptr,
            half_stride_,
            x,
            line_bytes_,
            shape_.activation,
            quarter_stride_,
            {of_cuts(halves_[0]), of_cuts(halves_[1])}};
  }

  void block(int64_t d, int64_t item, const Group& group, int thread) const {
    char *from = group.x[d & 1], *to = group.x[(d + 1) & 1], *y = y_ + thread * y_bytes_;
    const Band band = plane_.band(item, bands_);
    const Band* const owned = group.shared ? &band : nullptr;
    if (strassen_) {
      const int64_t first = plane_.first_cut(item, bands_), last = plane_.first_cut(item + 1, bands_);
      for (int64_t line = 0; line < lines_ / 2; ++line) {
        for (int64_t i = first; i < last; ++i) depthwise_pair(d, line, i, from, y, thread, owned);
      }
      return products_.whole(matrix(d), next_matrix(d), operands(first, last - first, y, to), thread);
    }
    const int64_t stride = line_stride(band.bytes);
    char* panels = panels_ + thread * panels_bytes_;
    for (int64_t line = 0; line < lines_; ++line) {
      char* y_line = keeps_y_ ? y + line * stride : y;
      depthwise(d, line, band, from + line * line_bytes_, y_line, thread, line + 1 < lines_ ? owned : nullptr);
      pack_panels(y_line, band.tokens, line, panels);
    }
    const ProductOperands o{
        frozen_ ? y : panels, stride,      band.tokens,      shape_.pw_residual ? y : nullptr, stride,
        to + band.offset,     line_bytes_, shape_.activation};
    products_.whole(matrix(d), next_matrix(d), o, thread);
  }

  Pointwise matrix(int64_t d) const {
    return plain_ ? net_.pointwise(d, *weights_) : net_.pointwise(d, plan_.slot_of_block[d]);
  }
  Pointwise after_stem() const { return shape_.depth > 0 ? matrix(0) : net_.stem(); }
  Pointwise next_matrix(int64_t d) const { return matrix(std::min(d + 1, shape_.depth - 1)); }

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
  const bool frozen_, plain_;  // matrices lie in panels; they are read where they are
  const Schedule schedule_;
  const Plane& plane_;
  const int threads_;
  const int64_t bands_;
  const bool strassen_;
  const int64_t lines_;
  const bool keeps_y_;        // all lines of y are needed at once
  const int64_t line_bytes_;  // of a group, in one line of channels
  // Of Strassen's product: halves of cuts; tokens of a line of a quarter, at most; from line to line and from one
  // quarter to the next.
  std::vector<TokenSpan> halves_[2];
  int64_t half_tokens_ = 0, half_stride_ = 0, quarter_stride_ = 0;
  Products products_;
  Classifier classifier_;
  int64_t panels_bytes_ = 0, product_bytes_ = 0, x_bytes_ = 0, x_count_ = 1, y_bytes_ = 0, scratch_bytes_ = 0,
          packed_bytes_ = 0;
  char *x_ = nullptr, *y_ = nullptr, *panels_ = nullptr, *scratch_ = nullptr;
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
