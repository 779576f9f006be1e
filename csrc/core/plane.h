// The tokens of an image in one line of channels, and bands of their rows.
#pragma once
#include <algorithm>

#include "types.h"

namespace spin {

struct Band {
  int64_t first_row, last_row, tokens, bytes, offset;  // offset: in the plane
};

struct Plane {
  int64_t height, width, token_bytes;
  int64_t cuts;  // what bands are made of: rows, or the parts that Strassen's product halves (strassen.h)

  int64_t tokens() const { return height * width; }
  int64_t bytes() const { return tokens() * token_bytes; }
  Band rows(int64_t first, int64_t last) const {
    const int64_t tokens = (last - first) * width;
    return {first, last, tokens, tokens * token_bytes, first * width * token_bytes};
  }
  Band cut(int64_t first, int64_t last) const { return rows(first * height / cuts, last * height / cuts); }
  // Of band number i of n.
  int64_t first_cut(int64_t i, int64_t n) const { return i * cuts / n; }
  Band band(int64_t i, int64_t n) const { return cut(first_cut(i, n), first_cut(i + 1, n)); }
  Band largest(int64_t n) const {
    Band largest = band(0, n);
    for (int64_t i = 1; i < n; ++i) {
      if (band(i, n).tokens > largest.tokens) largest = band(i, n);
    }
    return largest;
  }
};

}  // namespace spin
