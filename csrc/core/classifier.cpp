#include "classifier.h"

#include <algorithm>

namespace spin {

Classifier::Classifier(const Network& network, const Plane& plane, int64_t bands, const Batch& batch, int threads)
    : net_(network),
      k_(network.kernels()),
      plane_(plane),
      bands_(bands),
      batch_(batch),
      threads_(threads),
      lines_(network.lines(network.shape().channels)),
      sums_bytes_((bands > 1 ? plane.cuts : 1) * lines_ * k_.line_channels * int64_t(sizeof(float))),
      pooled_bytes_(lines_ * batch.size * k_.line_bytes),
      logits_bytes_(network.lines(network.shape().classes) * batch.size * k_.line_bytes) {}

void Classifier::bind(char* memory) {
  sums_ = memory;
  pooled_ = sums_ + threads_ * sums_bytes_;
  logits_ = pooled_ + pooled_bytes_;
}

void Classifier::add_cut(int64_t cut, const char* line, float* to) const {
  const Band band = plane_.cut(cut, cut + 1);
  k_.sum_tokens(line + band.offset, band.tokens, to);
}

void Classifier::pool_band(int64_t band, const char* x, int64_t line_bytes, float* sums) const {
  for (int64_t cut = plane_.first_cut(band, bands_); cut < plane_.first_cut(band + 1, bands_); ++cut) {
    for (int64_t line = 0; line < lines_; ++line) {
      float* const to = sums_of(cut, line, sums);
      std::fill_n(to, k_.line_channels, 0.f);
      add_cut(cut, x + line * line_bytes, to);
    }
  }
}

void Classifier::pool(int64_t line, const char* x, int64_t first_image, int64_t images, float* sums) const {
  float* const to = sums_of(0, line, sums);
  for (int64_t i = 0; i < images; ++i) {
    if (bands_ == 1) {
      std::fill_n(to, k_.line_channels, 0.f);
      for (int64_t cut = 0; cut < plane_.cuts; ++cut) add_cut(cut, x + i * plane_.bytes(), to);
    }
    k_.mean(to, bands_ > 1 ? plane_.cuts : 1, lines_ * k_.line_channels, plane_.tokens(),
            pooled_ + (line * batch_.size + first_image + i) * k_.line_bytes);
  }
}

void Classifier::classify(Team& team, int thread, const Products& products) const {
  const Pointwise w = net_.head();
  const int64_t stride = batch_.size * k_.line_bytes, classes = net_.shape().classes;
  const ProductOperands o{pooled_, stride, batch_.size, nullptr, 0, logits_, stride, Activation::kIdentity};
  team.phase(thread, products.parts(w, o, true), [&](int64_t part) { products.part(w, w, part, o, true, thread); });
  External to = batch_.output;
  to.channels = classes, to.height = 1, to.width = batch_.size;
  to.channel_stride = 1, to.row_stride = 0, to.column_stride = batch_.output_stride;
  team.phase(thread, net_.lines(classes), [&](int64_t line) { k_.store(logits_ + line * stride, line, to); });
}

}  // namespace spin
