// NumPy arrays as raw pointers, and threads of spin_runtime's own.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <thread>
#include <vector>

#include "../core/team.h"
#include "../core/types.h"

namespace spin {
namespace py = pybind11;

inline Parallel own_threads(int threads) {
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
  return {threads, [](int threads, const std::function<void(int)>& body) {
            std::vector<std::thread> others;
            for (int i = 1; i < threads; ++i) others.emplace_back(body, i);
            body(0);
            for (std::thread& thread : others) thread.join();
          }};
}

// float32, or bf16 as uint16, or float16.
inline DType type_of(const py::array& array, const char* name) {
  if (array.dtype().is(py::dtype::of<float>())) return DType::kFloat32;
  if (array.dtype().is(py::dtype::of<uint16_t>())) return DType::kBFloat16;
  if (array.dtype().is(py::dtype("float16"))) return DType::kFloat16;
  throw py::type_error(std::string(name) + ": expected float32, float16 or uint16 (the bits of bfloat16)");
}

inline const char* data_of(const py::array& array, DType type, std::vector<py::ssize_t> shape, const char* name) {
  if (type_of(array, name) != type) throw py::type_error(std::string(name) + ": expected the dtype of x");
  if (!(array.flags() & py::array::c_style)) throw py::value_error(std::string(name) + ": expected a contiguous array");
  if (std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()) != shape) {
    throw py::value_error(std::string(name) + ": its shape does not fit the other arguments");
  }
  return static_cast<const char*>(array.data());
}
inline const char* data_of(const std::optional<py::array>& array, DType type, std::vector<py::ssize_t> shape,
                           const char* name) {
  return array ? data_of(*array, type, std::move(shape), name) : nullptr;
}

// What compose_superweights and repeat_weight are made of (weights.cpp).
void define_weights(py::module_& m);

}  // namespace spin
