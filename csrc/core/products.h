// A matrix times some tokens, in parts that one thread or several take.
//
//  - Plain rows: a part is a line of output channels. A line of a matrix of another element type than the chain's is
//    converted right before its use.
//  - Panels (frozen): a part is a panel.
//  - Panels of quarters: a part is a panel of both halves of the output channels (strassen.h), for all operands; where
//    threads share a matrix, for one of them, and the first operand's parts come first.
#pragma once
#include <span>

#include "network.h"

namespace spin {

struct ProductOperands {
  const char* input;     // panels of tokens; where the matrix lies in panels: lines
  int64_t input_stride;  // of lines
  int64_t tokens;
  const char* residual;  // null: none
  int64_t residual_stride;
  char* output;
  int64_t output_stride;
  Activation activation;
  const char* sums = nullptr;  // of the input's quarters, like it; null: a plain product
};

class Products {
 public:
  // `converted`: the element type of rows that are not of the operands' (null: they are).
  Products(const Network& network, int threads, const DType* converted)
      : net_(network), k_(network.kernels()), threads_(threads), converted_(converted) {}

  // Per thread, for at most so many operands of at most so many tokens.
  int64_t scratch_bytes(int64_t tokens, int64_t operands) const;
  void bind(char* scratch, int64_t stride) { scratch_ = scratch, scratch_stride_ = stride; }

  int64_t parts(const Pointwise& w, bool shared, int64_t operands) const {
    return w.row_stride ? net_.lines(w.output_channels) : panels(w).count * (shared && w.quartered ? operands : 1);
  }
  // `next` is the matrix that a thread reads after it; `shared`: each thread has a range of the parts. Only a product
  // of quarters has several operands.
  void part(const Pointwise& w, const Pointwise& next, int64_t part, std::span<const ProductOperands> o, bool shared,
            int thread) const;
  void whole(const Pointwise& w, const Pointwise& next, std::span<const ProductOperands> o, int thread) const {
    for (int64_t i = 0; i < parts(w, false, 1); ++i) part(w, next, i, o, false, thread);
  }

 private:
  // What this thread reads next.
  struct Ahead {
    const char* data;
    int64_t bytes;
  };
  void rows(const Pointwise& w, const Pointwise& next, int64_t vector, const ProductOperands& o, int thread) const;
  void panel(const Pointwise& w, int64_t panel, const Ahead& ahead, const ProductOperands& o) const;
  void quarters(const Pointwise& w, int64_t panel, const Ahead& ahead, std::span<const ProductOperands> operands,
                int thread) const;

  // Of a step.
  static int64_t step_tokens(const ProductOperands& o) { return o.sums ? ceil_div(o.tokens, 2) : o.tokens; }
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
