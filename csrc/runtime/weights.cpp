// The kernels that make weights, for NumPy: what the sanitizer build's tests call.
#include <limits>

#include "../core/compose.h"
#include "../core/repeat.h"
#include "../core/run.h"
#include "arrays.h"

namespace spin {
namespace {

using Integers = std::vector<int64_t>;
using Maybe = std::optional<py::array>;

const Kernels& kernels(const std::string& isa) { return select_kernels(DType::kFloat32, isa); }

py::array like(const py::array& array, const std::vector<py::ssize_t>& shape) {
  py::array made(array.dtype(), shape);
  std::fill_n(static_cast<char*>(made.mutable_data()), made.nbytes(), char(0xff));  // NaN in all three types
  return made;
}
py::array_t<float> floats(const std::vector<py::ssize_t>& shape) {
  py::array_t<float> made(shape);
  std::fill_n(made.mutable_data(), made.size(), std::numeric_limits<float>::quiet_NaN());
  return made;
}
char* bytes(py::array& array) { return static_cast<char*>(array.mutable_data()); }

Composition composition(const py::array& bank, const py::array& coefficients, const Integers& pieces,
                        const Integers& shapes) {
  Composition made(pieces, shapes);
  if (made.bank_end() > bank.size() || made.coefficient_end() > coefficients.size()) {
    throw py::value_error("pieces: expected a larger bank or more coefficients");
  }
  made.lay_out();
  return made;
}

py::array compose(const py::array& bank, const py::array& coefficients, const Integers& pieces, const Integers& shapes,
                  int threads, const std::string& isa) {
  const Composition made = composition(bank, coefficients, pieces, shapes);
  const DType type = type_of(bank, "bank");
  const char* from = data_of(bank, type, {bank.size()}, "bank");
  const char* factors = data_of(coefficients, DType::kFloat32, {coefficients.size()}, "coefficients");
  py::array result = like(bank, {made.numel()});
  made.run(kernels(isa), type, from, reinterpret_cast<const float*>(factors), made.in(bytes(result), type),
           own_threads(threads));
  return result;
}

py::tuple compose_gradients(const py::array& grad, const py::array& bank, const py::array& coefficients,
                            const Integers& pieces, const Integers& shapes, int threads, const std::string& isa) {
  const Composition made = composition(bank, coefficients, pieces, shapes);
  const DType type = type_of(bank, "bank");
  const char* from = data_of(bank, type, {bank.size()}, "bank");
  const char* factors = data_of(coefficients, DType::kFloat32, {coefficients.size()}, "coefficients");
  const char* gradient = data_of(grad, type, {made.numel()}, "grad");
  py::array_t<float> to_bank = floats({bank.size()}), to_coefficients = floats({coefficients.size()});
  made.backward(kernels(isa), type, made.in(const_cast<char*>(gradient), type), from,
                reinterpret_cast<const float*>(factors), to_bank.mutable_data(), bank.size(),
                to_coefficients.mutable_data(), coefficients.size(), own_threads(threads));
  return py::make_tuple(to_bank, to_coefficients);
}

struct Repetition {
  RepeatShape shape;
  RepeatWeights weights;
  std::vector<py::ssize_t> sizes;  // of the result
};

Repetition repetition(const py::array& weight, const Maybe& alpha, const Maybe& beta, const Maybe& gate, int64_t out,
                      int64_t in) {
  if (weight.ndim() != 4 || weight.size() == 0 || out < 1 || in < 1 || alpha.has_value() != beta.has_value() ||
      (alpha && gate)) {
    throw py::value_error("weight: expected four sizes above 0, and alpha and beta, or gate, or neither");
  }
  const int64_t kh = weight.shape(2), kw = weight.shape(3);
  Repetition r{{weight.shape(0), weight.shape(1), out, in, kh * kw}, {}, {out, in, kh, kw}};
  const std::vector<py::ssize_t> tiles{r.shape.row_tiles(), r.shape.column_tiles()};
  RepeatWeights& w = r.weights;
  w.type = type_of(weight, "weight");
  w.base = data_of(weight, w.type, {weight.shape(0), weight.shape(1), kh, kw}, "weight");
  w.alpha = reinterpret_cast<const float*>(data_of(alpha, DType::kFloat32, tiles, "alpha"));
  w.beta = reinterpret_cast<const float*>(data_of(beta, DType::kFloat32, tiles, "beta"));
  w.gate = data_of(gate, w.type, r.sizes, "gate");
  return r;
}

py::array repeat(const py::array& weight, const Maybe& alpha, const Maybe& beta, const Maybe& gate, int64_t out,
                 int64_t in, int threads, const std::string& isa) {
  const Repetition r = repetition(weight, alpha, beta, gate, out, in);
  py::array result = like(weight, r.sizes);
  repeat_weight(kernels(isa), r.shape, r.weights, bytes(result), own_threads(threads));
  return result;
}

py::tuple repeat_gradients(const py::array& grad, const py::array& weight, const Maybe& alpha, const Maybe& beta,
                           const Maybe& gate, int64_t out, int64_t in, int threads, const std::string& isa) {
  const Repetition r = repetition(weight, alpha, beta, gate, out, in);
  const char* gradient = data_of(grad, r.weights.type, r.sizes, "grad");
  py::array_t<float> to_weight = floats({weight.shape(0), weight.shape(1), weight.shape(2), weight.shape(3)});
  const std::vector<py::ssize_t> tiles{r.shape.row_tiles(), r.shape.column_tiles()};
  py::array_t<float> to_alpha = floats(tiles), to_beta = floats(tiles);
  py::array to_gate = gate ? like(*gate, r.sizes) : py::array(py::dtype::of<float>(), std::vector<py::ssize_t>{0});
  repeat_weight_backward(kernels(isa), r.shape, r.weights, gradient, to_weight.mutable_data(), to_alpha.mutable_data(),
                         to_beta.mutable_data(), gate ? bytes(to_gate) : nullptr, own_threads(threads));
  return py::make_tuple(to_weight, to_alpha, to_beta, to_gate);
}

}  // namespace

void define_weights(py::module_& m) {
  using namespace py::literals;
  m.def("compose", &compose, "bank"_a, "coefficients"_a, "pieces"_a, "shapes"_a, "threads"_a = 1, "isa"_a = "",
        "compose_superweights.");
  m.def("compose_gradients", &compose_gradients, "grad"_a, "bank"_a, "coefficients"_a, "pieces"_a, "shapes"_a,
        "threads"_a = 1, "isa"_a = "", "Gradients of bank and coefficients, float32.");
  m.def("repeat", &repeat, "weight"_a, "alpha"_a, "beta"_a, "gate"_a, "out_channels"_a, "in_channels"_a,
        "threads"_a = 1, "isa"_a = "", "repeat_weight.");
  m.def("repeat_gradients", &repeat_gradients, "grad"_a, "weight"_a, "alpha"_a, "beta"_a, "gate"_a, "out_channels"_a,
        "in_channels"_a, "threads"_a = 1, "isa"_a = "",
        "Gradients of weight, alpha and beta in float32 and of gate in its own type; NaN where there is none.");
}

}  // namespace spin
