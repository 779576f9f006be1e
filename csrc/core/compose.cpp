#include "compose.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>

#include "workspace.h"

namespace spin {
namespace {

// A tile's templates stay in L1 (48 KB, or 32) beside what streams through it; its users' gradients in L2.
constexpr int64_t kTileBytes = 24 << 10;
constexpr int64_t kLeastColumns = 256, kMostColumns = 4096;  // below, starts of streams; above, few tiles
// Results beyond this are read again from memory anyway.
constexpr int64_t kStreamBytes = 8 << 20;
constexpr int64_t kZeroElements = 1 << 18;  // of a gradient, filled at a time

int64_t product(std::initializer_list<int64_t> factors) {
  int64_t result = 1;
  for (int64_t factor : factors) {
    if (factor < 0 || __builtin_mul_overflow(result, factor, &result)) {
      throw std::invalid_argument("pieces, shapes: expected sizes that fit in 63 bits");
    }
  }
  return result;
}
int64_t sum(std::initializer_list<int64_t> terms) {
  int64_t result = 0;
  for (int64_t term : terms) {
    if (term < 0 || __builtin_add_overflow(result, term, &result)) {
      throw std::invalid_argument("pieces: expected offsets that are not negative and fit in 63 bits");
    }
  }
  return result;
}

}  // namespace

Composition::Composition(const std::vector<int64_t>& pieces, const std::vector<int64_t>& shapes) {
  if (pieces.size() % 10 || shapes.size() % 4) {
    throw std::invalid_argument("pieces, shapes: expected ten integers per piece and four per layer");
  }
  std::vector<int64_t> first;  // of each layer in the result
  for (size_t l = 0; l < shapes.size(); l += 4) {
    first.push_back(numel_);
    numel_ = sum({numel_, product({shapes[l], shapes[l + 1], shapes[l + 2], shapes[l + 3]})});
  }
  std::map<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>, size_t> found;
  for (size_t i = 0; i < pieces.size(); i += 10) {
    const int64_t* n = pieces.data() + i;
    const Piece p{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9]};
    const std::string name = "pieces: piece " + std::to_string(i / 10);
    if (p.layer < 0 || p.layer >= int64_t(first.size())) throw std::invalid_argument(name + " has no such layer");
    const int64_t* shape = shapes.data() + 4 * p.layer;
    if (p.templates < 1 || p.out < 1 || p.in < 1 || p.row < p.in || sum({p.out_offset, p.out}) > shape[0] ||
        sum({p.in_offset, p.in}) > shape[1]) {
      throw std::invalid_argument(name + " expected to lie inside its layer");
    }
    const int64_t taps = shape[2] * shape[3], pitch = product({p.row, taps}), run = p.in * taps;
    bank_end_ =
        std::max(bank_end_, sum({p.base, product({p.templates - 1, p.stride}), product({p.out - 1, pitch}), run}));
    coefficient_end_ = std::max(coefficient_end_, sum({p.coefficient, p.templates}));
    const auto key = std::make_tuple(p.base, p.templates > 1 ? p.stride : 0, p.templates, p.out, run, pitch);
    const auto [entry, is_new] = found.try_emplace(key, sources_.size());
    if (is_new) sources_.push_back({p.base, std::get<1>(key), p.templates, p.out, run, pitch, {}});
    const int64_t to_pitch = shape[1] * taps;
    sources_[entry->second].users.push_back(
        {first[p.layer] + p.out_offset * to_pitch + p.in_offset * taps, to_pitch, p.coefficient});
  }
  for (Source& s : sources_) {  // rows that touch everywhere are one long row
    const bool whole = std::all_of(s.users.begin(), s.users.end(), [&](const User& u) { return u.pitch == s.run; });
    if (s.dense() && whole) s.run *= s.rows, s.pitch = s.run, s.rows = 1;
  }
  // The fewest phases of disjoint windows: in order of their beginnings, each into the first phase that has room.
  std::stable_sort(sources_.begin(), sources_.end(), [](const Source& a, const Source& b) { return a.base < b.base; });
  std::vector<int64_t> ends;
  for (Source& s : sources_) {
    const auto room = std::find_if(ends.begin(), ends.end(), [&](int64_t end) { return end <= s.base; });
    s.phase = room - ends.begin();
    if (room == ends.end()) ends.push_back(0);
    ends[s.phase] = s.end();
  }
  phases_ = int64_t(ends.size());
}

std::vector<Composition::Tile> Composition::tiles() const {
  std::vector<Tile> tiles;
  int64_t dots = 0;
  for (const Source& s : sources_) {
    const int64_t most = std::clamp(kTileBytes / 4 / s.templates / 64 * 64, kLeastColumns, kMostColumns);
    const int64_t columns = std::min(most, s.run), rows = std::max<int64_t>(1, most / s.run);
    for (int64_t row = 0; row < s.rows; row += rows) {
      for (int64_t column = 0; column < s.run; column += columns) {
        tiles.push_back({&s, row, std::min(rows, s.rows - row), column, std::min(columns, s.run - column), dots});
        dots += int64_t(s.users.size()) * s.templates;
      }
    }
  }
  return tiles;
}

ComposeTile Composition::open(const Tile& tile, DType type, const char* bank, const float* coefficients, char* flat,
                              std::vector<ComposeUser>& users) const {
  const Source& s = *tile.source;
  const int64_t bytes = size_of(type);
  users.clear();
  for (const User& u : s.users) {
    users.push_back(
        {flat + (u.to + tile.row * u.pitch + tile.column) * bytes, u.pitch, coefficients + u.coefficient, nullptr});
  }
  const int64_t offset = s.base + tile.row * s.pitch + tile.column;
  return {bank + offset * bytes, type,  s.stride, s.templates, tile.rows, tile.columns, s.pitch, users.data(),
          int64_t(users.size()), false, nullptr,  false};
}

void Composition::run(const Kernels& kernels, DType type, const char* bank, const float* coefficients, char* result,
                      const Parallel& parallel) const {
  const std::vector<Tile> all = tiles();
  const int threads = useful_threads(4.0 * numel_, parallel);
  Team team(threads, 1);
  parallel.run(threads, [&](int thread) {
    std::vector<ComposeUser> users;
    team.phase(thread, 0, int64_t(all.size()), [&](int64_t item) {
      ComposeTile tile = open(all[item], type, bank, coefficients, result, users);
      tile.stream = type == DType::kFloat32 && numel_ * 4 > kStreamBytes;
      kernels.compose(tile);
    });
  });
}

void Composition::backward(const Kernels& kernels, DType type, const char* gradient, const char* bank,
                           const float* coefficients, float* bank_gradient, int64_t bank_elements,
                           float* coefficient_gradient, int64_t coefficient_elements, const Parallel& parallel) const {
  const std::vector<Tile> all = tiles();
  // What the first phase writes whole needs no zeros before it.
  auto written = [](const Source& s) {
    return s.phase == 0 && s.dense() && (s.templates == 1 || s.stride == s.rows * s.run);
  };
  std::vector<std::pair<int64_t, int64_t>> zeros;  // begin, count
  auto add_zeros = [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += kZeroElements) zeros.push_back({begin, std::min(kZeroElements, end - begin)});
  };
  int64_t done = 0;
  for (const Source& s : sources_) {
    if (!written(s)) continue;
    add_zeros(done, s.base);
    done = s.end();
  }
  add_zeros(done, bank_elements);
  // Tiles of one phase at a time; those of a window that overlaps itself are one item.
  struct Item {
    int64_t first, count;
  };
  std::vector<std::vector<Item>> items(phases_);
  for (int64_t i = 0, count; i < int64_t(all.size()); i += count) {
    const Source& s = *all[i].source;
    count = 1;
    if (s.overlaps_itself()) {
      while (i + count < int64_t(all.size()) && all[i + count].source == &s) ++count;
    }
    items[s.phase].push_back({i, count});
  }
  const int64_t products =
      all.empty() ? 0 : all.back().dots + int64_t(all.back().source->users.size()) * all.back().source->templates;
  Workspace memory(products * int64_t(sizeof(double)));
  double* dots = reinterpret_cast<double*>(memory.data());
  const int threads = useful_threads(8.0 * numel_ + bank_elements, parallel);
  Team team(threads, phases_ + 1);
  parallel.run(threads, [&](int thread) {
    std::vector<ComposeUser> users;
    team.phase(thread, 0, int64_t(zeros.size()),
               [&](int64_t item) { std::fill_n(bank_gradient + zeros[item].first, zeros[item].second, 0.f); });
    for (int64_t phase = 0; phase < phases_; ++phase) {
      team.phase(thread, phase + 1, int64_t(items[phase].size()), [&](int64_t item) {
        const auto [first, count] = items[phase][item];
        for (int64_t i = first; i < first + count; ++i) {
          const Source& s = *all[i].source;
          ComposeTile tile = open(all[i], type, bank, coefficients, const_cast<char*>(gradient), users);
          for (size_t u = 0; u < users.size(); ++u) users[u].dots = dots + all[i].dots + int64_t(u) * s.templates;
          tile.bank_gradient = bank_gradient + s.base + all[i].row * s.pitch + all[i].column;
          tile.first = written(s);
          kernels.compose_gradient(tile);
        }
      });
    }
  });
  std::vector<double> totals(coefficient_elements, 0.0);
  for (const Tile& tile : all) {
    const double* dot = dots + tile.dots;
    for (const User& user : tile.source->users) {
      for (int64_t k = 0; k < tile.source->templates; ++k) totals[user.coefficient + k] += *dot++;
    }
  }
  std::copy(totals.begin(), totals.end(), coefficient_gradient);
}

}  // namespace spin
