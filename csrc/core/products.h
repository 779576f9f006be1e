// A matrix times some tokens, in parts that one thread or several take.
//
//  - Plain rows: a part is a line of output channels. A line of a matrix of another element type than the chain's is
//    converted right before its use.
//  - Panels (frozen): a part is a panel.
//  - Panels of quarters: a part is a panel of both halves of the output channels (strassen.h), for all cuts; where
//    threads share a matrix, for one of them, and the first cut's parts come first.
#pragma once
#include <span>

#include "network.h"

namespace spin {

struct ProductOperands {
  const char* input;     // panels of tokens; where the matrix lies in panels: lines
  int64_t input_stride;  // of lines
  int64_t tokens;        // of a plain product
  const char* residual;  // null: none
  int64_t residual_stride;
  char* output;
  int64_t output_stride;
  Activation activation;
  // Of Strassen's product, whose input lies in quarters; the residual is that input, too.
  int64_t quarter_stride = 0;                 // from one to the next; 0: a plain product
  std::span<const TokenSpan> halves[2] = {};  // first and second, of every cut
};

class Products {
 public:
  // `converted`: the element type of rows that are not of the operands' (null: they are).
  Products(const Network& network, int threads, const DType* converted)
      : net_(network), k_(network.kernels()), threads_(threads), converted_(converted) {}

  // Per thread, for plain products of at most so many tokens, or Strassen's of at most so many in the first halves.
  int64_t scratch_bytes(int64_t tokens, bool strassen) const;
  void bind(char* scratch, int64_t stride) { scratch_ = scratch, scratch_stride_ = stride; }

  int64_t parts(const Pointwise& w, const ProductOperands& o, bool shared) const {
    if (w.row_stride) return net_.lines(w.output_channels);
    return panels(w).count * (shared && o.quarter_stride ? int64_t(o.halves[0].size()) : 1);
  }
  // `next` is the matrix that a thread reads after it; `shared`: each thread has a range of the parts.
  void part(const Pointwise& w, const Pointwise& next, int64_t part, const ProductOperands& o, bool shared,
            int thread) const;
  void whole(const Pointwise& w, const Pointwise& next, const ProductOperands& o, int thread) const {
    for (int64_t i = 0; i < parts(w, o, false); ++i) part(w, next, i, o, false, thread);
  }

 private:
  void rows(const Pointwise& w, const Pointwise& next, int64_t vector, const ProductOperands& o, int thread) const;
  void panel(const Pointwise& w, int64_t panel, const Ahead& ahead, const ProductOperands& o) const;
  void quarters(const Pointwise& w, int64_t panel, const Ahead& ahead, const ProductOperands& o, int thread) const;

  Panels panels(const Pointwise& w) const {
    return w.quartered ? net_.quarter_panels() : net_.panels(w.output_channels);
  }
  // Of a panel's first `vectors`; quartered: one quarter of it.
  int64_t panel_bytes(const Pointwise& w, int64_t vectors) const {
    return w.quartered ? net_.quarter_bytes(vectors) : vectors * net_.vector_bytes(w.input_channels);
  }
  const char* panel_begin(const Pointwise& w, int64_t panel) const {
    return w.matrix + (w.quartered ? kQuarters : 1) * panel_bytes(w, panels(w).begin(panel));
  }
  Ahead panel_at(const Pointwise& w, int64_t panel) const {
    const Panels all = panels(w);
    return {panel_begin(w, panel), panel_bytes(w, all.begin(panel + 1) - all.begin(panel))};
  }
  ProductTarget target(const Pointwise& w, int64_t first_vector, const ProductOperands& o, const Ahead& ahead) const;
  int64_t kept_bytes(int64_t tokens) const;

  const Network& net_;
  const Kernels& k_;
  const int threads_;
  const DType* converted_;
  char* scratch_ = nullptr;
  int64_t scratch_stride_ = 0;
};

}  // namespace spin
