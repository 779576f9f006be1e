#include "repeat.h"

#include <algorithm>
#include <vector>

#include "workspace.h"

namespace spin {
namespace {

constexpr int64_t kPieceElements = 4096;  // of the base: 16 KB, beside what streams through L1

struct Piece {
  int64_t row, rows, column, columns;
};

std::vector<Piece> pieces_of(const RepeatShape& s) {
  std::vector<Piece> pieces;
  const int64_t run = s.base_in * s.taps;
  const int64_t columns = std::min(run, kPieceElements), rows = std::max<int64_t>(1, kPieceElements / run);
  for (int64_t row = 0; row < s.base_out; row += rows) {
    for (int64_t column = 0; column < run; column += columns) {
      pieces.push_back({row, std::min(rows, s.base_out - row), column, std::min(columns, run - column)});
    }
  }
  return pieces;
}

// The piece with all tiles; `flat` is the result or its gradient. A tile that ends before the piece is a user without
// rows or columns, so that users are numbered as tiles.
RepeatTile open(const RepeatShape& s, const RepeatWeights& w, const Piece& piece, char* flat, char* gate_gradient,
                std::vector<RepeatUser>& users) {
  const int64_t bytes = size_of(w.type), run = s.base_in * s.taps, pitch = s.in * s.taps;
  users.clear();
  for (int64_t a = 0; a < s.row_tiles(); ++a) {
    for (int64_t b = 0; b < s.column_tiles(); ++b) {
      const int64_t row = a * s.base_out + piece.row, column = b * run + piece.column, tile = a * s.column_tiles() + b;
      const int64_t at = (row * pitch + column) * bytes;
      const int64_t rows = std::clamp<int64_t>(s.out - row, 0, piece.rows);
      const int64_t columns = std::clamp<int64_t>(pitch - column, 0, piece.columns);
      const bool there = rows > 0 && columns > 0;
      users.push_back({there ? flat + at : nullptr, pitch, there ? rows : 0, columns, w.alpha ? w.alpha[tile] : 0.f,
                       w.beta ? w.beta[tile] : 0.f, w.gate && there ? w.gate + at : nullptr,
                       gate_gradient && there ? gate_gradient + at : nullptr});
    }
  }
  RepeatTile tile{};
  tile.base = w.base + (piece.row * run + piece.column) * bytes;
  tile.type = w.type;
  tile.modulation = w.alpha ? Modulation::kSwish : w.gate ? Modulation::kGate : Modulation::kPlain;
  tile.rows = piece.rows, tile.columns = piece.columns, tile.pitch = run;
  tile.users = users.data(), tile.users_count = int64_t(users.size());
  return tile;
}

}  // namespace

void repeat_weight(const Kernels& kernels, const RepeatShape& shape, const RepeatWeights& weights, char* result,
                   const Parallel& parallel) {
  const std::vector<Piece> pieces = pieces_of(shape);
  const int threads = useful_threads(4.0 * shape.elements(), parallel);
  Team team(threads);
  parallel.run(threads, [&](int thread) {
    std::vector<RepeatUser> users;
    team.phase(thread, int64_t(pieces.size()), [&](int64_t item) {
      RepeatTile tile = open(shape, weights, pieces[item], result, nullptr, users);
      tile.stream = weights.type == DType::kFloat32 && shape.elements() * 4 > kStreamBytes;
      kernels.repeat(tile);
    });
  });
}

void repeat_weight_backward(const Kernels& kernels, const RepeatShape& shape, const RepeatWeights& weights,
                            const char* gradient, float* base_gradient, float* alpha_gradient, float* beta_gradient,
                            char* gate_gradient, const Parallel& parallel) {
  const std::vector<Piece> pieces = pieces_of(shape);
  const int64_t sums = weights.alpha ? 2 * shape.tiles() : 0, run = shape.base_in * shape.taps;
  const Workspace memory(int64_t(pieces.size()) * sums * int64_t(sizeof(double)));
  double* products = reinterpret_cast<double*>(memory.data());
  const int threads = useful_threads(8.0 * shape.elements(), parallel);
  Team team(threads);
  parallel.run(threads, [&](int thread) {
    std::vector<RepeatUser> users;
    const Workspace scratch(sums * kernels.lanes * int64_t(sizeof(float)));
    team.phase(thread, int64_t(pieces.size()), [&](int64_t item) {
      const Piece& piece = pieces[item];
      RepeatTile tile = open(shape, weights, piece, const_cast<char*>(gradient), gate_gradient, users);
      tile.base_gradient = base_gradient + piece.row * run + piece.column;
      tile.sums = reinterpret_cast<float*>(scratch.data()), tile.products = products + item * sums;
      kernels.repeat_gradient(tile);
    });
  });
  for (int64_t t = 0; 2 * t < sums; ++t) {
    double alpha = 0, beta = 0;
    for (size_t piece = 0; piece < pieces.size(); ++piece) {
      alpha += products[piece * sums + 2 * t];
      beta -= products[piece * sums + 2 * t + 1];
    }
    alpha_gradient[t] = float(alpha), beta_gradient[t] = float(beta);
  }
}

}  // namespace spin
