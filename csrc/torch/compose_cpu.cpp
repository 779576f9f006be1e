// CPU kernels of compose_superweights: tensors in, raw pointers to csrc/core.
#include <charconv>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "../core/compose.h"
#include "tensors.h"

namespace spin {
namespace {

// What a call's text describes (checks.composition_text in Python writes it): pieces;shapes, numbers apart by spaces.
struct Described {
  std::vector<int64_t> shapes;
  Composition composition;
};

Described read_text(const std::string& text) {
  std::vector<int64_t> lists[2];
  const char *at = text.data(), *end = at + text.size();
  int list = 0;
  while (at < end) {
    if (*at == ' ' || *at == ';') {
      list += *at++ == ';';
      continue;
    }
    int64_t number = 0;
    const auto [rest, error] = std::from_chars(at, end, number);
    if (error != std::errc() || list > 1) break;
    lists[list].push_back(number), at = rest;
  }
  STD_TORCH_CHECK(at == end && list == 1, "composition: expected pieces;shapes in decimal numbers");
  Composition composition(lists[0], lists[1]);
  return {std::move(lists[1]), std::move(composition)};
}

// A network's text is the same in every call: what was made of them last is kept, the latest first. (Making it took 1
// to 4 % of a call for WRN-28-10.)
std::shared_ptr<const Described> described(const std::string& text, int64_t bank_elements, int64_t coefficients) {
  constexpr size_t kKept = 8;
  using Entry = std::pair<std::string, std::shared_ptr<const Described>>;
  static std::mutex mutex;
  static std::list<Entry>& kept = *new std::list<Entry>;  // other threads may be in a call while the process ends
  auto check = [&](const Composition& made) {
    STD_TORCH_CHECK(made.bank_end() <= bank_elements, "composition: expected a bank of at least ", made.bank_end(),
                    " elements, got ", bank_elements);
    STD_TORCH_CHECK(made.coefficient_end() <= coefficients, "composition: expected at least ", made.coefficient_end(),
                    " coefficients, got ", coefficients);
  };
  {
    std::lock_guard lock(mutex);
    for (auto entry = kept.begin(); entry != kept.end(); ++entry) {
      if (entry->first != text) continue;
      check(entry->second->composition);
      kept.splice(kept.begin(), kept, entry);
      return entry->second;
    }
  }
  Described made = read_text(text);
  check(made.composition);
  made.composition.lay_out();
  auto shared = std::make_shared<const Described>(std::move(made));
  std::lock_guard lock(mutex);
  kept.push_front({text, shared});
  if (kept.size() > kKept) kept.pop_back();
  return shared;
}

struct Call {
  std::shared_ptr<const Described> described;
  DType type;
  const char* bank;
  const float* coefficients;
  Keep keep;
};

Call read(const Tensor& bank, const Tensor& coefficients, const std::string& text) {
  Call call{described(text, bank.numel(), coefficients.numel()), dtype_of(bank, "bank"), nullptr, nullptr, {}};
  call.bank = data_of(bank, call.type, {bank.numel()}, "bank", call.keep);
  call.coefficients = floats_of(coefficients, {coefficients.numel()}, "coefficients", call.keep);
  return call;
}

// The layers' weights one after another in one tensor, or `apart`: a tensor for each, so that autograd need not join
// their gradients, a pass over memory larger than this one.
std::vector<Tensor> compose(const Tensor& bank, const Tensor& coefficients, std::string text, bool apart) {
  return within_memory("composition", [&] {
    const Call call = read(bank, coefficients, text);
    const auto& [shapes, made] = *call.described;
    std::vector<Tensor> results;
    std::vector<char*> weights;
    if (apart) {
      for (int64_t layer = 0; layer < made.layers(); ++layer) {
        const Tensor flat = pooled(bank, made.start(layer + 1) - made.start(layer), size_of(call.type));
        results.push_back(torch::stable::view(flat, {&shapes[4 * layer], 4}));
        weights.push_back(mutable_bytes(flat));
      }
    } else {
      results.push_back(pooled(bank, made.numel(), size_of(call.type)));
      weights = made.in(mutable_bytes(results[0]), call.type);
    }
    made.run(weight_kernels(), call.type, call.bank, call.coefficients, weights, torch_parallel());
    return results;
  });
}

// `grads` as compose() makes weights: one flat tensor, or one per layer.
std::tuple<Tensor, Tensor> compose_backward(std::vector<Tensor> grads, const Tensor& bank, const Tensor& coefficients,
                                            std::string text) {
  return within_memory("composition", [&] {
    Call call = read(bank, coefficients, text);
    const auto& [shapes, made] = *call.described;
    std::vector<char*> gradients;
    if (grads.size() == 1 && grads[0].dim() == 1) {
      gradients =
          made.in(const_cast<char*>(data_of(grads[0], call.type, {made.numel()}, "grad", call.keep)), call.type);
    } else {
      STD_TORCH_CHECK(int64_t(grads.size()) == made.layers(), "grads: expected one per layer");
      for (size_t layer = 0; layer < grads.size(); ++layer) {
        const int64_t* shape = &shapes[4 * layer];
        const char* data =
            data_of(grads[layer], call.type, {shape[0], shape[1], shape[2], shape[3]}, "grads", call.keep);
        gradients.push_back(const_cast<char*>(data));
      }
    }
    Tensor to_bank = pooled(bank, bank.numel(), size_of(call.type));
    Tensor to_coefficients = new_tensor(coefficients, {coefficients.numel()}, ScalarType::Float);
    fill_as_floats(to_bank, call.type, [&](float* floats) {
      made.backward(weight_kernels(), call.type, gradients, call.bank, call.coefficients, floats, bank.numel(),
                    mutable_floats(to_coefficients), coefficients.numel(), torch_parallel());
    });
    return std::make_tuple(to_bank, to_coefficients);
  });
}

}  // namespace
}  // namespace spin

STABLE_TORCH_LIBRARY_IMPL(spin, CPU, m) {
  m.impl("_compose_superweights_cpu", TORCH_BOX(&spin::compose));
  m.impl("_compose_superweights_backward_cpu", TORCH_BOX(&spin::compose_backward));
}
