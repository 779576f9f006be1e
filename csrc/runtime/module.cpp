// spin_runtime: csrc/core for NumPy, without torch. Processor features, measured peaks and the raw kernels:
// what the benchmark's ceilings and the sanitizer build's tests are made of.
#include <cstring>

#include "../core/packing_plan.h"
#include "../core/peaks.h"
#include "../core/run.h"
#include "../core/train.h"
#include "../core/workspace.h"
#include "arrays.h"

namespace py = pybind11;

namespace spin {
namespace {

Activation activation_of(const std::string& name) {
  static const char* const kNames[] = {"gelu", "gelu_tanh", "relu", "silu", "identity"};
  for (uint32_t i = 0; i < 5; ++i) {
    if (name == kNames[i]) return Activation(i);
  }
  throw py::value_error("activation: expected gelu, gelu_tanh, relu, silu or identity, got '" + name + "'");
}

External view_of(const py::array& x, DType type) {
  const py::ssize_t size = x.itemsize();
  return {static_cast<char*>(const_cast<void*>(x.data())),
          type,
          x.shape(1),
          x.shape(2),
          x.shape(3),
          x.strides(1) / size,
          x.strides(2) / size,
          x.strides(3) / size};
}

struct Mixer {
  NetworkShape shape;
  MixerWeights weights;
};

Mixer read_mixer(const py::array& x, const py::array& dw_weight, const std::optional<py::array>& dw_bias,
                 const py::array& dw_affine, const py::array& pw_weight, const std::optional<py::array>& pw_bias,
                 const py::array& pw_affine, const std::vector<int64_t>& pw_index,
                 const std::optional<std::vector<int64_t>>& dw_index, const std::optional<py::array>& pw_coefficients,
                 const std::optional<py::array>& pw_gain, const std::string& activation, bool pw_residual) {
  if (x.ndim() != 4 || dw_weight.ndim() != 4 || pw_weight.ndim() != 3) {
    throw py::value_error("x, dw_weight, pw_weight: expected ranks 4, 4 and 3");
  }
  const DType type = type_of(x, "x");
  for (int i = 0; i < 4; ++i) {
    if (x.strides(i) % x.itemsize()) throw py::value_error("x: expected strides of whole elements");
  }
  NetworkShape s;
  s.channels = x.shape(1), s.kernel_size = dw_weight.shape(2), s.depth = int64_t(pw_index.size());
  s.filters = dw_weight.shape(0), s.matrices = pw_coefficients ? pw_coefficients->shape(0) : pw_weight.shape(0);
  s.pw_index = pw_index, s.activation = activation_of(activation), s.pw_residual = pw_residual, s.type = type;
  if (dw_index) {
    s.dw_index = *dw_index;
  } else {
    for (int64_t d = 0; d < s.depth; ++d) s.dw_index.push_back(d);
  }
  if (s.channels < 1 || s.channels > kMaxChannels || s.kernel_size % 2 == 0 || s.kernel_size > kMaxKernelSize ||
      x.shape(2) < 1 || x.shape(3) < 1 || int64_t(s.dw_index.size()) != s.depth ||
      pw_weight.shape(0) < (pw_coefficients ? 1 : 0)) {
    throw py::value_error("x, dw_weight, dw_index, pw_weight: sizes out of range");
  }
  for (int64_t d = 0; d < s.depth; ++d) {
    if (s.pw_index[d] < 0 || s.pw_index[d] >= s.matrices || s.dw_index[d] < 0 || s.dw_index[d] >= s.filters) {
      throw py::value_error("pw_index, dw_index: out of range");
    }
  }
  const int64_t C = s.channels, k = s.kernel_size, D = s.depth, T = pw_weight.shape(0);
  auto floats = [](const char* data) { return reinterpret_cast<const float*>(data); };
  MixerWeights weights{
      .type = type,
      .dw_weight = data_of(dw_weight, type, {s.filters, C, k, k}, "dw_weight"),
      .dw_bias = data_of(dw_bias, type, {s.filters, C}, "dw_bias"),
      .dw_affine = floats(data_of(dw_affine, DType::kFloat32, {D, 2, C}, "dw_affine")),
      .pw_weight = data_of(pw_weight, type, {T, C, C}, "pw_weight"),
      .pw_bias = data_of(pw_bias, type, {s.matrices, C}, "pw_bias"),
      .pw_affine = floats(data_of(pw_affine, DType::kFloat32, {D, 2, C}, "pw_affine")),
      .pw_coefficients = floats(data_of(pw_coefficients, DType::kFloat32, {s.matrices, T}, "pw_coefficients")),
      .templates = T,
      .pw_gain = floats(data_of(pw_gain, DType::kFloat32, {D, C}, "pw_gain")),
  };
  return {std::move(s), weights};
}

py::array new_array(const py::dtype& type, std::vector<py::ssize_t> shape) { return py::array(type, std::move(shape)); }
std::vector<py::ssize_t> shape_of(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }

py::array mixer(const py::array& x, const py::array& dw_weight, const std::optional<py::array>& dw_bias,
                const py::array& dw_affine, const py::array& pw_weight, const std::optional<py::array>& pw_bias,
                const py::array& pw_affine, const std::vector<int64_t>& pw_index,
                const std::optional<std::vector<int64_t>>& dw_index, const std::optional<py::array>& pw_coefficients,
                const std::optional<py::array>& pw_gain, const std::string& activation, bool pw_residual, int threads,
                const std::string& isa, bool packed, bool quarters) {
  const auto [s, weights] = read_mixer(x, dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_index,
                                       dw_index, pw_coefficients, pw_gain, activation, pw_residual);
  const DType type = s.type;
  py::array y = new_array(x.dtype(), shape_of(x));
  const Batch batch{x.shape(0), view_of(x, type), x.strides(0) / x.itemsize(), view_of(y, type),
                    y.strides(0) / y.itemsize()};
  const Kernels& kernels = select_kernels(type, isa);
  const Parallel parallel = own_threads(threads);
  py::gil_scoped_release release;
  if (!packed) {
    run_unpacked(kernels, s, weights, batch, parallel);
    return y;
  }
  Network network(kernels, s, s.matrices, quarters ? MatrixForm::kQuarters : MatrixForm::kPanels);
  Workspace memory(network.bytes());
  network.bind(memory.data());
  for (int64_t item = 0; item < network.parameter_items(); ++item) network.pack_parameters(weights, item);
  for (int64_t matrix = 0; matrix < s.matrices; ++matrix) {
    for (int64_t item = 0; item < network.matrix_items(); ++item) network.pack_matrix(weights, matrix, matrix, item);
  }
  run_packed(network, batch, parallel);
  return y;
}

// Forward and backward: (y, dw_stats, pw_stats, [gradients of the nine tensors, None for absent ones]).
py::tuple mixer_gradients(const py::array& grad, const py::array& x, const py::array& dw_weight,
                          const std::optional<py::array>& dw_bias, const py::array& dw_affine,
                          const py::array& pw_weight, const std::optional<py::array>& pw_bias,
                          const py::array& pw_affine, const std::vector<int64_t>& pw_index,
                          const std::optional<std::vector<int64_t>>& dw_index,
                          const std::optional<py::array>& pw_coefficients, const std::optional<py::array>& pw_gain,
                          const std::string& activation, bool pw_residual, std::optional<float> eps, bool checkpoint,
                          int threads, const std::string& isa) {
  const auto [s, weights] = read_mixer(x, dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_index,
                                       dw_index, pw_coefficients, pw_gain, activation, pw_residual);
  if (type_of(grad, "grad") != s.type || shape_of(grad) != shape_of(x)) {
    throw py::value_error("grad: expected the shape and dtype of x");
  }
  for (int i = 0; i < 4; ++i) {
    if (grad.strides(i) % grad.itemsize()) throw py::value_error("grad: expected strides of whole elements");
  }
  if (x.shape(0) < 1) throw py::value_error("x: expected at least one image");
  const py::ssize_t depth = s.depth;
  const auto floats = py::dtype::of<float>();
  auto data = [](py::array& a) { return static_cast<char*>(a.mutable_data()); };
  py::array y = new_array(x.dtype(), shape_of(x));
  py::array dw_stats = new_array(floats, {eps ? depth : 0, 2, x.shape(1)}),
            pw_stats = new_array(floats, shape_of(dw_stats));
  py::list grads;
  std::vector<char*> to;
  for (const std::optional<py::array>& t :
       {std::optional(x), std::optional(dw_weight), dw_bias, std::optional(dw_affine), std::optional(pw_weight),
        pw_bias, std::optional(pw_affine), pw_coefficients, pw_gain}) {
    to.push_back(nullptr);
    if (!t) {
      grads.append(py::none());
      continue;
    }
    py::array gradient = new_array(t->dtype(), shape_of(*t));
    to.back() = data(gradient);
    std::memset(to.back(), 0, gradient.nbytes());
    grads.append(gradient);
  }
  auto as_floats = [&](int i) { return reinterpret_cast<float*>(to[i]); };
  const int64_t tokens = x.shape(0) * x.shape(2) * x.shape(3), kept = checkpoint ? 1 : 2;
  std::vector<char> saved(saved_elements(s, kept, tokens) * size_of(s.type));
  const TrainingCall call{s,
                          weights,
                          x.shape(0),
                          view_of(x, s.type),
                          x.strides(0) / x.itemsize(),
                          eps,
                          reinterpret_cast<float*>(data(dw_stats)),
                          reinterpret_cast<float*>(data(pw_stats)),
                          kept,
                          saved.data()};
  const auto gradient_of_x = grads[0].cast<py::array>();
  const MixerGradients out{view_of(gradient_of_x, s.type),
                           gradient_of_x.strides(0) / x.itemsize(),
                           to[1],
                           to[2],
                           as_floats(3),
                           to[4],
                           to[5],
                           as_floats(6),
                           as_floats(7),
                           as_floats(8)};
  const Kernels& kernels = select_training_kernels(s.type, isa);
  const Parallel parallel = own_threads(threads);
  {
    py::gil_scoped_release release;
    train_forward(kernels, call, view_of(y, s.type), y.strides(0) / y.itemsize(), parallel);
    train_backward(kernels, call, view_of(grad, s.type), grad.strides(0) / grad.itemsize(), out, parallel);
  }
  return py::make_tuple(y, dw_stats, pw_stats, grads);
}

py::array_t<float> activate(const std::string& activation, const py::array_t<float, py::array::c_style>& x,
                            const std::string& isa) {
  const Kernels& kernels = select_kernels(DType::kFloat32, isa);
  const int64_t count = x.size();
  std::vector<float> padded(x.data(), x.data() + count);
  padded.resize(round_up(count, kernels.lanes));
  kernels.activate(activation_of(activation), padded.data(), padded.data(), int64_t(padded.size()));
  py::array_t<float> y(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  std::copy_n(padded.data(), count, y.mutable_data());
  return y;
}

py::dict features() {
  const CpuFeatures& cpu = cpu_features();
  py::dict d;
  d["vendor"] = cpu.vendor;
  d["avx2_fma"] = cpu.avx2_fma;
  d["avx512"] = cpu.avx512;
  d["avx512_bf16"] = cpu.avx512_bf16;
  d["amx_bf16"] = cpu.amx_bf16;
  d["isas"] = available_isas();
  d["float32_kernels"] = select_kernels(DType::kFloat32, "").name;
  d["bfloat16_kernels"] = select_kernels(DType::kBFloat16, "").name;
  return d;
}

py::dict measure_peaks(int threads, double seconds) {
  const Parallel parallel = own_threads(threads);
  const std::vector<std::string> isas = available_isas();
  py::dict d;
  d["float32_gflops"] = measure_gflops(select_kernels(DType::kFloat32, ""), parallel, seconds / 3);
  // The processor's own bf16 instructions where it has some, whether or not the kernels use them.
  d["bfloat16_gflops"] = measure_gflops(select_kernels(DType::kBFloat16, isas.back()), parallel, seconds / 3);
  d["copy_gbps"] = measure_copy_gbps(parallel, seconds / 3);
  return d;
}

double multiply_add_rate(int threads, double seconds) {
  return measure_gflops(select_kernels(DType::kFloat32, ""), own_threads(threads), seconds, 1);
}

py::list packing_plan(const std::vector<int64_t>& pw_index, int64_t slots) {
  for (int64_t index : pw_index) {
    if (index < 0) throw py::value_error("pw_index: out of range");
  }
  const PackingPlan plan = plan_packing(pw_index, slots);
  py::list segments;
  for (const Segment& segment : plan.segments) {
    py::list packings;
    for (const Segment::Packing& p : segment.packings) packings.append(py::make_tuple(p.matrix, p.slot));
    const auto begin = plan.slot_of_block.begin();
    segments.append(py::make_tuple(segment.first_block, segment.last_block, packings,
                                   std::vector<int64_t>(begin + segment.first_block, begin + segment.last_block)));
  }
  return segments;
}

}  // namespace
}  // namespace spin

PYBIND11_MODULE(spin_runtime, m) {
  using namespace py::literals;
  m.doc() = "The CPU kernels of spin_kernels for NumPy arrays; bfloat16 is passed as the bits in uint16.";
  m.def("cpu_features", &spin::features,
        "Instruction sets of this processor and the kernels that are chosen for them.");
  m.def("measure_peaks", &spin::measure_peaks, "threads"_a, "seconds"_a = 1.0,
        "Multiply-add rates in registers (GFLOP/s) and copy bandwidth (GB/s, read plus written).");
  m.def("multiply_add_rate", &spin::multiply_add_rate, "threads"_a, "seconds"_a = 0.1,
        "The mean rate of float32 multiply-adds in registers (GFLOP/s) from now on for `seconds`: what a machine that "
        "others use too leaves of its peak.");
  m.def("mixer", &spin::mixer, "x"_a, "dw_weight"_a, "dw_bias"_a, "dw_affine"_a, "pw_weight"_a, "pw_bias"_a,
        "pw_affine"_a, "pw_index"_a, py::kw_only(), "dw_index"_a = py::none(), "pw_coefficients"_a = py::none(),
        "pw_gain"_a = py::none(), "activation"_a = "gelu", "pw_residual"_a = false, "threads"_a = 1, "isa"_a = "",
        "packed"_a = false, "quarters"_a = false,
        "shared_mixer_block on contiguous weights; packed=True runs from weights that were all packed first, with "
        "quarters=True as those of a whole frozen network are.");
  m.def("mixer_gradients", &spin::mixer_gradients, "grad"_a, "x"_a, "dw_weight"_a, "dw_bias"_a, "dw_affine"_a,
        "pw_weight"_a, "pw_bias"_a, "pw_affine"_a, "pw_index"_a, py::kw_only(), "dw_index"_a = py::none(),
        "pw_coefficients"_a = py::none(), "pw_gain"_a = py::none(), "activation"_a = "gelu", "pw_residual"_a = false,
        "eps"_a = py::none(), "checkpoint"_a = false, "threads"_a = 1, "isa"_a = "",
        "Forward and backward of the mixer; with eps the statistics are the batch's. (y, dw_stats, pw_stats, gradients "
        "of "
        "x, dw_weight, dw_bias, dw_affine, pw_weight, pw_bias, pw_affine, pw_coefficients, pw_gain).");
  m.def("activate", &spin::activate, "activation"_a, "x"_a, "isa"_a = "", "An activation function, elementwise.");
  m.def("packing_plan", &spin::packing_plan, "pw_index"_a, "slots"_a,
        "Segments (first block, last block, [(matrix, slot)], slot of each block) with at most `slots` slots if "
        "possible.");
  spin::define_weights(m);
}
