// SuperWeight compositions: every layer's weight of a network from windows of one bank, in one call.
//
//   result[layer l; out_offset + o, in_offset + i, tap] =
//       sum_k coefficients[coefficient + k] * bank[base + k * stride + (o * row + i) * taps + tap]
//
// Pieces that read the same templates (a bank and the layers that share it) form a *window*: it is cut into tiles,
// and a tile serves all its users, from caches, before the next one is read. So the bank and the result pass through
// memory once, and so do, backward, the result's gradient and the bank's: the floor.
// Cost: 2 * templates operations per element of the result forward, 4 backward.
//
// Backward gives every tile of a window to one thread. Windows that overlap (bases need not be multiples of anything)
// come in different phases, so nothing is ever added concurrently and sums have one order: by phase, user, template.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "team.h"

namespace spin {

class Composition {
 public:
  // Ten integers per piece, four (out, in, kh, kw) per layer. Throws std::invalid_argument for pieces that leave their
  // layer and for sizes that overflow; whether layers are covered is not looked at.
  Composition(const std::vector<int64_t>& pieces, const std::vector<int64_t>& shapes);
  Composition(Composition&&) = default;  // no copies: tiles point at cells

  struct User {
    int64_t layer, to, pitch;  // first element in the layer's weight, elements from one row to the next
    int64_t coefficient;
  };
  // Rows of `run` elements of all templates, the same ones for every user.
  struct Cell {
    int64_t base, rows, run;
    std::vector<User> users;
  };
  // Templates of which users read the whole or a corner: narrower layers have narrower windows. The sizes that occur
  // cut it into cells, so that a part of the bank is read once for all that use it.
  struct Window {
    int64_t base, stride, templates, pitch;  // from one row to the next
    int64_t rows = 0, run = 0;               // of the largest user
    std::vector<Cell> cells = {};
    int64_t phase = 0;
    bool whole = false;  // every element from `base` to `end` belongs to one cell
    int64_t extent() const { return (rows - 1) * pitch + run; }
    int64_t end() const { return base + (templates - 1) * stride + extent(); }
    bool overlaps_itself() const { return templates > 1 && stride < extent(); }
  };

  const std::vector<Window>& windows() const { return windows_; }  // by base; those of one phase are disjoint
  int64_t phases() const { return phases_; }
  int64_t bank_end() const { return bank_end_; }                // elements that the bank must have
  int64_t coefficient_end() const { return coefficient_end_; }  // and the coefficients
  int64_t layers() const { return int64_t(starts_.size()) - 1; }
  int64_t start(int64_t layer) const { return starts_[layer]; }  // in the flat result
  int64_t numel() const { return starts_.back(); }               // of the result

  // The layers' weights in a flat result.
  std::vector<char*> in(char* flat, DType type) const;

  // Cuts the windows into tiles: once before what follows, for a bank that is large enough (bank_end()).
  void lay_out();

  // `weights` are the layers', wherever they are.
  void run(const Kernels& kernels, DType type, const char* bank, const float* coefficients,
           const std::vector<char*>& weights, const Parallel& parallel) const;

  // Fills both gradients; `bank_gradient` has `bank_elements` floats. `gradients` (of the weights) are only read.
  void backward(const Kernels& kernels, DType type, const std::vector<char*>& gradients, const char* bank,
                const float* coefficients, float* bank_gradient, int64_t bank_elements, float* coefficient_gradient,
                int64_t coefficient_elements, const Parallel& parallel) const;

 private:
  struct Tile {
    const Window* window;
    const Cell* cell;
    int64_t row, rows, column, columns;
    int64_t products;  // where those begin that backward makes, of users and templates
    int64_t offset() const { return cell->base + row * window->pitch + column; }
    int64_t products_count() const { return int64_t(cell->users.size()) * window->templates; }
  };

  // Tiles of one phase, for one thread: one, or backward all of a window that overlaps itself.
  struct Item {
    int64_t first, count;
  };

  struct Part {
    int64_t rows, run;  // of the window's corner
    User user;
  };
  static void cut(Window& window, const std::vector<Part>& parts);
  std::vector<Tile> tiles(bool backward) const;
  static ComposeTile open(const Tile& tile, DType type, const char* bank, const float* coefficients,
                          const std::vector<char*>& weights, std::vector<ComposeUser>& users);

  std::vector<Window> windows_;     // by base
  std::vector<int64_t> starts_{0};  // of the layers, and the end
  int64_t phases_ = 0, bank_end_ = 0, coefficient_end_ = 0;
  std::vector<Tile> forward_, backward_;
  std::vector<std::vector<Item>> items_;             // backward, of each phase
  int64_t scratch_floats_ = 0, products_count_ = 0;  // backward, of a thread and of all tiles
};

}  // namespace spin
