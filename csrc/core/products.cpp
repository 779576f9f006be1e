#include "products.h"

#include <algorithm>
#include <span>

namespace spin {

// Of a panel, for all tiles of so many tokens.
int64_t Products::kept_bytes(int64_t tokens) const {
  return round_up(tokens, kTileTokens) * k_.panel_vectors * k_.lanes * int64_t(sizeof(float));
}

int64_t Products::scratch_bytes(int64_t tokens, bool strassen) const {
  if (converted_) return k_.lanes * net_.row_stride(net_.shape().channels);
  return net_.quartered() ? (strassen ? 2 : 1) * kept_bytes(tokens) : 0;
}

void Products::part(const Pointwise& w, const Pointwise& next, int64_t part, const ProductOperands& o, bool shared,
                    int thread) const {
  if (w.row_stride) {
    const int64_t per_line = k_.line_channels / k_.lanes, vectors = net_.vectors(w.output_channels);
    for (int64_t v = part * per_line; v < std::min((part + 1) * per_line, vectors); ++v) rows(w, next, v, o, thread);
    return;
  }
  const int64_t sharers = shared ? threads_ : 1, self = shared ? thread : 0, count = panels(w).count;
  // Where a thread's range of a matrix's parts begins.
  auto own = [&](const Pointwise& matrix, int64_t thread) { return parts(matrix, o, shared) * thread / sharers; };
  const bool last = part + 1 == own(w, self + 1);
  const int64_t after = last ? own(next, self) : part + 1;
  const Pointwise& source = last ? next : w;
  const Ahead ahead = panel_at(source, after % panels(source).count);
  if (!w.quartered) return panel(w, part, ahead, o);
  ProductOperands own_cuts = o;
  if (shared && o.quarter_stride) {
    for (auto& half : own_cuts.halves) half = half.subspan(part / count, 1);
  }
  quarters(w, part % count, ahead, own_cuts, thread);
}

ProductTarget Products::target(const Pointwise& w, int64_t first_vector, const ProductOperands& o,
                               const Ahead& ahead) const {
  const int64_t channel = first_vector * k_.lanes;
  return {
      .first_vector = first_vector,
      .bias = w.bias + channel,
      .gain = w.gain + channel,
      .scale = w.scale + channel,
      .shift = w.shift + channel,
      .residual = o.residual,
      .residual_stride = o.residual_stride,
      .output = o.output,
      .output_stride = o.output_stride,
      .activation = o.activation,
      .ahead = ahead,
  };
}

void Products::rows(const Pointwise& w, const Pointwise& next, int64_t vector, const ProductOperands& o,
                    int thread) const {
  const int64_t channel = vector * k_.lanes, after = channel + k_.lanes;
  const bool last = after >= w.output_channels;
  const Pointwise& ahead = last ? next : w;
  const int64_t first_ahead = last ? 0 : after, rows = std::min(k_.lanes, w.output_channels - channel);
  const char* weights = w.matrix + channel * w.row_stride;
  int64_t row_stride = w.row_stride;
  if (converted_) {
    char* to = scratch_ + thread * scratch_stride_;
    row_stride = net_.row_stride(w.input_channels);
    k_.pack_rows({weights, *converted_, 1, 0, nullptr, rows, w.input_channels, to, row_stride});
    weights = to;
  }
  k_.product({
      .panels = o.input,
      .tokens = o.tokens,
      .input_channels = w.input_channels,
      .weights = weights,
      .row_stride = row_stride,
      .output_channels = rows,
      .to = target(w, vector, o,
                   {ahead.matrix + first_ahead * ahead.row_stride,
                    std::min(k_.lanes, ahead.output_channels - first_ahead) * ahead.row_stride}),
  });
}

void Products::panel(const Pointwise& w, int64_t panel, const Ahead& ahead, const ProductOperands& o) const {
  const Panels panels = this->panels(w);
  const int64_t first = panels.begin(panel);
  const TokenSpan all{0, o.tokens, 0};
  k_.panel_product({
      .panel = panel_begin(w, panel),
      .vectors = panels.begin(panel + 1) - first,
      .input_channels = w.input_channels,
      .input = o.input,
      .input_stride = o.input_stride,
      .spans = &all,
      .spans_count = 1,
      .to = target(w, first, o, ahead),
  });
}

void Products::quarters(const Pointwise& w, int64_t panel, const Ahead& ahead, const ProductOperands& o,
                        int thread) const {
  const bool strassen = o.quarter_stride != 0;
  const std::span<const QuarterStep> steps =
      strassen ? std::span<const QuarterStep>(kStrassenSteps) : std::span<const QuarterStep>(kPlainSteps);
  const Panels panels = this->panels(w);
  const int64_t first = panels.begin(panel), vectors = panels.begin(panel + 1) - first;
  const int64_t half = w.output_channels / 2, half_lines = net_.lines(half), bytes = panel_bytes(w, vectors);
  const char* matrix = panel_begin(w, panel);
  const TokenSpan all{0, o.tokens, 0};
  auto input = [&](Place place) {
    return o.input + (strassen ? place.number * o.quarter_stride : place.channel_half() * half_lines * o.input_stride);
  };
  auto kept = [&](int buffer) {
    char* buffers = scratch_ + thread * scratch_stride_;
    return buffer < 0 ? nullptr : reinterpret_cast<float*>(buffers + buffer * scratch_stride_ / 2);
  };
  for (size_t i = 0; i < steps.size(); ++i) {
    const QuarterStep& step = steps[i];
    const int channel_half = step.output.channel_half();
    const auto spans = strassen ? o.halves[step.output.token_half()] : std::span<const TokenSpan>(&all, 1);
    ProductTarget to = target(w, first + channel_half * net_.vectors(half), o,
                              i + 1 == steps.size() ? ahead : Ahead{matrix + steps[i + 1].weights * bytes, bytes});
    // Lines of a residual are counted as the output's are; a quarter has half of them.
    if (o.residual && strassen) to.residual = input(step.output) - channel_half * half_lines * o.input_stride;
    k_.panel_product({
        .panel = matrix + step.weights * bytes,
        .vectors = vectors,
        .input_channels = half,
        .input = input(step.input),
        .input_stride = o.input_stride,
        .spans = spans.data(),
        .spans_count = int64_t(spans.size()),
        .to = to,
        .from = kept(step.from),
        .keep = kept(step.keep),
        .base = kept(step.base),
    });
  }
}

}  // namespace spin
