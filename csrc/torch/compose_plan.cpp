// A composition (core/compose.h) as tables for kernels that run one program per tile (triton_ops/compose.py).
//
// All are int64 on the CPU. A program serves `block` consecutive elements of a cell, whose rows follow one another; the
// programs of a step are disjoint in the bank's gradient, and steps are launched in order.
//   firsts (c)      first program of a cell
//   cells  (c, 12)  base, stride, templates, first and last template of this step, pitch, rows, run, first user, users,
//                   programs, first product
//   users  (u, 3)   first element in the result, pitch, first coefficient
//   sums   (q + 1)  coefficient -> the first of its terms
//   terms  (t, 2)   first and count of the products that are summed; product (user, template, program) of a cell is
//                   number first + (user * templates + template) * programs + program
//   steps  (s + 1)  first program of a step
#include <algorithm>
#include <array>

#include "../core/compose.h"
#include "tensors.h"

namespace spin {
namespace {

using Rows = std::vector<int64_t>;

constexpr int64_t kMostRun = int64_t(1) << 30;  // programs count columns in 32 bits

Tensor table(Rows rows, int64_t width = 1) {
  auto memory = std::make_shared<Rows>(std::move(rows));
  const int64_t sizes[] = {int64_t(memory->size()) / width, width}, strides[] = {width, 1};
  const size_t rank = width == 1 ? 1 : 2;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(memory->data(), {sizes, rank}, {strides, rank}, cpu, ScalarType::Long,
                                  [memory](void*) {});
}

void append(Rows& rows, std::initializer_list<int64_t> row) { rows.insert(rows.end(), row); }

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Plan plan(const Composition& composition, int64_t block) {
  // A window that overlaps itself takes a step per template.
  auto steps_of = [](const Composition::Window& w) { return w.overlaps_itself() ? w.templates : 1; };
  Rows first_step(composition.phases() + 1, 0);
  for (const auto& w : composition.windows()) {
    first_step[w.phase + 1] = std::max(first_step[w.phase + 1], steps_of(w));
  }
  for (size_t phase = 1; phase < first_step.size(); ++phase) first_step[phase] += first_step[phase - 1];

  std::vector<std::vector<std::array<int64_t, 12>>> cells_of(first_step.back());  // of each step
  std::vector<Rows> terms_of(composition.coefficient_end());                      // of each coefficient
  Rows users;
  int64_t products = 0;
  for (const auto& w : composition.windows()) {
    for (const auto& cell : w.cells) {
      for (int64_t column = 0; column < cell.run; column += kMostRun) {
        const int64_t run = std::min(kMostRun, cell.run - column), programs = ceil_div(cell.rows * run, block);
        const int64_t user = int64_t(users.size()) / 3, count = int64_t(cell.users.size()), steps = steps_of(w);
        for (int64_t step = 0; step < steps; ++step) {
          cells_of[first_step[w.phase] + step].push_back({cell.base + column, w.stride, w.templates,
                                                          steps > 1 ? step : 0, steps > 1 ? step + 1 : w.templates,
                                                          w.pitch, cell.rows, run, user, count, programs, products});
        }
        for (const auto& u : cell.users) {
          append(users, {composition.start(u.layer) + u.to + column, u.pitch, u.coefficient});
          for (int64_t k = 0; k < w.templates; ++k, products += programs) {
            append(terms_of[u.coefficient + k], {products, programs});
          }
        }
      }
    }
  }
  Rows firsts, cells, steps{0}, sums{0}, terms;
  int64_t first = 0;
  for (const auto& of_step : cells_of) {
    for (const auto& cell : of_step) {
      firsts.push_back(first);
      first += cell[10];
      cells.insert(cells.end(), cell.begin(), cell.end());
    }
    steps.push_back(first);
  }
  for (const Rows& one : terms_of) {
    terms.insert(terms.end(), one.begin(), one.end());
    sums.push_back(int64_t(terms.size()) / 2);
  }
  return {table(std::move(firsts)), table(std::move(cells), 12), table(std::move(users), 3),
          table(std::move(sums)),   table(std::move(terms), 2),  table(std::move(steps))};
}

Plan plan_composition(std::vector<int64_t> pieces, std::vector<int64_t> shapes, int64_t block) {
  STD_TORCH_CHECK(block > 0 && block <= kMostRun, "block: expected 1 to 2^30 elements, got ", block);
  return within_memory("pieces", [&] { return plan(Composition(pieces, shapes), block); });
}

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_IMPL(spin, CompositeExplicitAutograd, m) {
  m.impl("_plan_composition", TORCH_BOX(&spin::plan_composition));
}
