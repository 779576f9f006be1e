// The end of a whole network: the mean over the tokens of an image, and the classifier on it.
//
// A mean is that of sums of cuts, in their order, whoever takes them: the same bits at any number of threads. Bands
// leave a sum of each of their cuts, so that nobody reads lines that others have written (256/8 at batch 1 on an
// Emerald Rapids: 0.4 % of a call); without bands they are added up at once.
#pragma once
#include "plane.h"
#include "products.h"
#include "run.h"
#include "team.h"

namespace spin {

class Classifier {
 public:
  Classifier(const Network& network, const Plane& plane, int64_t bands, const Batch& batch, int threads);

  int64_t bytes() const { return threads_ * sums_bytes_ + pooled_bytes_ + logits_bytes_; }
  void bind(char* memory);  // bytes() of it
  float* sums(int thread) const { return reinterpret_cast<float*>(sums_ + thread * sums_bytes_); }

  // Of all lines, the first at x and the next `line_bytes` further: the cuts of a band.
  void pool_band(int64_t band, const char* x, int64_t line_bytes, float* sums) const;
  // A line of some images, whose planes lie one after the other at x. With bands: what pool_band has left.
  void pool(int64_t line, const char* x, int64_t first_image, int64_t images, float* sums) const;
  // One product whose tokens are the images of the batch.
  void classify(Team& team, int thread, const Products& products) const;

 private:
  float* sums_of(int64_t cut, int64_t line, float* sums) const {
    return sums + (cut * lines_ + line) * k_.line_channels;
  }
  void add_cut(int64_t cut, const char* line, float* to) const;

  const Network& net_;
  const Kernels& k_;
  const Plane& plane_;
  const int64_t bands_;
  const Batch& batch_;
  const int threads_;
  const int64_t lines_, sums_bytes_, pooled_bytes_, logits_bytes_;
  char *sums_ = nullptr, *pooled_ = nullptr, *logits_ = nullptr;
};

}  // namespace spin
