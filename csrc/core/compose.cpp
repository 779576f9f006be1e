#include "compose.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu.h"
#include "workspace.h"

namespace spin {
namespace {

// Forward a tile's templates, near L1 (48 KB, or 32) while its users are made; with users one at a time, half as many
// took 1.18 with six templates, which left each 4 KB at a time. Backward kMostColumns, however many templates and
// users.
constexpr int64_t kForwardBytes = 48 << 10;
constexpr int64_t kLeastColumns = 256, kMostColumns = 4096;  // below, starts of streams; above, few tiles
constexpr int64_t kVector = 16;                              // the widest: a line of floats
constexpr int64_t kZeroElements = 1 << 18;                   // of a gradient, filled at a time

struct Piece {
  int64_t layer, base, stride, templates, coefficient, out_offset, in_offset, out, in, row;
};

// The sum of products.
int64_t total(std::initializer_list<std::initializer_list<int64_t>> products) {
  int64_t sum = 0;
  for (const auto& factors : products) {
    int64_t product = 1;
    bool fits = true;
    for (const int64_t factor : factors) {
      fits = fits && factor >= 0 && !__builtin_mul_overflow(product, factor, &product);
    }
    if (!fits || __builtin_add_overflow(sum, product, &sum)) {
      throw std::invalid_argument("pieces, shapes: expected sizes and offsets from 0 on that fit in 63 bits");
    }
  }
  return sum;
}

}  // namespace

Composition::Composition(const std::vector<int64_t>& pieces, const std::vector<int64_t>& shapes) {
  if (pieces.size() % 10 || shapes.size() % 4) {
    throw std::invalid_argument("pieces, shapes: expected ten integers per piece and four per layer");
  }
  for (size_t l = 0; l < shapes.size(); l += 4) {
    starts_.push_back(total({{numel()}, {shapes[l], shapes[l + 1], shapes[l + 2], shapes[l + 3]}}));
  }
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t>, size_t> found;
  std::vector<std::vector<Part>> parts;  // of each window
  for (size_t i = 0; i < pieces.size(); i += 10) {
    const int64_t* n = pieces.data() + i;
    const Piece p{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
    const std::string name = "pieces: piece " + std::to_string(i / 10);
    if (p.layer < 0 || p.layer >= layers()) throw std::invalid_argument(name + " has no such layer");
    const int64_t* shape = shapes.data() + 4 * p.layer;
    if (p.templates < 1 || p.out < 1 || p.in < 1 || p.row < p.in || total({{p.out_offset}, {p.out}}) > shape[0] ||
        total({{p.in_offset}, {p.in}}) > shape[1]) {
      throw std::invalid_argument(name + " expected to lie inside its layer");
    }
    const int64_t taps = shape[2] * shape[3], pitch = total({{p.row, taps}}), run = p.in * taps;
    bank_end_ = std::max(bank_end_, total({{p.base}, {p.templates - 1, p.stride}, {p.out - 1, pitch}, {run}}));
    coefficient_end_ = std::max(coefficient_end_, total({{p.coefficient}, {p.templates}}));
    const int64_t stride = p.templates > 1 ? p.stride : 0, to_pitch = shape[1] * taps;
    const auto [entry, is_new] = found.try_emplace({p.base, stride, p.templates, pitch}, windows_.size());
    if (is_new) windows_.push_back({p.base, stride, p.templates, pitch}), parts.emplace_back();
    const User user{p.layer, p.out_offset * to_pitch + p.in_offset * taps, to_pitch, p.coefficient};
    parts[entry->second].push_back({p.out, run, user});
  }
  for (size_t w = 0; w < windows_.size(); ++w) cut(windows_[w], parts[w]);
  // The fewest phases of disjoint windows: in order of their beginnings, each into the first phase that has room.
  std::stable_sort(windows_.begin(), windows_.end(), [](const Window& a, const Window& b) { return a.base < b.base; });
  std::vector<int64_t> ends;
  for (Window& w : windows_) {
    const auto room = std::find_if(ends.begin(), ends.end(), [&](int64_t end) { return end <= w.base; });
    w.phase = room - ends.begin();
    if (room == ends.end()) ends.push_back(0);
    ends[w.phase] = w.end();
  }
  phases_ = int64_t(ends.size());
}

void Composition::cut(Window& w, const std::vector<Part>& parts) {
  std::vector<int64_t> rows, runs;
  for (const Part& part : parts) rows.push_back(part.rows), runs.push_back(part.run);
  for (std::vector<int64_t>* sizes : {&rows, &runs}) {
    std::sort(sizes->begin(), sizes->end());
    sizes->erase(std::unique(sizes->begin(), sizes->end()), sizes->end());
  }
  w.rows = rows.back(), w.run = runs.back();
  int64_t row = 0;
  for (const int64_t last_row : rows) {
    int64_t column = 0;
    for (const int64_t last_column : runs) {
      Cell cell{w.base + row * w.pitch + column, last_row - row, last_column - column, {}};
      for (const Part& part : parts) {
        if (part.rows < last_row || part.run < last_column) continue;
        cell.users.push_back(part.user);
        cell.users.back().to += row * part.user.pitch + column;
      }
      column = last_column;
      if (!cell.users.empty()) w.cells.push_back(std::move(cell));
    }
    row = last_row;
  }
  const bool dense = w.rows == 1 || w.pitch == w.run;
  w.whole = dense && w.cells.size() == rows.size() * runs.size() && (w.templates == 1 || w.stride == w.rows * w.run);
  // Rows that touch everywhere are one long row.
  const bool touch = w.cells.size() == 1 && w.pitch == w.run &&
                     std::all_of(parts.begin(), parts.end(), [&](const Part& p) { return p.user.pitch == w.run; });
  if (touch) w.cells[0].run *= w.rows, w.cells[0].rows = 1;
}

std::vector<Composition::Tile> Composition::tiles(bool backward) const {
  std::vector<Tile> tiles;
  int64_t products = 0;
  for (const Window& w : windows_) {
    const int64_t fitting = kForwardBytes / 4 / w.templates / 64 * 64;
    const int64_t most = backward ? kMostColumns : std::clamp(fitting, kLeastColumns, kMostColumns);
    for (const Cell& cell : w.cells) {
      // Backward all tiles of a row but the first begin with lines of the bank's gradient, which goes past the caches:
      // 0.8 to 0.95 of the time.
      const int64_t missing = backward ? cell.base % kVector : 0;  // of the first one's first line
      const int64_t columns = round_up(ceil_div(cell.run + missing, ceil_div(cell.run, most)), 64);
      const int64_t first = columns - missing, rows = std::max<int64_t>(1, most / round_up(cell.run, kVector));
      for (int64_t row = 0; row < cell.rows; row += rows) {
        for (int64_t column = 0, next = first; column < cell.run; column = next, next += columns) {
          const int64_t height = std::min(rows, cell.rows - row), width = std::min(next, cell.run) - column;
          tiles.push_back({&w, &cell, row, height, column, width, products});
          products += tiles.back().products_count();
        }
      }
    }
  }
  return tiles;
}

void Composition::lay_out() {
  forward_ = tiles(false), backward_ = tiles(true);
  items_.resize(phases_);
  for (int64_t i = 0, count; i < int64_t(backward_.size()); i += count) {
    const Window& w = *backward_[i].window;
    count = 1;
    if (w.overlaps_itself()) {
      while (i + count < int64_t(backward_.size()) && backward_[i + count].window == &w) ++count;
    }
    items_[w.phase].push_back({i, count});
  }
  for (const Tile& tile : backward_) {
    const int64_t area = tile.rows * round_up(tile.columns, kVector);
    scratch_floats_ = std::max(scratch_floats_, std::min(tile.window->templates, kHeldTemplates) * area);
    products_count_ += tile.products_count();
  }
}

ComposeTile Composition::open(const Tile& tile, DType type, const char* bank, const float* coefficients,
                              const std::vector<char*>& weights, std::vector<ComposeUser>& users) {
  const Window& w = *tile.window;
  const int64_t bytes = size_of(type);
  users.clear();
  for (const User& u : tile.cell->users) {
    users.push_back(
        {weights[u.layer] + (u.to + tile.row * u.pitch + tile.column) * bytes, u.pitch, coefficients + u.coefficient});
  }
  ComposeTile opened{};
  opened.bank = bank + tile.offset() * bytes, opened.type = type;
  opened.stride = w.stride, opened.templates = w.templates;
  opened.rows = tile.rows, opened.columns = tile.columns, opened.pitch = w.pitch;
  opened.users = users.data(), opened.users_count = int64_t(users.size());
  return opened;
}

std::vector<char*> Composition::in(char* flat, DType type) const {
  std::vector<char*> weights;
  for (int64_t layer = 0; layer < layers(); ++layer) weights.push_back(flat + start(layer) * size_of(type));
  return weights;
}

void Composition::run(const Kernels& kernels, DType type, const char* bank, const float* coefficients,
                      const std::vector<char*>& weights, const Parallel& parallel) const {
  const int threads = useful_threads(4.0 * numel(), parallel);
  Team team(threads);
  parallel.run(threads, [&](int thread) {
    std::vector<ComposeUser> users;
    team.phase(thread, int64_t(forward_.size()), [&](int64_t item) {
      ComposeTile tile = open(forward_[item], type, bank, coefficients, weights, users);
      tile.stream = type == DType::kFloat32 && numel() * 4 > kStreamBytes;
      tile.ask_into_l2 = cpu_features().few_l1_misses;
      kernels.compose(tile);
    });
  });
}

void Composition::backward(const Kernels& kernels, DType type, const std::vector<char*>& gradients, const char* bank,
                           const float* coefficients, float* bank_gradient, int64_t bank_elements,
                           float* coefficient_gradient, int64_t coefficient_elements, const Parallel& parallel) const {
  // What the first phase writes whole needs no zeros before it.
  auto written = [](const Window& w) { return w.phase == 0 && w.whole; };
  std::vector<std::pair<int64_t, int64_t>> zeros;  // begin, count
  auto add_zeros = [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kZeroElements) zeros.push_back({begin, std::min(kZeroElements, end - begin)});
  };
  int64_t done = 0;
  for (const Window& w : windows_) {
    if (!written(w)) continue;
    add_zeros(done, w.base);
    done = w.end();
  }
  add_zeros(done, bank_elements);
  const Workspace memory(products_count_ * int64_t(sizeof(double)));
  double* products = reinterpret_cast<double*>(memory.data());
  const int threads = useful_threads(8.0 * numel() + bank_elements, parallel);
  Team team(threads);
  parallel.run(threads, [&](int thread) {
    std::vector<ComposeUser> users;
    const Workspace tile_memory(scratch_floats_ * int64_t(sizeof(float)));
    team.phase(thread, int64_t(zeros.size()),
               [&](int64_t item) { std::fill_n(bank_gradient + zeros[item].first, zeros[item].second, 0.f); });
    for (const std::vector<Item>& phase : items_) {
      team.phase(thread, int64_t(phase.size()), [&](int64_t item) {
        const auto [first, count] = phase[item];
        for (int64_t i = first; i < first + count; ++i) {
          ComposeTile tile = open(backward_[i], type, bank, coefficients, gradients, users);
          tile.bank_gradient = bank_gradient + backward_[i].offset();
          tile.first = written(*backward_[i].window);
          tile.stream = bank_elements * 4 > kStreamBytes;
          tile.ask_into_l2 = true;  // bursts are too long for L1
          tile.scratch = reinterpret_cast<float*>(tile_memory.data()), tile.products = products + backward_[i].products;
          kernels.compose_gradient(tile);
        }
      });
    }
  });
  std::vector<double> totals(coefficient_elements, 0.0);
  for (const Tile& tile : backward_) {
    const double* one = products + tile.products;
    for (const User& user : tile.cell->users) {
      for (int64_t k = 0; k < tile.window->templates; ++k) totals[user.coefficient + k] += *one++;
    }
  }
  std::copy(totals.begin(), totals.end(), coefficient_gradient);
}

}  // namespace spin
